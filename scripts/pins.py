"""Constraints for pip: the versions in this environment of all that hf_coar and its extras need on every machine.

    .venv-newest/bin/python scripts/pins.py        # prints them; scripts/refresh_constraints.sh tests first

A requirement that holds only on some machines or Pythons (CUDA's libraries, triton, backports) is left out with all
that it alone needs: torch and the others name its version themselves. A pin without a local label (2.14.1) also takes a
build of the same version that has one (2.14.1+cpu); torchvision has to be of the same kind as torch.
"""

import re
from collections.abc import Iterator
from configparser import ConfigParser
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# Chromium's driver: the tests that need it are opt-in, and its browsers come by version.
EXTRAS = ("plots", "explore", "completion", "diffusion", "adapters", "graphs", "docs", "test")


def direct(setup: Path = ROOT / "setup.cfg") -> list[Requirement]:
    """The requirements of the package and of the extras that the two commands of the README install."""
    parsed = ConfigParser()
    parsed.read(setup)
    sections = [parsed["options"]["install_requires"], *(parsed["options.extras_require"][name] for name in EXTRAS)]
    found = [Requirement(line) for text in sections for line in text.strip().splitlines()]
    return [requirement for requirement in found if requirement.name != "hf_coar"]


def everywhere(requirement: Requirement, extras: set[str]) -> bool:
    """Whether a requirement holds on every machine and Python, with these extras of the package that has it."""
    if requirement.marker is None:
        return True
    text = str(requirement.marker)
    if re.fullmatch(r"extra == \"[^\"]*\"", text) is None:
        return False
    return any(requirement.marker.evaluate({"extra": extra}) for extra in extras)


def closure(wanted: list[Requirement]) -> Iterator[str]:
    """Names of all packages that these need on every machine, themselves included."""
    queue, seen = list(wanted), set()
    while queue:
        requirement = queue.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        yield key[0]
        needs = map(Requirement, requires(requirement.name) or ())
        queue += [need for need in needs if everywhere(need, requirement.extras)]


def main() -> None:
    """Print the constraints."""
    print("# The versions that were tested; made by scripts/refresh_constraints.sh.")
    for name in sorted(set(closure(direct()))):
        print(f"{name}=={version(name).partition('+')[0]}")


if __name__ == "__main__":
    main()
