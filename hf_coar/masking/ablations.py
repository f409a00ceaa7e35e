"""What an ablated component is replaced by: nothing, its mean, its value for another example, values of your own.

| ablation | what stands in | in the weights | cost of a pass |
|---|---|---|---|
| `"zero"` | nothing: the slice of the weight is zero, the bias stays (the paper's) | yes | one |
| `Mean(data)` | the component's mean output over examples and positions | where there is a bias | one |
| `Values(tensor)` | numbers of your own | where there is a bias | one |
| `Resample(data)` | its value for another example, drawn at random | no | two, then one a batch |
| `Patch(corrupt)` | its value for the example's partner, such as a corrupted prompt | no | two, then one a batch |

A new one is a class with a name::

    @ablations.register("median")
    @dataclass(frozen=True)
    class Median(ablations.Ablation):
        data: Any

        def stand_in(self, masked):
            return StandIn({"name": "median", "fingerprint": …}, values={parameter: tensor, …})
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hf_coar import data as data_module
from hf_coar import models
from hf_coar.components import StandIn
from hf_coar.data import Batch, Identity
from hf_coar.errors import CoarError, DataError
from hf_coar.masking.averages import Averages
from hf_coar.masking.masked_model import MaskedModel, check_takes_values, fingerprint_of
from hf_coar.models import tasks
from hf_coar.storage import files
from hf_coar.storage.registry import Registry


class Ablation(ABC):
    """What stands in for ablated components; the settings are the fields of a frozen dataclass.

    Attributes:
        name: under which it is registered.
        takes_data: whether its first setting is data.
    """

    name: ClassVar[str] = ""
    takes_data: ClassVar[bool] = False

    @abstractmethod
    def stand_in(self, masked: MaskedModel) -> StandIn | None:
        """What stands in for the components of a model; None for zero.

        Args:
            masked: the model with its components, for which zero stands in so far; it is left as it is.

        Raises:
            CoarError: nothing can be had; says why.
        """


ABLATIONS: Registry[type[Ablation]] = Registry("ablation")


def register(name: str, replace: bool = False) -> Callable[[type[Ablation]], type[Ablation]]:
    """Decorator: makes a subclass of `Ablation` known by a name."""
    add = ABLATIONS.register(name, replace=replace)

    def named(ablation: type[Ablation]) -> type[Ablation]:
        ablation.name = name
        return add(ablation)

    return named


def get(ablation: str | Ablation) -> Ablation:
    """An ablation, or the one of a name that needs no settings.

    Raises:
        CoarError: unknown, or one that needs more than a name.
    """
    if isinstance(ablation, Ablation):
        return ablation
    if not isinstance(ablation, str):
        raise CoarError(f"ablation={ablation!r:.80}; give a name, or such as hf_coar.Mean(data)")
    try:
        return ABLATIONS[ablation]()
    except TypeError as error:
        kind = ABLATIONS[ablation].__name__
        raise CoarError(f"ablation={ablation!r} is made of something; give hf_coar.{kind}(…)") from error


@register("zero")
@dataclass(frozen=True)
class Zero(Ablation):
    """Nothing stands in: the component's slice of the weight is zero, its bias stays, as in the paper."""

    def stand_in(self, masked: MaskedModel) -> None:
        """Nothing."""
        return


@register("mean")
@dataclass(frozen=True)
class Mean(Ablation):
    """The mean of what a component makes (of an input or a head: of what it reads), over examples and positions.

    The model runs once on the data, where it is; padding, as the attention mask has it, does not count.

    Attributes:
        data: as for `attribute`; it should not be what is to be explained alone, but like what the model is used on.
        per_position: a mean for every position (token, place of an image) over the examples alone, which then must all
            have the same shape.
    """

    data: Any = field(repr=False)
    per_position: bool = False
    takes_data = True

    def stand_in(self, masked: MaskedModel) -> StandIn:
        """Run the model on the data.

        Raises:
            CoarError: components that no value can stand in for, no examples, or modules that none of them reaches.
        """
        check_takes_values(masked.components, self.name)
        averages = Averages(masked.components.groups, self.per_position)
        model, n_examples, first, digest = masked.model, 0, None, hashlib.blake2b(digest_size=16)
        with models.frozen(model), torch.no_grad(), masked.noted(averages.note), averages.following(model):
            for batch in _told_apart(read(self.data)):
                first = batch if first is None else first
                averages.of(batch)
                run(model, batch)
                n_examples += data_module.size(batch)
                for row in range(data_module.size(batch)):
                    digest.update(key_of(data_module.rows(batch, row, row + 1)).encode())
        if first is None:
            raise DataError("the mean is one over no examples: the data of hf_coar.Mean are empty")
        record = {"name": self.name, "n_examples": n_examples}
        record |= {"per_position": True} if self.per_position else {}
        digest.update(fingerprint_of(model).encode())
        found = known({**record, "fingerprint": digest.hexdigest()}, averages.means(), masked)
        found = replace(found, data=data_module.describe(self.data))
        return found if self.per_position else absorbing(found, masked, first, averages.followers())


@register("values")
@dataclass(frozen=True)
class Values(Ablation):
    """Numbers of your own: what the module puts out (or reads) there when the component is ablated, bias included.

    Attributes:
        values: float [components], a number each; or [features], one for every output (or input) feature that the
            components divide, in their order; or by parameter name, such tensors of each matrix.
    """

    values: Tensor | Mapping[str, Tensor] = field(repr=False)

    def stand_in(self, masked: MaskedModel) -> StandIn:
        """Cut the numbers up.

        Raises:
            CoarError: of another length, or components that no value can stand in for.
        """
        check_takes_values(masked.components, self.name)
        groups = masked.components.groups
        if isinstance(self.values, Mapping):
            parts = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in self.values.items()}
            return known({"name": self.name}, parts, masked)
        flat, widths = torch.as_tensor(self.values, dtype=torch.float32), [group.n_features for group in groups]
        if flat.dim() == 1 and len(flat) == len(masked.components) and not any(group.at for group in groups):
            each = zip(groups, flat.split(masked.components.sizes()), strict=True)
            parts = [part if group.whole else part.repeat_interleave(group.block) for group, part in each]
        elif flat.dim() == 1 and len(flat) == sum(widths):
            parts = flat.split(widths)
        else:
            raise CoarError(
                f"values of shape {list(flat.shape)}; give one a component, [{len(masked.components)}], or one a "
                f"feature, [{sum(widths)}]"
            )
        names = [group.parameter for group in groups]
        return known({"name": self.name}, dict(zip(names, parts, strict=True)), masked)


def known(record: dict[str, Any], values: Mapping[str, Tensor], masked: MaskedModel) -> StandIn:
    """A stand-in whose values are known, float32 by parameter name.

    Raises:
        CoarError: NaN or infinity among them.
    """
    bad = [name for name, value in values.items() if not bool(value.isfinite().all())]
    if bad:
        raise CoarError(f"the values that are to stand in at {bad[0]!r} are not all finite; leave that module out")
    record = {"fingerprint": files.checksum(values), **record, "model": fingerprint_of(masked.model)}
    return StandIn(record, {name: value.float().contiguous() for name, value in values.items()})


def absorbing(found: StandIn, masked: MaskedModel, batch: Batch, followers: Mapping[str, str]) -> StandIn:
    """The stand-in with the batch normalisations behind modules without a bias that take a constant up.

    They are believed if a half of the components, ablated by hooks and in the weights, gives the same.
    """
    groups = [g for g in masked.components.groups if g.parameter in followers and g.by_weights != "never"]
    usable = {g.parameter: followers[g.parameter] for g in groups}
    if not usable:
        return found
    found = replace(found, absorbed=usable)
    tried = replace(masked.components, stand_in=found)
    kept = torch.cat([torch.arange(g.size) % 2 == (g.parameter not in usable) for g in tried.groups])
    kept |= torch.cat([torch.full((g.size,), g.parameter not in usable) for g in tried.groups])
    few = data_module.rows(batch, 0, min(4, data_module.size(batch)))
    outputs = []
    for how in ("hooks", "weights"):
        both = MaskedModel(masked.model, tried)
        with models.frozen(masked.model), torch.no_grad(), both.ablated(kept, how):
            outputs.append(run(masked.model, few))
    return found if _alike(*outputs) else replace(found, absorbed={})


def _alike(one: Any, other: Any) -> bool:
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(other), strict=True)
    return all(
        float((a.double() - b.double()).abs().max()) <= 1e-4 * max(1.0, float(a.double().abs().max()))
        for a, b in pairs
        if isinstance(a, Tensor) and a.is_floating_point() and a.numel()
    )


def read(data: Any) -> Iterator[Batch]:
    """All batches, without examples that cannot be read."""
    for chunk in data_module.Chunks(data_module.batches(data)):
        yield from (batch for _, batch in chunk.read().pieces)


TARGETS = ("labels",)


def key_of(batch: Batch) -> str:
    """A hash of all entries of a batch but the labels."""
    columns = Identity.of_batch({name: value for name, value in batch.items() if name not in TARGETS}).hashes
    return files.checksum(columns)


def _told_apart(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Batches with padding that have as many examples as positions come in two, so that neither is taken for both."""
    for batch in batches:
        attended, count = batch.get("attention_mask"), data_module.size(batch)
        square = isinstance(attended, Tensor) and attended.dim() == 2 and attended.shape[1] == count > 1
        if square and not bool(attended.all()):
            yield data_module.rows(batch, 0, 1)
            yield data_module.rows(batch, 1, count)
        else:
            yield batch


def run(model: nn.Module, batch: Batch) -> Any:
    """What the model returns for a batch, run as its task is."""
    batch = data_module.to_device(batch, models.device_of(model))
    with models.under_way(batch):
        return tasks.of(model).run(model, batch)
