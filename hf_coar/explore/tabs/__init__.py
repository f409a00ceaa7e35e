"""The tabs of the explorer, a file a tab: each registers itself when it is imported, and all files here are."""

import importlib
import pkgutil

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")
