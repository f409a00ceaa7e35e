"""What a solver is, and the checks that all of them make."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from hf_coar.errors import CoarError
from hf_coar.storage.registry import Registry


class Solver(Protocol):
    """Fits outputs ≈ masks · weights + bias for every example at once; all examples share one factorisation.

    A solver is a frozen dataclass, whose fields are its settings.

    Attributes:
        takes_prior: whether `fit` takes weights known beforehand as a third argument, `prior`, float [examples,
            components]: it fits what they leave over, and takes as much of them as predicts masks that are left out
            best.
    """

    takes_prior: ClassVar[bool]

    def fit(self, masks: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Fit.

        Args:
            masks: bool [masks, components], True = left in place.
            outputs: float [masks, examples].

        Returns:
            weights float32 [examples, components], bias float32 [examples].
        """
        ...


SOLVERS: Registry[type[Solver]] = Registry("solver")


def register(name: str, replace: bool = False) -> Callable[[type[Solver]], type[Solver]]:
    """Decorator: makes a dataclass with a method `fit` known as `solver=name`.

    Raises:
        CoarError: a name that is taken, or a class that is no such dataclass.
    """

    def add(solver: type[Solver]) -> type[Solver]:
        _check_solver(solver)
        SOLVERS.add(name, solver, replace=replace)
        return solver

    return add


def get(solver: str | Solver) -> Solver:
    """A solver by its name, with its own settings; a solver is taken as it is.

    Raises:
        CoarError: an unknown name, a class in the place of an object, or no dataclass with a method `fit`.
    """
    if isinstance(solver, str):
        return SOLVERS[solver]()
    if isinstance(solver, type):
        raise CoarError(f"solver={solver.__name__} is a class; give an object of it: {solver.__name__}()")
    _check_solver(solver)
    return solver


def settings(solver: Solver) -> dict[str, Any]:
    """What determines a solver's numbers, as JSON values."""
    return {"name": type(solver).__name__, **{entry.name: getattr(solver, entry.name) for entry in fields(solver)}}


def _check_solver(solver: Any) -> None:
    if not is_dataclass(solver) or not callable(getattr(solver, "fit", None)):
        name = solver.__name__ if isinstance(solver, type) else type(solver).__name__
        raise CoarError(
            f"the solver {name} is no dataclass with a method fit(masks, outputs): its fields are its settings, which "
            "are recorded; put @dataclass(frozen=True) above the class"
        )
    if not isinstance(getattr(solver, "takes_prior", None), bool):
        raise CoarError(f"the solver {solver!r} does not say whether it takes a prior; give it takes_prior = False")


def check(masks: Tensor, outputs: Tensor, prior: Tensor | None = None) -> None:
    """Raises `CoarError` unless masks, outputs and prior fit together and there are at least 3 masks."""
    n_masks, n_components = masks.shape
    if outputs.shape[0] != n_masks:
        raise CoarError(f"{n_masks} masks and {outputs.shape[0]} rows of outputs; they must be as many")
    if n_masks < 3:
        raise CoarError(f"a regression needs at least 3 masks; got {n_masks}")
    if prior is not None and prior.shape != (outputs.shape[1], n_components):
        raise CoarError(
            f"the prior weights have shape {list(prior.shape)}; expected {[outputs.shape[1], n_components]}, examples "
            "by components"
        )
