"""Which library a model comes from: all else that is asked of it goes through that library's own interfaces."""

from torch import nn


def library(model: nn.Module) -> str:
    """`"transformers"`, `"timm"` or `"torch"`."""
    module_names = {cls.__module__.split(".")[0] for cls in type(model).__mro__}
    if "transformers" in module_names and hasattr(model, "config"):
        return "transformers"
    if hasattr(model, "pretrained_cfg") and hasattr(model, "get_classifier"):
        return "timm"
    return "torch"
