"""Measuring: the model's outputs under masks, which the regression fits and the evaluation judges by."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from hf_coar import data as data_module
from hf_coar.errors import CoarError, NonFiniteOutputError
from hf_coar.masking import MaskedModel
from hf_coar.models.outputs import Output
from hf_coar.runs.captured import MASKED, CapturedPasses
from hf_coar.runs.engine import Part, current
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
        self._passes = CapturedPasses(self._run, masked.model, MASKED, output.identity)
        self._by_hooks: bool | None = None  # not known before the first pass of a batch

    def compute(self, batch: data_module.Batch, first: int, part: Part) -> dict[str, Tensor]:
        """Outputs float32 [examples, masks of the part]."""
        found = []
        self._passes.begin_batch(part.stop - part.start)
        self._by_hooks = None
        with torch.no_grad():
            for kept in self.masks.rows(part.start, part.stop).split(self.together):
                found.append(self._one(batch, kept[0])[None] if len(kept) == 1 else self._several(batch, kept))
            # Looked at once a part: on an accelerator every look waits for all that is under way.
            outputs = torch.cat(found).cpu()
        where = f"({self.masks.ablated_fraction:.3g} ablated)"
        for index in (~outputs.isfinite()).any(1).nonzero().flatten().tolist():
            check_finite(outputs[index], first, f"mask {part.start + index} {where}", self.output)
        return {"outputs": outputs.T.contiguous()}

    def _run(self, batch: data_module.Batch) -> tuple[Tensor]:
        return (self.output.of(self.masked.model, batch),)

    def _one(self, batch: data_module.Batch, kept: Tensor) -> Tensor:
        in_weights = self.masked.is_in_weights(kept)
        if in_weights and self._by_hooks is None:
            with self._watched(batch), self.masked.ablated(kept):
                return self._passes(batch)[0]
        if in_weights and self._by_hooks:
            try:
                with self.masked.ablated(kept, how="hooks"):
                    return self._run(batch)[0]
            except CoarError as error:  # a module that does not run as one, say
                logger.debug("masks go by weights: %s", error)
                self._by_hooks = False
        with self.masked.ablated(kept):
            return (self._passes if in_weights else self._run)(batch)[0]  # weights change in place: graphs read them

    @contextmanager
    def _watched(self, batch: data_module.Batch) -> Iterator[None]:
        """A pass of the batch, which tells whether others are sooner done by hooks, with the same bits."""
        across, seen = self.masked.across, []
        own_code = current().compile in (False, "auto") and data_module.device_of(batch).type == "cpu"
        if across is None or not own_code:
            self._by_hooks = False
            yield
            return
        name, width = across
        module = self.masked.model.get_submodule(name)
        note = module.register_forward_pre_hook(
            lambda _, given: seen.extend(one.numel() // one.shape[-1] for one in given[:1] if isinstance(one, Tensor))
        )
        try:
            yield
        finally:
            note.remove()
        self._by_hooks = bool(seen) and max(seen) <= width

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


class OwnMaskedPasses:
    """Masked passes of one run in which every example has a mask of its own; call it with a batch and masks."""

    def __init__(self, masked: MaskedModel, output: Output) -> None:
        """Nothing has run yet."""
        self.masked, self.output = masked, output
        stand_in = masked.components.stand_in
        alone = stand_in is None or not stand_in.of_partners
        what = ("own masks", masked.components, output.identity)
        self._passes = CapturedPasses(self._run, masked.model, MASKED, what, possible=alone)

    def begin_batch(self, n_passes: int) -> None:
        """Other examples come, for so many passes."""
        self._passes.begin_batch(n_passes)

    @torch.no_grad()
    def __call__(self, batch: data_module.Batch, kept: Tensor) -> Tensor:
        """Outputs float32 [examples] under masks, bool [examples, components]."""
        return (self._passes if kept.is_cuda else self._run)(batch, kept)[0]

    def _run(self, batch: data_module.Batch, kept: Tensor) -> tuple[Tensor]:
        if not kept.is_cuda:
            with self.masked.ablated(kept, how="hooks"):
                return (self.output.of(self.masked.model, batch),)
        # Gates that are to be differentiated are not looked at, for which the device would finish what is under way.
        gates = [part.float().requires_grad_() for part in kept.split(self.masked.components.sizes(), dim=1)]
        with self.masked.gated(gates) as fired:
            values = self.output.of(self.masked.model, batch)
        if fired.ran:
            fired.check()
        return (values.detach(),)


def check_finite(values: Tensor, first: int, where: str, output: Output) -> None:
    """Raises `NonFiniteOutputError` naming the first example (counted from `first`) whose value is NaN or infinite."""
    bad = (~values.isfinite()).nonzero().flatten()
    if len(bad):
        example = first + int(bad[0])
        raise NonFiniteOutputError(
            f"output {output.name!r} of example {example} is {float(values[bad[0]])} under {where}; look at that "
            "example, try a higher precision or a smaller ablated_fraction. What was finished before is kept"
        )
