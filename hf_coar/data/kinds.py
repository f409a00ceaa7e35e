"""Kinds of input: which columns of a data set a model reads, and how they become a batch. One table, open to more."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_coar.data.batches import Batch
from hf_coar.data.columns import Columns, Role, Table, chosen, without
from hf_coar.data.labels import Labels
from hf_coar.errors import DataError
from hf_coar.models import tasks
from hf_coar.models.calling import forward_names
from hf_coar.storage.registry import Registry


@dataclass(frozen=True)
class Reading:
    """All that a kind needs to know to prepare examples.

    Attributes:
        model: for whom.
        columns: by role; a role that no column plays is absent.
        labels: understood, or None.
        table: the data set's columns.
        first: some first examples, for checks; without what has to be decoded.
        preprocessor: Hub id, folder or object of the tokenizer or image processor, where it is not the model's own.
        max_length: tokens at which texts are cut.
        told: what a user was warned of already, of texts that are read while running.
    """

    model: nn.Module
    columns: Mapping[str, str]
    labels: Labels | None
    table: Table
    first: Sequence[Mapping[str, Any]] = ()
    preprocessor: Any = None
    max_length: int = 512
    told: set[str] = field(default_factory=set)

    def labelled(self, batch: Batch, rows: Sequence[Mapping[str, Any]]) -> Batch:
        """The batch that was made of raw examples, with their labels where these are understood."""
        return batch if self.labels is None else {**batch, "labels": self.labels.tensor(rows)}


@dataclass(frozen=True)
class Preparation:
    """How raw examples become a batch.

    Attributes:
        prepare: a list of raw examples -> a batch of tensors.
        show: one raw example -> what the model sees of it, as text.
        description: settings that change what the model sees, by the keywords of `load`.
    """

    prepare: Callable[[list[dict]], Batch]
    show: Callable[[Mapping[str, Any]], str]
    description: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Kind:
    """One kind of input, such as images or texts.

    Attributes:
        name: of the kind.
        roles: of the columns that it reads, the labels' not counted; the first one is what the kind is found by.
        reads: how surely a model reads this kind: 0 = not at all, 1 = perhaps, 2 = by the name of its main input, 3 =
            by the class of its head.
        choose: the columns, given those that were asked for by name and those that have another role.
        build: from a `Reading`.
        lazy: roles whose entries have to be decoded, which is left to `prepare`.
        optional: roles that need not be there.
        labels: whether the label of the whole example is read too, where the model's head takes one.
        instead: whether other kinds are looked at where its columns are absent, even if the class of the head says that
            it is this one.
        there: (model, table, columns that were asked for) -> whether its columns are there, where roles do not say it.
        entries: model -> names of its own arguments, which columns may be asked for as well.
    """

    name: str
    roles: tuple[Role, ...]
    reads: Callable[[nn.Module], int]
    choose: Callable[[nn.Module, Table, Columns, Sequence[str | None]], dict[str, str]]
    build: Callable[[Reading], Preparation]
    lazy: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    labels: bool = True
    instead: bool = False
    there: Callable[[nn.Module, Table, Columns], bool] | None = None
    entries: Callable[[nn.Module], Collection[str]] = lambda model: ()

    def may_be_asked(self, model: nn.Module) -> set[str]:
        """By which names columns can be asked for."""
        return {role.name for role in self.roles} | set(self.entries(model))

    def absent(self, model: nn.Module, table: Table, given: Columns) -> list[Role]:
        """The roles that have to be there and that no column can play."""
        if self.there is not None:
            return [] if self.there(model, table, given) else [Role("an entry of the model", lambda feature: True)]
        needed = [role for role in self.roles if role.name not in (*self.optional, *given)]
        return [
            role for role in needed
            if not any(not role.named or name.lower() in role.usual for name in table.fitting(role))
        ]  # fmt: skip


BY_HEAD = 3  # how sure the class of the head makes

KINDS: Registry[Kind] = Registry("kind of input")


def of(model: nn.Module, table: Table, given: Columns) -> Kind:
    """The kind that a model reads in a data set: what is asked for by name, then what the model takes, then the types.

    Raises:
        DataError: the data set has no column of a kind that the model reads.
    """
    given = {role: column for role, column in given.items() if column is not None}
    kinds = [kind for _, kind in KINDS.items()]
    wanted = {role for role in given if role != "label"}
    sure = {kind.name: kind.reads(model) for kind in kinds}
    possible = [kind for kind in kinds if sure[kind.name] and wanted <= kind.may_be_asked(model)]
    if not possible:
        read = [kind.name for kind in kinds if sure[kind.name] and kind.roles]
        raise DataError(
            f"{', '.join(f'{role}={given[role]!r}' for role in sorted(wanted))}: {type(model).__name__} reads "
            f"{' or '.join(read) or 'neither images nor texts'}; build batches of tensors yourself"
        )
    for kind in sorted(possible, key=lambda kind: -sure[kind.name]):
        absent = kind.absent(model, table, given)
        if not absent:
            return kind
        if sure[kind.name] == BY_HEAD and not kind.instead:
            raise without(absent[0], table)
    raise _no_columns(model, table, [kind for kind in possible if kind.roles], sure)


def _no_columns(model: nn.Module, table: Table, kinds: Sequence[Kind], sure: Mapping[str, int]) -> DataError:
    """The error for a data set with no column of any of the kinds that a model may read."""
    if not kinds:
        return _no_entries(model, table)
    surest = max(sure[kind.name] for kind in kinds)
    # Where those that are surest need not be it, whatever else the model reads is as good.
    surest = min(surest, *(2 if kind.instead else surest for kind in kinds if sure[kind.name] == surest))
    surest_kinds = [kind for kind in kinds if sure[kind.name] >= surest]
    named = sorted((kind.name for kind in surest_kinds), key=lambda name: sure[name])
    misnamed = next(filter(None, (table.misnamed(role) for kind in surest_kinds for role in kind.roles)), "")
    misnamed = misnamed or table.conversations()
    return DataError(
        f"{table.name!r} has no column of {' or '.join(named)}; it has {table.shown() or 'none at all'}{misnamed}. "
        "Or build batches of tensors yourself and pass a list or a DataLoader"
    )


def _no_entries(model: nn.Module, table: Table) -> DataError:
    """The error for a model that reads neither texts nor images, where no column is called as its arguments are."""
    wanted = tasks.of(model).columns or sorted(forward_names(model)[0])[:6]
    return DataError(
        f"{table.name!r} has no columns of numbers that are called as the arguments of {type(model).__name__} are "
        f"({', '.join(wanted)}); it has {table.shown() or 'none at all'}. Name them, "
        f"columns={{{wanted[0]!r}: …}} (--columns {wanted[0]}=…)"
    )


def by_head(*names: str) -> Callable[[nn.Module], int]:
    """A `Kind.reads` that is sure of models of these tasks."""
    return lambda model: BY_HEAD if tasks.of(model).name in names else 0


def by_roles(roles: Sequence[Role], optional: Sequence[str] = ()) -> Callable[..., dict[str, str]]:
    """A `Kind.choose` that finds the column of every role by itself."""
    return lambda model, table, given, taken: chosen(roles, optional, table, given, taken)
