"""Attributions, their provenance, and the files that they are saved in."""

from hf_coar.attributions.attributions import Attributions
from hf_coar.attributions.provenance import Provenance
from hf_coar.attributions.saving import Figures

__all__ = ["Attributions", "Figures", "Provenance"]
