"""Loading: a data set of `datasets` with the preprocessing that belongs to a model."""

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar.data.batches import Batch
from hf_coar.data.examples import Examples
from hf_coar.errors import CoarError, DataError
from hf_coar.models import library, record
from hf_coar.storage import hub


def load_data(
    name: str | Path,
    model: nn.Module,
    split: str | None = None,
    revision: str | None = None,
    batch_size: int = 32,
    streaming: bool = False,
    max_length: int = 512,
) -> Examples:
    """A data set of `datasets` with the preprocessing that belongs to the model.

    Args:
        name: Hub id, a folder (of Parquet, CSV, JSON lines or images, or saved by `save_to_disk`) or one such file.
        model: made by `load_model`; its id tells the image processor or tokenizer.
        split: such as `"validation[:2000]"`; the only one there is by default.
        revision: branch, tag or commit on the Hub.
        batch_size: examples a batch.
        streaming: read while running instead of downloading first.
        max_length: tokens at which texts are cut.

    Raises:
        DataError: no such data set or split, no column that the model could read, or no labels for a classifier.
    """
    commit = None if Path(name).exists() else hub.resolve_commit(str(name), revision, "dataset")
    dataset = _load_dataset(str(name), split, commit or revision, streaming)
    columns = _columns(dataset)
    if columns["image"]:
        prepare = _image_preparation(model, columns)
    elif columns["text"]:
        prepare = _text_preparation(model, columns, max_length)
    else:
        raise DataError(
            f"{name!r} has the columns {sorted(dataset.features or {})}, none of them images or texts; build batches "
            "of tensors yourself and pass a list or a DataLoader"
        )
    description = {"id": str(name), "split": split, "revision": commit or _cached_commit(dataset) or revision}
    description["fingerprint"] = getattr(dataset, "_fingerprint", None)
    if not columns["image"]:
        description["max_length"] = max_length
    if streaming and columns["image"]:
        # A stream that fails while it decodes is over; left to `prepare`, a bad image costs one example.
        dataset = dataset.cast_column(columns["image"], _undecoded(dataset.features[columns["image"]]))
    return Examples(dataset, prepare, batch_size, description)


def _undecoded(feature: Any) -> Any:
    feature = copy.copy(feature)
    feature.decode = False
    return feature


def _decoded(image: Any) -> Any:
    """An image that its data set left undecoded (a mapping of bytes and path), or any other one as it is."""
    if not isinstance(image, Mapping):
        return image
    from datasets import Image

    return Image().decode_example(image)


def _cached_commit(dataset: Any) -> str | None:
    """The commit of a data set of the Hub, without asking the Hub: the folder in the cache is named after it."""
    found = [Path(file["filename"]).parent.name for file in getattr(dataset, "cache_files", None) or ()]
    return found[0] if found and re.fullmatch(r"[0-9a-f]{40}", found[0]) else None


def _load_dataset(name: str, split: str | None, revision: str | None, streaming: bool) -> Any:
    import datasets

    path = Path(name)
    kinds = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}
    try:
        if path.is_dir() and any((path / f).exists() for f in ("dataset_info.json", "dataset_dict.json", "state.json")):
            dataset = datasets.load_from_disk(name)
            dataset = dataset[split] if split else dataset
        elif path.is_file() and path.suffix in kinds:
            files = {"data_files": name, "streaming": streaming}
            dataset = _load_split(datasets, kinds[path.suffix], split or "train", files)
        else:
            options = {"revision": revision, "streaming": streaming}
            dataset = _load_split(datasets, name, split, options)
    except DataError:
        raise
    except Exception as error:  # datasets raises a family of its own over OSError, ValueError, KeyError …
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DataError(f"no data set {name!r} (split {split!r}): {first}") from error
    if isinstance(dataset, dict):
        if len(dataset) != 1:
            raise DataError(f"{name!r} has the splits {sorted(dataset)}; choose one, such as split={min(dataset)!r}")
        dataset = next(iter(dataset.values()))
    return dataset


def _load_split(datasets: Any, name: str, split: str | None, options: dict) -> Any:
    """`datasets.load_dataset`, with slices such as `train[10:50]` for streams too, which it does not take itself."""
    slice_of = re.fullmatch(r"(\w+)\[(\d*):(\d*)\]", split or "")
    if not (options.get("streaming") and slice_of):
        return datasets.load_dataset(name, split=split, **options)
    split, start, stop = slice_of.groups()
    dataset = datasets.load_dataset(name, split=split, **options).skip(int(start or 0))
    return dataset.take(int(stop) - int(start or 0)) if stop else dataset


def _columns(dataset: Any) -> dict[str, str | None]:
    """Which column holds images, texts and labels, by type first and by the usual name second."""
    features = dict(dataset.features or {})
    types = {name: type(feature).__name__ for name, feature in features.items()}
    images = [name for name, kind in types.items() if kind == "Image"]
    integers = [name for name, feature in features.items() if str(getattr(feature, "dtype", "")).startswith("int")]
    labels = [name for name, kind in types.items() if kind == "ClassLabel"]
    labels += [name for name in ("label", "labels", "target", "fine_label") if name in integers]
    texts = [name for name, feature in features.items() if getattr(feature, "dtype", "") in ("string", "large_string")]
    texts = [name for name in ("text", "sentence", "content") if name in texts] or texts
    first = {"image": images, "text": texts, "label": labels}
    return {kind: names[0] if names else None for kind, names in first.items()}


def _image_preparation(model: nn.Module, columns: Mapping[str, str | None]) -> Callable[[list[dict]], Batch]:
    if columns["label"] is None:
        raise DataError("the data set has images and no labels (a ClassLabel or an integer column 'label'); add one")
    if library(model) == "timm":
        transform = _timm_transform(model)
    else:
        transform = _processor_transform(model)
    image, label = columns["image"], columns["label"]

    def prepare(examples: list[dict]) -> Batch:
        pixels = torch.stack([transform(_decoded(example[image])) for example in examples])
        return {"pixel_values": pixels, "labels": torch.tensor([example[label] for example in examples])}

    return prepare


def _timm_transform(model: nn.Module) -> Callable[[Any], Tensor]:
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    mode = {1: "L", 3: "RGB"}.get(config["input_size"][0])
    return lambda image: transform(image.convert(mode) if mode else image)


def _processor_transform(model: nn.Module) -> Callable[[Any], Tensor]:
    from transformers import AutoImageProcessor

    processor = _from_model(AutoImageProcessor, model, "image processor")
    return lambda image: processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


def _text_preparation(
    model: nn.Module, columns: Mapping[str, str | None], max_length: int
) -> Callable[[list[dict]], Batch]:
    from transformers import AutoTokenizer

    tokenizer = _from_model(AutoTokenizer, model, "tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere, so any token serves
    classifies = "SequenceClassification" in type(model).__name__
    text, label = columns["text"], columns["label"]
    if classifies and label is None:
        raise DataError("the data set has texts and no labels, and the model is a classifier; add a 'label' column")

    def prepare(examples: list[dict]) -> Batch:
        texts = [example[text] for example in examples]
        tokens = tokenizer(texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
        batch = {name: tokens[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in tokens}
        if classifies:
            batch["labels"] = torch.tensor([example[label] for example in examples])
        return batch

    return prepare


def _from_model(loader: Any, model: nn.Module, what: str) -> Any:
    source = record(model)
    if source["id"] is None:
        raise CoarError(f"the model has no id or folder to load its {what} from; use coar.load, or batches of tensors")
    try:
        return loader.from_pretrained(source["id"], revision=source["revision"], trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"no {what} is saved with {source['id']!r}; build batches of tensors yourself") from error
