"""The documentation as a site with strict links, and as notebooks that run; both are opt-in but for what is cheap."""

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import build_site
import make_notebooks

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("name", make_notebooks.PAGES)
def test_notebooks_are_those_of_the_pages(name):
    path = make_notebooks.FOLDER / f"{name}.ipynb"
    assert path.read_text(encoding="utf-8") == make_notebooks.text(name), "run scripts/make_notebooks.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", make_notebooks.PAGES)
def test_notebooks_run(name, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for folder in ("hf_coar", "scripts"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    made = nbformat.reads(make_notebooks.text(name), as_version=4)
    nbformat.validate(made)
    nbclient.NotebookClient(made, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.execution_count for cell in made.cells if cell.cell_type == "code")


def test_every_page_has_its_place_on_the_site(tmp_path):
    build_site.stage(tmp_path)
    listed = str(build_site.settings(tmp_path, tmp_path / "site")["nav"])
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in listed
    assert "not-run" not in (tmp_path / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_site_is_built_with_strict_links(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, ROOT / "scripts" / "build_site.py", "--out", tmp_path / "site"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    reference = (tmp_path / "site" / "reference" / "hf_coar.attributions.looking.html").read_text(encoding="utf-8")
    assert "The components with the largest weights" in reference
    assert (tmp_path / "site" / "index.html").is_file()
