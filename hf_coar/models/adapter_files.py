"""Adapters of PEFT in a folder or repository, which hold no base model and name it; nothing is unpickled."""

from pathlib import Path
from typing import Any

from torch import nn

from hf_coar.errors import CoarError, ModelError
from hf_coar.models.building import building, size_of_file
from hf_coar.storage import files, hub

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(source: hub.Source) -> bool:
    """Whether there are adapters and no model of their own."""
    try:
        return source.file_if_there("config.json") is None and source.file_if_there(_CONFIG) is not None
    except CoarError:  # nothing of that name: whoever reads its config.json says so
        return False


def base_of(source: hub.Source) -> str:
    """The folder or Hub id of the base model that adapters name.

    Raises:
        ModelError: they name none, or a folder that is not here.
    """
    base = _config(source).get("base_model_name_or_path")
    if isinstance(base, str) and base:
        is_folder, is_here = base.startswith((".", "/", "~")), Path(base).exists()
        # What comes from the Hub names no folder of this machine.
        if (not is_folder and not is_here) or (is_here and source.is_local):
            return base
    raise ModelError(
        f"{source.name!r} holds adapters of PEFT for the base model {base!r}, which is not here; give "
        "architecture=… (--architecture), the folder or Hub id of the base model"
    )


def put_onto(base: nn.Module, source: hub.Source) -> nn.Module:
    """The base model with the adapters on it.

    Raises:
        ModelError: PEFT is not installed, the adapters are not in safetensors, or they do not fit the base model.
    """
    try:
        import peft
    except ImportError as error:
        raise ModelError(f"{source.name!r} holds adapters of PEFT; install it: pip install peft") from error
    config, weights = _config(source), source.file_if_there(_WEIGHTS)
    if weights is None:
        raise ModelError(f"{source.name!r} holds no {_WEIGHTS}, and other weights are not read; save it with PEFT anew")
    if config.get("megatron_config"):  # names a module that would be imported
        raise ModelError(f"the adapters of {source.name!r} are of Megatron, which is not run here; merge them there")
    _check_head(base, config.get("task_type"), source.name)
    with building(f"the adapters of {source.name!r} cannot be put onto {type(base).__name__}", size_of_file(weights)):
        return peft.PeftModel.from_pretrained(base, str(weights.parent), use_safetensors=True)


def _config(source: hub.Source) -> dict[str, Any]:
    config = files.read_json(source.file(_CONFIG))
    if not isinstance(config, dict):
        raise ModelError(f"{_CONFIG} of {source.name!r} holds a {type(config).__name__}, not a mapping")
    return config


# What PEFT calls a head, and how transformers' classes with such a head end.
_HEADS = {
    "CAUSAL_LM": ("CausalLM", "LMHeadModel", "ConditionalGeneration"),
    "SEQ_2_SEQ_LM": ("ConditionalGeneration",),
    "SEQ_CLS": ("SequenceClassification",),
    "TOKEN_CLS": ("TokenClassification",),
    "QUESTION_ANS": ("QuestionAnswering",),
}


def _check_head(base: nn.Module, task: Any, name: str) -> None:
    endings = _HEADS.get(task)
    if endings and not type(base).__name__.endswith(endings):
        raise ModelError(
            f"the adapters of {name!r} are for a head of the kind {task}, and the base model is a "
            f"{type(base).__name__}; load the base with that head (AutoModelFor…), put the adapters on it "
            f"(peft.PeftModel.from_pretrained(base, {name!r})), and give that model with preprocessor=…"
        )
