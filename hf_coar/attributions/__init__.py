"""Attributions, their provenance, and the files that they are saved in."""

from hf_coar.attributions.attributions import Attributions, Figures
from hf_coar.attributions.provenance import Provenance

__all__ = ["Attributions", "Figures", "Provenance"]
