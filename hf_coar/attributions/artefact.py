"""The files of attributions on disk and on the Hub: their names, and checks of what is read, from whomever it comes."""

import hashlib
import re
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_coar.attributions import forecast, rows
from hf_coar.attributions.provenance import Provenance, public_record
from hf_coar.components import Components
from hf_coar.data import Identity
from hf_coar.data.identity import HASH
from hf_coar.errors import CoarError, CorruptFileError
from hf_coar.storage import cards, files, hub, swapping

# 3: something else than zero stands in for ablated components; 2: examples are known by a hash of every entry; 1: by
# one number, see `data.identity.signatures`.
FORMATS = (1, 2, 3)
WEIGHTS, CONFIG, COMPONENTS = "attributions.safetensors", "config.json", "components.json"
MATRICES = (*rows.MATRICES, *forecast.MATRICES)
STAND_INS = "stand_ins.safetensors"
_VALUES = "stand_ins"  # what `COMPONENTS` says of that file
EVALUATION, PICTURES = "evaluation.json", "pictures"
FIRST_EXAMPLE = "example_0"  # a picture
UPLOADED = ("attributions*.safetensors", CONFIG, COMPONENTS, EVALUATION, "README.md", "pictures/*.png", cards.RESULTS)
UPLOADED += (STAND_INS,)

_SHARD = re.compile(r"attributions(-\d{5}-of-\d{5})?\.safetensors")


def shard_names(n_shards: int) -> list[str]:
    """The names of the files that hold the matrices."""
    numbered = [f"attributions-{i:05d}-of-{n_shards:05d}.safetensors" for i in range(1, n_shards + 1)]
    return [WEIGHTS] if n_shards == 1 else numbered


def shards_in(folder: Path) -> list[str]:
    """The names of the files of matrices that lie in a folder."""
    return sorted(path.name for path in folder.glob("attributions*.safetensors") if _SHARD.fullmatch(path.name))


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration, or the record of an edit, without the local paths that it may name."""
    named = {key: config[key] for key in ("model", "data", "base") if isinstance(config.get(key), Mapping)}
    return {**config, **{key: public_record(entry) for key, entry in named.items()}}


def licensed(model: Mapping[str, Any], token: str | bool | None = None) -> dict[str, Any]:
    """A record of a model with the licence that its card on the Hub names, if its weights are from there."""
    known = cards.model_id(model)
    return {**model, **(hub.license_of(known, model.get("revision"), token) if known else {})}


def write_json(path: Path, value: Any) -> None:
    """Write JSON, atomically.

    Raises:
        CoarError: the value holds NaN, or what JSON does not know.
    """
    try:
        files.write_json(path, value)
    except (ValueError, TypeError) as error:
        if isinstance(error, CoarError):
            raise
        raise CoarError(f"{path.name} cannot be written: it holds what is no JSON ({error})") from error


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read `evaluation.json`; see `cards.check_evaluation`."""
    return cards.check_evaluation(files.read_json(path))


read_json = files.read_json


def is_of(evaluation: Mapping[str, Any], fingerprint: str, unknown: bool = True) -> bool:
    """Whether an evaluation judged the attributions with this fingerprint; `unknown` if it does not say which."""
    judged = evaluation.get("of")
    return unknown if judged is None else judged == fingerprint


def checksum(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CorruptFileError(f"cannot read {path}: {error}") from error


def size(path: Path) -> int:
    """Bytes of a file."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise CorruptFileError(f"cannot read {path}: {error}") from error


def check_folder(folder: Path) -> None:
    """Raises `CoarError` unless a folder holds attributions, or something like it."""
    absent = [file for file in (CONFIG, COMPONENTS) if not swapping.current(folder, file).is_file()]
    if absent:
        a_model = (folder / "config.json").is_file()
        advice = f"; of the model there, make some: hf-coar attribute {folder} DATA --out ANOTHER" if a_model else ""
        raise CoarError(f"{folder} holds no attributions: it lacks {', '.join(absent)}{advice}")


def read_config(path: Path, name: str) -> tuple[dict[str, str], Provenance]:
    """The files of attributions with their checksums, and the provenance.

    Raises:
        CorruptFileError: damaged, of another format, or with names of files that are not ours.
    """
    config = files.read_json(path)
    if not isinstance(config, dict) or config.get("hf_coar_format") not in FORMATS:
        found = config.get("hf_coar_format") if isinstance(config, dict) else None
        raise CorruptFileError(
            f"{name} is of hf_coar format {found!r}, and this version reads formats {FORMATS}; it holds no "
            "attributions, or a newer hf_coar wrote them"
        )
    provenance = Provenance.from_json(config, str(path))
    if not _is_list_of_files(config.get("files")):
        raise CorruptFileError(f"{path} is damaged: it does not list the files of attributions with their checksums")
    if not files.is_json(config):
        raise CorruptFileError(f"{path} is damaged: it holds numbers or characters that JSON does not know")
    return config["files"], provenance


def _is_list_of_files(value: Any) -> bool:
    """Names of our own making only, so that none leads out of the folder."""
    if not isinstance(value, dict) or not all(isinstance(checksum, str) for checksum in value.values()):
        return False
    shards = [name for name in value if name != COMPONENTS]
    return COMPONENTS in value and bool(shards) and shards == shard_names(len(shards))


def check_columns(path: Path, matrices: Mapping[str, Any], columns: Mapping[str, torch.Tensor]) -> None:
    """Raises `CorruptFileError` unless these are the matrices and small tensors of attributions."""
    wanted = {"bias": torch.float32, "signatures": torch.float64, "labels": torch.int64}
    numbers = {name: column.dtype for name, column in columns.items() if not name.startswith(HASH)}
    hashed = len(numbers) < len(columns)
    lacking = {"signatures"} if hashed else set()
    wanted = {name: dtype for name, dtype in wanted.items() if name not in lacking}
    wanted |= {"unablated": torch.float32} if "unablated" in columns else {}
    sane = numbers == wanted and all(columns[name].dim() == 1 for name in numbers)
    if "weights" not in matrices or not sane:
        raise CorruptFileError(
            f"{path} holds {reprlib.repr(sorted([*matrices, *columns]))}, which are no attributions: those are "
            "weights, maybe standard_errors, and of every example a bias, a label, and hashes of its entries"
        )


def format_of(identity: Identity, components: Components) -> int:
    """The version of the format that attributions of such examples and components are saved in."""
    return 3 if components.stand_in is not None else 2 if identity.hashes else 1


def write_components(folder: Path, components: Components) -> str:
    """Write what the columns are, and what stands in for them; returns the checksum, which covers both."""
    stand_in, entries = components.stand_in, components.to_json()
    if stand_in is not None and stand_in.values is not None:
        files.write_tensors(folder / STAND_INS, stand_in.values)
        entries[_VALUES] = {"checksum": files.checksum(stand_in.values), "absorbed": dict(stand_in.absorbed)}
    write_json(folder / COMPONENTS, entries)
    return checksum(folder / COMPONENTS)


def read_components(source: Any, known: str, provenance: Provenance) -> Components:
    """Read what `write_components` wrote.

    Args:
        source: `hub.Source` of the files.
        known: the checksum.
        provenance: names the data that what stands in was made of.

    Raises:
        CorruptFileError: damaged, or not finished.
    """
    path = source.file(COMPONENTS)
    if checksum(path) != known:
        raise CorruptFileError(f"{path} is damaged or not finished: its checksum is not the recorded one")
    entries = read_json(path)
    components = Components.from_json(entries)
    stand_in = components.stand_in
    if stand_in is None:
        return components
    stand_in = replace(stand_in, data=dict((provenance.ablation or {}).get("data") or {}))
    if not stand_in.of_partners:
        values, about = files.read_tensors(source.file(STAND_INS)), entries.get(_VALUES)
        absorbed = about.get("absorbed") if isinstance(about, Mapping) else None
        sane = isinstance(absorbed, Mapping) and all(isinstance(name, str) for name in absorbed.values())
        sane = sane and all(value.dtype == torch.float32 for value in values.values())
        if not sane or files.checksum(values) != about.get("checksum"):
            raise CorruptFileError(f"{STAND_INS} in {source.name} is not what the components were attributed with")
        stand_in = replace(stand_in, values=values, absorbed=dict(absorbed))
    return replace(components, stand_in=stand_in)
