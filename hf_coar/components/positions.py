"""Components at positions: a component at one token of every example, or at the tokens that play a role in it.

A position is its number. A role is a name, such as "subject"; which tokens of an example play it says the entry
`positions` of the batch, int64 [examples, tokens]: the number of the role of every token, -1 for none. `mark` makes it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_coar.components.groups import Components, Group
from hf_coar.errors import CoarError, DataError
from hf_coar.models.calling import POSITIONS as ENTRY


def at_positions(components: Components, positions: Sequence[int] | Sequence[str]) -> Components:
    """The components at every one of some positions, or roles, by themselves.

    Args:
        components: whose activations pass through the input or output of a module, [examples, tokens, features].
        positions: numbers of tokens, from 0, or names of roles; not both.

    Raises:
        CoarError: none, one twice, numbers and names, or components that are hidden inside of a module.
    """
    names = tuple(str(one) for one in positions)
    numbers = [type(one) is int and one >= 0 for one in positions]
    words = [isinstance(one, str) and not one.isdigit() and bool(one) for one in positions]
    if not names or len(set(names)) != len(names) or not (all(numbers) or all(words)):
        raise CoarError(
            f"positions={list(positions)[:8]!r}; give numbers of tokens, such as range(12), or names of roles, such as "
            '["subject", "last token"], each once'
        )
    hidden = [group.parameter for group in components.groups if group.site not in ("output", "input") or group.routed]
    if hidden:
        raise CoarError(
            f"{', '.join(hidden[:8])} have no positions: what they make never leaves their module token by token; "
            "leave them out with find_components(model, exclude=[…])"
        )
    groups = tuple(
        replace(group, size=group.size * len(names), at=names, by_weights="never") for group in components.groups
    )
    return replace(components, groups=groups)


def roles_of(group: Group, batch: Mapping[str, Any] | None, n_tokens: int) -> Tensor:
    """Which of the positions of a group every token is at, int64 [examples or 1, tokens]; -1 for none of them.

    Raises:
        DataError: a position outside of the examples, or no entry that says who plays a role.
    """
    if group.at[0].isdigit():
        places = torch.tensor([int(one) for one in group.at])
        if int(places.max()) >= n_tokens:
            raise DataError(
                f"position {int(places.max())} is outside of the {n_tokens} tokens of the examples; give positions up "
                f"to {n_tokens - 1}"
            )
        found = torch.full((1, n_tokens), -1)
        found[0, places] = torch.arange(len(places))
        return found
    found = None if batch is None else batch.get(ENTRY)
    if not isinstance(found, Tensor) or found.dim() != 2 or found.shape[1] != n_tokens:
        there = "none" if not isinstance(found, Tensor) else f"one of shape {list(found.shape)}"
        raise DataError(
            f"the roles {', '.join(group.at)} need an entry '{ENTRY}' [examples, {n_tokens}] that says which token "
            f"plays which, and the batch has {there}; hf_coar.components.mark makes it"
        )
    if int(found.max()) >= len(group.at):
        raise DataError(
            f"'{ENTRY}' names role {int(found.max())}, and there are {len(group.at)}: {', '.join(group.at)}"
        )
    return found


def spread(gates: Tensor, group: Group, roles: Tensor) -> Tensor:
    """Gates [size] or [examples, size] over the features of every token; 1 where a token is at no position.

    Args:
        gates: with a number for every component at every position.
        group: whose gates they are.
        roles: int64 [examples or 1, tokens], from `roles_of`.

    Returns:
        [examples or 1, tokens, features].
    """
    by_unit = gates.unflatten(-1, (-1, len(group.at)))
    by_unit = torch.cat([by_unit, torch.ones_like(by_unit[..., :1])], dim=-1).movedim(
        -1, -2
    )  # [.., positions + 1, units]
    index = torch.where(roles < 0, len(group.at), roles).to(gates.device)
    if by_unit.dim() == 2:
        found = by_unit[index]
    else:
        index = index.expand(len(by_unit), -1)
        found = by_unit[torch.arange(len(by_unit), device=gates.device)[:, None], index]
    return found.repeat_interleave(group.block, dim=-1) if group.block > 1 else found


def mark(
    batch: Mapping[str, Any],
    tokenizer: Any,
    prompts: Sequence[str],
    roles: Mapping[str, str | Sequence[str] | None],
) -> dict[str, Any]:
    """A batch with the entry `positions`, which says for every token the role that it plays.

    Args:
        batch: with `input_ids` and maybe `attention_mask`, made of the prompts (and what follows them).
        tokenizer: a fast one, that made the batch.
        prompts: the texts, one an example.
        roles: by name, in the order of `find_components(positions=…)`, the words of the text that play it: a pattern
            (regular expression), or one string an example (such as a column); None for the last token of the prompt.

    Raises:
        DataError: a role that no word of an example plays, or a tokenizer that does not tell where its tokens lie.
    """
    ids = batch["input_ids"]
    found = torch.full(ids.shape, -1)
    for row, prompt in enumerate(prompts):
        spans = _offsets(tokenizer, prompt)
        offset = _first(batch, row)
        for number, (name, words) in enumerate(roles.items()):
            for place in _tokens(name, words, row, prompt, spans):
                found[row, offset + place] = number
    return {**batch, ENTRY: found}


def _offsets(tokenizer: Any, prompt: str) -> list[tuple[int, int]]:
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"{type(tokenizer).__name__} does not say where its tokens lie in a text; use a fast tokenizer")
    spans = [tuple(span) for span in tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]]
    while spans and spans[-1][0] == spans[-1][1]:  # what closes a text is no part of a prompt that goes on
        spans.pop()
    return spans


def _first(batch: Mapping[str, Any], row: int) -> int:
    attended = batch.get("attention_mask")
    return int(attended[row].argmax()) if isinstance(attended, Tensor) else 0  # padding may be on the left


def _tokens(
    name: str, words: str | Sequence[str] | None, row: int, prompt: str, spans: Sequence[tuple[int, int]]
) -> list[int]:
    if words is None:
        return [len(spans) - 1]
    match = re.search(words, prompt) if isinstance(words, str) else re.search(re.escape(words[row]), prompt)
    places = [] if match is None else [
        place for place, (start, stop) in enumerate(spans) if start < match.end() and stop > match.start()
    ]  # fmt: skip
    if not places:
        sought = words if isinstance(words, str) else words[row]
        raise DataError(f"no token of example {row} plays {name!r}: {sought!r} is not in {prompt[:80]!r}")
    return places
