"""What the documentation shows runs: every snippet of README.md and docs/ is executed, and prints what is shown.

A fence ```python is executed, the fences of a page one after the other in one namespace; so are the `hf-coar` lines of
a ```bash fence. A ```text fence right after is what that prints, numbers to within 0.02 (README.md) or 0.05 (docs/).
Fences marked `not-run` need the Hub or take long: their Python is parsed, and so are their command lines.
"""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from other_processes import forked

from hf_coar import cli
from hf_coar.cli import config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)?( not-run)?\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def fences(page):
    """(language, whether it runs, text, where it begins) of every fence."""
    text = page.read_text(encoding="utf-8")
    return [(match[1], not match[2], match[3], text[: match.start()].count("\n") + 2) for match in FENCE.finditer(text)]


@pytest.fixture
def somewhere(tmp_path, monkeypatch, registering):
    """An empty folder from which the repository looks as from its root; what a page registers is gone afterwards."""
    for name in ("hf_coar", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command_lines(text):
    """Commands of a shell fence, continued lines joined, comments left out."""
    joined = text.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def same(printed, shown, tolerance=0.02):
    """Raises unless all words are the same and numbers differ by no more than the tolerance."""
    assert NUMBER.sub("#", " ".join(printed.split())) == NUMBER.sub("#", " ".join(shown.split())), printed
    pairs = zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    assert all(abs(float(a) - float(b)) <= tolerance + 1e-9 for a, b in pairs), printed


SLOW = ("clip.md",)  # alone it takes two thirds of a minute


def marked(page):
    return pytest.param(page, marks=pytest.mark.slow if page.name in SLOW else ())


@pytest.mark.parametrize("page", [marked(page) for page in PAGES], ids=lambda page: page.name)
def test_snippets_run_and_print_what_is_shown(page, somewhere, capsys, request):
    if page.name == "README.md":
        request.getfixturevalue("pictures")
    namespace, printed = {"__name__": "docs"}, ""
    for language, runs, text, line in fences(page):
        capsys.readouterr()
        if language == "python" and runs:
            # Padding makes the line numbers of a traceback those of the page.
            exec(compile("\n" * (line - 1) + text, str(page), "exec"), namespace)
            printed = capsys.readouterr().out
        elif language == "python":
            ast.parse(text)
        elif language == "bash":
            for words in command_lines(text):
                if words[0] == "hf-coar" and runs:
                    assert cli.main(words[1:]) == 0, words
            printed = capsys.readouterr().out
        elif language == "text" and printed:
            same(printed, text, 0.02 if page.name == "README.md" else 0.05)
            printed = ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_exist(page):
    lines = [words for language, _, text, _ in fences(page) if language == "bash" for words in command_lines(text)]
    inline = re.findall(r"`(hf-coar [^`…|]+)`", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S))
    for words in lines + [shlex.split(line) for line in inline]:
        if words[0] == "hf-coar" and "--config" not in words and not any(word.isupper() for word in words):
            parsed = config.parse(cli.parser(), words[1 : words.index(">")] if ">" in words else words[1:])
            assert callable(parsed.run)
        elif words[0] == "bash":
            assert (ROOT / words[1]).is_file(), words
            subprocess.run(["bash", "-n", ROOT / words[1]], check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), flags=re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def test_the_comparison_of_outputs_can_fail():
    same("a 1.00 b", "a 1.01 b")
    for other in ("a 1.10 b", "a 1.00 c", "a 1.00", "a 1.00 b 2"):
        with pytest.raises((AssertionError, ValueError)):
            same(other, "a 1.00 b")


def test_the_reference_of_the_api_is_generated(tmp_path):
    """By the command that README.md names."""
    pdoc = pytest.importorskip("pdoc.__main__")
    words = shlex.split(re.search(r"`(pdoc hf_coar[^`]*)`", PAGES[0].read_text(encoding="utf-8"))[1])
    assert words[-2] == "-o"
    done = forked(lambda: pdoc.cli([*words[1:-1], str(tmp_path)]) or 0)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "hf_coar.html").read_text(encoding="utf-8")
    assert "How much every component contributes" in page and "PathGradient" in page
    for module in (word.removeprefix("hf_coar.") for word in words[2:-4]):
        assert (tmp_path / "hf_coar" / f"{module}.html").is_file()
