"""An explorer as a folder that a Hugging Face Space runs as it is: app.py, requirements.txt, README.md, local files."""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from hf_coar.attributions import Attributions, artefact
from hf_coar.errors import CoarError
from hf_coar.explore import source
from hf_coar.explore.page import gradio
from hf_coar.storage import files, hub

logger = logging.getLogger(__name__)

# What a model's own library reads, and what a data set consists of; no pickles, no code.
_OF_MODELS = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")
_OF_DATA = ("*.parquet", "*.csv", "*.json", "*.jsonl", "*.txt", "*.arrow", "*.png", "*.jpg", "*.jpeg", "*.webp")

_PYTHON = "3.12"  # Spaces take an older one by default than hf_coar needs

_APP = Template('''\
"""An hf_coar explorer. It runs as it is: python app.py"""

import os
from pathlib import Path

from hf_coar.explore import launch

HERE = Path(__file__).parent

if __name__ == "__main__":
    launch(
        $attributions,
        model=$model,
        data=$data,
        revision=$revision,
        host="0.0.0.0" if "SPACE_ID" in os.environ else os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),
        port=int(os.environ["GRADIO_SERVER_PORT"]) if "GRADIO_SERVER_PORT" in os.environ else None,
    )
''')

_README = Template("""\
---
$head
---

# $title

An [hf_coar](https://huggingface.co/papers/2404.11534) explorer: how much each of $n_components components of $model
contributes to its predictions on $n_examples examples ($output), and what would happen without any of them, on the live
model.

`python app.py` runs it here; as a Space it runs by itself. `requirements.txt` names hf_coar, which must be installable
where it runs: if your index does not have it, put the wheel beside `app.py` and its file name into `requirements.txt`.
""")


def export(
    attributions: str | Path,
    folder: str | Path,
    model: str | Path | None = None,
    data: str | Path | None = None,
    revision: str | None = None,
) -> Path:
    """Write a folder that a Space of the Hub (SDK Gradio) runs as it is.

    What has a Hub id is named, and local attributions, models and data are copied, so that the folder stands alone.

    Args:
        attributions: folder or Hub id.
        folder: to write to; it must be new or empty, or an earlier export.
        model: Hub id or folder; by default as the attributions name it.
        data: Hub id, folder or file; by default as the attributions name it.
        revision: of the model: branch, tag or commit.

    Returns:
        The folder.

    Raises:
        CoarError: no such attributions, they do not say where their model or data came from, the folder holds other
            things, or it cannot be written.
    """
    loaded, folder = Attributions.from_pretrained(attributions), Path(folder)
    _check_target(folder)
    config = loaded.config
    sources = {
        "attributions": (attributions, artefact.UPLOADED),
        "model": (model or source.known(loaded, "model"), _OF_MODELS),
        "data": (data or source.known(loaded, "data"), _OF_DATA),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        named = {what: _placed(Path(source), folder, what, kinds) for what, (source, kinds) in sources.items()}
        _without_local_paths(folder / "attributions" / artefact.CONFIG)
    except OSError as error:
        raise CoarError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
    revision = None if named["model"].startswith("HERE") else revision or (config.get("model") or {}).get("revision")
    files.write_bytes(
        folder / "app.py", _APP.substitute(named, revision=json.dumps(revision).replace("null", "None")).encode()
    )
    files.write_bytes(folder / "requirements.txt", b"hf_coar[explore]\n")
    files.write_bytes(folder / hub.CARD, _readme(loaded, sources).encode())
    return folder


def _check_target(folder: Path) -> None:
    if folder.is_file():
        raise CoarError(f"{folder} is a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "app.py").is_file():
        raise CoarError(f"{folder} holds other things already; give a new or empty folder, or an earlier export")


def _placed(source: Path, folder: Path, what: str, kinds: tuple[str, ...]) -> str:
    """The expression in `app.py` for a Hub id, or for a copy of local files inside the folder."""
    if not source.exists():
        return json.dumps(str(source))
    target = folder / what
    if source.resolve() == target.resolve():
        return f'HERE / "{what}"'
    if target.exists():
        shutil.rmtree(target)
    target.mkdir()
    logger.info("export: copying %s", source)
    if source.is_file():
        shutil.copyfile(source, target / source.name)
        return f'HERE / "{what}" / {json.dumps(source.name)}'
    for path in sorted({path for kind in kinds for path in source.rglob(kind) if path.is_file()}):
        if what == "attributions" and not _is_of_attributions(path.relative_to(source)):
            continue  # the shards of the run
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return f'HERE / "{what}"'


def _without_local_paths(config: Path) -> None:
    """The copied configuration as `push_to_hub` would upload it."""
    if config.is_file():
        artefact.write_json(config, artefact.public(artefact.read_json(config)))


def _is_of_attributions(path: Path) -> bool:
    return any(path.match(kind) and len(path.parts) == len(Path(kind).parts) for kind in artefact.UPLOADED)


def _readme(loaded: Attributions, sources: Mapping[str, tuple[Any, Any]]) -> str:
    from huggingface_hub import SpaceCardData

    ids = {what: str(source) for what, (source, _) in sources.items() if not Path(source).exists()}
    name = str(sources["model"][0]).rstrip("/").split("/")[-1]
    head = SpaceCardData(
        title=f"Components of {name}"[:60],
        sdk="gradio",
        sdk_version=gradio().__version__,
        python_version=_PYTHON,
        app_file="app.py",
        short_description="What each component of a model contributes",
        license=None,
        models=[ids[what] for what in ("model", "attributions") if what in ids] or None,
        datasets=[ids["data"]] if "data" in ids else None,
        tags=["hf_coar", "interpretability"],
    )
    return _README.substitute(
        head=head.to_yaml().strip(), title=f"Components of {name}", model=name, n_examples=f"{len(loaded):,}",
        n_components=f"{len(loaded.components):,}", output=loaded.config.get("output"),
    )  # fmt: skip
