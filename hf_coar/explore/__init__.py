"""The explorer: attributions in the browser, on the live model. `launch` serves it, `export` makes a Space of it."""

from hf_coar.explore.export import export
from hf_coar.explore.serving import launch

__all__ = ["export", "launch"]
