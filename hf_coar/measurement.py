"""Measuring: the model's outputs under masks, which the regression fits and the evaluation judges by."""

import torch
from torch import Tensor, nn

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.components import Components
from hf_coar.engine import Part, run
from hf_coar.errors import NonFiniteOutputError
from hf_coar.masking import ablate
from hf_coar.outputs import Output
from hf_coar.sampling import Masks
from hf_coar.store import Store

MASKS_A_UNIT = 64  # passes between two writes to the disk


def parts_of(masks: Masks, kind: str = "masks") -> list[Part]:
    """The masks in parts of at most `MASKS_A_UNIT`."""
    bounds = range(0, masks.count, MASKS_A_UNIT)
    return [Part(kind, i, stop := min(i + MASKS_A_UNIT, masks.count), float(stop - i)) for i in bounds]


def measure(
    store: Store,
    model: nn.Module,
    data: object,
    components: Components,
    output: Output,
    masks: Masks,
    kind: str = "masks",
    progress: bool = True,
) -> tuple[Tensor, data_module.Identity]:
    """Outputs of every example under every mask.

    Returns:
        outputs float32 [masks, examples], and by what the examples are known again.

    Raises:
        NonFiniteOutputError: the model gave NaN or infinity; says for which example and mask.
    """

    def compute(batch: data_module.Batch, first: int, part: Part) -> dict[str, Tensor]:
        columns = []
        with torch.no_grad():
            for index, kept in enumerate(masks.rows(part.start, part.stop), start=part.start):
                with ablate(model, components, kept):
                    values = output(models.logits(model, batch), batch)
                check_finite(values, first, f"mask {index} ({masks.ablated_fraction:.3g} ablated)", output)
                columns.append(values.cpu())
        return {"outputs": torch.stack(columns, dim=1)}

    parts = parts_of(masks, kind)
    n_examples = run(
        store, model, data, parts, compute, f"masked passes, {masks.ablated_fraction:.3g} ablated", progress
    )
    gathered = [store.gather(part.name, n_examples) for part in parts]
    return torch.cat([results["outputs"] for results in gathered], dim=1).T, data_module.Identity.of(gathered[0])


def check_finite(values: Tensor, first: int, where: str, output: Output) -> None:
    """Raises `NonFiniteOutputError` naming the first example (counted from `first`) whose value is NaN or infinite."""
    bad = (~values.isfinite()).nonzero().flatten()
    if len(bad):
        example = first + int(bad[0])
        raise NonFiniteOutputError(
            f"output {output.name!r} of example {example} is {float(values[bad[0]])} under {where}; look at that "
            "example, try a higher precision or a smaller ablated_fraction. What was finished before is kept"
        )
