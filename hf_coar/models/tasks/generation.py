"""Models that make something step by step: diffusion, decisions."""

import hashlib
import json
from typing import Any

from torch import Tensor, nn

from hf_coar.errors import CoarError, DataError
from hf_coar.models import outputs
from hf_coar.models.tasks.base import Batch, labels_of, register


@outputs.register("denoising", unit="squared error", takes="output")
def denoising(found: Any, batch: Batch) -> Tensor:
    """Minus the denoising loss: the squared error of the predicted noise, mean over its values (at most 0).

    `noise` is what the model was trained to predict for the noisy `sample` at `timestep`: the noise, or the velocity.
    """
    made = getattr(found, "sample", None)
    if not isinstance(made, Tensor):
        raise CoarError(
            f"the model returned a {type(found).__name__} without a sample; give call= and output= of your own"
        )
    noise = labels_of(batch, "noise")
    if made.shape != noise.shape:
        raise DataError(f"noise has shape {list(noise.shape)}, and the model makes {list(made.shape)}")
    return -(made.float() - noise.float()).square().flatten(1).mean(1)


def sampling(scheduler: Any, steps: int = 6, start: str = "noise") -> Any:
    """A call that makes samples: `attribute(call=tasks.sampling(scheduler), output=a function of (sample, batch))`.

    Gradients go through all steps. The output should be the behaviour that is to be explained or edited, such as a
    classifier's margin of what is made: the denoising loss of given images says little of what a model makes.

    Args:
        scheduler: of diffusers, deterministic (`DDIMScheduler`).
        steps: how many.
        start: the entry that holds the noise to begin with, [examples, …].
    """

    def sample(model: nn.Module, batch: Batch) -> Tensor:
        image = labels_of(batch, start)
        given = {name: batch[name] for name in ("class_labels", "encoder_hidden_states") if name in batch}
        scheduler.set_timesteps(steps, device=image.device)
        for step in scheduler.timesteps:
            said = model(image, step.expand(len(image)), **given).sample
            image = scheduler.step(said, step, image).prev_sample
        return image

    digest = hashlib.blake2b(json.dumps(dict(scheduler.config), sort_keys=True, default=str).encode(), digest_size=8)
    # What attributions remember of the call.
    sample.__qualname__ = f"sampling({type(scheduler).__name__} {digest.hexdigest()}, steps={steps}, start={start!r})"
    return sample


@outputs.register("action", unit="squared error", takes="output")
def action(found: Any, batch: Batch) -> Tensor:
    """Minus the squared error of the predicted actions, mean over the attended steps (at most 0); `labels` are true."""
    made = getattr(found, "action_preds", None)
    if not isinstance(made, Tensor):
        raise CoarError(f"the model returned a {type(found).__name__} without action_preds; give an output of your own")
    labels = labels_of(batch).float()
    if labels.shape != made.shape:
        raise DataError(f"labels have shape {list(labels.shape)}, and the actions predicted {list(made.shape)}")
    errors = -(made.float() - labels).square().mean(-1)
    mask = batch.get("attention_mask")
    return errors.mean(1) if mask is None else (errors * mask).sum(1) / mask.sum(1).clamp_min(1)


register("denoising", ("denoising",), ("diffusers",), targets=("noise",), columns=("image",))
register("decision", ("action",), ("DecisionTransformerModel",), columns=("states", "actions"))
