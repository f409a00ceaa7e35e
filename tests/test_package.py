"""The package as it is installed: what the wheel holds, which versions of others come with it."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import pins

ROOT = Path(__file__).resolve().parent.parent


def test_wheel_holds_cards_and_demo(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    # Built from a copy, so that no build folder is left beside the sources.
    source = tmp_path / "source"
    names = ("hf_coar", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
    source.mkdir()
    for name in names:
        path = ROOT / name
        shutil.copytree(path, source / name) if path.is_dir() else shutil.copy(path, source / name)
    subprocess.run([*command, "--wheel-dir", tmp_path, source], check=True, capture_output=True)
    wheel = zipfile.ZipFile(next(tmp_path.glob("hf_coar-*.whl")))
    held = set(wheel.namelist())
    paths = [path for path in (ROOT / "hf_coar").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    files = {path.relative_to(ROOT).as_posix() for path in paths}
    assert {
        "hf_coar/storage/templates/attributions.md.template",
        "hf_coar/storage/templates/edited_model.md.template",
        "hf_coar/demo/images.parquet",
        "hf_coar/demo/LICENSE-fashion-mnist",
        "hf_coar/demo/model/config.json",
        "hf_coar/demo/model/model.safetensors",
        "hf_coar/components/rules.py",
    } <= files
    assert files <= held, "a file that the sources hold and a plain `pip install` does not"
    entry = next(name for name in held if name.endswith("entry_points.txt"))
    assert b"hf-coar = hf_coar.cli:main" in wheel.read(entry)
    assert any(name.endswith("LICENSE") for name in held)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone")
def test_no_file_of_the_package_is_ignored():
    command = ["git", "ls-files", "--others", "--ignored", "--exclude-standard", "hf_coar"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    assert not [path for path in listed if "__pycache__" not in path], "a clone would be without them"


# ------------------------------------------------------------------------------------------ versions that are installed


def constraints():
    lines = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_every_requirement_has_a_tested_version_at_or_above_its_floor():
    pinned = constraints()
    for requirement in pins.direct():
        (floor,) = requirement.specifier  # `>=` alone: check_floors.sh installs it as `==`
        assert floor.operator == ">="
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])
    assert {"torchvision", "tokenizers", "pyarrow"} <= set(pinned), "what they need is pinned too"


def test_no_constraint_belongs_to_one_kind_of_machine():
    for name, version in constraints().items():
        assert re.match(r"nvidia|cuda|triton", name) is None
        assert Version(version).local is None


def test_the_closure_leaves_out_what_only_some_machines_need():
    found = set(pins.closure([Requirement("torch"), Requirement("huggingface_hub")]))
    assert {"torch", "sympy", "mpmath", "huggingface-hub", "filelock"} <= found
    assert not {"triton", "hf-xet", "tomli"} & found


FAKE_PYTHON = """#!/usr/bin/env bash
if [[ $1 == -m && $2 == venv ]]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; exit; fi
if [[ $1 == -m ]]; then echo "$@"; fi
"""


@pytest.mark.parametrize("versions", ["tested", "lowest", "newest"])
def test_the_environment_gets_the_versions_that_were_asked_for(tmp_path, versions):
    (tmp_path / "scripts").mkdir()
    for name in ("setup.cfg", "scripts/environment.sh", "scripts/constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "VERSIONS": versions}
    ran = subprocess.run(
        ["bash", "-c", "source scripts/environment.sh test; echo venv=$venv"],
        cwd=tmp_path, env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    venv = ".venv" if versions == "tested" else f".venv-{versions}"
    assert f"venv={venv}" in ran.stdout and not ran.stderr
    installed = next(line for line in ran.stdout.splitlines() if "pip install" in line)
    assert ("--constraint" in installed) == (versions != "newest")
    if versions == "newest":
        assert "--upgrade" in installed
        return
    lines = (tmp_path / installed.split("--constraint ")[1].split()[0]).read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    floors = {requirement.name: next(iter(requirement.specifier)).version for requirement in pins.direct()}
    if versions == "lowest":
        assert floors.items() <= pinned.items()


def test_versions_that_there_are_none_of_are_refused(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable, "VERSIONS": "oldest"}
    command = ["bash", "-c", f"source {ROOT}/scripts/environment.sh test"]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 2 and "oldest" in ran.stderr


def test_the_run_of_the_floors_names_tests_that_are_there():
    text = (ROOT / "scripts" / "check_floors.sh").read_text(encoding="utf-8")
    names = re.search(r"matter=\(([^)]*)\)", text)[1].split()
    assert names and all((ROOT / "tests" / f"test_{name}.py").is_file() for name in names)


def test_the_version_has_one_place():
    import yaml

    import hf_coar

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == hf_coar.__version__
    assert {"cff-version", "title", "message", "authors", "license", "preferred-citation"} <= set(citation)
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert "version = attr: hf_coar.__version__" in setup and hf_coar.__version__ not in setup
