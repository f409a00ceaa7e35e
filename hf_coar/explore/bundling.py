"""How an exported explorer gets hf_coar: from an index that has it, or as a copy of the package beside the app."""

import shutil
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

_NAME, _EXTRA = "hf_coar", "explore"
_PACKAGE = Path(__file__).resolve().parents[1]


def bundle(folder: Path) -> str:
    """What `requirements.txt` has to say; where no index has this version, the package is copied into the folder.

    A wheel would not do: Spaces install their requirements before there is any other file, while a folder beside the
    app is found by Python itself.
    """
    try:
        installed = metadata.distribution(_NAME)
    except metadata.PackageNotFoundError:
        return f"{_NAME}[{_EXTRA}]\n"
    # PEP 610: whatever came from a path, an archive or a repository says so. A source tree that is found first was not
    # made by a wheel.
    if installed.read_text("WHEEL") is not None and installed.read_text("direct_url.json") is None:
        return f"{_NAME}[{_EXTRA}]=={installed.version}\n"
    shutil.copytree(_PACKAGE, folder / _PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return "".join(f"{line}\n" for line in _needs(installed.requires or []))


def _needs(requires: list[str]) -> list[str]:
    """The requirements of the package with its explorer, without markers."""
    found = []
    for requirement in map(Requirement, requires):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": one}) for one in ("", _EXTRA)):
            requirement.marker = None
            found.append(str(requirement))
    return found
