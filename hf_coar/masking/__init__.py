"""Masking: a `MaskedModel` is ablated or gated, by its `weights` or by gates; `sites` says where, `layout` for whom."""

from hf_coar.masking.gating import FiredGroups
from hf_coar.masking.masked_model import MaskedModel, ablate, fingerprint_of
from hf_coar.masking.sites import SITES

__all__ = ["SITES", "FiredGroups", "MaskedModel", "ablate", "fingerprint_of"]
