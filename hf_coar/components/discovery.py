"""Finding components: walk the modules, ask each class's rule for its matrices, cut them by the granularity."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from hf_coar.components.groups import GRANULARITIES, Components, Group, Skipped
from hf_coar.components.rules import Matrix, registered, rule_of
from hf_coar.errors import CoarError, NoComponentsError
from hf_coar.models import embedding_modules, output_modules

_HEAD = "classifier or language-model head (left out unless included)"
_EMBEDDING = "embedding"
_VECTOR = "no matrix: normalisation, bias or scale"


def find_components(
    model: nn.Module,
    granularity: str = "unit",
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
) -> Components:
    """The components of a model.

    Args:
        model: any module; of timm or transformers best.
        granularity: "unit" (convolution filters and output neurons of every weight matrix), "input" (input features of
            every weight matrix) or "module" (whole matrices).
        include: globs over module names, such as `["layer4.*"]`: only these. A head that is named here counts too.
        exclude: globs over module names: not these.

    Returns:
        The components, in the order of the modules. The classifier or language-model head and the embeddings are left
        out by default; `components.skipped` lists every weight that was left out, with the reason. Of a plain module
        whose classifier cannot be told, nothing is left out.

    Raises:
        NoComponentsError: nothing is left, or a glob matches no module.
        CoarError: an unknown granularity.
    """
    if granularity not in GRANULARITIES:
        raise CoarError(f"unknown granularity {granularity!r}; there are {', '.join(GRANULARITIES)}")
    include, exclude = _globs(include), _globs(exclude)
    candidates = list(_matrices(model))
    _check_globs(include + exclude, [name for name, _, _ in candidates], model)
    left_out = _left_out(model, {name for name, _, _ in candidates if include and _matches(name, include)})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[tuple[int, int], Group] = {}
    skipped: list[Skipped] = []
    for name, module, matrix in candidates:
        parameter_name = f"{name}.{matrix.parameter}" if name else matrix.parameter
        parameter = parameters[parameter_name]
        reason = left_out.get(name) or _filtered(name, include, exclude)
        group = None if reason else _cut(name, parameter_name, parameter, matrix, granularity)
        if group is None:
            reason = reason or f"has no components of granularity {granularity!r}"
            skipped.append(Skipped(name, type(module).__name__, parameter.numel(), reason))
        elif (id(parameter), group.axis) in groups:
            first = groups[id(parameter), group.axis]
            groups[id(parameter), group.axis] = _with_sharer(first, name)
        else:
            groups[id(parameter), group.axis] = group
    skipped += _without_rule(model, {name for name, _, _ in candidates})
    if not groups:
        raise NoComponentsError(_nothing_found(model, candidates, granularity, include, exclude))
    return Components(tuple(groups.values()), granularity, tuple(skipped))


def _globs(value: Sequence[str] | str | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _matches(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, Matrix]]:
    """Every matrix of every module that has a rule; what lies inside such a module is its rule's business."""
    spoken_for: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in spoken_for:
            continue
        found = rule_of(module)
        if found is None:
            continue
        spoken_for.update(module.modules())
        for matrix in found(module):
            yield name, module, matrix


def _check_globs(globs: Sequence[str], names: Sequence[str], model: nn.Module) -> None:
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise NoComponentsError(
                f"the glob {glob!r} matches none of the {len(names)} modules of {type(model).__name__} with "
                f"components: {_abbreviate(names)}"
            )


def _abbreviate(names: Sequence[str], most: int = 24) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f", … ({len(names) - most} more)" if len(names) > most else "")


def _left_out(model: nn.Module, included: set[str]) -> dict[str, str]:
    """Reason by module name for heads and embeddings; a module that `include` names stays."""
    reasons = dict.fromkeys(embedding_modules(model), _EMBEDDING)
    for head in output_modules(model):
        reasons.update(dict.fromkeys(head.modules(), _HEAD))
    return {
        name: reasons[module]
        for name, module in model.named_modules(remove_duplicate=False)
        if module in reasons and name not in included
    }


def _filtered(name: str, include: Sequence[str], exclude: Sequence[str]) -> str | None:
    if include and not _matches(name, include):
        return "not included"
    return "excluded" if _matches(name, exclude) else None


def _cut(module: str, parameter_name: str, parameter: torch.Tensor, matrix: Matrix, granularity: str) -> Group | None:
    """One matrix as a group of components."""
    if granularity == "input":
        axis, kind, side = matrix.input_axis, "input feature", "input"
    else:
        axis, kind, side = matrix.output_axis, matrix.unit, "output"
    if axis is None:
        return None
    rows = parameter.shape[axis]
    size, block, kind = (1, rows, "module") if granularity == "module" else (rows, 1, kind)
    # A site inside the module (an attention's projections) has its own two sides.
    site = f"{matrix.site} {side}" if matrix.site else side
    return Group(module, kind, parameter_name, axis, size, block, site, matrix.feature_axis)


def _with_sharer(group: Group, module: str) -> Group:
    return replace(group, shared_by=(*group.shared_by, module))


def _without_rule(model: nn.Module, ruled: set[str]) -> list[Skipped]:
    """Parameters that no rule speaks for, by the module that owns them."""
    skipped = []
    for name, module in model.named_modules():
        if any(name == owner or name.startswith(f"{owner}.") for owner in ruled):
            continue
        own = list(module.parameters(recurse=False))
        count = sum(parameter.numel() for parameter in own)
        if not count:
            continue
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            reason = _EMBEDDING
        elif all(sum(size > 1 for size in parameter.shape) <= 1 for parameter in own):
            reason = _VECTOR
        else:
            reason = f"no rule for {type(module).__name__}; add one with hf_coar.components.rule"
        skipped.append(Skipped(name, type(module).__name__, count, reason))
    return skipped


def _nothing_found(
    model: nn.Module, candidates: list, granularity: str, include: Sequence[str], exclude: Sequence[str]
) -> str:
    name = type(model).__name__
    if candidates:
        return (
            f"no components of granularity {granularity!r} are left in {name} with include={include} and "
            f"exclude={exclude}; there are {_abbreviate([name for name, _, _ in candidates])}"
        )
    known = sorted(key if isinstance(key, str) else key.__name__ for key in registered())
    classes = sorted({type(module).__name__ for module in model.modules()})
    return (
        f"{name} has no module with a rule; it is made of {_abbreviate(classes)}, and there are rules for "
        f"{', '.join(known)}; add one with hf_coar.components.rule"
    )
