"""Masking: `ablate` and `gated` (`ablation`), where gates enter (`sites`), where examples are (`layout`), `weights`."""

from hf_coar.masking.ablation import FiredGroups, ablate, check_same_model, gated, zero_slices
from hf_coar.masking.sites import SITES

__all__ = ["SITES", "FiredGroups", "ablate", "check_same_model", "gated", "zero_slices"]
