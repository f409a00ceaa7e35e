"""No pass waits: nothing looks at a value inside one, for which an accelerator would first finish what is under way."""

import collections
import traceback
from pathlib import Path

import pytest
import timm
import torch
import transformers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import hf_coar as coar
from hf_coar import data
from hf_coar.errors import DataError
from hf_coar.estimators.gates import GateRounds
from hf_coar.estimators.path_gradient import BatchReader
from hf_coar.masking import MaskedModel
from hf_coar.models import outputs
from hf_coar.runs.engine import Part
from hf_coar.runs.measuring import MaskedPasses
from hf_coar.runs.sampling import Masks

LOOKED_AT = tuple(str(Path(package.__file__).parent) for package in (coar, transformers))
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "_unique2"}


class Waits(TorchDispatchMode):
    """Counts operations whose result's value or shape the host has to know, by the file that asked."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_bool = name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])
        if name in WAITS or by_bool:
            frames = [frame for frame in traceback.extract_stack() if frame.name != "__torch_function__"]
            files = [frame.filename for frame in frames]
            ours = [file.split("/")[-1] for file in files if file.startswith(LOOKED_AT)]
            if ours[-1] != "masking_utils.py":  # transformers' own look at masks and positions, once a forward
                self.found[ours[-1]] += 1
        return func(*args, **(kwargs or {}))


def resnet():
    model = timm.create_model("resnet18", num_classes=10).eval()
    return model, {"x": torch.randn(2, 3, 32, 32), "labels": torch.tensor([0, 1])}, "margin"


def vit():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10).eval()
    return model, {"x": torch.randn(3, 3, 32, 32), "labels": torch.tensor([0, 1, 2])}, "log_prob"


def gpt2():
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=100, **ends)
    tokens = torch.randint(0, 100, (3, 9))
    return transformers.GPT2LMHeadModel(config).eval(), {"input_ids": tokens}, "token_margin"


def bert():
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=100, **sizes)).eval()
    tokens = torch.randint(0, 100, (3, 9))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens.clone()}
    return model, batch, coar.outputs.get("token_log_prob")


@pytest.mark.parametrize("case", [resnet, vit, gpt2, bert])
def test_nothing_waits_in_a_pass(case):
    torch.manual_seed(0)
    model, batch, output = case()
    model.requires_grad_(False)
    masked, output = MaskedModel(model, coar.find_components(model)), outputs.get(output)
    examples = list(range(len(next(iter(batch.values())))))
    rounds = GateRounds(masked, output, 0.1, seed=0)
    rounds.round(batch, examples, 0)
    with Waits() as waits:
        rounds.round(batch, examples, 1)
    assert rounds.blocks == 5 and not waits.found
    vars(masked)["across"] = None  # what is stored by columns is gated on CPUs alone, where nothing waits
    passes, part = MaskedPasses(masked, output, Masks(len(masked), 0.05, 8, 0, 0)), Part("masks", 0, 8, 8.0, 8)
    passes.compute(batch, 0, part)
    with Waits() as waits:
        passes.compute(batch, 0, part)
    assert waits.found == {"measuring.py": 1}


class Listed(TorchFunctionMode):
    """Counts values taken by lists of Python, which are copied to the device first: it finishes what is under way."""

    found = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("__getitem__", "__setitem__"):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found += any(isinstance(place, list) for place in places)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_between_rounds():
    torch.manual_seed(0)
    model, batch, output = gpt2()
    model.requires_grad_(False)
    masked, output = MaskedModel(model, coar.find_components(model)), outputs.get(output)
    reader = BatchReader(coar.PathGradient(), GateRounds(masked, output, 0.1, seed=0), data.as_batch(batch), 0)
    assert reader.method.max_outliers
    reader.next_round()
    with Waits() as waits, Listed() as listed:
        for _ in range(2):
            reader.next_round()
    assert not waits.found and not listed.found
    reader._rows = [0, 2]
    with listed:
        reader.next_round()
    assert listed.found == 1 and reader.sums.rounds.tolist() == [4, 3, 4]


def test_what_is_written_to_a_batch_is_looked_at_again():
    logits, batch = torch.randn(2, 5), {"labels": torch.tensor([0, 4])}
    margin = outputs.get("margin")
    margin(logits, batch)
    with Waits() as waits:
        margin(logits, batch)
    assert not waits.found
    with pytest.raises(DataError, match="from 0 to 4, and the model has 3 classes"):
        margin(logits[:, :3], batch)
    batch["labels"][0] = 7
    for _ in range(2):
        with pytest.raises(DataError, match="from 4 to 7"):
            margin(logits, batch)


def test_a_mask_of_another_batch_is_looked_at():
    logits, tokens = torch.randn(1, 4, 9), torch.tensor([[1, 2, 3, 4]])
    margin = outputs.get("token_margin")
    margin(logits, {"input_ids": tokens, "attention_mask": torch.ones(1, 4, dtype=torch.int64)})
    with pytest.raises(DataError, match=r"examples \[0\] of the batch have no real next token"):
        margin(logits, {"input_ids": tokens, "attention_mask": torch.tensor([[1, 0, 0, 0]])})
