"""COAR-Edit: ablate the few components that move the outputs of target examples, and spare those of references.

One call an edit: `tasks` (forget, fix, lift, match, steer), measured beside honest `rivals`. Below them:
What to ablate first is said by a rule (`rules`), how much of it by validation (`choosing`, with the ready-made
`measures`; `stepwise` where the rest is attributed anew after every few), and `edit` does it (`making`).
"""

from hf_coar.editing import rivals
from hf_coar.editing.choosing import (
    Candidate,
    Choice,
    Constraint,
    Goal,
    choose,
    choose_n_components,
    numbers_to_try,
)
from hf_coar.editing.making import edit, kept_without, rank_components
from hf_coar.editing.measures import AtLeast, AtMost, Keep, accuracy, mean_output, worst_accuracy
from hf_coar.editing.rules import AUTO, RULES, Rule, Sides, best_first, rule, welch_scores
from hf_coar.editing.stepwise import choose_in_steps, steps
from hf_coar.editing.tasks import EditResult, Figure, Figures, fix, forget, lift, match, steer

__all__ = [
    "AUTO",
    "AtLeast",
    "AtMost",
    "Candidate",
    "Choice",
    "Constraint",
    "EditResult",
    "Figure",
    "Figures",
    "Goal",
    "Keep",
    "RULES",
    "Rule",
    "Sides",
    "accuracy",
    "best_first",
    "choose",
    "choose_in_steps",
    "choose_n_components",
    "edit",
    "fix",
    "forget",
    "kept_without",
    "lift",
    "match",
    "mean_output",
    "numbers_to_try",
    "rank_components",
    "rivals",
    "rule",
    "steer",
    "steps",
    "welch_scores",
    "worst_accuracy",
]
