"""Registries: names, names that are taken, definitions that run again, and messages."""

import sys
import types

import pytest
from torch import nn

from hf_coar.errors import CoarError
from hf_coar.storage.registry import Registry

CELL = "def {name}(x):\n    return x + {step}\n"


def cell(name="mine", step=1, module="__main__"):
    """A function as a notebook's cell defines it: another object every time the cell runs."""
    namespace = {"__name__": module}
    exec(CELL.format(name=name, step=step), namespace)
    return namespace[name]


@pytest.fixture
def registry():
    found = Registry("sauce")
    found.register("pesto")(cell("pesto", module="kitchen"))
    return found


def test_what_is_registered_is_found(registry):
    @registry.register("salsa", "verde")
    def salsa(x):
        return x

    assert registry["salsa"] is salsa and registry["verde"] is salsa
    assert list(registry) == ["pesto", "salsa", "verde"] == registry.names()
    assert len(registry) == 3 and "salsa" in registry and "sal" not in registry and 3 not in registry
    assert dict(registry.items())["salsa"] is salsa


def test_a_taken_name_raises_and_changes_nothing(registry):
    before = registry["pesto"]
    with pytest.raises(CoarError, match=r"sauce 'pesto' is taken by kitchen\.pesto.*__main__\.mine.*replace=True"):
        registry.register("rosso", "pesto")(cell())
    assert registry["pesto"] is before and "rosso" not in registry
    mine = cell()
    registry.register("pesto", replace=True)(mine)
    assert registry["pesto"] is mine


def test_a_cell_that_runs_again_takes_the_place_of_its_first_run(registry):
    registry.register("mine")(cell(step=1))
    registry.register("mine")(cell(step=2))
    assert registry["mine"](0) == 2
    with pytest.raises(CoarError, match="taken"):
        registry.register("mine")(cell("other"))
    with pytest.raises(CoarError, match="taken"):
        registry.register("mine")(cell(module="elsewhere"))


def test_what_a_function_makes_is_never_taken_for_a_second_run(registry):
    def make(step):
        return lambda x: x + step

    for of_one, of_two in ((make(1), make(2)), (lambda x: x, lambda x: -x)):
        registry.register("made", replace=True)(of_one)
        registry.register("made")(of_one)  # the very same object is no other
        with pytest.raises(CoarError, match="taken"):
            registry.register("made")(of_two)


def test_a_value_may_wrap_what_was_defined(registry):
    for step in (1, 2):
        registry.add("wrapped", ("unit", step), cell(step=step))
    assert registry["wrapped"] == ("unit", 2)
    with pytest.raises(CoarError, match=r"taken by __main__\.mine"):
        registry.add("wrapped", ("unit", 3), cell("other"))


def test_objects_are_no_definitions(registry):
    registry.add("three", 3)
    registry.add("three", 3)
    with pytest.raises(CoarError, match="taken"):
        registry.add("three", 4)


def test_unknown_names_list_what_there_is(registry):
    with pytest.raises(CoarError, match=r"unknown sauce 'pseto' \(did you mean 'pesto'\?\); there are pesto"):
        registry["pseto"]
    with pytest.raises(CoarError, match=r"unknown sauce 'x'; there are pesto"):
        del registry["x"]
    del registry["pesto"]
    with pytest.raises(CoarError, match="there are none"):
        registry["pesto"]


def test_a_decorator_without_its_parentheses_is_an_error(registry):
    with pytest.raises(CoarError, match="a name in quotation marks"):
        registry.register(cell())
    with pytest.raises(CoarError, match="none was given"):
        registry.register()
    with pytest.raises(CoarError, match="a name in quotation marks"):
        registry.register("")(cell())


def test_a_class_and_its_dotted_path_are_one_key():
    registry = Registry("rule", of_classes=True)
    registry.register(nn.Linear, "timm.layers.linear.Linear")(cell())
    assert nn.Linear in registry and "torch.nn.modules.linear.Linear" in registry and nn.Conv2d not in registry
    assert registry[nn.Linear] is registry["timm.layers.linear.Linear"]
    with pytest.raises(CoarError, match=r"rule 'torch\.nn\.modules\.linear\.Linear' is taken"):
        registry.register("torch.nn.modules.linear.Linear")(cell("other"))
    with pytest.raises(CoarError, match="a module class or its dotted path"):
        registry.register(cell())


def test_a_class_is_known_by_every_path_that_a_library_shows_it_under(monkeypatch):
    """`torch.nn.Linear` is the same key, and a library that is loaded later shows what its names stand for."""
    registry = Registry("rule", of_classes=True)
    registry.register("torch.nn.Linear", "a_library.Layer")(cell())
    assert nn.Linear in registry and "torch.nn.Linear" in registry
    with pytest.raises(CoarError, match=r"rule 'torch\.nn\.modules\.linear\.Linear' is taken"):
        registry.register(nn.Linear)(cell("other"))
    registry.settle()
    assert "a_library.Layer" in registry, "not loaded: nobody knows"
    library, layer = types.ModuleType("a_library"), type("Layer", (nn.Module,), {"__module__": "a_library.inside"})
    library.Layer = layer
    monkeypatch.setitem(sys.modules, "a_library", library)
    registry.settle()
    assert registry[layer] is registry[nn.Linear] and list(registry) == [
        "torch.nn.modules.linear.Linear",
        "a_library.inside.Layer",
    ]
