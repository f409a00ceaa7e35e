"""Masking: `ablate` and `gated` (`ablation`), where gates enter (`sites`), where examples are (`layout`), `weights`."""

from hf_coar.masking.ablation import FiredGroups, ablate, check_same_model, gated, zero_slices
from hf_coar.masking.repeated import Repeated
from hf_coar.masking.sites import SITES

__all__ = ["SITES", "FiredGroups", "Repeated", "ablate", "check_same_model", "gated", "zero_slices"]
