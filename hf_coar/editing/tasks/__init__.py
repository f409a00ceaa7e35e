"""Edits by task: one call each, which divides the data, edits, and measures on examples that chose nothing."""

from hf_coar.editing.tasks.figures import Figure, Figures
from hf_coar.editing.tasks.fixing import fix
from hf_coar.editing.tasks.forgetting import forget
from hf_coar.editing.tasks.lifting import lift
from hf_coar.editing.tasks.matching import match
from hf_coar.editing.tasks.setting import EditResult
from hf_coar.editing.tasks.steering import before_and_after, steer

__all__ = ["EditResult", "Figure", "Figures", "before_and_after", "fix", "forget", "lift", "match", "steer"]
