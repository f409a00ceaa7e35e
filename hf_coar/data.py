"""Data: anything that can be iterated again, as batches of tensors whose first axis is the example."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar.errors import CoarError, DataError
from hf_coar.models import library, record

Batch = dict[str, Tensor]


@dataclass
class Examples:
    """A data set with the preprocessing of a model: iterating yields batches, every time from the start.

    Attributes:
        dataset: a `datasets.Dataset` or `IterableDataset` of raw examples.
        prepare: turns a list of raw examples into a batch of tensors.
        batch_size: examples a batch; changes speed only.
        description: id, split and fingerprint: what goes into an attribution's `config.json`.
    """

    dataset: Any
    prepare: Callable[[list[dict]], Batch]
    batch_size: int = 32
    description: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Batch]:
        """Batches, in the order of the data set."""
        for rows in _chunks(self.dataset, self.batch_size):
            yield self.prepare(rows)

    def __len__(self) -> int:
        """How many batches.

        Raises:
            TypeError: the data set is a stream of unknown length.
        """
        return -(-len(self.dataset) // self.batch_size)

    def with_batch_size(self, batch_size: int) -> "Examples":
        """The same examples in batches of another size."""
        return Examples(self.dataset, self.prepare, batch_size, self.description)

    def select(self, indices: Iterable[int]) -> "Examples":
        """A part of the examples, by index, in the order given."""
        indices = [int(index) for index in indices]
        chosen = {**self.description, "selected": indices}
        return Examples(self.dataset.select(indices), self.prepare, self.batch_size, chosen)


def _chunks(rows: Iterable[dict], size: int) -> Iterator[list[dict]]:
    chunk = []
    for row in rows:
        chunk.append(row)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def batches(data: Any, batch_size: int | None = None) -> Iterable[Batch]:
    """What `attribute` and `evaluate` take, seen as batches.

    `Examples` and raw `datasets` objects are cut into batches of `batch_size` (32 by default; their columns must hold
    numbers or tensors); a `DataLoader`, a list or any other iterable already yields batches, mappings of tensors or
    pairs (inputs, labels).

    Raises:
        DataError: data that cannot be iterated again, such as a generator.
    """
    if isinstance(data, Examples):
        return data.with_batch_size(batch_size) if batch_size else data
    if type(data).__module__.split(".")[0] == "datasets":
        return Examples(data, _collate, batch_size or 32, {"fingerprint": getattr(data, "_fingerprint", None)})
    if not hasattr(data, "__iter__") or isinstance(data, Iterator):
        raise DataError(
            f"data is a {type(data).__name__}, which cannot be iterated again; "
            "give a datasets.Dataset, a DataLoader, or a list of batches"
        )
    return data


def _collate(rows: list[dict]) -> Batch:
    from torch.utils.data import default_collate

    try:
        columns = default_collate(rows)
    except (TypeError, RuntimeError) as error:
        raise DataError(
            f"the data set's columns {sorted(rows[0])} cannot be stacked into tensors ({error}); "
            "use coar.load, or give the data set a transform that yields tensors of one shape"
        ) from error
    return {name: value for name, value in columns.items() if isinstance(value, Tensor)}


def as_batch(item: Any) -> Batch:
    """One item of a data set as a checked batch.

    Raises:
        DataError: not a mapping (or pair) of tensors that agree on the number of examples.
    """
    if isinstance(item, tuple | list) and len(item) == 2:
        item = {"inputs": item[0], "labels": item[1]}
    if not isinstance(item, Mapping):
        raise DataError(
            f"the data yielded a {type(item).__name__}; expected batches: mappings of tensors such as "
            "{'pixel_values': …, 'labels': …}, or pairs (inputs, labels)"
        )
    batch = {"labels" if name == "label" else name: value for name, value in item.items() if isinstance(value, Tensor)}
    sizes = {name: value.shape[0] if value.dim() else None for name, value in batch.items()}
    if not batch or len(set(sizes.values())) != 1 or None in sizes.values() or 0 in sizes.values():
        raise DataError(
            f"a batch must hold tensors with the same first axis, at least one example; got {sizes or sorted(item)}"
        )
    return batch


def size(batch: Mapping[str, Tensor]) -> int:
    """How many examples a batch holds."""
    return next(iter(batch.values())).shape[0]


def rows(batch: Mapping[str, Tensor], start: int, stop: int) -> Batch:
    """Examples start … stop - 1 of a batch."""
    return {name: value[start:stop] for name, value in batch.items()}


def to_device(batch: Mapping[str, Tensor], device: torch.device) -> Batch:
    """The batch on a device."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


@dataclass(frozen=True)
class Identity:
    """By what the examples of a run are known again.

    Attributes:
        signatures: float64 [examples], see `signatures`.
        labels: int64 [examples]; -1 where there is no label of the whole example.
    """

    signatures: Tensor
    labels: Tensor

    @classmethod
    def of(cls, results: Mapping[str, Tensor]) -> "Identity":
        """From the results of a run."""
        return cls(results["signatures"], results["labels"])

    def check(self, other: "Identity") -> None:
        """Raises `DataError` unless the other examples are the same, in the same order."""
        ours, theirs = self.signatures, other.signatures
        if len(ours) != len(theirs):
            raise DataError(f"the data hold {len(theirs)} examples, and the attributions are of {len(ours)}")
        differing = (ours - theirs).abs() > _SIGNATURE_TOLERANCE * (1 + ours.abs())
        if differing.any():
            first = int(differing.nonzero()[0])
            raise DataError(
                f"{int(differing.sum())} of {len(ours)} examples are not those that were attributed, the first one is "
                f"example {first}; give the same data set, split and order (no shuffling)"
            )


_SIGNATURE_TOLERANCE = 1e-3


def identity(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The `signatures` and `labels` of a batch."""
    labels = batch.get("labels")
    if labels is None or labels.dim() != 1 or labels.is_floating_point():
        labels = torch.full((size(batch),), -1)
    return {"signatures": signatures(batch), "labels": labels.detach().cpu().long()}


def signatures(batch: Mapping[str, Tensor]) -> Tensor:
    """One number an example, float64 [examples]; not a hash, so that it survives the rounding of a resized image.

    The sum over the inputs of a weighted mean, in which padding does not count.
    """
    real = batch.get("attention_mask")
    total = torch.zeros(size(batch), dtype=torch.float64)
    for name, value in batch.items():
        if name in ("attention_mask", "labels"):
            continue
        flat = value.detach().cpu().double().flatten(1)
        if real is not None and real.shape == value.shape:
            flat = flat * real.detach().cpu().double()
        # Weights that differ by position, so that permuted pixels or tokens do not cancel.
        weights = torch.cos(torch.arange(flat.shape[1], dtype=torch.float64) * 0.1) + 1.5
        total += (flat * weights).sum(1) / (flat.abs().sum(1) + 1.0)
    return total


def describe(data: Any) -> dict[str, Any]:
    """What is known of a data set: id, split, fingerprint."""
    return dict(getattr(data, "description", {}) or {})


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
    dataset = _load_dataset(str(name), split, revision, streaming)
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
    description = {"id": str(name), "split": split, "revision": revision}
    description["fingerprint"] = getattr(dataset, "_fingerprint", None)
    return Examples(dataset, prepare, batch_size, description)


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
        pixels = torch.stack([transform(example[image]) for example in examples])
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
        return loader.from_pretrained(source["id"], revision=source["revision"])
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"no {what} is saved with {source['id']!r}; build batches of tensors yourself") from error
