"""Masking: a `MaskedModel` is ablated or gated, by its `weights` or by gates; `sites` says where, `layout` for whom.

What stands in for what is ablated, `ablations` says.
"""

from hf_coar.masking.ablations import ABLATIONS, Ablation, Mean, Values
from hf_coar.masking.finding import find_components
from hf_coar.masking.gating import FiredGroups
from hf_coar.masking.masked_model import MaskedModel, ablate, fingerprint_of
from hf_coar.masking.resampling import Patch, Resample, paired, reopened
from hf_coar.masking.sites import SITES

__all__ = [
    "ABLATIONS",
    "SITES",
    "Ablation",
    "FiredGroups",
    "Mean",
    "MaskedModel",
    "Patch",
    "Resample",
    "Values",
    "ablate",
    "find_components",
    "fingerprint_of",
    "paired",
    "reopened",
]
