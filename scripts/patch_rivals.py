"""What `patch_language_model.py` is compared with: other libraries' attributions of the same heads, gates and prompts.

    pip install captum                      # integrated gradients
    pip install transformer_lens nnsight    # attribution patching, with --peers

Every rival gives weights [examples, components] in the sign of hf_coar, how much replacing a component takes from the
output, and its cost in forward passes, a forward and backward pass being three.
"""

import copy
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import hf_coar as coar
from hf_coar.data import Batch
from hf_coar.models.outputs import IGNORED_LABEL

Weights = tuple[Tensor, float]
STEPS = {"to 0": (5, 20), "to 1 − 2a": (2,)}  # of integrated gradients; more change nothing on the short way
INTEGRATED, TRANSFORMER_LENS, NNSIGHT = "integrated gradients", "TransformerLens", "nnsight"
PEERS = ("transformer_lens", "nnsight")


def missing(packages: Sequence[str]) -> list[str]:
    """Those that are not installed."""
    return [name for name in packages if importlib.util.find_spec(name) is None]


def integrated_gradients(
    model: nn.Module, data: Any, components: coar.Components, fraction: float
) -> dict[str, Callable[[], Weights]]:
    """captum's, along all gates at once: to 0 (as in EAP-IG, AutoCircuit) and as far as twice the fraction."""
    import benchmark_rivals

    task = benchmark_rivals.Task(model, data, components, "answer_difference", fraction, 0)
    ends = {"to 0": 0.0, "to 1 − 2a": 1 - 2 * fraction}

    def run(to: float, steps: int) -> Weights:
        return benchmark_rivals.integrated(task, to, steps), 3.0 * steps

    return {
        f"{INTEGRATED} {name}, {steps} steps": lambda to=to, steps=steps: run(to, steps)
        for name, to in ends.items()
        for steps in STEPS[name]
    }


def attribution_patching(
    model: nn.Module, clean: Batch, corrupt: Batch, components: coar.Components, packages: Sequence[str]
) -> dict[str, Callable[[], Weights]]:
    """That of the packages, of all heads; what they need to wrap the model is made here, outside of what is timed."""
    found: dict[str, Callable[[], Weights]] = {}
    if "transformer_lens" in packages:
        bridge = _bridge(model)
        found[f"{TRANSFORMER_LENS} attribution_patch"] = lambda: _of_lens(bridge, clean, corrupt, True)
        found[f"{TRANSFORMER_LENS}, clean and corrupted swapped"] = lambda: _of_lens(bridge, clean, corrupt, False)
    if "nnsight" in packages:
        import nnsight

        traced = nnsight.NNsight(model)
        found[f"{NNSIGHT}, gradient in a trace"] = lambda: _of_trace(traced, clean, corrupt, components)
    return found


# ------------------------------------------------------------------------------------------------------ TransformerLens


def _bridge(model: nn.Module) -> Any:
    """The model that TransformerLens wraps: a copy, for it changes modules; nothing is asked of the Hub."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    folder = model.config.name_or_path
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TransformerBridge.boot_transformers(folder, hf_model=copy.deepcopy(model), tokenizer=tokenizer)


def _of_lens(bridge: Any, clean: Batch, corrupt: Batch, restoring: bool) -> Weights:
    """One example after the other, as it goes through them itself, here without padding.

    Args:
        bridge: the model.
        clean: prompts with answers and foils.
        corrupt: their partners.
        restoring: the gradient is that of the corrupted prompt, as it defines it; else the prompts change places, and
            the gradient is that of the clean one, with the sign turned.
    """
    from transformer_lens.tools.analysis import attribution_patching as lens

    rows = []
    for example, (place, answer, foil) in enumerate(answers_of(clean)):
        length = int(clean["attention_mask"][example].sum())
        pair = [batch["input_ids"][example : example + 1, :length] for batch in (clean, corrupt)]

        def difference(logits: Tensor, place: int = place, answer: int = answer, foil: int = foil) -> Tensor:
            return logits[0, place, answer] - logits[0, place, foil]

        scores = lens.attribution_patch(bridge, *(pair if restoring else pair[::-1]), difference).node_scores
        heads = torch.zeros(bridge.cfg.n_layers, bridge.cfg.n_heads)
        for node, score in scores.items():
            if node.kind == "attn_head_out":
                heads[node.layer, node.head] += score if restoring else -score
        rows.append(heads.flatten())
    return torch.stack(rows), 4.0


def answers_of(batch: Batch) -> list[tuple[int, int, int]]:
    """(position that predicts it, answer, foil) of every example, for answers of one token."""
    places = (batch["labels"] != IGNORED_LABEL).int().argmax(1)
    tokens = [batch[name].gather(1, places[:, None])[:, 0].tolist() for name in ("labels", "foil_labels")]
    return list(zip((places - 1).tolist(), *tokens, strict=True))


# -------------------------------------------------------------------------------------------------------------- nnsight


def _of_trace(traced: Any, clean: Batch, corrupt: Batch, components: coar.Components) -> Weights:
    """Two traces and the gradient to what goes into the output projections, as its tutorial on attribution patching."""
    layers, heads = traced.model.layers, components.groups[0].size
    given = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in (clean, corrupt)]
    with torch.no_grad(), traced.trace(**given[1]):
        corrupted = list().save()  # noqa: C408 (nnsight's own way to keep a list)
        for layer in layers:
            corrupted.append(layer.self_attn.o_proj.input)
    with traced.trace(**given[0]):
        ours = list().save()  # noqa: C408
        for layer in layers:
            ours.append(layer.self_attn.o_proj.input)
        logits = traced.output.logits.save()
    wanted = torch.tensor(answers_of(clean))
    examples = torch.arange(len(wanted))
    chosen = [logits[examples, wanted[:, 0], wanted[:, column]] for column in (1, 2)]
    slopes = torch.autograd.grad((chosen[0] - chosen[1]).sum(), ours)
    parts = zip(ours, corrupted, slopes, strict=True)
    by_head = [((a - b) * slope).detach().unflatten(-1, (heads, -1)).sum((1, 3)) for a, b, slope in parts]
    return torch.cat(by_head, 1), 4.0


def as_attributions(reference: coar.Attributions, weights: Tensor) -> coar.Attributions:
    """A rival's weights as attributions: with nothing replaced, they predict the output itself."""
    unablated = reference.bias.double() + reference.weights.double().sum(1)
    bias = (unablated - weights.double().sum(1)).float()
    return coar.Attributions(
        weights.float(), bias, None, reference.components, reference.identity, reference.provenance
    )
