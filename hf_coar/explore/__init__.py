"""The explorer: attributions in the browser, on the live model.

`launch` serves it, `export` makes a Space of it, `share` writes one page that needs no server.
"""

from hf_coar.explore.export import export
from hf_coar.explore.serving import launch
from hf_coar.explore.sharing import share

__all__ = ["export", "launch", "share"]
