"""Heads with logits at every position: language models of all kinds, classifiers of tokens and frames; answers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar.errors import DataError
from hf_coar.models import calling, outputs
from hf_coar.models.libraries import wrapped
from hf_coar.models.outputs import DECODED, IGNORED_LABEL, NEXT, SAME
from hf_coar.models.tasks.base import Batch, labels_of, of, register, two_sides

_TOKENS = ("token_margin", "token_log_prob", "own_loss")
_ANSWERS = ("answer_difference", "answer_log_prob")


def _has_decoder(model: nn.Module) -> bool:
    """Whether a text (or sound) is encoded and another decoded."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _choose(model: nn.Module, batch: Batch) -> str:
    """What a prompt is answered with, where there is an answer and a foil; else all tokens."""
    if "foil_labels" in batch:
        return "answer_difference"
    if of(model).alignment == DECODED:
        _check_decoded(model, batch)
    if of(model).alignment != NEXT or "input_ids" not in batch:
        labels_of(batch)
    return "token_margin"


def decode(model: nn.Module, batch: Batch) -> Any:
    """Run a model with a decoder; where the decoder's inputs are not given, the model makes them of the labels.

    Raises:
        DataError: there is neither.
    """
    if "decoder_input_ids" in batch:
        return calling.call(model, batch)
    _check_decoded(model, batch)
    return calling.call(model, batch, without=())


def _check_decoded(model: nn.Module, batch: Batch) -> None:
    if "decoder_input_ids" not in batch and not isinstance(batch.get("labels"), Tensor):
        raise DataError(
            f"{type(wrapped(model)).__name__} decodes a second text: give it as 'labels' (or 'decoder_input_ids' and "
            f"'labels'); the batch has {', '.join(batch)}"
        )


# -------------------------------------------------------------------------------------------------------------- answers

FOIL = "foil_"


def answers(model: nn.Module, batch: Batch) -> tuple[Any, Any]:
    """Run the model on the answer and on the foil, whose entries bear the same names after `foil_`."""
    ours, foils = two_sides(batch, FOIL)
    if "labels" not in foils:
        raise DataError(
            f"this output needs 'foil_labels' beside 'labels', and the batch has {', '.join(batch)}; columns prompt, "
            "answer, foil make them, or hf_coar.tasks.encode_answers"
        )
    run = of(model).run
    found = run(model, ours)
    return (found, found) if _one_token(ours, foils) else (found, run(model, {**ours, **foils}))


def _one_token(ours: Batch, foils: Batch) -> bool:
    """Whether answer and foil are each one token at the end of the same tokens: then one pass tells both."""
    if "input_ids" not in foils or ours["input_ids"].shape != foils["input_ids"].shape:
        return False
    marked = ours["labels"] != IGNORED_LABEL
    same = (ours["input_ids"] == foils["input_ids"]) | marked
    alike = torch.equal(marked, foils["labels"] != IGNORED_LABEL)
    return alike and bool((marked.sum(1) == 1).all()) and bool(same.all()) and bool(_is_last(marked, ours).all())


def _is_last(marked: Tensor, batch: Batch) -> Tensor:
    """Whether nothing attended comes after what is marked, which a model that looks ahead would see."""
    after = marked.long().cumsum(1).bool() & ~marked
    attended = batch.get("attention_mask", torch.ones_like(marked))
    return ~(after & attended.bool()).any(1)


@outputs.register("answer_difference", unit="nats", takes="output", call=answers, alignment=NEXT, boundary=0.0)
def answer_difference(found: tuple[Any, Any], batch: Batch, alignment: str = NEXT) -> Tensor:
    """Log-probability of the answer minus that of the foil after the same prompt; above 0 = the answer is preferred.

    For answers of one token it is the difference of their logits (Wang et al. 2023, the indirect object task).
    """
    ours, foils = (calling.logits_of(one).float() for one in found)
    names = ("labels", "attention_mask", "decoder_attention_mask")
    other = {name: batch.get(FOIL + name, batch.get(name)) for name in names if FOIL + name in batch or name in batch}
    right = outputs.answer_log_prob(ours, {name: batch[name] for name in names if name in batch}, alignment)
    return right - outputs.answer_log_prob(foils, other, alignment)


def encode_answers(
    tokenizer: Any,
    prompts: Sequence[str],
    answers: Sequence[str],
    foils: Sequence[str] | None = None,
    max_length: int | None = None,
    decoder: bool = False,
) -> dict[str, Tensor]:
    """Prompts and answers as a batch for `answer_difference`, or without foils for `answer_log_prob`.

    Args:
        tokenizer: of the model.
        prompts: one an example.
        answers: what follows each prompt, with the space that goes before it, of any length.
        foils: what is not to follow.
        max_length: tokens that the model takes; the tokenizer's own limit by default.
        decoder: whether the model encodes the prompt and decodes the answer (T5).

    Returns:
        int64 [examples, tokens]: `input_ids`, `attention_mask`, `labels` (-100 but for the answer), and the same of
        the foils after `foil_`; with a decoder, only `foil_labels` of them.

    Raises:
        DataError: lists of unlike length, an empty answer, an answer equal to its foil, one whose first token the
            tokenizer joins with the end of the prompt, or a prompt that leaves no room.
    """
    sides = [answers] if foils is None else [answers, foils]
    if any(len(side) != len(prompts) for side in sides):
        raise DataError(f"{len(prompts)} prompts with {' and '.join(str(len(side)) for side in sides)} answers")
    for index, pair in enumerate(zip(*sides, strict=True)):
        if not all(pair) or (len(pair) == 2 and pair[0] == pair[1]):
            raise DataError(f"example {index} has the answers {pair}; give one that is not empty, and another foil")
    limit = max_length or min(getattr(tokenizer, "model_max_length", 10**9), 10**9)
    batch: dict[str, Tensor] = {}
    for prefix, side in zip(("", FOIL), sides, strict=False):
        encode = _decoded if decoder else _continued
        found = encode(tokenizer, prompts, side, limit)
        if prefix and decoder:
            found = {"labels": found["labels"]}
        batch |= {prefix + name: value for name, value in found.items()}
    return batch


def _continued(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], limit: int) -> dict[str, Tensor]:
    rows, starts = [], []
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        first, whole = _open(tokenizer, prompt), _open(tokenizer, prompt + answer)
        if whole[: len(first)] != first or len(whole) == len(first):
            raise DataError(
                f"example {index}: the tokenizer splits {prompt[-24:]!r} otherwise when {answer!r} follows; begin the "
                "answer at a word, with its space, and end the prompt before that"
            )
        if len(whole) > limit:
            raise DataError(
                f"example {index} has {len(whole)} tokens with its answer {answer!r}, and the model takes {limit}; "
                "shorten the prompt"
            )
        if not first:
            raise DataError(f"example {index} has a prompt without a token, so that nothing predicts the answer")
        rows.append(whole)
        starts.append(len(first))
    width = max(map(len, rows))
    ids, attended = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED_LABEL)
    for row, (tokens, start) in enumerate(zip(rows, starts, strict=True)):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        ids[row, len(tokens) :] = tokens[-1]  # never attended, but a token of the vocabulary
        attended[row, : len(tokens)] = 1
        labels[row, start : len(tokens)] = ids[row, start : len(tokens)]
    return {"input_ids": ids, "attention_mask": attended, "labels": labels}


def _open(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that goes on: with what opens one, and without what closes it."""
    tokens = list(tokenizer(text)["input_ids"])
    closing = len(tokens) - len(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
    if closing and tokens and tokens[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        return tokens[:-1]
    return tokens


def _decoded(tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], limit: int) -> dict[str, Tensor]:
    rows = [list(tokenizer(text)["input_ids"]) for text in prompts]
    targets = [list(tokenizer(text_target=text)["input_ids"]) for text in answers]
    for index, tokens in enumerate(rows):
        if len(tokens) > limit:
            raise DataError(
                f"example {index} has {len(tokens)} tokens, and the model takes {limit}; shorten the prompt"
            )
    return {
        "input_ids": _padded(rows, tokenizer.pad_token_id or 0),
        "attention_mask": _padded([[1] * len(row) for row in rows], 0),
        "labels": _padded(targets, IGNORED_LABEL),
    }


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows])


# ---------------------------------------------------------------------------------------------------------------- tasks


def _has_no_decoder(model: nn.Module) -> bool:
    return not _has_decoder(model)


register(
    "token_classification",
    _TOKENS,
    ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",),
    alignment=SAME,
    columns=("tokens", "labels"),
)
register(
    "frame_classification",
    _TOKENS,
    ("MODEL_FOR_AUDIO_FRAME_CLASSIFICATION_MAPPING_NAMES",),
    alignment=SAME,
    columns=("audio", "labels"),
)
register(
    "seq2seq_lm",
    (*_TOKENS, *_ANSWERS),
    (
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", "EncoderDecoderModel",
        "VisionEncoderDecoderModel", "SpeechEncoderDecoderModel",
    ),
    call=decode,
    alignment=DECODED,
    choose=_choose,
    columns=("text", "target"),
    only=_has_decoder,
)  # fmt: skip
register(
    "masked_lm",
    _TOKENS,
    ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",),
    alignment=SAME,
    columns=("text",),
    only=_has_no_decoder,
)
register(
    "causal_lm",
    (*_TOKENS, *_ANSWERS),
    ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",),
    alignment=NEXT,
    needs=(),
    choose=_choose,
    columns=("text",),
)
register(
    "image_text_lm",
    (*_TOKENS, *_ANSWERS),
    (
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    ),
    alignment=NEXT,
    columns=("image", "text"),
)  # fmt: skip
