"""Versions of libraries, also of those that run from a folder no installer knows."""

import importlib.metadata
import sys


def version_of(name: str) -> str:
    """The version of a library, as installed or as it says itself; "unknown" where neither is to be had."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get(name), "__version__", "unknown")
