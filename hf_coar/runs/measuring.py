"""Measuring: the model's outputs under masks, which the regression fits and the evaluation judges by."""

import logging
from collections.abc import Hashable

import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.errors import CoarError, NonFiniteOutputError
from hf_coar.masking import MaskedModel
from hf_coar.models import calling, checked, launched
from hf_coar.models.outputs import Output
from hf_coar.runs.engine import Part, current
from hf_coar.runs.running import rounding
from hf_coar.runs.sampling import MaskSequence

logger = logging.getLogger(__name__)

MASKS_A_UNIT = 64  # passes between two writes to the disk


def parts_of(n_masks: int, kind: str = "masks") -> list[Part]:
    """The masks in parts of at most `MASKS_A_UNIT`, of a forward pass each."""
    bounds = range(0, n_masks, MASKS_A_UNIT)
    stops = [min(start + MASKS_A_UNIT, n_masks) for start in bounds]
    return [Part(kind, i, stop, float(stop - i), stop - i) for i, stop in zip(bounds, stops, strict=True)]


class MaskedPasses:
    """The masked passes of one run, over any batch."""

    def __init__(self, masked: MaskedModel, output: Output, masks: MaskSequence) -> None:
        """Nothing has run yet."""
        self.masked, self.output, self.masks = masked, output, masks
        self.together = current().masks_together
        self._forward = _Forward(masked.model, output)

    def compute(self, batch: data_module.Batch, first: int, part: Part) -> dict[str, Tensor]:
        """Outputs float32 [examples, masks of the part]."""
        found = []
        self._forward.begin_batch(part.stop - part.start)
        with torch.no_grad():
            for kept in self.masks.rows(part.start, part.stop).split(self.together):
                found.append(self._one(batch, kept[0])[None] if len(kept) == 1 else self._several(batch, kept))
            # Looked at once a part: on an accelerator every look waits for all that is under way.
            outputs = torch.cat(found).cpu()
        where = f"({self.masks.ablated_fraction:.3g} ablated)"
        for index in (~outputs.isfinite()).any(1).nonzero().flatten().tolist():
            check_finite(outputs[index], first, f"mask {part.start + index} {where}", self.output)
        return {"outputs": outputs.T.contiguous()}

    def _one(self, batch: data_module.Batch, kept: Tensor) -> Tensor:
        in_weights = self.masked.is_in_weights(kept)
        with self.masked.ablated(kept):
            return self._forward(batch) if in_weights else self.output.of(self.masked.model, batch)

    def _several(self, batch: data_module.Batch, kept: Tensor) -> Tensor:
        """Outputs [masks, examples] of one forward pass over a copy of the batch for every mask."""
        count = data_module.size(batch)
        copies = data_module.take(batch, torch.arange(count).repeat(len(kept)))
        try:
            with self.masked.ablated(kept.repeat_interleave(count, dim=0), how="hooks"):
                values = self.output.of(self.masked.model, copies)
        except CoarError as error:
            logger.warning("masks go one at a time, not %d together: %s", self.together, error)
            self.together = 1
            return torch.stack([self._one(batch, row) for row in kept])
        return values.view(len(kept), count)


_WORTH = 16  # passes over a batch; recording takes about as long as five


class _Forward:
    """The outputs of batches by one model whose weights change, launched as one on a CUDA device.

    Whether a recording gives what the model's own code gives, every batch shows in its second pass, and the batch that
    it is made with in its third: under another mask than it knows.
    """

    def __init__(self, model: nn.Module, output: Output) -> None:
        self._model, self._output = model, output
        self._possible = True
        self._recordings: dict[Hashable, launched.Recording] = {}
        self._passes, self._trusted, self._worth = 0, False, False

    def begin_batch(self, n_passes: int) -> None:
        """Other examples come, for so many passes."""
        self._passes, self._trusted, self._worth = 0, False, n_passes >= _WORTH

    def __call__(self, batch: data_module.Batch) -> Tensor:
        """Outputs float32 [examples]."""
        key = self._key(batch) if self._worth and self._possible else None
        if key is None:
            return self._output.of(self._model, batch)
        if self._trusted:
            calling.tell()
            return self._replayed(key, batch)
        found = self._output.of(self._model, batch)
        self._passes += 1
        if self._passes >= 2:
            self._prepare(key, batch, found)
        return found

    @staticmethod
    def _key(batch: data_module.Batch) -> Hashable | None:
        """What one recording is good for; None where there is none."""
        if current().compile != "auto" or not all(isinstance(one, Tensor) and one.is_cuda for one in batch.values()):
            return None
        return current().dtype, *((name, tuple(one.shape), one.dtype, one.device) for name, one in batch.items())

    def _replayed(self, key: Hashable, batch: data_module.Batch) -> Tensor:
        return self._recordings[key](*batch.values())[0]

    def _prepare(self, key: Hashable, batch: data_module.Batch, found: Tensor) -> None:
        """Make a recording, or let the batch's other passes be launched as one if it gives what was found."""
        try:
            if key in self._recordings:
                launched.check_equal([found], [self._replayed(key, batch)], rounding())
                self._trusted = True
            else:
                self._recordings = {key: self._recorded(batch)}  # the last batch may be shorter; one is kept
        except Exception as error:  # whatever a model's own code does
            self._possible, self._recordings = False, {}
            torch.cuda.empty_cache()
            lines = str(error).strip().splitlines() or [""]
            name = type(self._model).__name__
            logger.info("masked passes of %s run as its own code: %s: %s", name, type(error).__name__, lines[0][:200])

    def _recorded(self, batch: data_module.Batch) -> launched.Recording:
        names, weights = list(batch), [*self._model.parameters(), *self._model.buffers()]
        if any(one.is_meta for one in weights):
            raise ValueError("parts of it are kept elsewhere")

        def run(*inputs: Tensor) -> tuple[Tensor]:
            return (self._output.of(self._model, dict(zip(names, inputs, strict=True))),)

        with models.state_kept(self._model), checked.passed(), calling.unheard():
            return launched.Recording(run, list(batch.values()), weights)


def check_finite(values: Tensor, first: int, where: str, output: Output) -> None:
    """Raises `NonFiniteOutputError` naming the first example (counted from `first`) whose value is NaN or infinite."""
    bad = (~values.isfinite()).nonzero().flatten()
    if len(bad):
        example = first + int(bad[0])
        raise NonFiniteOutputError(
            f"output {output.name!r} of example {example} is {float(values[bad[0]])} under {where}; look at that "
            "example, try a higher precision or a smaller ablated_fraction. What was finished before is kept"
        )
