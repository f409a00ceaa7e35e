"""Which column of a data set holds what: as asked for, else by evidence, and where two readings remain an error."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hf_coar.errors import DataError
from hf_coar.storage.texts import and_more, shortened

# From the role of a column ("text", "label", …) to its name; for labels that have a column each, to their names.
Columns = Mapping[str, str | Sequence[str] | None]


@dataclass(frozen=True)
class Role:
    """What a column can be to a kind of input.

    Attributes:
        name: the keyword of `load` that names the column, such as "text".
        fits: whether a column of this type (a feature of `datasets`) could be it.
        usual: names under which it is usually found.
        what: one such entry in words, for messages.
        named: whether a column is only taken under a usual name, or where it is asked for.
        become: how a column of something else becomes one, for messages.
    """

    name: str
    fits: Callable[[Any], bool]
    usual: tuple[str, ...] = ()
    what: str = "a value"
    named: bool = False
    become: str = ""


@dataclass(frozen=True)
class Table:
    """What a data set's columns look like.

    Attributes:
        name: of the data set.
        features: types by column.
        first: the first example, without what has to be decoded; empty where there is none.
    """

    name: str
    features: Mapping[str, Any]
    first: Mapping[str, Any]

    def fitting(self, role: Role, taken: Iterable[str | None] = ()) -> list[str]:
        """The columns that could play a role and have no other one."""
        taken = set(taken)
        return [name for name, feature in self.features.items() if role.fits(feature) and name not in taken]

    def misnamed(self, role: Role) -> str:
        """What to say of the columns that are called as the role's are and cannot be it; "" where there are none."""
        found = [
            name for name, feature in self.features.items() if name.lower() in role.usual and not role.fits(feature)
        ]
        if not found:
            return ""
        return f". {found[0]!r} ({self.example(found[0])}) is not {role.what}" + (
            f": {role.become}" if role.become else ""
        )

    def conversations(self) -> str:
        """What to say of columns of messages with their roles; "" where there are none."""
        found = [name for name, feature in self.features.items() if _are_messages(feature)]
        if not found:
            return ""
        return (
            f". {found[0]!r} holds conversations: make a column of texts of them, "
            f"tokenizer.apply_chat_template({found[0]}, tokenize=False), or of prompts (up to the answer, with "
            "add_generation_prompt=True) and answers"
        )

    def shown(self, columns: Iterable[str] | None = None) -> str:
        """Columns with an example of each: `'id' ('doc0'), 'review' ('A dull film …')`."""
        columns = list(self.features if columns is None else columns)
        said = [f"{name!r} ({self.example(name)})" for name in columns[:12]]
        return ", ".join(said) + and_more(len(columns), 12)

    def example(self, name: str) -> str:
        """An entry of a column, shortened; its type where it is none that could be read at a glance."""
        if name in self.first and isinstance(self.first[name], str | int | float | bool | list | None):
            return shortened(repr(self.first[name]), 40)
        return type(self.features[name]).__name__


def declared_names(feature: Any) -> list[str]:
    """What the classes of a column are called, where its type declares them; none where they are numbers alone."""
    names = [str(name) for name in getattr(feature, "names", None) or ()]
    return [] if names == [str(place) for place in range(len(names))] else names


def asked(given: Columns, table: Table, roles: Sequence[Role]) -> dict[str, str]:
    """The columns that were asked for by name, checked.

    Raises:
        DataError: there is no such column, it cannot be what it is to be, or it is asked for twice.
    """
    found: dict[str, str] = {}
    known = {role.name: role for role in roles}
    for role, column in given.items():
        if column is None:
            continue
        if role not in known:
            raise DataError(f"{role}={column!r}: the model reads {' and '.join(known)} of an example, and no {role}")
        if not isinstance(column, str):
            raise DataError(f"{role}={column!r}: give the name of one column; {table.name!r} has {table.shown()}")
        if column not in table.features:
            raise DataError(f"{role}={column!r}: {table.name!r} has no such column; it has {table.shown()}")
        if not known[role].fits(table.features[column]):
            raise DataError(
                f"{role}={column!r}: the column holds {table.example(column)}, and {role} must be {known[role].what}; "
                f"{table.name!r} has {table.shown()}"
            )
        if column in found.values():
            raise DataError(f"{role}={column!r}: the same column is asked for twice; give each role its own")
        found[role] = column
    return found


def the_one(role: Role, table: Table, taken: Iterable[str | None] = ()) -> str | None:
    """The column of a role: the only one that fits, or the only one of those under a usual name; None without any.

    Of a role that goes by names alone it is only the latter.

    Raises:
        DataError: several could be it.
    """
    candidates = table.fitting(role, taken)
    usual = [name for name in candidates if name.lower() in role.usual]
    candidates = usual if role.named else candidates
    if len(usual) == 1 or len(candidates) == 1:
        return (usual if len(usual) == 1 else candidates)[0]
    if candidates:
        raise several(role.name, usual or candidates, table)
    return None


def chosen(
    roles: Sequence[Role], optional: Sequence[str], table: Table, given: Columns, taken: Iterable[str | None] = ()
) -> dict[str, str]:
    """The columns of all roles: as asked for, then those that go by names, then what is left.

    Raises:
        DataError: a role has no column, or several could be it.
    """
    found = asked(given, table, roles)
    for role in sorted(roles, key=lambda role: not role.named):
        if role.name in found:
            continue
        column = the_one(role, table, (*taken, *found.values()))
        if column is not None:
            found[role.name] = column
        elif role.name not in optional:
            raise without(role, table)
    return found


def without(role: Role, table: Table) -> DataError:
    """The error where a role has no column."""
    usual = f" (usually {' or '.join(map(repr, role.usual[:4]))})" if role.usual else ""
    return DataError(
        f"{table.name!r} has no column that is known as the {role.name}{usual}, {role.what}; it has "
        f"{table.shown() or 'none at all'}. Name it, columns={{{role.name!r}: …}} (--columns {role.name}=…), or pass "
        "batches of tensors"
    )


def several(role: str, candidates: Sequence[str], table: Table) -> DataError:
    """The error where two readings remain."""
    best = candidates[-1]
    return DataError(
        f"{table.name!r} has several columns that could be the {role}: {table.shown(candidates)}; choose one, such as "
        f"{role}={best!r} (--{role} {best})"
    )


def is_text(feature: Any) -> bool:
    """Whether a column holds strings."""
    return getattr(feature, "dtype", "") in ("string", "large_string")


def is_texts(feature: Any) -> bool:
    """Whether a column holds lists of strings."""
    inner = getattr(feature, "feature", None)
    return inner is not None and is_text(inner)


def _are_messages(feature: Any) -> bool:
    """Whether a column holds conversations, as chat templates take them: lists of mappings with a role and a text."""
    parts = getattr(feature, "feature", None)
    return isinstance(parts, Mapping) and any(names <= set(parts) for names in ({"role", "content"}, {"from", "value"}))


def is_image(feature: Any) -> bool:
    """Whether a column holds images."""
    return type(feature).__name__ == "Image"


def is_label(feature: Any) -> bool:
    """Whether a column could hold labels: classes, strings, numbers, or lists of those."""
    inner = getattr(feature, "feature", None)
    kind = str(getattr(feature if inner is None else inner, "dtype", ""))
    return is_text(feature) or is_texts(feature) or kind.startswith(("int", "uint", "float", "bool", "decimal"))
