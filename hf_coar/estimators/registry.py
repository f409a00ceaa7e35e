"""What an estimator is, and all of them by name.

An estimator of your own is a frozen dataclass whose fields are its settings::

    from dataclasses import dataclass
    from hf_coar import estimators

    @estimators.register("mine")
    @dataclass(frozen=True)
    class Mine(estimators.Estimator):
        n_masks: int = 100

        def parts(self, size):
            return estimators.parts_of(self.n_masks)

        def fit(self, problem):
            outputs = problem.measure(…)  # or problem.compute(…)
            return estimators.Fit(weights, bias)

Then `attribute(method="mine")`, `method=Mine(n_masks=20)`, the command line, budgets and plans know it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar, Self

from hf_coar.errors import BudgetError, CoarError
from hf_coar.runs.engine import Part
from hf_coar.runs.problem import Fit, Problem, Size
from hf_coar.storage.registry import Registry

FORWARD_AND_BACKWARD = 3.0  # cost of a forward and backward pass to the gates, in forward passes
_LARGEST = 10**7  # rounds, masks or steps


class Estimator(ABC):
    """How attributions are made of a problem; the settings are the fields of a frozen dataclass.

    Attributes:
        name: under which it is registered.
        differentiates: whether a gradient must get through the model.
        sizable: whether `sized` can make it cheaper or dearer.
        better: what to take where it predicts little, in words.
    """

    name: ClassVar[str] = ""
    differentiates: ClassVar[bool] = False
    sizable: ClassVar[bool] = False
    better: ClassVar[str] = "a smaller ablated_fraction, or method='auto'"

    @abstractmethod
    def parts(self, size: Size) -> list[Part]:
        """The parts of the passes on every batch, with their cost, or the most of it where that varies."""

    @abstractmethod
    def fit(self, problem: Problem) -> Fit:
        """Estimate the attributions of every example."""

    def settings(self) -> dict[str, Any]:
        """What determines the numbers, as JSON values."""
        return {"name": self.name, **{entry.name: getattr(self, entry.name) for entry in fields(self)}}

    def cost(self, size: Size) -> float:
        """Forward passes an example, or the most of them; a forward and backward pass counts as three."""
        return sum(part.cost for part in self.parts(size))

    def sized(self, passes: float, size: Size) -> Self:
        """An estimator like this one with as many rounds, masks or steps as so many passes an example afford.

        Raises:
            CoarError: not even the smallest is affordable.
        """
        self.check_affordable(passes, size)
        return self

    def bare(self) -> "Estimator":
        """The estimator without what only judges and forecasts, for one that begins from its weights."""
        return self

    def check_affordable(self, passes: float, size: Size) -> None:
        """Raises `BudgetError` if it costs more than so many forward passes an example."""
        cost = self.cost(size)
        if cost > passes:
            raise BudgetError(
                f"a budget of {passes:.4g} forward passes an example is too small: {self!r} costs {cost:g} at "
                f"ablated_fraction={size.ablated_fraction:g}; give more, take fewer examples, or another method"
            )

    def largest(self, field: str, least: int, step: int, passes: float, size: Size) -> Self:
        """With the largest `field` (least, least + step, …) that a budget affords, where the cost grows evenly with it.

        Raises:
            CoarError: not even the least is affordable.
        """
        smallest, next_one = (replace(self, **{field: value}) for value in (least, least + step))
        smallest.check_affordable(passes, size)
        cost = smallest.cost(size)
        slope = next_one.cost(size) - cost
        steps = int((passes - cost) / slope + 1e-9) if slope > 0 else 0
        return replace(self, **{field: min(least + steps * step, _LARGEST)})


ESTIMATORS: Registry[type[Estimator]] = Registry("method")


def register(name: str, replace: bool = False) -> Callable[[type[Estimator]], type[Estimator]]:
    """Decorator: makes a dataclass that is an `Estimator` known as `method=name`.

    Raises:
        CoarError: a name that is taken, or a class that is none.
    """

    def add(estimator: type[Estimator]) -> type[Estimator]:
        if not (isinstance(estimator, type) and issubclass(estimator, Estimator) and is_dataclass(estimator)):
            raise CoarError(f"{estimator!r} is no dataclass that is an Estimator, and cannot be the method {name!r}")
        estimator.name = name
        ESTIMATORS.add(name, estimator, replace=replace)
        return estimator

    return add


def get(method: "str | Estimator") -> Estimator:
    """An estimator by its name, with its own settings; an estimator is taken as it is.

    Raises:
        CoarError: an unknown name, a class in the place of an object, or something else.
    """
    if isinstance(method, str):
        return ESTIMATORS[method]()
    if isinstance(method, type) and issubclass(method, Estimator):
        raise CoarError(f"method={method.__name__} is a class; give an object of it: {method.__name__}()")
    if not isinstance(method, Estimator):
        raise CoarError(
            f"method={method!r} is no estimator; give a name ({', '.join(ESTIMATORS.names())}) or an object such as "
            "hf_coar.PathGradient()"
        )
    return method


def is_whole(value: object, least: int) -> bool:
    """Whether a setting is a whole number, this one at least."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def single_part(kind: str, cost: float, n_numbers: int, differentiates: bool, stop: int = 1) -> list[Part]:
    """One part that holds all passes, numbers 0 … stop - 1 of its kind."""
    return [Part(kind, 0, stop, cost, n_numbers, differentiates)]


__all__: Sequence[str] = (
    "ESTIMATORS",
    "FORWARD_AND_BACKWARD",
    "Estimator",
    "Fit",
    "Part",
    "Problem",
    "Size",
    "get",
    "is_whole",
    "register",
    "single_part",
)
