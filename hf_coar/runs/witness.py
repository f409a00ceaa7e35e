"""A witness: outputs of the first examples with nothing ablated, by which what computes them is known again.

Weights have a fingerprint, examples have hashes, and a function has a name, which tells nothing of what it does: two
closures are called the same, and so is a function before and after it was edited. What it gives does tell, and with it
whether the call and all that a model does beside its weights are the same.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_coar import models
from hf_coar.data import Batch, Identity
from hf_coar.errors import CoarError, CorruptFileError, RunMismatchError
from hf_coar.models.outputs import Output
from hf_coar.runs.checks import rounding
from hf_coar.runs.preflight import First
from hf_coar.storage import files

logger = logging.getLogger(__name__)

_FILE, _OUTPUTS = "witness.safetensors", "outputs"
_EXAMPLES = 8
# Times what two runs in one place may differ by: on another device convolutions of float32 may be in lower precision
# (cuDNN's default), and margins of half precision, differences of larger numbers, be off by a good part of themselves.
_ELSEWHERE, _HALF = 100, 0.3
_NOTHING = 1e-5  # what is as small may be rounding alone, as the distance of a model from itself


@dataclass(frozen=True)
class Witness:
    """What an output is of a few examples, with nothing ablated.

    Attributes:
        output: which.
        values: float32 [examples].
        identity: of the examples.
        tolerance: by how much of the largest they may be off.
    """

    output: Output
    values: Tensor
    identity: Identity
    tolerance: float

    @classmethod
    def of(cls, model: nn.Module, output: Output, first: First) -> "Witness":
        """What the first examples give; of none where not even one fits into memory, which the run itself says."""

        def look(batch: Batch) -> Witness:
            with torch.no_grad():
                values = output.of(model, batch).cpu()
            return cls(output, values, Identity.of_batch(batch), min(_HALF, _ELSEWHERE * rounding(model)))

        try:
            return first.tried(model, look, _EXAMPLES)
        except (RuntimeError, MemoryError) as error:
            if not models.is_out_of_memory(error):
                raise
            return cls(output, torch.zeros(0), Identity(), 0.0)

    def check_run(self, folder: Path) -> None:
        """Compare with what began the run in a folder; the first one is kept there.

        Raises:
            RunMismatchError: the same examples have other outputs.
        """
        if not len(self.values):
            return
        path = folder / _FILE
        try:
            found = files.read_tensors(path) if path.exists() else {}
        except CorruptFileError as error:
            logger.warning("%s; it is written anew", error)
            found = {}
        if not found:
            files.write_tensors(path, {_OUTPUTS: self.values, **self.identity.columns()})
            return
        if said := self._unlike(found[_OUTPUTS], Identity.of(found), self.tolerance):
            raise RunMismatchError(f"{folder} holds a run in which {said}. Choose another folder, or go back to that")

    def check_attributed(self, values: Tensor, identity: Identity, dtype: str | None) -> None:
        """Compare with unablated outputs of attributions, [examples], made in that precision.

        Raises:
            CoarError: the same examples have other outputs.
        """
        said = self._unlike(values, identity, self.tolerance if dtype is None else _HALF)
        if said:
            raise CoarError(f"in these attributions {said}. Give the output and the call that were attributed")

    def _unlike(self, values: Tensor, identity: Identity, tolerance: float) -> str:
        """What differs of the examples that are the same; empty if nothing does."""
        count = min(len(self.identity), len(identity))
        ours, theirs = (one.rows(slice(count)) for one in (self.identity, identity))
        if not count or ours.hashes.keys() != theirs.hashes.keys():
            return ""
        known = torch.stack([(one == theirs.hashes[name]).all(1) for name, one in ours.hashes.items()]).all(0)
        was, now = values[:count][known].double(), self.values[:count][known].double()
        if not len(was):
            return ""
        off = (was - now).abs().nan_to_num(0, 0, 0)
        if float(off.max()) <= max(_NOTHING, tolerance * float(torch.maximum(was.abs(), now.abs()).max())):
            return ""
        place = int(off.argmax())
        return (
            f"output {self.output.name!r} of example {int(known.nonzero()[place])} is {float(was[place]):.5g} with "
            f"nothing ablated, and now it is {float(now[place]):.5g}: the function, the call, or what the model does "
            "beside its weights is another one"
        )
