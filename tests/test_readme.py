"""What the README promises at a glance; `test_docs.py` executes its snippets."""

import re
from pathlib import Path

import pytest
import yaml

import hf_coar as coar

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_snippet_with_its_output_comes_early():
    assert "95 % interval" in "\n".join(README.splitlines()[:45])


def test_file_map_is_the_tree():
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listing = re.search(r"```text\n(hf_coar/\n.*?)```", contributing, flags=re.DOTALL)[1]
    named = set(re.findall(r"^  (\S+)", listing, flags=re.MULTILINE))
    tree = {path.name for path in (ROOT / "hf_coar").glob("*.py")} - {"__init__.py", "__main__.py"}
    tree |= {f"{path.parent.name}/" for path in (ROOT / "hf_coar").glob("*/__init__.py")}
    assert named == tree


def test_pictures_exist():
    paths = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert paths and all((ROOT / path).is_file() for path in paths)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_page_is_linked(page):
    assert f"(docs/{page.name})" in README


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == coar.__version__ and citation["cff-version"] == "1.2.0"
    assert citation["license"] == "Apache-2.0"
