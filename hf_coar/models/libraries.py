"""Which library a model comes from: all else that is asked of it goes through that library's own interfaces."""

from torch import nn


def library(model: nn.Module) -> str:
    """The library that saves and loads a model: `"transformers"`, `"timm"`, `"diffusers"`, `"peft"` or `"torch"`."""
    roots = {(cls.__module__.split(".")[0], cls.__name__) for cls in type(model).__mro__}
    # By the one ancestor that saves and loads: models of PEFT inherit from others of transformers too.
    for name, ancestors in _ANCESTORS.items():
        if any((name, ancestor) in roots for ancestor in ancestors):
            return name
    if hasattr(model, "pretrained_cfg") and hasattr(model, "get_classifier"):
        return "timm"
    return "torch"


_ANCESTORS = {
    "peft": ("PeftModel", "PeftMixedModel"),
    "transformers": ("PreTrainedModel",),
    "diffusers": ("ModelMixin",),
}


def wrapped(model: nn.Module) -> nn.Module:
    """The model inside of what only wraps it (PEFT, `torch.compile`), or the model itself."""
    inner = getattr(model, "_orig_mod", None)
    if isinstance(inner, nn.Module):
        return wrapped(inner)
    return wrapped(model.get_base_model()) if library(model) == "peft" else model
