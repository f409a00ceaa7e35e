"""Fine-tuning: all parameters of the model go down the task's own loss, on the examples that are attributed."""

import itertools

from torch import nn

from hf_coar.editing.tasks import descending
from hf_coar.editing.tasks.aims import Aim, changed_copy, note_changed, rival
from hf_coar.editing.tasks.walking import Verdict
from hf_coar.errors import UnsatisfiedError

CHECKPOINTS = (1, 2, 4, 8, 16, 32)


@rival("fine_tuning", ("forget", "fix", "lift", "match", "steer"))
def fine_tuning(aim: Aim) -> nn.Module:
    """Adam, its rate and its number of steps chosen like the edit, by the same examples and limits.

    To forget, towards the model's own answers without the class; to fix, on the examples; to lift, with every group
    counting alike; to match, on clean and triggered examples. Normalisation keeps its statistics: a few examples would
    spoil them.

    Raises:
        UnsatisfiedError: no rate and number of steps keeps the limits.
    """
    best: tuple[Verdict, nn.Module] | None = None
    for rate in descending.RATES:
        tuned = changed_copy(aim, "fine_tuning")
        walk = descending.steps(tuned, lambda model: [aim.loss(model)], rate)
        for step in itertools.islice(walk, max(CHECKPOINTS)):
            if step not in CHECKPOINTS:
                continue
            verdict = aim.judge(tuned)
            if verdict.satisfies and (best is None or verdict.merit > best[0].merit):
                best = verdict, _snapshot(aim, tuned)
            if verdict.spent > 0.1:  # far over the allowance; further steps only lead away
                break
    if best is None:
        raise UnsatisfiedError(f"no rate and number of steps of fine-tuning {aim.wanted}")
    return note_changed(aim, best[1])


def _snapshot(aim: Aim, tuned: nn.Module) -> nn.Module:
    """A copy as it is now, which asks for gradients where the model does."""
    kept = changed_copy(aim, "fine_tuning")
    kept.load_state_dict({name: value.detach().clone() for name, value in tuned.state_dict().items()})
    return kept
