"""Finding components: walk the modules, ask each class's rule for its matrices, cut them by the granularity."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from hf_coar.components import experts, heads
from hf_coar.components.groups import GRANULARITIES, Components, Group, Skipped
from hf_coar.components.rules import Matrix, registered, rule_of, searched_inside
from hf_coar.components.unknown import is_table
from hf_coar.errors import CoarError, NoComponentsError
from hf_coar.models import adapters, check_usable, embedding_modules, output_modules

logger = logging.getLogger(__name__)

_HEAD = "classifier or language-model head (left out unless included)"
_EMBEDDING = "embedding (left out unless included)"
_BASE = "base model of the adapters (left out unless included)"
_TABLE = "embedding or other table: looked up, added or applied entry by entry, not multiplied"
_VECTOR = "no matrix: normalisation, bias or scale"
_MISSED, _NAMED = 0.05, 4  # the share of the weights from which on it is told that no rule reaches them; reasons told
NO_RULE = "no rule for"  # how the reason begins for weights that hold components and that no rule reaches


@dataclass(frozen=True)
class _Found:
    """One matrix of a model."""

    module: str
    module_class: str
    matrix: Matrix
    parameter: str
    tensor: Tensor
    head_block: int = 0
    expert: str | None = None


def find_components(
    model: nn.Module,
    granularity: str = "unit",
    include: Sequence[str] | str | None = None,
    exclude: Sequence[str] | str | None = None,
) -> Components:
    """The components of a model.

    Args:
        model: any module; of timm or transformers best. Its weights are not read: it may be on the meta device.
        granularity: "unit" (convolution filters and output neurons of every weight matrix), "input" (input features of
            every weight matrix), "head" (attention heads), "expert" (experts of a mixture) or "module" (whole
            matrices).
        include: globs over module names, such as `["layer4.*"]`: only these. A head that is named here counts too,
            and an embedding whose own name is (not only that of the block around it).
        exclude: globs over module names: not these.

    Returns:
        The components, in the order of the modules; what is left out is told at `find_components` of the package.

    Raises:
        ModelError: a lazy module without a shape, TorchScript, or weights of inference mode.
        NoComponentsError: nothing is left, the model has none of this granularity, or a glob matches no module.
        CoarError: an unknown granularity.
    """
    if granularity not in GRANULARITIES:
        raise CoarError(f"unknown granularity {granularity!r}; there are {', '.join(GRANULARITIES)}")
    include, exclude = _globs(include, "include"), _globs(exclude, "exclude")
    check_usable(model)
    found = _matrices(model)
    aliases = _aliases(model)
    names = [name for one in found for name in aliases[one.module]]
    _check_globs(include + exclude, names, model)
    included = [aliases[one.module] for one in found if _any(aliases[one.module], _naming(include, one))]
    left_out = _left_out(model, {name for every in included for name in every})
    users = _users(model)
    groups: dict[tuple[int, int, int | None], Group] = {}
    skipped: list[Skipped] = []
    for one in found:
        reason = left_out.get(one.module) or _filtered(aliases[one.module], include, exclude)
        group = None if reason else _cut(one, granularity)
        if group is None:
            reason = reason or f"has no components of granularity {granularity!r}"
            skipped.append(Skipped(one.module, one.module_class, one.tensor.numel(), reason))
        else:
            # A tied parameter comes up once a user, and is one group.
            groups.setdefault((id(one.tensor), group.axis, group.stack_axis), group)
    skipped += _without_rule(model, found)
    if not groups:
        raise NoComponentsError(_nothing_found(model, found, left_out, granularity, include, exclude))
    _warn_of_guesses(model, groups.values())
    _warn_of_missed(model, found, skipped)
    shared = [_with_sharers(model, group, users.get(key[0])) for key, group in groups.items()]
    return Components(tuple(shared), granularity, tuple(skipped))


def _globs(value: Sequence[str] | str | None, name: str) -> list[str]:
    given = [value] if isinstance(value, str) else [] if value is None else value
    globs = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(glob, str) for glob in globs):
        raise CoarError(f'{name}={value!r}; give names of modules, with * for any letters, such as ["layer4.*"]')
    return globs


def _naming(globs: Sequence[str], one: _Found) -> Sequence[str]:
    """The globs that may name a matrix; a table is not meant by one that takes whatever lies in a block (`block.*`)."""
    if one.matrix.unit != "row":
        return globs
    return [glob for glob in globs if glob.rpartition(".")[2].strip("*")]


def _any(names: Sequence[str], globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for name in names for glob in globs)


def _matrices(model: nn.Module) -> list[_Found]:
    """Every matrix of every module; what lies inside a module with a rule is its rule's business."""
    modules = dict(model.named_modules())
    registered().settle()
    spoken_for: set[nn.Module] = set()
    found: list[_Found] = []
    for name, module in modules.items():
        if module in spoken_for:
            continue
        module_rule = rule_of(module)
        if module_rule is not None and not searched_inside(module_rule):
            spoken_for.update(module.modules())
        for matrix in (module_rule or experts.structural)(module):
            inner = ".".join(part for part in (name, matrix.module) if part)
            found.append(_locate(inner, model.get_submodule(inner), matrix))
    found = _told_by_their_like(found)
    blocks = heads.head_blocks(model, [(one.module, one.matrix) for one in found])
    return [
        replace(
            one,
            head_block=blocks.get((one.module, one.matrix.parameter), 0),
            expert=experts.expert_of(one.module, modules),
        )
        for one in found
    ]


def _told_by_their_like(found: Sequence[_Found]) -> list[_Found]:
    """Guessed axes (of a square matrix, often) become known where the class's other matrices of this name are."""
    known: dict[tuple[str, str], set[tuple[int | None, int | None]]] = {}
    for one in found:
        if not one.matrix.guessed:
            axes = (one.matrix.output_axis, one.matrix.input_axis)
            known.setdefault((one.module_class, one.matrix.parameter), set()).add(axes)

    def told(one: _Found) -> _Found:
        axes = known.get((one.module_class, one.matrix.parameter), set()) if one.matrix.guessed else set()
        if len(axes) != 1:
            return one
        ((output_axis, input_axis),) = axes
        return replace(one, matrix=replace(one.matrix, output_axis=output_axis, input_axis=input_axis, guessed=False))

    return [told(one) for one in found]


def _locate(name: str, module: nn.Module, matrix: Matrix) -> _Found:
    """Where the matrix is stored: under its own name, or behind a parametrization such as weight normalisation."""
    path = matrix.parameter
    if parametrize.is_parametrized(module, path):
        steps = module.parametrizations[path]
        normalised = len(steps) == 1 and isinstance(steps[0], parametrizations._WeightNorm)
        path = f"parametrizations.{path}." + ("original1" if normalised else "original")
        if not hasattr(steps, path.rpartition(".")[2]):
            path = f"{path}0"
        if not normalised:
            matrix = replace(matrix, by_weights="never")
    owner, _, last = path.rpartition(".")
    stored = _stored(module.get_submodule(owner), last)
    if stored != last:
        path, matrix = f"{path.removesuffix(last)}{stored}", replace(matrix, by_weights="never")
    tensor = getattr(module.get_submodule(owner), stored)
    return _Found(name, type(module).__name__, matrix, f"{name}.{path}" if name else path, tensor)


def _stored(owner: nn.Module, name: str) -> str:
    """The name of the tensor that a weight is made of by a hook before every pass (`torch.nn.utils`, old and pruning).

    It keeps the shape: `weight_orig` of spectral normalisation and of pruning, the direction `weight_v` of length and
    direction. What a module holds itself, or makes by a property, goes by its own name.
    """
    own = dict(owner.named_parameters(recurse=False)) | dict(owner.named_buffers(recurse=False))
    shape = getattr(getattr(owner, name), "shape", None)
    made_of = [f"{name}{end}" for end in ("_orig", "_v") if getattr(own.get(f"{name}{end}"), "shape", None) == shape]
    return name if name in own or not made_of else made_of[0]


def _check_globs(globs: Sequence[str], names: Sequence[str], model: nn.Module) -> None:
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise NoComponentsError(
                f"the glob {glob!r} matches none of the {len(set(names))} modules of {type(model).__name__} with "
                f"components: {_abbreviate(names)}"
            )


def _abbreviate(names: Sequence[str], most: int = 24) -> str:
    names = list(dict.fromkeys(names))
    return ", ".join(names[:most]) + (f", … ({len(names) - most} more)" if len(names) > most else "")


def _left_out(model: nn.Module, included: set[str]) -> dict[str, str]:
    """Reason by module name for heads, embeddings and what adapters stand on; a module that `include` names stays."""
    inside = {module for part in adapters(model) for module in part.modules()}
    reasons = {module: _BASE for module in model.modules() if inside and module not in inside}
    reasons |= dict.fromkeys(embedding_modules(model), _EMBEDDING)
    for head in output_modules(model):
        reasons.update(dict.fromkeys(head.modules(), _HEAD))
    return {
        name: reasons[module]
        for name, module in model.named_modules(remove_duplicate=False)
        if module in reasons and name not in included
    }


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All names of every module, by its first."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return {of_module[0]: of_module for of_module in names.values()}


def _filtered(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> str | None:
    if include and not _any(names, include):
        return "not included"
    return "excluded" if _any(names, exclude) else None


def _cut(one: _Found, granularity: str) -> Group | None:
    """One matrix as a group of components."""
    matrix = one.matrix
    if granularity == "unit":
        return _side(one, "output", matrix.unit, matrix.output_block)
    if granularity == "input":
        return _side(one, "input", matrix.input_unit, 1)
    if granularity == "head":
        return _side(one, "input", "head", one.head_block) if one.head_block else None
    if granularity == "module":
        return _whole(one, "module")
    if experts.is_stack_output(one.parameter, matrix):
        axis, n_experts = matrix.output_stack or matrix.input_stack
        return replace(_whole(one, "expert"), axis=axis, size=n_experts, block=one.tensor.shape[axis] // n_experts)
    if one.expert is not None and experts.is_last_of_expert(one.module, one.expert):
        return _whole(one, "expert")
    return None


def _side(one: _Found, side: str, kind: str, block: int) -> Group | None:
    """Output or input slices of one matrix, `block` entries each."""
    matrix = one.matrix
    axis, stack, size = (
        (matrix.output_axis, matrix.output_stack, matrix.output_size)
        if side == "output"
        else (matrix.input_axis, matrix.input_stack, matrix.input_size)
    )
    if axis is None:
        return None
    stack_axis, stacks = stack or (None, 1)
    rows = size or stacks * one.tensor.shape[axis]
    return _group(one, side, kind, axis, rows // block, block, stack_axis, stacks)


def _whole(one: _Found, kind: str) -> Group:
    """A whole matrix, or stack of matrices, as one component."""
    matrix = one.matrix
    axis = matrix.output_axis if matrix.output_axis is not None else matrix.input_axis
    rows = (matrix.output_size if matrix.output_axis is not None else matrix.input_size) or one.tensor.shape[axis]
    return _group(one, "output", kind, axis, 1, rows)


def _group(
    one: _Found,
    side: str,
    kind: str,
    axis: int,
    size: int,
    block: int,
    stack_axis: int | None = None,
    stacks: int = 1,
) -> Group:
    matrix = one.matrix
    # A site inside the module (an attention's projections) has its own two sides.
    site = f"{matrix.site} {side}" if matrix.site == "attention" else matrix.site or side
    return Group(
        module=one.module,
        kind=kind,
        parameter=one.parameter,
        axis=axis,
        size=size,
        block=block,
        site=site,
        feature_axis=matrix.feature_axis,
        stack_axis=stack_axis,
        stacks=stacks,
        by_weights=matrix.by_weights,
        routed=one.expert is not None,
        head_block=one.head_block or None,
        guessed=matrix.guessed and size > 1,  # of a whole matrix, no axis matters
    )


def _warn_of_guesses(model: nn.Module, groups: Iterable[Group]) -> None:
    """One line that names the classes whose rows and columns nothing but a name tells apart."""
    places: dict[str, list[str]] = {}
    for group in groups:
        if group.guessed:
            path = group.parameter.removeprefix(f"{group.module}.")
            places.setdefault(f"{path} of {type(model.get_submodule(group.module)).__name__}", []).append(group.module)
    if places:
        logger.warning(
            "which axis of %s makes the outputs is guessed: no rule knows the class, and neither its sizes nor a bias "
            "tell (first in %r); if it is wrong, say it with hf_coar.components.rule",
            _abbreviate(list(places)), next(iter(places.values()))[0],
        )  # fmt: skip


def _warn_of_missed(model: nn.Module, found: Sequence[_Found], skipped: Sequence[Skipped]) -> None:
    """One line that names the weights that no rule reaches, where they are more than a few of a model's."""
    missed = [one for one in skipped if one.reason.startswith(NO_RULE)]
    count = sum(one.n_parameters for one in missed)
    whole = count + sum({id(one.tensor): one.tensor.numel() for one in found}.values())
    if count > _MISSED * whole:
        reasons = list(dict.fromkeys(one.reason for one in missed))
        logger.warning(
            "%.0f %% of the weights of %s are no components: %s (components.skipped has all)",
            100 * count / whole, type(model).__name__, "; ".join(reasons[:_NAMED]),
        )  # fmt: skip


def _users(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold a parameter or buffer, by its identity."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
        for buffer in module.buffers(recurse=False):
            users.setdefault(id(buffer), []).append(name)
    return users


def _with_sharers(model: nn.Module, group: Group, users: Sequence[str] | None) -> Group:
    """The group with all other modules that use its parameter, heads and embeddings too: it is one weight."""
    if users is None:  # no module holds it: a property makes it anew whenever somebody looks
        return replace(group, by_weights="never")
    owner = group.parameter.rpartition(".")[0]
    others = tuple(name for name in users if name not in (group.module, owner))
    if not others:
        return group
    # Each may read it in a way of its own (looked up, transposed, without running at all), which no hook on it shows.
    parts = [name.split(".") for name in (group.module, *others)]
    end = next((i for i, level in enumerate(zip(*parts, strict=False)) if len(set(level)) > 1), 0)
    while end and isinstance(model.get_submodule(".".join(parts[0][:end])), nn.ModuleList | nn.ModuleDict):
        end -= 1  # lists do not run
    return replace(group, shared_by=others, site="weight", scope=".".join(parts[0][:end]))


def _without_rule(model: nn.Module, found: Sequence[_Found]) -> list[Skipped]:
    """Parameters that no rule speaks for, by the module that owns them and the reason."""
    claimed = {id(one.tensor) for one in found}
    spoken_for: set[nn.Module] = set()
    counts: dict[tuple[str, str, str], int] = {}
    for name, module in model.named_modules():
        module_rule = rule_of(module)
        if module_rule is not None and not searched_inside(module_rule):
            spoken_for.update(module.modules())
        if module in spoken_for:
            continue
        if hasattr(module, "_packed_params") and not any(True for _ in module.parameters()):
            # Of torch.ao: its weights are no tensors that a module shows.
            size = getattr(module, "in_features", 1) * getattr(module, "out_features", 1)
            reason = f"{NO_RULE} {type(module).__name__}, whose weights are packed; give the model before quantisation"
            counts[name, type(module).__name__, reason] = size
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in claimed:
                key = (name, type(module).__name__, _reason(module, parameter_name, parameter))
                counts[key] = counts.get(key, 0) + parameter.numel()
    return [Skipped(name, class_name, count, reason) for (name, class_name, reason), count in counts.items() if count]


def _reason(module: nn.Module, name: str, parameter: Tensor) -> str:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return _EMBEDDING
    if sum(size > 1 for size in parameter.shape) <= 1:
        return _VECTOR
    if is_table(name) or hasattr(module, "num_embeddings") or hasattr(module, "padding_idx"):
        return _TABLE
    return f"{NO_RULE} {type(module).__name__}.{name}; add one with hf_coar.components.rule"


def _nothing_found(
    model: nn.Module,
    found: Sequence[_Found],
    left_out: Mapping[str, str],
    granularity: str,
    include: Sequence[str],
    exclude: Sequence[str],
) -> str:
    name = type(model).__name__
    if found and all(one.module in left_out for one in found):
        reasons = "; ".join(sorted({left_out[one.module] for one in found}))
        return (
            f"{name} has no components but {_abbreviate([one.module for one in found], 8)}: {reasons}. Name them with "
            "include=[…]; or, if its other modules hold weights of a kind of their own, add hf_coar.components.rule"
        )
    if found:
        names = [one.module for one in found if one.module not in left_out] or [one.module for one in found]
        others = [
            other
            for other in GRANULARITIES
            if other != granularity and any(_cut(one, other) for one in found if one.module not in left_out)
        ]
        return (
            f"no components of granularity {granularity!r} are left in {name} with include={include} and "
            f"exclude={exclude}; there are components of granularity {', '.join(map(repr, others)) or 'none'} "
            f"in {_abbreviate(names)}"
        )
    known = sorted({name.rpartition(".")[2] for name in registered()})
    classes = sorted({type(module).__name__ for module in model.modules()})
    return (
        f"{name} has no module with a rule; it is made of {_abbreviate(classes)}, and there are rules for "
        f"{', '.join(known)}; add one with hf_coar.components.rule"
    )
