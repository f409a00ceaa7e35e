"""Attention heads: the columns of an attention's output projection that read what one head found.

Head h of an attention with H heads writes the h-th block of the vector that the output projection reads. Zeroing the
block's columns takes the head away and nothing else, whatever made the keys and values (fused, grouped, low rank,
windows). So a head is `head_dim` input columns of the output projection, and all that must be found is that projection
and H. Both come from structure: a module that knows how many heads it has (an integer attribute of its own, or its
configuration) and holds query, key or value projections; its output projection is the matrix beside or right behind
them that is named as outputs are and whose width H divides.
"""

import re
from collections.abc import Mapping, Sequence

from torch import nn

from hf_coar.components.rules import Matrix

_COUNTS = (
    "num_heads", "n_heads", "num_attention_heads", "n_head", "num_attn_heads", "attention_heads", "nhead", "heads",
    "num_v_heads",
)  # fmt: skip
_VALUE_SIZES = ("v_head_dim", "head_v_dim", "values_head_dim")
_SIZES = (
    "head_dim", "attention_head_size", "dim_head", "d_head", "head_size", "key_value_proj_dim", "kv_channels",
    "attention_head_dim",
)  # fmt: skip
_WORDS = re.compile(r"[A-Z]?[a-z0-9]+|[A-Z]+")
_WRAPPERS = {"linear", "conv", "convolution", "ln", "c", "layer", "base", "convolution_projection"}
_SOURCE = {
    "q", "k", "v", "qk", "kv", "qkv", "qkvs", "query", "key", "value", "queries", "keys", "values", "wq", "wk", "wv",
    "wqkv", "in", "pos", "rel", "relative", "gate", "g", "f", "b", "a", "r", "x", "dt", "l", "w", "pool", "weights",
    "index", "indexer", "offsets",
}  # fmt: skip
_OUTPUT = {"o", "wo", "out", "output", "proj", "projection", "dense", "final", "post", "merge"}
_CORE_HINTS = {"q", "k", "v", "qk", "kv", "qkv", "qkvs", "query", "key", "value", "queries", "keys", "values"}
_FEED_FORWARD = {"mlp", "ffn", "ff", "intermediate", "feed", "experts", "expert", "fc", "fc1", "fc2"}


# Heads that take turns within the width, so that no block of columns is one head's.
_INTERLEAVED = {"timm.models.nest.Attention"}


def head_blocks(model: nn.Module, matrices: Sequence[tuple[str, Matrix]]) -> dict[tuple[str, str], int]:
    """Input columns a head, by (module name, parameter inside it), for every output projection of an attention.

    Args:
        model: any module.
        matrices: all matrices with the names of their modules.
    """
    modules = dict(model.named_modules())
    names = [name for name, matrix in matrices if matrix.input_axis is not None]
    found: dict[tuple[str, str], int] = {}
    for name, matrix in matrices:
        block = _own_block(modules.get(name), matrix)
        if block:
            found[name, matrix.parameter] = block
    of_name = dict(matrices)
    inside = _descendants(names)
    for core, module in modules.items():
        if not _knows_heads(module) or not inside.get(core):
            continue
        output = _output_projection(core, inside, modules)
        if output is None:
            continue
        width = _input_width(modules[output], of_name[output])
        block = _block(module, width)
        if block and (output, of_name[output].parameter) not in found:
            found[output, of_name[output].parameter] = block
    return found


def _own_block(module: nn.Module | None, matrix: Matrix) -> int:
    """Attentions that are one module with several matrices: PyTorch's own, and stacks with an axis of heads."""
    if isinstance(module, nn.MultiheadAttention):
        return module.head_dim if matrix.parameter == "out_proj.weight" else 0
    if matrix.parameter == "o" and matrix.input_stack and type(getattr(module, "d_head", None)) is int:
        return module.d_head
    return 0


def _descendants(names: Sequence[str]) -> dict[str, list[str]]:
    """Names of matrices by every module above them."""
    inside: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        for end in range(len(parts)):
            inside.setdefault(".".join(parts[:end]), []).append(name)
    return inside


def _attribute(module: nn.Module, names: Sequence[str]) -> int:
    """A whole number that the module knows by one of these names; an attention may leave it to its configuration."""
    places = [vars(module)]
    if "attention" in type(module).__name__.lower() and hasattr(module, "config"):
        places.append(getattr(module.config, "__dict__", {}))
    return next((v for known in places for name in names if type(v := known.get(name)) is int and v > 0), 0)


def _knows_heads(module: nn.Module) -> bool:
    if f"{type(module).__module__}.{type(module).__qualname__}" in _INTERLEAVED:
        return False
    return bool(_attribute(module, (*_COUNTS, *_VALUE_SIZES, *_SIZES)))


def _words(part: str) -> set[str]:
    return {word.lower() for word in _WORDS.findall(part)}


def _role(path: str) -> set[str]:
    """The words of the part of a path that says what the matrix is for: `q_proj.linear` → {q, proj}."""
    parts = [part for part in path.split(".") if not part.isdigit() and part not in _WRAPPERS]
    if len(parts) > 1 and _words(parts[-1]) <= {"proj", "dense", "conv"}:
        return _words(parts[-2]) | _words(parts[-1])
    return _words(parts[-1]) if parts else set()


def _output_projection(core: str, inside: Mapping[str, list[str]], modules: Mapping[str, nn.Module]) -> str | None:
    """The matrix that reads the heads: inside the attention, or in a sibling of it such as `output.dense`."""
    own = [name for name in inside[core] if _innermost(name, core, modules)]
    roles = {name: _role(name[len(core) + 1 if core else 0 :]) for name in own}
    makes_heads = any(role & (_CORE_HINTS | {"in"}) for role in roles.values())
    # What only names a number of heads and holds no queries (an encoder, say) is no attention with matrices far inside.
    near = [name for name in own if makes_heads or name.count(".") - (core.count(".") + bool(core)) <= 1]
    # Of an output projection in two steps (o_a, o_b) the first one reads the heads.
    found = [name for name in near if roles[name] & _OUTPUT and not (roles[name] - {"a"}) & _SOURCE]
    plainly = [name for name in found if not roles[name] - _OUTPUT - {"a", "lin", "linear", "c", "layer"}]
    if plainly:
        return plainly[-1]
    beside = _beside(core, inside) if makes_heads and core else None
    return beside or (found[-1] if found else None)


def _beside(core: str, inside: Mapping[str, list[str]]) -> str | None:
    """An output projection in a sibling of the attention."""
    parent = core.rpartition(".")[0]
    for name in inside.get(parent, ()):
        path = name[len(parent) + 1 if parent else 0 :]
        words = set().union(*(_words(part) for part in path.split(".")))
        outside = not name.startswith(f"{core}.") and path.count(".") <= 1
        if outside and words & _OUTPUT and not words & (_SOURCE | _FEED_FORWARD):
            return name
    return None


def _innermost(name: str, core: str, modules: Mapping[str, nn.Module]) -> bool:
    """No other module that knows its heads, and no feed-forward block, lies between the core and the matrix."""
    path = name[len(core) + 1 if core else 0 :].split(".")
    for end in range(1, len(path)):
        between = ".".join(([core] if core else []) + path[:end])
        if _knows_heads(modules[between]) or _words(path[end - 1]) & _FEED_FORWARD:
            return False
    return len(path) <= 4


def _input_width(module: nn.Module, matrix: Matrix) -> int:
    if matrix.input_size is not None:
        return matrix.input_size
    if matrix.input_axis is None or matrix.site == "attention":
        return 0
    stacks = matrix.input_stack[1] if matrix.input_stack else 1
    return stacks * getattr(module, matrix.parameter).shape[matrix.input_axis]


def _block(module: nn.Module, width: int) -> int:
    """Columns a head: of what the module says of counts and sizes, the one that fits the width; 0 if none does."""
    count, value_size, size = (_attribute(module, names) for names in (_COUNTS, _VALUE_SIZES, _SIZES))
    if value_size and width % value_size == 0:
        return value_size
    # Where heads are only a part of what the projection reads (convolutions beside them), their size still holds.
    partly = _attribute(module, ("all_head_size",)) not in (0, width)
    if size and width % size == 0 and (count * size == width or not count or partly):
        return size
    return width // count if count and width % count == 0 else 0
