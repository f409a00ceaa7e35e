"""An explorer as a folder that a Hugging Face Space runs as it is: app.py, requirements.txt, README.md, local files."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from string import Template

from hf_coar.attributions import Attributions, artefact
from hf_coar.errors import CoarError
from hf_coar.explore import bundling
from hf_coar.explore.page import gradio
from hf_coar.storage import files, hub

logger = logging.getLogger(__name__)

# What a model's own library reads, and what a data set consists of; no pickles, no code.
_OF_MODELS = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model")
_OF_DATA = ("*.parquet", "*.csv", "*.json", "*.jsonl", "*.txt", "*.arrow", "*.png", "*.jpg", "*.jpeg", "*.webp")

_HUB_ID = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")
_MARKER = ".hf_coar.json"  # says that a folder is ours
Found = tuple[str, bool, tuple[str, ...]]  # Hub id or path, whether it may be a path, what is copied of it

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

`python app.py` runs it here; as a Space it runs by itself. `requirements.txt` names hf_coar; where that was not
installed from an index, its code lies beside `app.py`, and `requirements.txt` names what it needs.
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
        folder: to write to; it must be new or empty, or an earlier export. Files that are not of that stay.
        model: Hub id or folder; by default as the attributions name it. Paths are followed of those only that were
            made on this machine by this user.
        data: Hub id, folder or file; by default likewise.
        revision: of the model: branch, tag or commit.

    Returns:
        The folder.

    Raises:
        CoarError: no such attributions, they do not say where their model or data came from, the folder holds other
            things, or it cannot be written.
    """
    loaded, folder = Attributions.from_pretrained(attributions), Path(folder)
    earlier = _check_target(folder)
    # Who calls may name any path; a configuration, from whomever it comes, only one that this user wrote here.
    found = {
        "attributions": (str(attributions), True, artefact.UPLOADED),
        "model": (str(model), True, _OF_MODELS) if model else _named(loaded, "model", _OF_MODELS),
        "data": (str(data), True, _OF_DATA) if data else _named(loaded, "data", _OF_DATA),
    }
    try:
        folder.resolve().parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.resolve().parent))
        try:
            _write(staging, loaded, found, revision)
            _publish(staging, folder.resolve(), earlier)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise CoarError(f"cannot write {folder}: {error.strerror or error}; choose another folder") from error
    return folder


def _named(attributions: Attributions, what: str, kinds: tuple[str, ...]) -> Found:
    """What attributions say that their "model" or "data" came from: a Hub id, or a path, if this user wrote it here.

    Raises:
        CoarError: they do not say, or name what may be a path of somebody else's.
    """
    name = (attributions.config.get(what) or {}).get("id")
    if not name:
        raise CoarError(f"the attributions do not say where their {what} came from; give --{what}")
    place = str(attributions.found(name))
    local = Path(place).exists()
    if not local and not _HUB_ID.fullmatch(name):
        raise CoarError(f"the attributions name {name!r} as their {what}, which is no Hub id; give --{what}")
    return place, local, kinds


def _write(folder: Path, loaded: Attributions, found: Mapping[str, Found], revision: str | None) -> None:
    named = {what: _placed(name, folder / what, kinds, local) for what, (name, local, kinds) in found.items()}
    _without_local_paths(folder / "attributions" / artefact.CONFIG)
    revision = None if named["model"].startswith("HERE") else revision or loaded.config.get("model", {}).get("revision")
    app = _APP.substitute(named, revision=json.dumps(revision).replace("null", "None"))
    ids = {what: name for what, (name, _, _) in found.items() if not named[what].startswith("HERE")}
    files.write_bytes(folder / "app.py", app.encode())
    files.write_bytes(folder / "requirements.txt", bundling.bundle(folder).encode())
    files.write_bytes(folder / hub.CARD, _readme(loaded, found["model"][0], ids).encode())
    made = {path.relative_to(folder).as_posix(): artefact.checksum(path) for path in _files_of(folder)}
    files.write_json(folder / _MARKER, {"hf_coar": 1, "kind": "explorer", "made": sorted(made), "checksums": made})


def _check_target(folder: Path) -> dict[str, str]:
    """The files of an earlier export that a new one replaces, with their checksums.

    Raises:
        CoarError: the folder holds other things, or a file of the earlier export was changed since.
    """
    if folder.exists() and not folder.is_dir():
        raise CoarError(f"{folder} is a file; give a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return {}
    marker = files.read_json(folder / _MARKER) if (folder / _MARKER).is_file() else {}
    made = marker.get("checksums") if isinstance(marker, dict) and marker.get("kind") == "explorer" else None
    if not isinstance(made, dict):
        raise CoarError(
            f"{folder} holds other things already, and no {_MARKER} that says that they are an earlier export; give a "
            "new or empty folder"
        )
    changed = [name for name in made if (folder / name).is_file() and artefact.checksum(folder / name) != made[name]]
    if hub.CARD in changed:
        changed.remove(hub.CARD)
        del made[hub.CARD]  # a person wrote it, and it stays
    if changed:
        raise CoarError(f"{folder} was changed since it was exported: {', '.join(changed[:6])}; give a new folder")
    return made


def _publish(staging: Path, folder: Path, earlier: Mapping[str, str]) -> None:
    """Put the new export in the place of the earlier one; what else lies there comes along."""
    os.chmod(staging, folder.stat().st_mode if folder.exists() else 0o777 & ~_umask())
    if not folder.exists():
        os.rename(staging, folder)
        return
    for path in _files_of(folder):
        name = path.relative_to(folder)
        if name.as_posix() not in (*earlier, _MARKER):
            if (staging / name).exists() and str(name) != hub.CARD:
                raise CoarError(f"{path} is not of the earlier export, and the new one would replace it; move it away")
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, staging / name, follow_symlinks=False)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.old.", dir=folder.parent))
    try:
        os.rename(folder, beside / "old")
        try:
            os.rename(staging, folder)
        except OSError:
            os.rename(beside / "old", folder)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _files_of(folder: Path) -> list[Path]:
    return sorted(Path(root) / name for root, _, names in os.walk(folder) for name in names)


def _placed(name: str, target: Path, kinds: tuple[str, ...], local: bool) -> str:
    """The expression in `app.py` for a Hub id, or for a copy of local files inside the folder."""
    place, source = f'HERE / "{target.name}"', Path(name)
    if not local or not source.exists():
        return json.dumps(name)
    target.mkdir()
    logger.info("export: copying %s", source)
    if source.is_file():
        shutil.copyfile(source, target / source.name)
        return f"{place} / {json.dumps(source.name)}"
    for path in sorted({path for kind in kinds for path in source.rglob(kind) if path.is_file()}):
        if target.name == "attributions" and not _is_of_attributions(path.relative_to(source)):
            continue  # the shards of the run
        if not any(path.resolve().is_relative_to(root) for root in _roots(source)):
            raise CoarError(f"{path} is a link to {path.resolve()}, out of the folder; put the file itself there")
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return place


def _roots(folder: Path) -> list[Path]:
    """Where the files of a folder may lie: in it, or, of a snapshot in the Hub's cache, in that repository's cache."""
    folder = folder.resolve()
    return [folder, folder.parent.parent] if folder.parent.name == "snapshots" else [folder]


def _without_local_paths(config: Path) -> None:
    """The copied configuration as `push_to_hub` would upload it."""
    if config.is_file():
        artefact.write_json(config, artefact.public(artefact.read_json(config)))


def _is_of_attributions(path: Path) -> bool:
    return any(path.match(kind) and len(path.parts) == len(Path(kind).parts) for kind in artefact.UPLOADED)


def _readme(loaded: Attributions, model: str, ids: Mapping[str, str]) -> str:
    from huggingface_hub import SpaceCardData

    name = model.rstrip("/").split("/")[-1]
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
