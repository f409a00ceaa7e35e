"""What the README says runs: its Python is executed, its shell lines are parsed, its file map is the tree."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from hf_coar import cli, outputs
from hf_coar.components import rules

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def registries():
    """What the README registers is gone afterwards."""
    tables = (outputs._OUTPUTS, rules._RULES)
    saved = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, saved, strict=True):
        table.clear()
        table.update(entries)


def test_python_runs_and_prints_what_the_readme_shows(capsys, registries):
    namespace = {"__name__": "readme"}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    shown = next(block for block in blocks("text") if "correlation" in block)
    ours, theirs = (re.findall(r"-?\d+\.\d+", text) for text in (printed, shown))
    assert len(theirs) == 11
    assert [float(x) for x in ours[: len(theirs)]] == pytest.approx([float(x) for x in theirs], abs=0.02)
    assert printed.splitlines()[0] == shown.splitlines()[0]
    assert printed.splitlines()[-1] == "20"  # components of the layer with a rule of its own: 16 + 4
    assert isinstance(namespace["edited"], torch.nn.Module)


def test_snippet_with_its_output_comes_early():
    assert "95 % interval" in "\n".join(README.splitlines()[:45])


def test_shell_lines_parse():
    lines = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
    lines += re.findall(r"`(hf-coar [^`…]+)`", README)
    verbs = set()
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[0] == "hf-coar":
            args = cli._parser().parse_args(words[1:])
            verbs.add(args.verb)
        elif words[0] == "bash":
            assert (ROOT / words[1]).is_file(), line
            subprocess.run(["bash", "-n", ROOT / words[1]], check=True)
    assert {"components", "attribute", "evaluate", "edit", "demo"} <= verbs


def test_file_map_is_the_tree():
    listing = next(block for block in blocks("text") if block.startswith("hf_coar/"))
    named = set(re.findall(r"^  (\S+)", listing, flags=re.MULTILINE))
    tree = {path.name for path in (ROOT / "hf_coar").glob("*.py")} - {"__init__.py", "__main__.py"}
    tree |= {f"{path.parent.name}/" for path in (ROOT / "hf_coar").glob("*/__init__.py")}
    assert named == tree


def test_pictures_exist():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
