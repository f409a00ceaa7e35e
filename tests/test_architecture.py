"""The house rules that can be read off the source: imports go down, nothing heavy at import, no print, no pickle."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hf_coar

PACKAGE = Path(hf_coar.__file__).parent

# A module may import only from strictly earlier steps; a package counts as one module.
STEPS: list[set[str]] = [
    {"errors"},
    {"files", "sampling", "solvers", "outputs", "cards", "hub", "tracking"},
    {"models", "store", "layout", "rows", "artefact", "workers", "progress"},
    {"components", "data"},
    {"sites", "weights", "engine", "attributions"},
    {"masking"},
    {"fit", "measurement", "delta_reads", "shrinkage", "gradients", "stability"},
    {"gate_passes"},
    {"gate_rounds", "outliers"},
    {"regression", "path_gradient", "evaluation", "editing", "edited", "folders", "baselines", "allowance"},
    {"live", "plots", "budget"},
    {"report"},
    {"pipeline"},
    {"demo"},
    {"__init__"},
    {"explore"},
    {"cli"},
    {"__main__"},
]
HEAVY = {"transformers", "timm", "datasets", "matplotlib", "accelerate", "safetensors", "huggingface_hub", "gradio"}

SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "model_cards" not in path.parts)
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
TOP_LEVEL = {path.removesuffix(".py") if "/" not in path else path.split("/")[0] for path in TREES}


def module_of(path: str) -> str:
    """`components/rules.py` belongs to `components`, `files.py` is `files`."""
    return path.split("/")[0] if "/" in path else path.removesuffix(".py")


def own_imports(tree: ast.AST) -> list[tuple[ast.stmt, str]]:
    """(statement, imported module of this package) for every import of the package itself."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "hf_coar":
                    found.append((node, [*alias.name.split("."), "__init__"][1]))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which step is imported"
            if node.module == "hf_coar":
                found += [(node, alias.name if alias.name in TOP_LEVEL else "__init__") for alias in node.names]
            elif node.module.split(".")[0] == "hf_coar":
                found.append((node, node.module.split(".")[1]))
    return found


def functions(tree: ast.AST) -> list[ast.AST]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]


def module_level_imports(tree: ast.AST) -> set[str]:
    """Libraries imported when the module is, wherever the statement is nested."""
    inside = {id(node) for function in functions(tree) for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):  # never runs
            inside |= {id(child) for statement in node.body for child in ast.walk(statement)}
    names = set()
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def test_every_module_stands_on_one_step():
    on_steps = [name for step in STEPS for name in step]
    assert len(on_steps) == len(set(on_steps))
    assert set(on_steps) >= TOP_LEVEL, f"put {TOP_LEVEL - set(on_steps)} on a step of STEPS"


@pytest.mark.parametrize("path", TREES)
def test_imports_only_go_down(path):
    step_of = {name: number for number, step in enumerate(STEPS) for name in step}
    module = module_of(path)
    imported = {target for _, target in own_imports(TREES[path])} - {module}
    upwards = sorted(target for target in imported if step_of[target] >= step_of[module])
    assert not upwards, f"{path} (step {step_of[module]}) imports {upwards} from its own step or above"


@pytest.mark.parametrize("path", TREES)
def test_the_package_is_never_imported_inside_a_function(path):
    inside = {id(node) for function in functions(TREES[path]) for node in ast.walk(function)}
    assert not [node.lineno for node, _ in own_imports(TREES[path]) if id(node) in inside]


@pytest.mark.parametrize("path", TREES)
def test_heavy_libraries_are_imported_inside_calls(path):
    assert not module_level_imports(TREES[path]) & HEAVY


@pytest.mark.parametrize("path", TREES)
def test_no_assert_no_pickle_no_torch_load(path):
    tree = TREES[path]
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    imported = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not imported & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"torch.load", "torch.save", "np.load", "numpy.load"}


@pytest.mark.parametrize("path", sorted(set(TREES) - {"cli.py"}))
def test_only_the_command_line_prints(path):
    called = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)]
    assert not [node.lineno for node in called if isinstance(node.func, ast.Name) and node.func.id == "print"]


def test_the_import_is_light():
    heavy = ["transformers", "timm", "datasets", "matplotlib"]
    code = f"import sys, hf_coar; print(sorted(set({heavy}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_fixed_names_are_public():
    promised = {"load", "find_components", "ablate", "attribute", "evaluate", "edit", "Attributions", "Components"}
    promised |= {"PathGradient", "Regression", "Ridge", "Report", "CoarError"}
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


@pytest.mark.parametrize(("name", "value"), callables(), ids=[name for name, _ in callables()])
def test_public_names_have_docstrings_and_type_hints(name, value):
    own = value.__doc__
    assert own and len(own.split()) >= 2
    assert not own.startswith(f"{name}("), "dataclass made this docstring up"
    function = value.__init__ if inspect.isclass(value) else value
    if not inspect.isfunction(function):
        return  # an exception's constructor
    hints = inspect.signature(function)
    unhinted = [p.name for p in hints.parameters.values() if p.name not in ("self", "cls") and p.annotation is p.empty]
    assert not unhinted
    assert inspect.isclass(value) or hints.return_annotation is not hints.empty


@pytest.mark.parametrize("name", ["components", "outputs"])
def test_public_modules_have_docstrings(name):
    assert getattr(hf_coar, name).__doc__
