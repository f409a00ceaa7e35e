"""The house rules that can be read off the source: imports go down, nothing heavy at import, no print, no pickle."""

import ast
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import hf_coar

PACKAGE = Path(hf_coar.__file__).parent

# A room (a folder or a single file at the top) imports only from rooms on strictly earlier steps.
STEPS: list[set[str]] = [
    {"errors"},
    {"storage"},
    {"models"},
    {"components", "data"},
    {"masking", "attributions"},
    {"runs"},
    {"estimators", "judging"},
    {"editing"},
    {"plots"},
    {"api"},
    {"demo"},
    {"__init__"},
    {"explore"},
    {"cli"},
    {"__main__"},
]
MOST_ROOMS = 16
HEAVY = {
    "accelerate", "datasets", "diffusers", "gradio", "huggingface_hub", "matplotlib", "peft", "safetensors", "timm",
    "torch_geometric", "transformers",
}  # fmt: skip

SOURCES = sorted(PACKAGE.rglob("*.py"))
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def room_of(path: str) -> str:
    """`components/rules.py` lies in `components`, `errors.py` is `errors`."""
    return path.split("/")[0].removesuffix(".py")


ROOMS = {room_of(path) for path in TREES}


def file_of(module: str) -> str:
    """The file of a dotted module of this package."""
    parts = module.split(".")[1:]
    plain = "/".join(parts) + ".py"
    return plain if plain in TREES else "/".join([*parts, "__init__.py"])


def own_imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """(statement, file of this package) for every import of the package itself that runs."""
    never = only_for_types(tree)
    for node in ast.walk(tree):
        if id(node) in never:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "hf_coar":
                    yield node, file_of(alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which step is imported"
            if (node.module or "").split(".")[0] == "hf_coar":
                for alias in node.names:
                    inner = file_of(f"{node.module}.{alias.name}")
                    yield node, inner if inner in TREES else file_of(node.module)


def only_for_types(tree: ast.AST) -> set[int]:
    """What stands under `if TYPE_CHECKING`, and never runs."""
    found = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    return {id(node) for branch in found for statement in branch.body for node in ast.walk(statement)}


def inside_functions(tree: ast.AST) -> set[int]:
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    return {id(node) for function in functions for node in ast.walk(function)}


def module_level_imports(tree: ast.AST) -> set[str]:
    """Libraries imported when the module is, wherever the statement is nested."""
    inside = inside_functions(tree) | only_for_types(tree)
    names = set()
    for node in ast.walk(tree):
        if id(node) not in inside and isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif id(node) not in inside and isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def offences(found: Callable[[ast.AST], list]) -> dict[str, list]:
    """What a law finds in each file that breaks it."""
    return {path: broken for path, tree in TREES.items() if (broken := found(tree))}


def test_every_room_stands_on_one_step():
    on_steps = [name for step in STEPS for name in step]
    assert len(on_steps) == len(set(on_steps))
    assert set(on_steps) == ROOMS


def test_a_stranger_can_take_in_the_top_of_the_package():
    entries = [entry.name for entry in PACKAGE.iterdir() if not entry.name.startswith(("_", "."))]
    assert len(entries) <= MOST_ROOMS, sorted(entries)


def test_imports_only_go_down():
    step_of = {name: number for number, step in enumerate(STEPS) for name in step}
    upwards = {
        (path, target)
        for path, tree in TREES.items()
        for _, target in own_imports(tree)
        if room_of(target) != room_of(path) and step_of[room_of(target)] >= step_of[room_of(path)]
    }
    assert not upwards


def test_no_files_import_each_other_in_a_circle():
    graph = {path: {target for _, target in own_imports(tree)} - {path} for path, tree in TREES.items()}
    # A room's face imports its files, and these name each other by their files, never by the face.
    graph = {path: {target for target in targets if target != _face(path)} for path, targets in graph.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def _face(path: str) -> str:
    return f"{path.rpartition('/')[0]}/__init__.py"


def test_the_package_is_never_imported_inside_a_function():
    def found(tree: ast.AST) -> list[int]:
        inside = inside_functions(tree)
        return [node.lineno for node, _ in own_imports(tree) if id(node) in inside]

    assert not offences(found)


def test_heavy_libraries_are_imported_inside_calls():
    assert not offences(lambda tree: sorted(module_level_imports(tree) & HEAVY))


def test_no_assert():
    assert not offences(lambda tree: [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)])


def only_tensors(tree: ast.AST) -> set[int]:
    """`torch.load` where it is called with `weights_only=True`, spelled out: it lets tensors and plain values in."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"]
    said = {id(call.func): {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords} for call in calls}
    return {function for function, keywords in said.items() if keywords.get("weights_only") == "True"}


def test_one_place_reads_files_of_torch():
    assert list(offences(lambda tree: list(only_tensors(tree)))) == ["models/weight_files.py"]


def test_nothing_is_unpickled():
    libraries = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    functions = {"torch.load", "torch.save", "np.load", "numpy.load"}

    def found(tree: ast.AST) -> list[str]:
        imported = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
        imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        safe = only_tensors(tree)
        named = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in safe]
        attributes = {ast.unparse(node) for node in named}
        return sorted(imported & libraries | attributes & functions)

    assert not offences(found)


def test_the_library_does_not_print():
    def found(tree: ast.AST) -> list[int]:
        called = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        return [node.lineno for node in called if isinstance(node.func, ast.Name) and node.func.id == "print"]

    assert not offences(found)


def test_the_import_is_light():
    code = f"import sys, hf_coar; print(sorted(set({sorted(HEAVY)}) & set(sys.modules)))"
    code += "; import hf_coar.explore; print('gradio' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "False"]


def test_the_fixed_names_are_public():
    promised = {"load", "find_components", "ablate", "attribute", "evaluate", "edit", "Attributions", "Components"}
    promised |= {"PathGradient", "Regression", "Ridge", "Report", "CoarError", "undo", "outputs", "components"}
    assert promised <= set(hf_coar.__all__)
    assert all(hasattr(hf_coar, name) for name in hf_coar.__all__)


def callables() -> list[tuple[str, object]]:
    """Every public function, class and public method of a class."""
    found = []
    for name in hf_coar.__all__:
        value = getattr(hf_coar, name)
        if inspect.ismodule(value):
            continue
        found.append((name, value))
        if inspect.isclass(value):
            for method, inner in vars(value).items():
                inner = inner.__func__ if isinstance(inner, classmethod | staticmethod) else inner
                inner = inner.fget if isinstance(inner, property) else inner
                if inspect.isfunction(inner) and not method.startswith("_"):
                    found.append((f"{name}.{method}", inner))
    return found


def test_public_names_have_docstrings_and_type_hints():
    for name, value in callables():
        own = value.__doc__
        assert own and len(own.split()) >= 2, name
        assert not own.startswith(f"{name}("), f"dataclass made the docstring of {name} up"
        function = value.__init__ if inspect.isclass(value) else value
        if not inspect.isfunction(function):
            continue  # an exception's constructor
        hints = inspect.signature(function)
        parameters = [p for p in hints.parameters.values() if p.name not in ("self", "cls")]
        assert not [p.name for p in parameters if p.annotation is p.empty], name
        assert inspect.isclass(value) or hints.return_annotation is not hints.empty, name


def test_first_sentences_stand_by_themselves():
    """`help()` shows them without what stands around them in the file."""
    lame = ("Of ", "The same", "See ")
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module

    def found(tree: ast.AST) -> list[str]:
        told = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        return [text.split("\n")[0] for text in told if text.startswith(lame)]

    assert not offences(found)


@pytest.mark.parametrize("name", ["components", "outputs"])
def test_public_modules_have_docstrings(name):
    assert getattr(hf_coar, name).__doc__
