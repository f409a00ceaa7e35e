"""Attributions, and the files that they are saved in."""

from hf_coar.attributions.attributions import Attributions, Figures

__all__ = ["Attributions", "Figures"]
