"""The package as it is installed: what the wheel holds, what an import costs in modules."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
    assert {
        "hf_coar/storage/templates/attributions.md.template",
        "hf_coar/storage/templates/edited_model.md.template",
        "hf_coar/demo/images.parquet",
        "hf_coar/demo/LICENSE-fashion-mnist",
        "hf_coar/demo/model/config.json",
        "hf_coar/demo/model/model.safetensors",
        "hf_coar/components/rules.py",
    } <= held
    entry = next(name for name in held if name.endswith("entry_points.txt"))
    assert b"hf-coar = hf_coar.cli:main" in wheel.read(entry)
    assert any(name.endswith("LICENSE") for name in held)
