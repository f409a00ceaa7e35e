"""Honest rivals of the edits: what anybody would try first, with their own settings, judged on the same examples."""

from hf_coar.editing.rivals import ablations, biases, heads, tuning
from hf_coar.editing.tasks.aims import RIVALS, rival, rivals_of

__all__ = ["RIVALS", "ablations", "biases", "heads", "rival", "rivals_of", "tuning"]
