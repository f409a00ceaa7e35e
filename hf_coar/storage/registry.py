"""What is known by name: outputs, component rules, estimators, solvers, editing rules, each kind in a `Registry`.

A registry of a kind takes one line, and its decorator is what users see::

    METHODS: Registry[type] = Registry("method")

    @METHODS.register("leave_one_out")
    class LeaveOneOut: ...

    METHODS["leave_one_out"]
"""

import difflib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

from hf_coar.errors import CoarError

Value = TypeVar("Value")


def dotted(thing: Any) -> str:
    """Where a function or class is defined, such as `torch.nn.modules.linear.Linear`."""
    named = thing if hasattr(thing, "__module__") and hasattr(thing, "__qualname__") else type(thing)
    return f"{named.__module__}.{named.__qualname__}"


def _own_path(path: str) -> str:
    """The path where the class that a library shows under this one is defined; the path itself until it is loaded."""
    module, _, name = path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return dotted(found) if isinstance(found, type) else path


class Registry(Generic[Value]):
    """Things of one kind by name, in the order in which they were registered.

    A name that is taken raises: nobody's margin becomes another's without a word. The one exception is the same
    definition that runs again, in a notebook's cell, by a reload of its module: a function or class at the top of a
    module, of the same module and name as the one that is there, takes its place. To put something else in its place,
    say `replace=True`.

    Args:
        kind: what the things are called in messages, such as "output".
        of_classes: keys are module classes or their dotted paths, which are the same key (`torch.nn.Linear` too, where
            `torch.nn.modules.linear.Linear` is meant); else they are plain names.
    """

    def __init__(self, kind: str, of_classes: bool = False) -> None:
        """An empty registry of a kind."""
        self.kind = kind
        self._of_classes = of_classes
        self._values: dict[str, Value] = {}
        self._defined: dict[str, Any] = {}  # what was decorated, which may be wrapped in the value

    def register(self, *keys: str | type, replace: bool = False) -> Callable[[Value], Value]:
        """Decorator: makes a function or class known by one or more names.

        Raises:
            CoarError: no name, a name that is none (`@register` without its parentheses), or one that is taken.
        """
        names = [self._name(key) for key in keys]
        if not names:
            raise CoarError(f"a {self.kind} is registered under {self._wanted()}, and none was given")

        def add(value: Value) -> Value:
            for name in names:
                self._check_free(name, value, replace)
            for name in names:
                self.add(name, value, replace=replace)
            return value

        return add

    def add(self, key: str | type, value: Value, defined: Any = None, replace: bool = False) -> None:
        """Makes `value` known; `defined` is the function or class that a user wrote, where the value wraps it.

        Raises:
            CoarError: as of `register`.
        """
        name, defined = self._name(key), value if defined is None else defined
        self._check_free(name, defined, replace)
        self._values[name], self._defined[name] = value, defined

    def settle(self) -> None:
        """Classes that were named by another path before their library was loaded are known by their own from now on.

        Raises:
            CoarError: that one is taken.
        """
        for name in [name for name in self._values if self._name(name) != name]:
            value, defined = self._values.pop(name), self._defined.pop(name)
            self.add(name, value, defined)

    def names(self) -> list[str]:
        """All names in alphabetical order."""
        return sorted(self._values)

    def items(self) -> list[tuple[str, Value]]:
        """All names with what they stand for."""
        return list(self._values.items())

    def __getitem__(self, key: str | type) -> Value:
        """What is known by this name.

        Raises:
            CoarError: nothing is; the message lists what there is, and the name that is nearest.
        """
        name = self._name(key)
        if name not in self._values:
            near = difflib.get_close_matches(name, self._values, 1)
            meant = f" (did you mean {near[0]!r}?)" if near else ""
            raise CoarError(f"unknown {self.kind} {name!r}{meant}; there are {', '.join(self.names()) or 'none'}")
        return self._values[name]

    def __delitem__(self, key: str | type) -> None:
        """Forgets a name.

        Raises:
            CoarError: nothing is known by it.
        """
        self[key]
        del self._values[self._name(key)], self._defined[self._name(key)]

    def __contains__(self, key: object) -> bool:
        """Whether something is known by this name; False for what can be no name."""
        return isinstance(key, str | type) and self._name(key) in self._values

    def __iter__(self) -> Iterator[str]:
        """All names, the first registered first."""
        return iter(list(self._values))

    def __len__(self) -> int:
        """How many names there are."""
        return len(self._values)

    def __repr__(self) -> str:
        """Such as `Registry('sauce': pesto, salsa)`."""
        return f"Registry({self.kind!r}: {', '.join(self._values)})"

    def _name(self, key: Any) -> str:
        if isinstance(key, str) and key:
            return _own_path(key) if self._of_classes else key
        if self._of_classes and isinstance(key, type):
            return dotted(key)
        raise CoarError(f"a {self.kind} is known by {self._wanted()}, not by {key!r}")

    def _wanted(self) -> str:
        return "a module class or its dotted path" if self._of_classes else "a name in quotation marks"

    def _check_free(self, name: str, defined: Any, replace: bool) -> None:
        if replace or name not in self._defined:
            return
        there = self._defined[name]
        if there is defined or _runs_again(there, defined):
            return
        raise CoarError(
            f"the {self.kind} {name!r} is taken by {dotted(there)}; choose another name for {dotted(defined)}, or say "
            "replace=True to put it in its place"
        )


class Bound:
    """The functions of a registry as methods of a thing, which is their first argument: `a.plot.layers()`."""

    def __init__(self, registry: Registry[Callable], thing: Any) -> None:
        """Nothing is called yet."""
        self._registry, self._thing = registry, thing

    def __getattr__(self, name: str) -> Callable:
        """A function, with the thing as its first argument."""
        if name.startswith("_"):
            raise AttributeError(name)
        return partial(self._registry[name], self._thing)

    def __dir__(self) -> list[str]:
        """The functions that there are."""
        return self._registry.names()


def _runs_again(there: Any, defined: Any) -> bool:
    """Whether both are one definition at the top of a module; what functions make (`<locals>`, lambdas) may differ."""
    named = hasattr(defined, "__module__") and hasattr(defined, "__qualname__")
    return named and "<" not in defined.__qualname__ and dotted(there) == dotted(defined)
