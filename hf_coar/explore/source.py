"""What the explorer shows: attributions with the model and the data that they are of, read example by example."""

import bisect
import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_coar import api, models
from hf_coar import data as data_module
from hf_coar.attributions import Attributions
from hf_coar.data import showing
from hf_coar.errors import DataError
from hf_coar.explore import columns, reading
from hf_coar.explore.columns import Progress, no_progress
from hf_coar.explore.outcome import Outcome
from hf_coar.models import outputs
from hf_coar.models.calling import Call
from hf_coar.models.outputs import Output, OutputFunction
from hf_coar.runs import workers
from hf_coar.storage import labels

BATCH_SIZE = 32
_CACHED_BYTES = 256 * 2**20  # of prepared batches, so that the next ablation does not decode them again
_CONTEXT = 3  # tokens before one that decide how it is written


class Source:
    """Attributions, model and data behind one door; whoever runs the model holds `lock`.

    Attributes:
        attributions: read row by row.
        model: in evaluation mode.
        components: of the attributions.
        output: that was attributed, as the task of the model runs it.
        class_names: by class; empty where nobody named them.
        device: of the model.
        lock: held while the model runs, as an ablation changes it for that time.
    """

    def __init__(
        self,
        attributions: Attributions,
        model: nn.Module,
        data: Any,
        output: Output | OutputFunction | None = None,
        call: Call | None = None,
    ) -> None:
        """Model and data are loaded already; an output and a call that are not registered are given as to `attribute`.

        Raises:
            ModelMismatchError: another model than was attributed.
            DataError: other examples than were attributed.
        """
        attributions.check_model(models.fingerprint(model), models.record(model))
        self.attributions, self.model, self.components = attributions, model.eval(), attributions.components
        self.output = reading.bound(attributions, self.model, output, call)
        self.device = models.device_of(model)
        self.lock = threading.RLock()
        batches = data_module.batches(data)
        self._examples = batches if isinstance(batches, data_module.Examples) else None
        self._list = None if self._examples is not None else [data_module.as_batch(item) for item in batches]
        self._places = self._places_of_rows()
        self._batches: OrderedDict[tuple[int, ...], dict[str, Any]] = OrderedDict()
        self._predicted: dict[int, Outcome] = {}
        self._sizes: Tensor | None = None
        self.acts: Any = None  # what `acts.of` found, kept
        self.class_names = self._named_classes()
        self._check_examples()

    def _places_of_rows(self) -> list[int]:
        """Where in the data every row of the attributions comes from: examples that could not be read have none."""
        places = self.attributions.places
        if self._examples is not None:
            if not hasattr(self._examples.dataset, "__len__"):
                raise DataError("the explorer reaches examples by their number; load the data without streaming")
            n_there = len(self._examples.dataset)
        else:
            self._starts = [0]
            for batch in self._list:
                self._starts.append(self._starts[-1] + data_module.size(batch))
            n_there = self._starts[-1]
        if places and places[-1] >= n_there:
            raise DataError(
                f"the data hold {n_there} examples, and the attributions are of {len(places)}; give the same data set "
                "and split"
            )
        return places

    def _check_examples(self) -> None:
        rows = sorted({0, len(self) // 2, len(self) - 1})
        for row in rows:
            self.attributions.identity.rows([row]).check_batch(self.batch([row]), row)

    def __len__(self) -> int:
        """How many examples."""
        return len(self.attributions)

    @property
    def unit(self) -> str:
        """The unit of the output."""
        return self.attributions.config.get("unit") or self.output.unit

    @functools.cached_property
    def speaks(self) -> bool:
        """Whether what is predicted at a position is a token of the vocabulary, and no class."""
        inner = models.wrapped(self.model)
        has_words = models.library(inner) == "transformers" and models.word_embeddings(inner, "output") is not None
        return self.output.alignment is not None and (has_words or models.library(inner) == "torch")

    @property
    def is_language_model(self) -> bool:
        """Whether the output is of the tokens that follow from those before them."""
        return self.output.alignment == outputs.NEXT and self.speaks

    @property
    def targets(self) -> str:
        """What is predicted at the positions of an example, in words."""
        return "next tokens" if self.is_language_model else "tokens" if self.speaks else "positions"

    def sizes(self, progress: Progress = no_progress) -> Tensor:
        """Every component's mean absolute weight; one pass over the files at the first call."""
        with self.lock:
            if self._sizes is None:
                self._sizes = columns.sizes(self.attributions, progress)
            return self._sizes

    @functools.cached_property
    def names(self) -> list[str]:
        """The components' names, short and full, ready for searching."""
        short = self.components.names.all()
        return [f"{name} {full}".casefold() for name, full in zip(short, map(str, self.components), strict=True)]

    # ------------------------------------------------------------------------------------------------------ examples

    def raw(self, row: int) -> Mapping[str, Any]:
        """An example as its data set holds it, or its tensors where there is no data set."""
        if self._examples is not None:
            return self._examples.dataset[self._places[row]]
        return {name: value[0] for name, value in self.batch([row]).items()}

    def texts(self, row: int) -> list[str]:
        """The texts of an example that the model reads: none, one, or the two of a pair."""
        raw = self.raw(row)
        return [raw[column] for column in self._text_columns(raw)]

    def _text_columns(self, raw: Mapping[str, Any]) -> list[str]:
        return showing.text_columns(raw, {} if self._examples is None else self._examples.description)

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """Some examples as the model reads them, with their labels.

        Raises:
            DataError: they can no longer be read.
        """
        key = tuple(rows)
        if key in self._batches:
            self._batches.move_to_end(key)
            return self._batches[key]
        places = [self._places[row] for row in rows]
        if self._examples is not None:
            found = data_module.as_batch(self._examples.prepare([self._examples.dataset[place] for place in places]))
        else:
            found = self._of_list(places)
        self._batches[key] = found
        while len(self._batches) > 1 and sum(map(_n_bytes, self._batches.values())) > _CACHED_BYTES:
            self._batches.popitem(last=False)
        return found

    def _of_list(self, places: Sequence[int]) -> dict[str, Any]:
        pieces = []
        for place in places:
            number = self._batch_of(place)
            start = place - self._starts[number]
            pieces.append(data_module.rows(self._list[number], start, start + 1))
        return {name: _joined([one[name] for one in pieces]) for name in pieces[0]}

    def _batch_of(self, place: int) -> int:
        return bisect.bisect_right(self._starts, place) - 1

    def chunks(self, rows: Sequence[int]) -> Iterator[list[int]]:
        """Rows in lists of a batch's size; of batches that came ready, only such as have the same shapes."""
        if self._list is None:
            yield from chunks(rows)
            return
        shapes = [
            tuple((n, tuple(v.shape[1:]) if isinstance(v, Tensor) else ()) for n, v in b.items()) for b in self._list
        ]
        for _, alike in itertools.groupby(rows, key=lambda row: shapes[self._batch_of(self._places[row])]):
            yield from chunks(list(alike))

    def prepare_own(self, content: Any) -> dict[str, Any]:
        """An image or text of the visitor's as a batch of one; its label is still to be set.

        Raises:
            DataError: the data are tensors, so that nobody knows how to make more of them.
        """
        if self._examples is None:
            raise DataError("the data are batches of tensors, which do not say how an image or a text becomes one")
        first, of_text = dict(self._examples.dataset[self._places[0]]), isinstance(content, str)
        found = next(iter(self._text_columns(first)), None) if of_text else showing.image_column(first)
        column = found if of_text else self._examples.description.get("image") or found
        if column is None:
            raise DataError(f"the data set holds no {'texts' if isinstance(content, str) else 'images'}")
        return data_module.as_batch(self._examples.prepare([{**first, column: content}]))

    @property
    def kind(self) -> str:
        """What the examples are: "image", "text" or "tensors"."""
        if self._examples is None:
            batch = self._list[0]
            return "image" if "pixel_values" in batch else "tensors"
        first = self._examples.dataset[self._places[0]]
        return "image" if showing.image_column(first) else "text" if self._text_columns(first) else "tensors"

    @property
    def takes_own(self) -> bool:
        """Whether a visitor's own image or text can be prepared, and attributed without targets of its own."""
        if self._examples is None or self.kind not in ("image", "text") or "pair" in self._examples.description:
            return False
        return self.is_language_model or self.predictions([0])[0].classes is not None

    # ----------------------------------------------------------------------------------------------------- the model

    def run(self, batch: Mapping[str, Any]) -> Outcome:
        """The model as it is now on one batch."""
        on_device = data_module.to_device(batch, self.device)
        with self.lock, torch.no_grad():
            logits, values = reading.read(self.model, self.output, on_device)
            return Outcome.of(logits, values, on_device, self.output.alignment)

    def measure(self, rows: Sequence[int], progress: Progress = no_progress) -> Outcome:
        """The model as it is now (within `ablate`, ablated) on many examples, a batch at a time."""
        parts = []
        for chunk in self.chunks(rows):
            parts.append(self.run(self.batch(chunk)))
            done = sum(len(part.outputs) for part in parts)
            progress(done / len(rows), f"running the model: {done} of {len(rows)} examples")
        return Outcome.joined(parts)

    def predictions(self, rows: Sequence[int], progress: Progress = no_progress) -> list[Outcome]:
        """What the unchanged model says of some examples, one outcome an example; kept for the next time."""
        with self.lock:
            absent = [row for row in rows if row not in self._predicted]
            for chunk in self.chunks(absent):
                found = self.run(self.batch(chunk))
                for place, row in enumerate(chunk):
                    self._predicted[row] = found.at(place)
                done = sum(row in self._predicted for row in rows)
                progress(done / len(rows), f"running the model: {done} of {len(rows)} examples")
            return [self._predicted[row] for row in rows]

    def is_right(self, row: int) -> bool:
        """Whether the model's prediction is the label (of tokens: more than half of them); true where there is none."""
        found = self.predictions([row])[0]
        if found.classes is not None:
            return self.label(row) in (-1, int(found.classes[0]))
        return not found.tokens or bool((found.tokens[0] == found.targets[0]).float().mean() > 0.5)

    def label(self, row: int) -> int:
        """An example's label; -1 where it has none."""
        return int(self.attributions.labels[row])

    def class_name(self, index: int) -> str:
        """A class by its name, or as `class 3`."""
        if 0 <= index < len(self.class_names):
            return self.class_names[index]
        return f"class {index}" if index >= 0 else "no label"

    def words(self, tokens: Sequence[int]) -> list[str]:
        """Tokens as the text that each adds to the ones before it, so with its spaces, whatever the tokenizer.

        Alone, a token of SentencePiece loses the space before it, and one of WordPiece keeps its `##`.
        """
        if self.tokenizer is None:
            return [f"token {index} " for index in tokens]
        decode, found = partial(self.tokenizer.decode, clean_up_tokenization_spaces=False), []
        for place in range(len(tokens)):
            start = max(0, place - _CONTEXT)
            before = decode(tokens[start:place]).rstrip("\ufffd") if place else ""  # the first half of a character
            whole = decode(tokens[start : place + 1])
            found.append(whole[len(before) :] if whole.startswith(before) else decode([tokens[place]]))
        return found

    def marked(self, row: int, found: Outcome) -> list[tuple[str, bool]]:
        """The text of an example word by word, each with whether the model expects what is there; [] without words."""
        if not found.targets or self.tokenizer is None:
            return []
        hits, places = (found.tokens[0] == found.targets[0]).tolist(), found.places[0].tolist()
        if self.output.alignment != outputs.SAME:  # all that is decoded, or follows
            return list(zip(self.words(found.targets[0].tolist()), hits, strict=True))
        batch = self.batch([row])
        if "input_ids" not in batch:
            return []
        tokens = batch["input_ids"][0].tolist()
        if self.speaks:  # what is masked, in its place
            tokens = [dict(zip(places, found.targets[0].tolist(), strict=True)).get(i, t) for i, t in enumerate(tokens)]
        right = dict(zip(places, hits, strict=True))
        attended = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[0].tolist()
        return [(word, right.get(i, False)) for i, word in enumerate(self.words(tokens)) if attended[i]]

    def target(self, index: int) -> str:
        """What is predicted at a position: a token, or a class."""
        return repr(self.token(index)) if self.speaks else self.class_name(index)

    def token(self, index: int) -> str:
        """A token by itself, as text with the space before it."""
        return self.words([*self._some_word, index])[-1]

    @functools.cached_property
    def _some_word(self) -> list[int]:
        return [] if self.tokenizer is None else self.tokenizer("a", add_special_tokens=False)["input_ids"][-1:]

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of a transformers model whose files are at hand, or None."""
        if not hasattr(self, "_tokenizer"):
            tokens = self.kind == "text" or "input_ids" in self.batch([0])
            self._tokenizer = showing.tokenizer_of(self.model) if tokens else None
        return self._tokenizer

    @property
    def n_classes(self) -> int:
        """How many classes the labels and names speak of; 0 where an example as a whole has no label."""
        largest = int(self.attributions.labels.max())
        return 0 if largest < 0 else max(len(self.class_names), largest + 1)

    def _named_classes(self) -> list[str]:
        if self.speaks:
            return []
        recorded = labels.label_names(self.attributions.provenance)
        if recorded:
            return list(recorded)
        features = dict(getattr(getattr(self._examples, "dataset", None), "features", None) or {})
        for feature in features.values():
            if type(feature).__name__ == "ClassLabel":
                return [str(name) for name in feature.names]
        return list(models.class_names(self.model) or ())


def _joined(values: Sequence[Any]) -> Any:
    """One entry of several batches as one: tensors joined, lists after each other."""
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else [one for value in values for one in value]


def chunks(rows: Sequence[int]) -> Iterator[list[int]]:
    """Rows in lists of a batch's size."""
    for start in range(0, len(rows), BATCH_SIZE):
        yield list(rows[start : start + BATCH_SIZE])


def _n_bytes(batch: Mapping[str, Any]) -> int:
    tensors = [leaf for leaf in pytree.tree_leaves(dict(batch)) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def open_source(
    attributions: str | Path | Attributions,
    model: str | Path | nn.Module | None = None,
    data: Any = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    output: Output | OutputFunction | None = None,
    call: Call | None = None,
) -> Source:
    """Attributions with the model and the data that they name, or that are given.

    Raises:
        CoarError: no such attributions, or they do not say where their model or data came from.
        ModelMismatchError: another model.
        DataError: other data.
    """
    if not isinstance(attributions, Attributions):
        attributions = Attributions.from_pretrained(attributions)
    if not isinstance(model, nn.Module):
        model = api.reopen_model(attributions, model=model, revision=revision, trust_remote_code=trust_remote_code)
        model.to(workers.processes().device)
    if data is None or isinstance(data, str | Path):
        _, data = api.reopen(attributions, model=model, data=data)
    return Source(attributions, model, data, output, call)
