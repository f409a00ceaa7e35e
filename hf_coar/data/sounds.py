"""Sounds as batches, with a label or with what is said in them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_coar.data import preprocessors
from hf_coar.data.batches import Batch
from hf_coar.data.columns import Role, is_text
from hf_coar.data.kinds import KINDS, Kind, Preparation, Reading, by_roles
from hf_coar.errors import DataError
from hf_coar.models import library, tasks
from hf_coar.models.outputs import IGNORED_LABEL

_INPUTS = ("input_values", "input_features")


def _is_sound(feature: Any) -> bool:
    """Whether a column holds sounds: files, or lists of numbers."""
    inner = getattr(feature, "feature", None)
    return type(feature).__name__ == "Audio" or str(getattr(inner, "dtype", "")).startswith("float")


AUDIO = Role("audio", _is_sound, ("audio", "speech", "sound", "file"), "a sound")
SAID = Role("text", is_text, ("text", "sentence", "transcription", "transcript", "normalized_text"), "what is said")


def _hears(model: nn.Module) -> bool:
    return library(model) == "transformers" and getattr(model, "main_input_name", None) in _INPUTS


def _reads(model: nn.Module) -> int:
    return 2 if _hears(model) and tasks.of(model).name == "audio_classification" else 0


def _reads_speech(model: nn.Module) -> int:
    return 3 if _hears(model) and tasks.of(model).name in ("ctc", "seq2seq_lm") else 0


def wave(sound: Any, rate: int) -> Tensor:
    """A sound as float32 [samples], one channel.

    Args:
        sound: a list of numbers, a mapping with `array` and `sampling_rate`, or what `datasets` decodes.
        rate: samples a second that the model wants.

    Raises:
        DataError: it has another rate.
    """
    found = rate
    if hasattr(sound, "get_all_samples"):
        samples = sound.get_all_samples()
        sound, found = samples.data, samples.sample_rate
    elif isinstance(sound, Mapping):
        sound, found = sound.get("array"), sound.get("sampling_rate", rate)
    if found != rate:
        raise DataError(
            f"a sound has {found} samples a second, and the model wants {rate}: "
            f"dataset.cast_column(…, datasets.Audio(sampling_rate={rate}))"
        )
    values = torch.as_tensor(sound, dtype=torch.float32)
    return values.mean(0) if values.dim() == 2 else values


def _build(reading: Reading) -> Preparation:
    from transformers import AutoFeatureExtractor

    extractor = preprocessors.load(AutoFeatureExtractor, reading.model, "feature extractor", reading.preprocessor)
    column = reading.columns["audio"]

    def prepare(rows: Sequence[Mapping[str, Any]]) -> Batch:
        return reading.labelled(_heard(extractor, rows, column), rows)

    return Preparation(prepare, lambda row: _show(wave(row[column], extractor.sampling_rate), extractor))


def _build_speech(reading: Reading) -> Preparation:
    from transformers import AutoProcessor

    processor = preprocessors.load(AutoProcessor, reading.model, "processor", reading.preprocessor)
    extractor, tokenizer = processor.feature_extractor, processor.tokenizer
    column, said = reading.columns["audio"], reading.columns["text"]

    def prepare(rows: Sequence[Mapping[str, Any]]) -> Batch:
        words = tokenizer([row[said] for row in rows], padding=True, return_tensors="pt")
        labels = words["input_ids"].where(words["attention_mask"].bool(), IGNORED_LABEL)
        return {**_heard(extractor, rows, column), "labels": labels}

    return Preparation(prepare, lambda row: _show(wave(row[column], extractor.sampling_rate), extractor))


def _heard(extractor: Any, rows: Sequence[Mapping[str, Any]], column: str) -> Batch:
    rate = extractor.sampling_rate
    waves = [wave(row[column], rate).numpy() for row in rows]
    # Recognisers of speech want 30 seconds whatever the sound is; all others the longest of the batch.
    padding = "max_length" if hasattr(extractor, "chunk_length") else True
    return dict(extractor(waves, sampling_rate=rate, padding=padding, return_tensors="pt"))


def _show(samples: Tensor, extractor: Any) -> str:
    return f"a sound of {len(samples) / extractor.sampling_rate:.2f} seconds"


KINDS.add("sound", Kind("sound", (AUDIO,), _reads, by_roles((AUDIO,)), _build, lazy=("audio",)))
KINDS.add(
    "sound and what is said in it",
    Kind("sound and what is said in it", (AUDIO, SAID), _reads_speech, by_roles((AUDIO, SAID)), _build_speech),
)
