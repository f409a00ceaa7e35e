"""Loading: a data set of `datasets` with the preprocessing that belongs to a model; a line says what was read."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hf_coar.data import (
    described,
    entries,
    images,
    kinds,
    label_columns,
    labels,
    language,
    pictures,
    sounds,
    sources,
    texts,
)
from hf_coar.data.batches import Batch
from hf_coar.data.columns import Columns, Table, asked
from hf_coar.data.examples import Examples
from hf_coar.data.kinds import Kind, Preparation, Reading
from hf_coar.data.label_columns import LABEL
from hf_coar.data.labels import Labels
from hf_coar.errors import CoarError, DataError, check_count
from hf_coar.models.classes import Head, head
from hf_coar.storage import hub
from hf_coar.storage.texts import shortened

logger = logging.getLogger(__name__)

FAMILIES = (entries, images, texts, language, pictures, sounds)  # each registers its kinds of input


def load_data(
    data: Any,
    model: nn.Module,
    split: str | None = None,
    revision: str | None = None,
    batch_size: int = 32,
    streaming: bool = False,
    max_length: int = 512,
    columns: Columns | None = None,
    n_examples: int | None = None,
    data_seed: int = 0,
    preprocessor: Any = None,
) -> Examples:
    """A data set of `datasets` with the preprocessing that belongs to the model.

    Args:
        data: Hub id, a folder (of Parquet, CSV, JSON lines or images, or saved by `save_to_disk`), one such file, or an
            object of `datasets`.
        model: made by `load_model`; its id tells the image processor or tokenizer.
        split: such as `"validation[:2000]"`; the only one there is by default.
        revision: branch, tag or commit on the Hub.
        batch_size: examples a batch.
        streaming: read while running instead of downloading first.
        max_length: tokens at which texts are cut.
        columns: names of columns by role: "text", "pair", "image", "label", and those of the model's task; found by
            evidence where none is given.
        n_examples: draw so many, as many of each class; all by default.
        data_seed: of that draw.
        preprocessor: Hub id, folder or object of the tokenizer or image processor; the model's own by default.

    Raises:
        DataError: no such data set, split or column, several columns that could be it, labels that the model's head
            does not know, or a tokenizer that does not know the texts.
    """
    check_count(max_length, "max_length")
    check_count(data_seed, "data_seed", least=0)
    dataset, description = _found(data, split, revision, streaming)
    name = description.get("id", "the data set")
    table, first = sources.table(dataset, name, images.has_to_be_decoded)
    sources.check_some(dataset, first, data, split)
    given = {role: column for role, column in (columns or {}).items() if column is not None}
    kind = kinds.of(model, table, given)
    chosen = _columns(kind, model, table, given, first)
    known = _labels(kind, chosen, dataset, table, first, head(model))
    description |= described.recorded(chosen)
    if n_examples is not None:
        by = None if known is None or known.kind != "classes" else sources.values(dataset, known.columns)
        dataset = sources.drawn(dataset, n_examples, data_seed, by)
        table, first = sources.table(dataset, name, images.has_to_be_decoded)
        description |= {"n_examples": n_examples, "data_seed": data_seed}
    description["fingerprint"] = getattr(dataset, "_fingerprint", None)
    inputs = {role: column for role, column in chosen.items() if role != "label" or known is None}
    preparation = kind.build(Reading(model, inputs, known, table, first, preprocessor, texts.cut_at(model, max_length)))
    description |= preparation.description | ({"label_names": list(known.names)} if known and known.names else {})
    if isinstance(preprocessor, str | Path):
        description["preprocessor"] = str(preprocessor)
    if sources.is_stream(dataset):
        dataset = _undecoded(dataset, table, kind, chosen)
    _tell(dataset, chosen, known, first, preparation, description)
    return Examples(dataset, _without_gaps(preparation.prepare, inputs), batch_size, description)


def _without_gaps(prepare: Callable[[list[dict]], Batch], inputs: Columns) -> Callable[[list[dict]], Batch]:
    """The preparation, for which an example whose text, image or the like is missing cannot be read, and says why."""
    columns = [column for role, column in inputs.items() if role not in ("label", "answers")]

    def checked(rows: list[dict]) -> Batch:
        for row in rows:
            missing = [column for column in columns if row[column] is None]
            if missing:
                raise ValueError(f"there is nothing in {missing[0]!r}")
        return prepare(rows)

    return checked


def _found(data: Any, split: str | None, revision: str | None, streaming: bool) -> tuple[Any, dict[str, Any]]:
    """The data set, and what is known of where it is from: of an object nothing."""
    if sources.is_object(data):
        return sources.given(data, split), {}
    commit = None if Path(data).exists() else hub.resolve_commit(str(data), revision, "dataset")
    dataset = sources.read(str(data), split, commit or revision, streaming)
    revision = commit or sources.cached_commit(dataset) or revision
    return dataset, {"id": str(data), "split": split, "revision": revision}


def _columns(
    kind: Kind, model: nn.Module, table: Table, given: Columns, first: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Every role that a column plays, the labels' too, which may have several."""
    of_head = head(model)
    if of_head.kind is None or not kind.labels:
        return kind.choose(model, table, given, [])
    others = {role: column for role, column in given.items() if role != "label"}
    several = label_columns.one_a_class(table, of_head, given.get("label"))
    if several is not None:
        return {**kind.choose(model, table, asked(others, table, kind.roles), several), "label": several}
    known = asked(given, table, (*kind.roles, LABEL))
    asked_for = {role: column for role, column in known.items() if role != "label"}
    label = known.get("label")
    if label is None:
        lazy = [name for name, feature in table.features.items() if images.has_to_be_decoded(feature)]
        certain = [*asked_for.values(), *lazy]
        label = label_columns.column(table, of_head, certain, lambda name: [example[name] for example in first])
    found = kind.choose(model, table, asked_for, [label])
    return found if label is None else {**found, "label": label}


def _labels(
    kind: Kind, chosen: Columns, dataset: Any, table: Table, first: Sequence[Mapping[str, Any]], of_head: Head
) -> Labels | None:
    if "label" not in chosen or not kind.labels or of_head.kind is None:
        return None
    return labels.understood(chosen["label"], table, of_head, sources.values(dataset, chosen["label"], first))


def _undecoded(dataset: Any, table: Table, kind: Kind, chosen: Columns) -> Any:
    """A stream that fails while it decodes is over; left to `prepare`, a bad image costs one example."""
    for role in kind.lazy:
        column = chosen.get(role)
        if column is None or dataset.features is None or not hasattr(table.features[column], "decode"):
            continue
        dataset = dataset.cast_column(column, images.undecoded(dataset.features[column]))
    return dataset


def _tell(
    dataset: Any,
    chosen: Columns,
    known: Labels | None,
    first: Sequence[Mapping[str, Any]],
    preparation: Preparation,
    description: dict[str, Any],
) -> None:
    """One line about what was read; and a warning where all labels are the same one."""
    named = {role: [column] if isinstance(column, str) else column for role, column in chosen.items()}
    read = ", ".join(f"{role} from {' and '.join(map(repr, columns))}" for role, columns in named.items())
    classes = known is not None and known.kind == "classes"
    counts = known.counts(sources.values(dataset, known.columns, first)) if classes else {}
    said = ", ".join(f"{name} ({count})" for name, count in counts.items())
    beginning = "of the first " + str(len(first)) if sources.is_stream(dataset) else "labels"
    logger.info(
        "data: %s; first example: %s%s",
        read, _first_example(dataset, preparation), f"; {beginning}: {shortened(said, 300)}" if said else "",
    )  # fmt: skip
    if len(counts) == 1 and sum(counts.values()) > 1:
        logger.warning(
            "all %d examples%s have the same label, %s: is the data set sorted? Draw from all classes with "
            "n_examples=… (--n-examples) and the whole split",
            sum(counts.values()), " at the beginning" if sources.is_stream(dataset) else "", next(iter(counts)),
        )  # fmt: skip


def _first_example(dataset: Any, preparation: Preparation) -> str:
    try:
        return preparation.show(next(iter(dataset)))
    except CoarError:
        raise
    except StopIteration:
        raise DataError("the data set holds no examples; choose another split") from None
    except Exception as error:  # a decoder's: the run itself says what becomes of such an example
        return f"cannot be read ({shortened(str(error) or type(error).__name__, 100)})"
