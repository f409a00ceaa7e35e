"""Tokenizers and image processors: those that belong to the model, or others that are named."""

from pathlib import Path
from typing import Any

from torch import nn

from hf_coar.errors import CoarError, DataError
from hf_coar.models import record

_FUNCTION = ", or a function from an image to a tensor"


def load(loader: Any, model: nn.Module, what: str, preprocessor: Any = None) -> Any:
    """A tokenizer or image processor of transformers.

    Args:
        loader: the class that loads it.
        model: whose it is, by the id or folder in its record.
        what: it is, in words.
        preprocessor: Hub id or folder of another one, or the object itself.

    Raises:
        DataError: there is none.
        CoarError: the model does not say where it came from.
    """
    if preprocessor is not None and not isinstance(preprocessor, str | Path):
        return preprocessor
    known = record(model)
    source, revision = (known["id"], known["revision"]) if preprocessor is None else (str(preprocessor), None)
    if preprocessor is None and known.get("architecture"):  # whose commit is another one
        source, revision = known["architecture"], None
    if source is None:
        raise CoarError(
            f"the {type(model).__name__} given does not say where its {what} is; give preprocessor=…, a Hub id or "
            f"folder that holds the {what}{_FUNCTION if what == 'image processor' else ''}, or pass batches of tensors"
        )
    try:
        return loader.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"no {what} is saved with {source!r}; save it there, or give preprocessor=…, a Hub id or folder that "
            f"holds the {what}"
        ) from error
