"""Texts for heads that want more than one text and its label: answers, spans, choices, tags, second texts, masks."""

import hashlib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_coar.data.batches import Batch
from hf_coar.data.columns import Columns, Role, Table, asked, declared_names, is_label, is_text, is_texts, the_one
from hf_coar.data.kinds import KINDS, Kind, Preparation, Reading, by_head, by_roles
from hf_coar.data.texts import PAIR, TEXT, Row, by_names, encoded, entries, of, tell_lengths, tokenized
from hf_coar.errors import DataError
from hf_coar.models import class_names, tasks
from hf_coar.models.outputs import DECODED, IGNORED_LABEL
from hf_coar.storage.texts import shortened

# -------------------------------------------------------------------------------------------- answers against foils

PROMPT = Role("prompt", is_text, ("prompt",), "a text that goes on", named=True)
ANSWER = Role("answer", is_text, ("answer", "completion", "obj_label"), "what follows the prompt", named=True)
FOIL = Role("foil", is_text, ("foil", "distractor", "wrong_answer"), "what is not to follow it", named=True)


def _answers(reading: Reading) -> Preparation:
    prompt, answer, foil = (reading.columns.get(role) for role in ("prompt", "answer", "foil"))
    decoder = tasks.of(reading.model).alignment == DECODED

    def make(tokenizer: Any, rows: Sequence[Row]) -> Batch:
        prompts = of(rows, prompt)
        sides = [
            [following(*pair) for pair in zip(prompts, of(rows, column), strict=True)]
            for column in (answer, foil)
            if column is not None
        ]
        limit = min(reading.max_length, tokenizer.model_max_length)
        batch = tasks.encode_answers(tokenizer, prompts, *sides, max_length=limit, decoder=decoder)
        tell_lengths(tokenizer, reading, batch["attention_mask"].sum(-1).tolist())
        return batch

    return tokenized(reading, "prompt", make)


def following(prompt: str, answer: str) -> str:
    """An answer with the space between two words, where the data leave it out and the script has one."""
    joined = prompt and answer and _is_word(prompt[-1]) and _is_word(answer[0])
    return " " + answer if joined else answer


def _is_word(letter: str) -> bool:
    return letter.isalnum() and unicodedata.east_asian_width(letter) not in "WF"


# -------------------------------------------------------------------------------------------------- answers in a text


def _has_spans(feature: Any) -> bool:
    parts = getattr(feature, "feature", feature)
    return isinstance(parts, Mapping) and {"text", "answer_start"} <= set(parts)


QUESTION = Role("question", is_text, ("question",), "a text", named=True)
CONTEXT = Role("context", is_text, ("context", "passage", "paragraph"), "a text", named=True)
ANSWERS = Role("answers", _has_spans, ("answers", "answer"), "{'text': […], 'answer_start': […]}", named=True)


def _spans(reading: Reading) -> Preparation:
    question, context, answers = (reading.columns[role] for role in ("question", "context", "answers"))

    def make(tokenizer: Any, rows: Sequence[Row]) -> Batch:
        if not tokenizer.is_fast:
            raise DataError(f"{type(tokenizer).__name__} does not say which characters a token is; give a fast one")
        texts = of(rows, question), of(rows, context)
        found = encoded(tokenizer, reading, *texts, truncation="only_second", return_offsets_mapping=True)
        marked = zip(texts[1], of(rows, answers), strict=True)
        ends = torch.tensor([_span(found, i, _first_answer(*one)) for i, one in enumerate(marked)])
        return {**entries(found), "start_positions": ends[:, 0], "end_positions": ends[:, 1]}

    return tokenized(reading, "context", make)


def _first_answer(context: str, answers: Any) -> tuple[int, int] | None:
    """Where the first of the answers begins and ends, in characters; None for a question without one.

    They are a mapping of lists, as SQuAD has them, of one text and its start, or a list of such mappings.
    """
    first = answers[0] if isinstance(answers, list) and answers else answers or {"text": []}
    text, start = first["text"], first.get("answer_start")
    if isinstance(text, list):
        text, start = (text[0], start[0]) if text else ("", None)
    if not text:
        return None
    found = context[int(start) : int(start) + len(text)]
    if found.casefold() != text.casefold():  # counted in bytes, say, or after the text was changed
        raise ValueError(f"at character {start} of the text is {found[:40]!r}, not the answer {text[:40]!r}")
    return int(start), int(start) + len(text)


def _span(found: Any, index: int, answer: tuple[int, int] | None) -> tuple[int, int]:
    """The first and the last token of an answer; of a question without one the first token of all, as in SQuAD 2."""
    if answer is None:
        return 0, 0
    (start, stop), offsets = answer, found["offset_mapping"][index].tolist()
    inside = [
        place for place, (low, high) in enumerate(offsets)
        if found.sequence_ids(index)[place] == 1 and low < stop and high > start
    ]  # fmt: skip
    if not inside or offsets[inside[-1]][1] < stop:
        raise ValueError("the answer is not in what is left of its text")  # is left out
    return inside[0], inside[-1]


# --------------------------------------------------------------------------------------------------------- choices

_STEMS = ("sent1", "startphrase", "ctx", "context", "question", "prompt", "premise", "text")


def _has_choices(feature: Any) -> bool:
    return is_texts(feature) or (isinstance(feature, Mapping) and is_texts(feature.get("text")))


STEM = Role("text", is_text, _STEMS, "a text that the choices go with", named=True)
CHOICES = Role("choices", _has_choices, ("choices", "endings", "options"), "a list of texts", named=True)
PLACE = Role("label", is_label, ("label", "answer", "answerkey", "gold"), "the place of the right one, or its letter",
             named=True)  # fmt: skip


def _choices(reading: Reading) -> Preparation:
    stem, choices, label = (reading.columns[role] for role in ("text", "choices", "label"))

    def make(tokenizer: Any, rows: Sequence[Row]) -> Batch:
        each = [entry["text"] if isinstance(entry, Mapping) else entry for entry in of(rows, choices)]
        count = len(each[0])
        if any(len(one) != count for one in each):
            raise DataError(f"the examples have {sorted({len(one) for one in each})} choices; give as many to each")
        stems = [text for text in of(rows, stem) for _ in range(count)]
        found = entries(encoded(tokenizer, reading, stems, [text for one in each for text in one]))
        labels = [which(value, count) for value in of(rows, label)]
        return {name: value.unflatten(0, (-1, count)) for name, value in found.items()} | {
            "labels": torch.tensor(labels)
        }

    return tokenized(reading, "text", make)


def which(value: Any, count: int) -> int:
    """A place from 0, or a letter."""
    text = str(value).strip().upper()
    place = ord(text) - ord("A") if len(text) == 1 and text.isalpha() else int(text) if text.isdigit() else -1
    if not 0 <= place < count:
        raise DataError(f"the label {value!r} is none of {count} choices: give their place from 0, or a letter from A")
    return place


# ------------------------------------------------------------------------------------------------------------- tags


def _are_tags(feature: Any) -> bool:
    inner = getattr(feature, "feature", None)
    return inner is not None and is_label(inner) and getattr(inner, "feature", None) is None


WORDS = Role("tokens", is_texts, ("tokens", "words"), "a list of words", named=True)
TAGS = Role("tags", _are_tags, ("ner_tags", "tags", "labels", "pos_tags", "upos"), "a tag for every word", named=True)


def _tags(reading: Reading) -> Preparation:
    words, tags = reading.columns["tokens"], reading.columns["tags"]
    place = _places(reading, tags)

    def make(tokenizer: Any, rows: Sequence[Row]) -> Batch:
        for row in rows:
            if len(row[words]) != len(row[tags]) or not row[words]:  # is left out
                raise ValueError(f"{len(row[words])} words in {words!r}, and {len(row[tags])} tags in {tags!r}")
        found = encoded(tokenizer, reading, of(rows, words), is_split_into_words=True)
        labels = torch.full_like(found["input_ids"], IGNORED_LABEL)
        for index, of_words in enumerate(of(rows, tags)):
            before = None
            for at, word in enumerate(found.word_ids(index)):
                if word is not None and word != before:  # the first token of a word speaks for it, as in BERT's paper
                    labels[index, at] = place(of_words[word])
                before = word
        return {**entries(found), "labels": labels}

    return tokenized(reading, "tokens", make)


def _places(reading: Reading, column: str) -> Callable[[Any], int]:
    """A tag -> its class: by name where the data name them as the model does, else by number."""
    ours = getattr(reading.table.features[column].feature, "names", None)
    theirs = {name: place for place, name in enumerate(class_names(reading.model) or ())}
    n = getattr(reading.model.config, "num_labels", None)
    by_number = ours and set(ours) <= set(theirs)
    if ours and not by_number and len(ours) != n:
        raise DataError(f"{column!r} has {len(ours)} tags ({shortened(', '.join(ours), 60)}), and the model {n}")

    def place(tag: Any) -> int:
        if tag == IGNORED_LABEL:
            return tag
        name = ours[tag] if by_number else tag
        found = theirs.get(name) if isinstance(name, str) else int(name)
        if found is None or not 0 <= found < (n or found + 1):
            raise DataError(
                f"the tag {tag!r} in {column!r} is none of the model's {n}: {shortened(str(list(theirs)), 80)}"
            )
        return found

    return place


# --------------------------------------------------------------------------------------- one text from another, masks

SOURCE = Role("text", is_text, ("text", "source", "article", "document", "dialogue", "input", "sentence"), "a text")
TARGET = Role("target", is_text, ("target", "summary", "highlights", "output", "translation"), "a text", named=True)


def _targets(reading: Reading) -> Preparation:
    source, target = reading.columns["text"], reading.columns["target"]

    def make(tokenizer: Any, rows: Sequence[Row]) -> Batch:
        found = entries(encoded(tokenizer, reading, of(rows, source)))
        found.pop("token_type_ids", None)
        wanted = encoded(tokenizer, reading, text_target=of(rows, target))
        return {**found, "labels": wanted["input_ids"].where(wanted["attention_mask"].bool(), IGNORED_LABEL)}

    return tokenized(reading, "text", make)


_MASKED = 0.15  # of the tokens, as in BERT's training


def _masked(reading: Reading) -> Preparation:
    text, answer = reading.columns["text"], reading.columns.get("answer")

    def make(tokenizer: Any, rows: Sequence[Row]) -> Batch:
        found = encoded(tokenizer, reading, of(rows, text), return_special_tokens_mask=True)
        ids, labels = found["input_ids"], torch.full_like(found["input_ids"], IGNORED_LABEL)
        for index in range(len(ids)):
            given = ids[index] == tokenizer.mask_token_id
            if given.any() or answer is not None:
                labels[index, given] = _one_token(tokenizer, rows[index][answer] if answer else None, int(given.sum()))
                continue
            hidden = _drawn(ids[index], found["special_tokens_mask"][index].bool())
            labels[index, hidden] = ids[index, hidden]
            ids[index, hidden] = tokenizer.mask_token_id
        return {**entries(found), "labels": labels}

    return tokenized(reading, "text", make)


def _drawn(ids: Tensor, special: Tensor) -> Tensor:
    """The places to be masked, the same of a text whatever is beside it."""
    places = (~special).nonzero().flatten().tolist()
    own = ids[~special].numpy().tobytes()
    order = sorted(places, key=lambda place: hashlib.blake2b(own + place.to_bytes(4, "big"), digest_size=8).digest())
    return torch.tensor(sorted(order[: max(1, round(_MASKED * len(places)))]), dtype=torch.long)


def _one_token(tokenizer: Any, answer: str | None, n_masks: int) -> int:
    if answer is None:
        raise DataError("a text holds the mask token, and no column says what is under it; name one as the answer")
    for text in (answer, " " + answer):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id and n_masks == 1:
            return ids[0]
    raise DataError(
        f"the answer {answer!r} is no single token, or its text holds {n_masks} masks, not one; leave it out"
    )


# ------------------------------------------------------------------------------------------------------ two texts each


def _is_class(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")).startswith(("int", "uint", "bool"))


# Which sort of pair an example is: the similarity has no use for it, and whoever compares sorts of pairs has.
SORT = Role("label", _is_class, ("label", "labels"), "a class (a ClassLabel, or its number)", named=True)


def _two_texts(model: Any, table: Table, given: Columns, taken: Sequence[str | None]) -> dict[str, str]:
    label = asked(given, table, (TEXT, PAIR, SORT)).get("label")
    texts = {role: column for role, column in given.items() if role != "label"}
    found = by_names(model, table, texts, [*taken, label])
    label = label or the_one(SORT, table, [*taken, *found.values()])
    return found if label is None else {**found, "label": label}


def _both(reading: Reading) -> Preparation:
    first, second, label = (reading.columns.get(role) for role in ("text", "pair", "label"))

    def make(tokenizer: Any, rows: Sequence[Row]) -> Batch:
        a, b = (encoded(tokenizer, reading, of(rows, column)) for column in (first, second))
        batch = {**entries(a), **entries(b, "pair_")}
        sorts = [-1 if value is None else int(value) for value in of(rows, label)]
        return batch if label is None else {**batch, "labels": torch.tensor(sorts, dtype=torch.long)}

    made = tokenized(reading, "text", make)
    names = declared_names(reading.table.features.get(label))
    return replace(made, description={**made.description, "label_names": names}) if names else made


CHOSEN = Role("chosen", is_text, ("chosen",), "the better text", named=True)
REJECTED = Role("rejected", is_text, ("rejected",), "the worse text", named=True)


def _preferences(reading: Reading) -> Preparation:
    chosen, rejected = reading.columns["chosen"], reading.columns["rejected"]

    def make(tokenizer: Any, rows: Sequence[Row]) -> Batch:
        a, b = (encoded(tokenizer, reading, of(rows, column)) for column in (chosen, rejected))
        return {**entries(a), **entries(b, "rejected_")}

    return tokenized(reading, "chosen", make)


def _gives_one_number(model: Any) -> int:
    found = tasks.of(model).name == "text_classification" and getattr(model.config, "num_labels", None) == 1
    return 3 if found else 0


def _register(name: str, roles: Sequence[Role], reads: Any, build: Any, choose: Any = None, **more: Any) -> None:
    choose = choose or by_roles(roles, more.get("optional", ()))
    KINDS.add(name, Kind(name, tuple(roles), reads, choose, build, **more))


_register(
    "answers", (PROMPT, ANSWER, FOIL), by_head("causal_lm", "seq2seq_lm"), _answers, optional=("foil",), instead=True
)
_register("question and context", (QUESTION, CONTEXT, ANSWERS), by_head("question_answering"), _spans)
_register("choices", (STEM, CHOICES, PLACE), by_head("multiple_choice"), _choices)
_register("words with tags", (WORDS, TAGS), by_head("token_classification"), _tags)
_register("masked text", (TEXT, ANSWER), by_head("masked_lm"), _masked, optional=("answer",))
_register(
    "two texts", (TEXT, PAIR, SORT), by_head("embedding"), _both, _two_texts, instead=True, optional=("label",),
    there=lambda model, table, given: len(table.fitting(TEXT)) > 1,
)  # fmt: skip
_register("preference", (CHOSEN, REJECTED), _gives_one_number, _preferences, labels=False, instead=True)


def _encodes_text(model: Any) -> int:
    of_text = getattr(model, "main_input_name", None) == "input_ids" and tasks.of(model).name == "seq2seq_lm"
    return 3 if of_text else 0


_register("text and target", (SOURCE, TARGET), _encodes_text, _targets)
