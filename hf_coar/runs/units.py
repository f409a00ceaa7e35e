"""Units: outputs of any size are attributed in a unit near their own, and what is found is told in theirs.

Squares of float32 are lost below 1e-19 and above 1e19, and floors that keep divisors from zero suppose effects that are
not tiny. A power of two as unit changes no digit, so that nothing else depends on it.
"""

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from hf_coar.models.outputs import Output

_USUAL = 16  # powers of two up or down that are left as they are: all outputs of models as people have them


def unit_of(values: Tensor) -> float:
    """The power of two next above some outputs; 1 where they are of a usual size, all zero, or none at all.

    Args:
        values: float32 [examples], with nothing ablated.
    """
    sizes = values.abs()[values.isfinite()]
    exponent = math.frexp(float(sizes.max()))[1] if len(sizes) else 0
    return 1.0 if abs(exponent) <= _USUAL else 2.0**exponent


def measured_in(output: Output, unit: float) -> Output:
    """The output in a unit."""
    if unit == 1:
        return output

    def function(*arguments: Any, **options: Any) -> Tensor:
        return output.function(*arguments, **options) / unit

    return replace(output, function=function, boundary=output.boundary and output.boundary / unit)
