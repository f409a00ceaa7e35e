"""Data sets of `datasets`: read from the Hub, a folder or a file; what is in their columns; drawn from."""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_coar.data import nested, written
from hf_coar.data.columns import Table
from hf_coar.data.streams import beginning
from hf_coar.errors import DataError, is_count
from hf_coar.models.quiet import without_bars, without_errors

logger = logging.getLogger(__name__)

FILES = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".txt": "text"}
_NO_ROWS = "there are no rows in it"
_PEEKED = 64  # first examples that are looked at before a run
_QUICK = 10**8  # bytes: smaller files are read in no time
_HEAD = 10_000  # letters of the first line of a table
_SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")  # by which `save_to_disk` is known


def is_object(data: Any) -> bool:
    """Whether data are given by an object, of `datasets` or a table, rather than by where they are."""
    return not isinstance(data, str | Path)


def _as_dataset(data: Any) -> Any:
    """An object of `datasets`; a table of pandas, Polars or PyArrow, rows or columns as Python has them become one.

    Raises:
        DataError: none of these.
    """
    from datasets import Dataset

    of = type(data).__module__.split(".")[0]
    splits = list(data.values()) if isinstance(data, dict) else []
    if of == "datasets" or (splits and all(type(split).__module__.split(".")[0] == "datasets" for split in splits)):
        return data
    try:
        if of == "pandas" and type(data).__name__ == "DataFrame":
            return Dataset.from_pandas(data, preserve_index=False)
        if of == "polars" and type(data).__name__ == "DataFrame":
            return Dataset.from_polars(data)
        if of == "pyarrow" and type(data).__name__ == "Table":
            return Dataset(data)
        if isinstance(data, list | tuple) and data and all(isinstance(row, dict) for row in data):
            return Dataset.from_list(list(data))
        if isinstance(data, dict) and data and all(isinstance(one, list | tuple | np.ndarray) for one in data.values()):
            return Dataset.from_dict(data)
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's errors are among them
        raise DataError(f"the {type(data).__name__} given cannot be read as a table: {_reason(error)}") from error
    raise DataError(
        f"data is a {type(data).__name__}; give a Hub id, a folder, a file, a data set of `datasets`, a DataFrame or a "
        "list of rows [{'text': …, 'label': …}, …]. Batches of tensors, a DataLoader too, go to attribute as they are"
    )


def given(data: Any, split: str | None) -> Any:
    """A data set that is an object, see `is_object`, or one of the splits of such a one.

    Raises:
        DataError: several splits and none is chosen, no such split, or a split of what has none; no table.
    """
    data = _as_dataset(data)
    if isinstance(data, dict):
        if split is None and len(data) == 1:
            return _plain(next(iter(data.values())))
        return _plain(_part(data, split))
    if split is not None:
        raise DataError(f"split={split!r} of a {type(data).__name__}, which has no splits; give that part of it")
    return _plain(data)


def _part(splits: Mapping[str, Any], split: str | None) -> Any:
    """A split, or parts of some, in the words of `datasets`: `train[:100]`, `train[:50%]+test`.

    Raises:
        DataError: there is no such part.
    """
    from datasets import ReadInstruction, concatenate_datasets

    if split in splits:
        return splits[split]
    why = ""
    if split is not None and not any(is_stream(one) for one in splits.values()):
        try:
            wanted = ReadInstruction.from_spec(split).to_absolute({name: len(one) for name, one in splits.items()})
            parts = [splits[one.splitname].select(range(*_ends(one, splits))) for one in wanted]
            return parts[0] if len(parts) == 1 else concatenate_datasets(parts)
        except ValueError as error:
            why = f" ({_reason(error)})"
    raise DataError(
        f"the data have the splits {sorted(splits)}, and split={split!r}{why}; choose one of them, or a part such as "
        f"'{min(splits)}[:100]'"
    )


def _ends(instruction: Any, splits: Mapping[str, Any]) -> tuple[int, int]:
    """Where a part begins and ends."""
    stop = len(splits[instruction.splitname]) if instruction.to is None else instruction.to
    return instruction.from_ or 0, stop


def _plain(dataset: Any) -> Any:
    """A data set whose rows hold what is in it, not the tensors or frames that somebody wanted to see there."""
    of = getattr(dataset, "format", None)  # streams have none that can be told
    if not of or of["type"] in (None, "custom"):
        return dataset
    seen = dataset.with_format(None)
    return seen if len(of["columns"]) == len(seen.column_names) else seen.select_columns(of["columns"])


def read(name: str, split: str | None, revision: str | None, streaming: bool) -> Any:
    """A data set by Hub id, folder or file.

    Raises:
        DataError: there is none, or it has several splits and none is chosen.
    """
    path = Path(name)
    _check_there(name)
    if path.is_file() and path.suffix.lower() not in FILES:
        raise DataError(f"{name!r} is a file of an unknown kind; known are {', '.join(FILES)}")
    try:
        with without_errors("datasets"):
            dataset = _loaded(name, split, revision, streaming)
    except DataError:
        raise
    except Exception as error:  # datasets raises a family of its own over OSError, ValueError, KeyError …
        why = _reason(error)
        why += told_splits(_counts_of(name, revision)) if why == _NO_ROWS else ""
        raise DataError(f"no data set {name!r} (split {split!r}): {why}") from error
    if isinstance(dataset, dict):
        if len(dataset) != 1:
            best = min(dataset, key=lambda split: (_n_examples(dataset[split]) == 0, split))
            raise DataError(f"{name!r} has the splits {sorted(dataset)}; choose one, such as split={best!r}")
        dataset = next(iter(dataset.values()))
    is_text = dataset.builder_name == "csv"  # of files, folders and the Hub alike
    return written.read_back(dataset) if is_text else nested.unnested(dataset)


def _loaded(name: str, split: str | None, revision: str | None, streaming: bool) -> Any:
    """What `datasets` makes of a Hub id, a folder or a file: all splits, where there are several and none is chosen."""

    path = Path(name)
    if path.is_dir() and any((path / file).exists() for file in _SAVED):
        dataset = _saved(path)
        splits = dataset if isinstance(dataset, dict) else {str(dataset.split or "train"): dataset}
        return _part(splits, split) if split else dataset
    if not path.is_file():
        return _load_split(name, split, {"revision": revision, "streaming": streaming})
    options = {"data_files": name, "streaming": streaming}
    options |= {} if (between := _separator(path)) is None else {"sep": between}
    options |= {} if (field := nested.rows_in(path, _QUICK)) is None else {"field": field}
    with without_bars("datasets") if path.stat().st_size < _QUICK else nullcontext():
        return _load_split(FILES[path.suffix.lower()], split or "train", options)


def _saved(folder: Path) -> Any:
    """What `save_to_disk` wrote; a split without examples, which `datasets` writes and cannot read, is empty again."""
    import datasets

    parts, state = folder / "dataset_dict.json", folder / "state.json"
    if parts.is_file():
        names = json.loads(parts.read_text(encoding="utf-8"))["splits"]
        return datasets.DatasetDict({name: _saved(folder / name) for name in names})
    if not state.is_file() or json.loads(state.read_text(encoding="utf-8")).get("_data_files") != []:
        return datasets.load_from_disk(str(folder))
    features = datasets.DatasetInfo.from_directory(str(folder)).features
    return datasets.Dataset.from_dict({name: [] for name in features}, features=features)


def _separator(path: Path) -> str | None:
    """What stands between the columns of a table in a text file, where it is no comma."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    if path.suffix.lower() != ".csv":
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        head = file.readline(_HEAD)
    found = next((mark for mark in (";", "\t", "|") if "," not in head and mark in head), None)
    if found is not None:
        logger.info("%s has %r between its columns", path.name, found)
    return found


def _reason(error: BaseException) -> str:
    """The first line of what an error began with: what a reader of a file raised, not that there was an error."""
    while error.__cause__ is not None and not isinstance(error, ImportError):  # which says what to install
        error = error.__cause__
    if isinstance(error, UnicodeDecodeError):
        return (
            f"it is no text in UTF-8 (0x{error.object[error.start]:02x} is in it); save it as UTF-8, or give "
            "the table that pandas.read_csv(…, encoding='cp1252') reads, or 'utf-16'"
        )
    said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return _NO_ROWS if said == "StopIteration" or "corresponds to no data" in said else said


def _check_there(name: str) -> None:
    """Raises `DataError` for a path of this machine where there is nothing, before the Hub is asked for it."""
    local = Path(name).suffix.lower() in FILES or name.startswith((".", "/", "~")) or name.count("/") > 1
    if local and not Path(name).exists():
        raise DataError(f"no data set {name!r}: there is no such file or folder here (in {Path.cwd()})")


def _load_split(name: str, split: str | None, options: dict) -> Any:
    """`datasets.load_dataset`, with slices such as `train[10:50]` for streams too, which it does not take itself."""
    import datasets

    slice_of = re.fullmatch(r"(\w+)\[(\d*):(\d*)\]", split or "")
    if not (options.get("streaming") and slice_of):
        return datasets.load_dataset(name, split=split, **options)
    split, start, stop = slice_of.groups()
    dataset = datasets.load_dataset(name, split=split, **options).skip(int(start or 0))
    return dataset.take(int(stop) - int(start or 0)) if stop else dataset


def cached_commit(dataset: Any) -> str | None:
    """The commit of a data set of the Hub, without asking the Hub: the folder in the cache is named after it."""
    found = [Path(file["filename"]).parent.name for file in getattr(dataset, "cache_files", None) or ()]
    return found[0] if found and re.fullmatch(r"[0-9a-f]{40}", found[0]) else None


def check_some(dataset: Any, first: Sequence[Any], data: Any, split: str | None) -> None:
    """Raises `DataError` for a data set without examples, which says what splits there are instead, where it is known.

    Args:
        dataset: that was chosen, of `datasets`.
        first: its first examples; of a stream that has to be decoded there may be none for that reason alone.
        data: that were given, which may be several splits.
        split: that was asked for.
    """
    there = len(dataset) if not is_stream(dataset) else len(first) or beginning(dataset, 1)
    if not there:
        if split is None:  # an object that came from some split is all that was given
            raise DataError("the data set holds no examples; give others")
        counts = _counts(data if isinstance(data, dict) else getattr(dataset.info, "splits", None))
        raise DataError(f"split {split!r} of the data holds no examples{told_splits(counts)}")


def _counts_of(name: str, revision: str | None) -> dict[str, int]:
    """How many examples each split of a data set has, that was read a moment ago; nothing where that is not known."""
    import datasets

    try:
        if Path(name).is_file():
            return _counts(datasets.load_dataset(FILES[Path(name).suffix.lower()], data_files=name))
        return _counts(datasets.load_dataset(name, revision=revision))
    except Exception:  # whatever the reader of a file raises: this is for the message of another error
        return {}


def _counts(splits: Any) -> dict[str, int]:
    """How many examples each of several splits has, as far as it is known."""
    sizes = {name: _n_examples(one) for name, one in splits.items()} if isinstance(splits, dict) else {}
    return {name: size for name, size in sizes.items() if size is not None}


def _n_examples(split: Any) -> int | None:
    return len(split) if hasattr(split, "__len__") else getattr(split, "num_examples", None)


def told_splits(counts: Mapping[str, int]) -> str:
    """What splits there are, with their sizes, and what to do; for the end of a message."""
    if not any(counts.values()):
        return "; give others, or another split"
    there = ", ".join(f"{name!r} with {count:,}" for name, count in counts.items())
    return f"; the splits are {there}: choose one that has examples, or such a part of one"


def is_stream(dataset: Any) -> bool:
    """Whether a data set can only be read from its beginning."""
    return not hasattr(dataset, "__len__")


def table(dataset: Any, name: str, lazy: Callable[[Any], bool]) -> tuple[Table, list[dict]]:
    """The columns of a data set, and its first examples without those columns that have to be decoded.

    Args:
        dataset: of `datasets`.
        name: under which it is known.
        lazy: tells by its type a column whose entries have to be decoded.
    """
    features = dict(dataset.features or _shown_by(dataset))
    plain = [column for column, feature in features.items() if not lazy(feature)]
    first = _first(dataset, plain) if plain else []
    return Table(name, features, first[0] if first else {}), first


def _shown_by(dataset: Any) -> Mapping[str, Any]:
    """The types of a stream that does not know them, such as one of CSV files or of a generator: by its beginning."""
    from datasets import Dataset

    return Dataset.from_list(beginning(dataset, _PEEKED)).features


def _first(dataset: Any, columns: Sequence[str]) -> list[dict]:
    chosen = dataset.select_columns(list(columns))
    if is_stream(chosen):
        return beginning(chosen, _PEEKED)
    return [chosen[index] for index in range(min(_PEEKED, len(chosen)))]


def values(dataset: Any, column: str | Sequence[str], first: Sequence[Mapping[str, Any]] = ()) -> list[Any]:
    """All entries of a column; of a stream those of its first examples, which are at hand. Of several columns lists."""
    if not isinstance(column, str):
        each = [values(dataset, one, first) for one in column]
        return each[0] if len(each) == 1 else [list(entries) for entries in zip(*each, strict=True)]
    if is_stream(dataset):
        return [example[column] for example in first]
    return dataset.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()


def drawn(dataset: Any, n_examples: int, seed: int, labels: Sequence[Any] | None) -> Any:
    """Some examples, drawn at random, from every class as many as there are to be had; in the order of the data set.

    Args:
        dataset: of `datasets`, no stream.
        n_examples: how many.
        seed: of the draw.
        labels: of all examples, by which the draw is balanced; None draws from all alike.

    Raises:
        DataError: a stream, or fewer examples than asked for.
    """
    if is_stream(dataset):
        raise DataError(
            f"n_examples={n_examples} draws from all examples, and a stream is read from its beginning; take the first "
            f"ones with split='train[:{n_examples}]', or read it without streaming"
        )
    if not is_count(n_examples, most=len(dataset)):
        raise DataError(f"n_examples={n_examples}; must be from 1 to {len(dataset)}, the number of examples")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(dataset), generator=generator).tolist()
    return dataset.select(sorted(_balanced(order, labels)[:n_examples]))


def _balanced(order: Sequence[int], labels: Sequence[Any] | None) -> list[int]:
    """The order, so that each beginning of it holds of each class as many, or all there are."""
    if labels is None:
        return list(order)
    seen: dict[Any, int] = defaultdict(int)
    rounds = []
    for place, index in enumerate(order):
        label = repr(labels[index])
        rounds.append((seen[label], place, index))
        seen[label] += 1
    return [index for _, _, index in sorted(rounds)]
