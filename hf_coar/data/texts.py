"""Texts as batches of tokens, one text an example or a pair; a tokenizer that does not know the language is refused."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hf_coar.data import preprocessors
from hf_coar.data.batches import Batch
from hf_coar.data.columns import Columns, Role, Table, asked, is_text, several, the_one, without
from hf_coar.data.kinds import KINDS, Kind, Preparation, Reading
from hf_coar.errors import DataError
from hf_coar.models import library, word_embeddings, wrapped
from hf_coar.models.classes import head
from hf_coar.storage.texts import shortened

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
Make = Callable[[Any, Sequence[Row]], Batch]  # (tokenizer, raw examples) -> a batch

TEXT = Role("text", is_text, ("text", "sentence", "content"), "a text", become="make every entry a string")
PAIR = Role("pair", is_text, (), "a text")

# The two texts of an example under the names that the data sets of the Hub give them; first the text, then its pair.
PAIRS = (
    ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("question", "sentence"),
    ("text1", "text2"), ("text_a", "text_b"), ("sentence_a", "sentence_b"), ("sentence_1", "sentence_2"),
    ("query", "passage"), ("query", "document"), ("query", "text"), ("question", "passage"), ("question", "answer"),
    ("text", "text_pair"), ("anchor", "positive"), ("anchor", "negative"),
)  # fmt: skip

_UNKNOWN = 0.5  # of the tokens: what no tokenizer of the language comes near, and one without a vocabulary exceeds


def reads_texts(model: nn.Module) -> int:
    """How surely a model reads texts; see `Kind.reads`."""
    model = wrapped(model)
    if library(model) == "transformers":
        return 2 if getattr(model, "main_input_name", None) == "input_ids" else 0
    return 0 if library(model) == "timm" else 1


def cut_at(model: nn.Module, max_length: int) -> int:
    """Where texts are cut: at `max_length` tokens, or as many as a model has positions in a table, if it has fewer."""
    wanted = _positions(model)
    tokens = word_embeddings(model)
    # A table has up to two entries more than positions, or some that padding takes; where there is none (rotary,
    # relative positions) longer texts run.
    tables = [one for one in model.modules() if isinstance(one, nn.Embedding) and one is not tokens]
    usable = [
        min(wanted, one.num_embeddings - (0 if one.padding_idx is None else one.padding_idx + 1))
        for one in tables
        if wanted <= one.num_embeddings <= wanted + 2
    ]
    if not usable or min(usable) >= max_length:
        return max_length
    logger.info("texts are cut at %d tokens: the model has no more positions", min(usable))
    return min(usable)


def _positions(model: nn.Module) -> float:
    """The tokens of the longest texts that a model was made for; infinity where its configuration does not say."""
    config = getattr(wrapped(model), "config", None)
    found = getattr(config, "max_position_embeddings", None)
    return found if type(found) is int and found > 0 else math.inf


def _choose(model: nn.Module, table: Table, given: Columns, taken: Sequence[str | None]) -> dict[str, str]:
    found = asked(given, table, (TEXT, PAIR))
    if "text" in found:
        return found
    if "pair" in found:
        return {"text": the_one(TEXT, table, (*taken, found["pair"])) or _no_text(table), **found}
    return _by_names(table, taken, head(model).kind is not None)


def by_names(model: nn.Module, table: Table, given: Columns, taken: Sequence[str | None]) -> dict[str, str]:
    """Two texts: as asked for, or a pair by its usual names."""
    found = asked(given, table, (TEXT, PAIR))
    if len(found) == 2:
        return found
    if "text" in found or "pair" in found:
        other = PAIR if "text" in found else TEXT
        column = the_one(other, table, (*taken, *found.values()))
        return {**found, other.name: column or _no_text(table)}
    found = _by_names(table, taken, takes_pairs=True)
    if "pair" not in found:
        raise without(PAIR, table)
    return found


def _by_names(table: Table, taken: Sequence[str | None], takes_pairs: bool) -> dict[str, str]:
    """A pair by its usual names where the head takes one, or the one text."""
    candidates = {name.lower(): name for name in table.fitting(TEXT, taken)}
    pairs = [pair for pair in PAIRS if takes_pairs and set(pair) <= set(candidates)]
    if not pairs:
        return {"text": the_one(TEXT, table, taken) or _no_text(table)}
    inside = {name for pair in pairs for name in pair}
    others = [candidates[name] for name in TEXT.usual if name in candidates and name not in inside]
    if len(pairs) > 1 or others:
        raise several("text", [candidates[name] for name in candidates if name in inside] + others, table)
    return dict(zip(("text", "pair"), (candidates[name] for name in pairs[0]), strict=True))


def _no_text(table: Table) -> str:
    raise DataError(f"{table.name!r} has no column of texts that is not its labels; it has {table.shown()}")


def _build(reading: Reading) -> Preparation:
    columns = [reading.columns[role] for role in ("text", "pair") if role in reading.columns]

    def make(tokenizer: Any, rows: Sequence[Row]) -> Batch:
        return entries(encoded(tokenizer, reading, *(of(rows, column) for column in columns)))

    made = tokenized(reading, "text", make)
    return replace(made, prepare=lambda rows: reading.labelled(made.prepare(rows), rows))


def tokenized(reading: Reading, role: str, make: Make) -> Preparation:
    """A preparation with the tokenizer of the model.

    Args:
        reading: of the data.
        role: whose texts tell whether the tokenizer knows their language.
        make: (tokenizer, raw examples) -> a batch.
    """
    from transformers import AutoTokenizer

    tokenizer = preprocessors.load(AutoTokenizer, reading.model, "tokenizer", reading.preprocessor)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked everywhere, so any token serves
    check_tokenizer(tokenizer, reading, role)

    def show(example: Row) -> str:
        ids = make(tokenizer, [example])["input_ids"]
        return repr(shortened(tokenizer.decode(ids.flatten(0, -2)[0]), 100))

    return Preparation(lambda rows: make(tokenizer, rows), show, {"max_length": reading.max_length})


def of(rows: Sequence[Row], column: str | None) -> list[Any]:
    """The entries of a column."""
    return [] if column is None else [row[column] for row in rows]


def entries(found: Any, prefix: str = "") -> Batch:
    """What a model reads of what a tokenizer gave, under names with this beginning."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {prefix + name: found[name] for name in names if name in found}


def check_tokenizer(tokenizer: Any, reading: Reading, role: str) -> None:
    """Raises `DataError` where a tokenizer knows few of the first texts' tokens, or gives some that the model lacks.

    Texts that are longer than what is read of them are told.

    transformers makes an empty tokenizer for a folder that holds none: every token is unknown then, or none is left.
    """
    texts = [example.get(reading.columns[role]) for example in reading.first]
    texts = [" ".join(map(str, text)) if isinstance(text, list) else text for text in texts]
    texts = [text for text in texts if isinstance(text, str) and text.strip()]
    if not texts:
        return
    found = tokenizer(texts, truncation=True, max_length=reading.max_length)
    ids = [token for tokens in found["input_ids"] for token in tokens]
    special = set(tokenizer.all_special_ids)
    known, unknown = sum(token not in special for token in ids), ids.count(tokenizer.unk_token_id)
    if unknown > _UNKNOWN * (known + unknown) or not known:
        raise DataError(
            f"the tokenizer ({type(tokenizer).__name__}, {len(tokenizer)} tokens) knows {known} of {known + unknown} "
            f"tokens of the first texts, such as {shortened(repr(texts[0]), 50)}: was the model saved without its "
            "tokenizer? Save it there, or give preprocessor=…, a Hub id or folder that holds it"
        )
    n_tokens = getattr(word_embeddings(reading.model), "num_embeddings", None)
    if n_tokens is not None and max(ids) >= n_tokens:
        raise DataError(
            f"the tokenizer gives token {max(ids)}, and the model knows tokens 0 to {n_tokens - 1}: it belongs to "
            "another model; give preprocessor=…, a Hub id or folder that holds the right one"
        )
    tell_lengths(tokenizer, reading, [len(tokens) for tokens in found["input_ids"]], {"text": texts})


def encoded(
    tokenizer: Any, reading: Reading, text: Any = None, text_pair: Any = None, text_target: Any = None, **options: Any
) -> Any:
    """Texts as padded tensors of tokens, cut at the length of the reading; texts that are too long are told.

    Args:
        tokenizer: of the model.
        reading: of the data.
        text: one an example; or lists of words.
        text_pair: of the same examples, where they have second texts.
        text_target: of the same examples, instead of the texts.
        options: for the tokenizer.
    """
    given = {"text": text, "text_pair": text_pair, "text_target": text_target}
    sides = {name: list(side) for name, side in given.items() if side is not None}
    options = {"truncation": True, **options}
    found = tokenizer(**sides, padding=True, max_length=reading.max_length, return_tensors="pt", **options)
    mask = found["attention_mask"] if "attention_mask" in found else torch.ones_like(found["input_ids"])
    tell_lengths(tokenizer, reading, mask.sum(-1).tolist(), sides, **options)
    return found


def tell_lengths(
    tokenizer: Any, reading: Reading, lengths: Sequence[int], sides: Mapping[str, Sequence[Any]] = {}, **options: Any
) -> None:
    """Warns of texts that are cut, and of those longer than any that the model was made for; of each once a reading.

    Args:
        tokenizer: of the model.
        reading: of the data; it remembers of what was told.
        lengths: tokens that are left of every text.
        sides: the texts by the keywords of the tokenizer; none where nothing is cut.
        options: with which they were tokenized.
    """
    limit, made_for = reading.max_length, _positions(reading.model)
    if "cut" not in reading.told:
        # Whether a text that fills its room was longer, slow tokenizers do not say.
        full = [index for index, length in enumerate(lengths) if sides and length >= limit]
        options = {**options, "truncation": False, "verbose": False, "return_offsets_mapping": False}
        whole = [tokenizer(**{name: side[index] for name, side in sides.items()}, **options) for index in full]
        cut = sum(len(one["input_ids"]) > limit for one in whole)
        if cut:
            reading.told.add("cut")
            logger.warning(
                "%d of %d texts looked at have more than %d tokens and are cut there; max_length=… (--max-length) "
                "reads more, as far as the model has positions", cut, len(lengths), limit,
            )  # fmt: skip
    longest = max(lengths, default=0)
    if longest > made_for and "long" not in reading.told:
        reading.told.add("long")
        logger.warning(
            "a text has %d tokens, and the model was made for %d at most (max_position_embeddings): what it says of "
            "longer ones may mean nothing; max_length=%d (--max-length) cuts them there", longest, made_for, made_for,
        )  # fmt: skip


KINDS.add("text", Kind("text", (TEXT, PAIR), reads_texts, _choose, _build))
