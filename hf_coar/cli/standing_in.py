"""The components that the flags name, and what stands in for them when they are ablated."""

import argparse
from typing import Any

from hf_coar import api
from hf_coar.cli import editing
from hf_coar.components import Components
from hf_coar.errors import CoarError
from hf_coar.masking import ABLATIONS, find_components


def zeroed(model: Any, args: argparse.Namespace, ablation: Any = "zero") -> Components:
    """The components that the flags choose; zero stands in for them, unless something else is given."""
    return find_components(model, args.granularity, args.include, args.exclude, ablation)


def components(model: Any, data: Any, args: argparse.Namespace) -> Components:
    """The components, with what the flags say stands in for them."""
    kind = ABLATIONS[args.ablation]
    others = {"data": args.ablation_data, "split": args.ablation_split}
    others = {name: value for name, value in others.items() if value is not None}
    if not kind.takes_data:
        idle = [name for name in ("data", "split", "seed") if getattr(args, f"ablation_{name}") is not None]
        if idle:
            raise CoarError(f"--ablation-{idle[0]} has no effect with --ablation {args.ablation}; add --ablation mean")
        return zeroed(model, args)
    if args.ablation == "patch" and "data" not in others:
        raise CoarError("--ablation patch needs --ablation-data, a partner for every example of the data")
    if others:
        _, data = api.load(**{**editing.sources(args), **others, "model": model})
    given = {} if args.ablation_seed is None else {"seed": args.ablation_seed}
    try:
        ablation = kind(data, **given)
    except TypeError as error:
        raise CoarError(f"--ablation-seed has no effect with --ablation {args.ablation}") from error
    return zeroed(model, args, ablation)
