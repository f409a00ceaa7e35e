"""The other example whose values stand in: found for whatever the model is given, run first, and played back.

A batch holds its partners' entries under the same names after `partner_`, so that they go wherever an example goes;
where no batch is under way, what the components come with is asked (`masking.ablations`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hf_coar import models
from hf_coar.components import StandIn
from hf_coar.errors import CoarError, DataError
from hf_coar.masking.passing import Pass
from hf_coar.masking.recording import Recording
from hf_coar.models import PARTNER, ragged

Arguments = tuple[tuple, dict[str, Any]]


class Partners:
    """What the model computes for the partners of the batch that it runs on; kept until another batch comes."""

    def __init__(self, stand_in: StandIn) -> None:
        """Nothing was run yet."""
        self.stand_in = stand_in
        self._ran: tuple[Any, list[Any], Recording] | None = None

    def first(self, state: Pass, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that runs the partners first, so that they stand in when it runs on the examples.

        Args:
            state: of the gated pass.
            forward: gated.
        """

        def run(*args: Any, **kwargs: Any) -> Any:
            inputs, partners = self._inputs(args, kwargs)
            state.replayed = self._recorded(state, forward, partners)
            state.replayed.rewind()
            return forward(*inputs[0], **inputs[1])

        return run

    def _recorded(self, state: Pass, forward: Callable[..., Any], partners: Arguments) -> Recording:
        leaves, spec = pytree.tree_flatten(partners)
        key = (state.n_examples, models.example_alone(), spec)
        if self._ran is not None and self._ran[0] == key and _same(self._ran[1], leaves):
            return self._ran[2]
        recording, self._ran = Recording(), None
        state.note = recording.note
        try:
            with torch.no_grad():
                forward(*partners[0], **partners[1])
        finally:
            state.note = None
        self._ran = (key, leaves, recording)
        return recording

    def _inputs(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Arguments, Arguments]:
        """What the model is given, and the same of the partners.

        Raises:
            CoarError: there are no partners, or partners of another shape.
        """
        if ragged.current() is not None:
            raise DataError(
                f"{self.stand_in.name!r} needs a partner of the same shape, and the examples here have as many "
                "entries as each has; take ablation='zero' or hf_coar.Mean(data)"
            )
        given = {name: value for name, value in kwargs.items() if name.startswith(PARTNER)}
        kwargs = {name: value for name, value in kwargs.items() if name not in given}
        known = {**kwargs, **given} if given else models.batch_under_way() or {}
        if not any(name.startswith(PARTNER) for name in known):
            known = self._asked(args, kwargs)
        count = 0

        def swapped(value: Any, name: str | None) -> Any:
            nonlocal count
            if not isinstance(value, Tensor):
                return value
            partner = _partner(value, name, known)
            if partner is None:
                return value
            if partner.shape != value.shape:
                raise CoarError(
                    f"the examples have {name or 'inputs'} of shape {list(value.shape)} and their partners "
                    f"{list(partner.shape)}; give partners of the same shape"
                )
            count += 1
            return partner

        others = tuple(swapped(value, None) for value in args)
        named = {name: swapped(value, name) for name, value in kwargs.items()}
        if not count:
            raise self._lacking()
        return (args, kwargs), (others, named)

    def _asked(self, args: tuple, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The inputs with their partners, where these are known by what the examples are."""
        if self.stand_in.source is None:
            raise self._lacking()
        inputs = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        if not inputs and args and isinstance(args[0], Tensor):
            inputs = {"inputs": args[0]}
        return self.stand_in.source.joined(inputs)

    def _lacking(self) -> CoarError:
        kind = self.stand_in.name
        return DataError(
            f"{kind!r} puts the values of another example in the place of ablated components, and the batch names "
            f"none: give data as hf_coar.{kind.capitalize()}(…).paired(data), whose batches hold '{PARTNER}…' entries"
        )


def _same(before: list[Any], now: list[Any]) -> bool:
    return all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(before, now, strict=True))


def _partner(value: Tensor, name: str | None, known: Mapping[str, Any]) -> Tensor | None:
    """The partner's tensor that is to one side what `value` is to the other: by identity, else by its name."""
    found = next((key for key, one in known.items() if one is value and PARTNER + key in known), None)
    if found is None:
        sides = [key for key in known if name is not None and key.endswith(f"_{name}") and not key.startswith(PARTNER)]
        found = None if sides else name
    partner = known.get(f"{PARTNER}{found}") if found is not None else None
    return partner.to(value.device) if isinstance(partner, Tensor) else None
