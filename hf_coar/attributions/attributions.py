"""Attributions: weights by example and component, with everything that determined them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_coar.attributions import looks, rows
from hf_coar.attributions.forecast import Forecast
from hf_coar.attributions.looking import Looking
from hf_coar.attributions.predicting import Known, Outcome
from hf_coar.attributions.provenance import Provenance
from hf_coar.attributions.rows import Rows
from hf_coar.attributions.saving import Saved
from hf_coar.components import Components
from hf_coar.data import Identity, within
from hf_coar.errors import CoarError, ModelMismatchError, NonFiniteOutputError

_BLOCK = 32  # examples whose rows are read together
_TOLD = ("class", "library", "id", "revision", "dtype", "n_parameters")


class Attributions(Looking, Saved):
    """How much every component contributes to every example's output.

    At the fitted fraction the output of example e, when the components outside `kept` are ablated, is about
    `bias[e] + sum_i kept[i] * weights[e, i]`: a positive weight means that keeping the component raises the output.
    Where there is a `forecast`, `predict` knows more: the output with nothing ablated, single effects, and limits.

    Attributes:
        weights: float32 [examples, components], in the unit of the output.
        bias: float32 [examples].
        standard_errors: float32 [examples, components] of the weights, or None.
        components: what the columns are.
        identity: by which the examples are known again, and their labels.
        provenance: model, data, output, method, ablated fraction, seed, cost and versions.
        evaluation: predicted against measured as JSON values, or None; `evaluate` makes it, `save_pretrained` keeps it.
        origin: the folder that they were loaded from, the Hub id, or None where they were made just now.
        made_here: whether `provenance` comes from this user on this machine, so that local paths in it may be followed.
        forecast: what predictions for sets of any size need beside the weights, or None.
    """

    origin: Path | str | None = None
    made_here: bool = False

    def __init__(
        self,
        weights: Tensor | Rows,
        bias: Tensor,
        standard_errors: Tensor | Rows | None,
        components: Components,
        identity: Identity,
        config: Provenance | Mapping[str, Any] | None = None,
        evaluation: Mapping[str, Any] | None = None,
        forecast: Forecast | None = None,
    ) -> None:
        """Matrices as tensors, or as rows that lie in files; `config` is the provenance, or its JSON values.

        Raises:
            CoarError: the shapes do not agree.
            NonFiniteOutputError: NaN or infinity; names the example and the component.
        """
        self.provenance = Provenance.from_json(config or {})
        self._matrices = {"weights": rows.as_rows(weights)}
        if standard_errors is not None:
            self._matrices["standard_errors"] = rows.as_rows(standard_errors)
        self.bias = bias
        self.components = replace(components, fingerprint=self.provenance.fingerprint)
        self.identity = identity
        self.evaluation = dict(evaluation) if evaluation is not None else None
        self.forecast = forecast
        self.provenance = self.provenance.found(forecast=None if forecast is None else forecast.to_json())
        shapes = {name: list(matrix.shape) for name, matrix in self._matrices.items()}
        n_examples = len(self)
        columns = {"bias": bias, **identity.columns()}
        columns |= {} if forecast is None else {"unablated": forecast.unablated}
        lengths = {name: list(column.shape) for name, column in columns.items() if name not in identity.hash_columns()}
        lengths |= {name: list(column.shape)[:1] for name, column in identity.hash_columns().items()}
        if any(shape != [n_examples, len(components)] for shape in shapes.values()) or any(
            shape != [n_examples] for shape in lengths.values()
        ):
            raise CoarError(f"{shapes | lengths} and {len(components)} components do not fit together")
        self._check_finite()

    def _check_finite(self) -> None:
        """Check all that lies in memory; what lies in files is checked as it is read."""
        for matrix in self._matrices.values():
            if matrix.in_memory:
                matrix.verify(self.components)
        bad = (~self.bias.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise NonFiniteOutputError(f"the bias of example {bad[0]} is {float(self.bias[bad[0]])}; it cannot be used")

    @property
    def config(self) -> dict[str, Any]:
        """The provenance as JSON values, as `config.json` holds it."""
        return self.provenance.to_json()

    @property
    def weights(self) -> Tensor:
        """Float32 [examples, components]; of loaded attributions a view of the file, read where it is used."""
        return self._matrices["weights"].tensor()

    @property
    def standard_errors(self) -> Tensor | None:
        """Float32 [examples, components] of the weights, like them; None where the estimator gave none."""
        return self._matrices["standard_errors"].tensor() if self.has_standard_errors else None

    def __len__(self) -> int:
        """How many examples."""
        return self._matrices["weights"].shape[0]

    def __repr__(self) -> str:
        """Two lines: sizes and output; model, data and fidelity."""
        return looks.attributions_text(self)

    @property
    def labels(self) -> Tensor:
        """The examples' labels, int64 [examples]; -1 where there are none."""
        return self.identity.labels

    def row(self, index: int, of: str = "weights") -> Tensor:
        """One example's weights (or standard errors), float32 [components]; only they are read, and checked.

        Args:
            index: of the example; negative ones count from the end.
            of: "weights" or "standard_errors".

        Raises:
            OutOfRangeError: no such example.
            CoarError: there are no standard errors.
            CorruptFileError: the row in the file is not what was written.
        """
        return self.matrix(of).row(index)

    def matrix(self, of: str = "weights") -> rows.Rows:
        """The weights or the standard errors as rows that are read when asked for.

        Args:
            of: "weights" or "standard_errors".

        Raises:
            CoarError: there are no such ones.
        """
        if of not in self._matrices:
            raise CoarError(f"of={of!r}; there are {', '.join(self._matrices)}")
        return self._matrices[of]

    @property
    def has_standard_errors(self) -> bool:
        """Whether there are standard errors; reads nothing."""
        return "standard_errors" in self._matrices

    def verify(self) -> None:
        """Check every row of what was loaded against its checksum; this reads the files once.

        Raises:
            CorruptFileError: a row is not what was written.
            NonFiniteOutputError: a row holds NaN or infinity.
        """
        for matrix in self._matrices.values():
            matrix.verify(self.components)

    def predict(self, kept: Any, level: float | None = None) -> "Tensor | tuple[Tensor, Tensor, Tensor]":
        """The outputs expected when components are ablated, for sets of any size, and where they lie with a certainty.

        With a `forecast` predictions start from the unablated output, take the size of the set into account, and know
        how far outputs can go; see `attributions.forecast`. Without one (of regressions) they are linear.

        Args:
            kept: bool or float, [masks, components] or [components]; True or 1 = left in place.
            level: such as 0.95: also give the ends of an interval that a share `level` of fresh sets fell into. These
                ablate twice the fitted fraction at most (or eight components, or half of few), some half of the model:
                these teach how intervals grow with the size. Beyond, they are extrapolated and need not hold; a warning
                says so. They are random ones, an example's own strongest and, of eight examples or more, whole layers,
                one at a time. Several layers together are none of these, nor are the strongest of other examples, of
                which warnings say as well: measure those with `ablate`.

        Returns:
            float32 [masks, examples] ([1, examples] for a single mask); with `level` three of them: values, low, high.

        Raises:
            CoarError: another shape, gates outside 0 … 1, or a level for which too few sets were measured.
        """
        kept = torch.atleast_2d(self.components.check_kept(kept).float())
        fraction = self.provenance.ablated_fraction
        known = Known(self.components, self.weights, self.bias, self.standard_errors, self.forecast, fraction)
        if level is not None:
            known.tell_of_others(kept)
        return known.outputs(kept, level)

    def without(self, which: Any, example: "int | Sequence[int] | None" = None, level: float | None = 0.95) -> Outcome:
        """What ablating some components does: the outputs before and after, with an interval where one is known.

        Args:
            which: components by index or by name, such as `["layer3.1.conv2 filter 7", 12]`, or a single one.
            example: of one example, or of several; all of them by default.
            level: of the interval; None for none.

        Returns:
            The forecast; it prints as a sentence.

        Raises:
            CoarError: no such component, or too few sets were measured for the level.
            OutOfRangeError: no such example.
        """
        kept = torch.ones(1, len(self.components))
        kept[0, self.components.indices(which)] = 0
        rows = list(range(len(self))) if example is None else within(example, len(self))
        outcomes: list[Outcome] = []
        for first in range(0, len(rows), _BLOCK):
            known = self._known(rows[first : first + _BLOCK])
            if level is not None and not outcomes:
                known.tell_of_others(kept)
            outcomes.append(known.outcome(kept, level))
        return Outcome.joined(outcomes)

    def has_intervals(self, level: float = 0.95) -> bool:
        """Whether fresh sets were measured, and enough of them for intervals of a level."""
        calibration = None if self.forecast is None else self.forecast.calibration
        return calibration is not None and calibration.knows(level)

    def _known(self, rows: Sequence[int]) -> Known:
        """All that is known of some examples; only their rows are read."""

        def read(of: str) -> Tensor:
            return torch.stack([self.row(row, of).float() for row in rows])

        errors = read("standard_errors") if self.has_standard_errors else None
        forecast = None if self.forecast is None else self.forecast.at(rows)
        fraction = self.provenance.ablated_fraction
        return Known(self.components, read("weights"), self.bias[list(rows)], errors, forecast, fraction)

    @property
    def pairs(self) -> "dict[tuple[int, int], Tensor]":
        """Interactions of pairs of components, float32 [examples] each; empty where none were measured.

        Positive: the effect of ablating both is smaller than the sum of their single effects.
        """
        found = self.forecast
        if found is None or found.interactions is None:
            return {}
        return {tuple(pair): found.interactions[:, i] for i, pair in enumerate(found.pairs.tolist())}

    def stability(self) -> float | None:
        """The correlation expected between an example's weights and those of a second run with another seed.

        The mean over the examples of 1 - (mean squared noise) / (variance of the weights); the module `stability` gives
        it for each of them. None without standard errors, or where no example's weights vary.
        """
        if not self.has_standard_errors:
            return None
        found = []
        for index in range(len(self)):
            weights, errors = self.row(index), self.row(index, "standard_errors")
            variance = weights.double().var(correction=0)
            noise = self.provenance.of_this_seed(weights, errors).double().square().mean()
            if variance > 0:
                found.append(float(1 - noise / variance))
        return sum(found) / len(found) if found else None

    def sum_by(self, by: str) -> tuple[list[str], Tensor]:
        """Totals over the components of each layer, module or attention head: how much of the weights is where.

        What ablating all of a layer costs may be far more or less than its total, which knows of no interactions:
        measure that with `ablate`.

        Args:
            by: "layer", "module" or "head".

        Returns:
            names [groups], and float32 [examples, groups] in the unit of the output. Components that belong to no group
            (to no head) are in no total.

        Raises:
            CoarError: another `by`, or no component belongs to a head.
        """
        names, index = self.components.regroup(by)
        inside = index >= 0
        totals = torch.zeros(len(self), len(names), dtype=self.weights.dtype)
        return names, totals.index_add_(1, index[inside], self.weights[:, inside].cpu())

    def found(self, name: str | None) -> str | None:
        """Where a model or data set that the provenance names is: a Hub id, or a local path seen from here.

        Raises:
            CoarError: these attributions come from the Hub and name a local path.
        """
        if name is None or self.origin is None:
            return name
        if isinstance(self.origin, str):
            if Path(name).exists():
                raise CoarError(
                    f"attributions from the Hub ({self.origin}) name {name!r}, which is a path on this machine; if it "
                    "is meant, give it yourself with model=… or data=…"
                )
            return name
        # Relative paths are of the folder where the run was made, which is around it as a rule.
        around = [Path(name), *(folder / name for folder in self.origin.parents)]
        there = next((str(path) for path in around if path.exists()), None)
        if there is not None and not self.made_here:
            raise CoarError(
                f"{self.origin} was not made here by you, and names {name!r}, which is a path on this machine; if it "
                "is meant, give it yourself with model=… or data=…"
            )
        return there or name

    def check_model(self, fingerprint: str, given: Mapping[str, Any] | None = None) -> None:
        """Raises `ModelMismatchError` unless a model with this fingerprint was attributed.

        Args:
            fingerprint: `models.fingerprint` of the model.
            given: `models.record` of the model, for the message to name what differs.
        """
        known = self.provenance.model
        if known.get("fingerprint") == fingerprint:
            return
        named = {key: (known.get(key), given.get(key)) for key in _TOLD} if given is not None else {}
        differing = [f"{key} {was!r} against {now!r}" for key, (was, now) in named.items() if was != now]
        if given is not None and "edit" in given:
            differing.append(f"it was edited: {len(given['edit'].get('components', ()))} components are ablated")
        differing.append(f"weights {str(known.get('fingerprint'))[:12]}… against {fingerprint[:12]}…")
        raise ModelMismatchError(
            f"these attributions are of {known.get('id') or 'a model'} (class {known.get('class')}), and not of the "
            f"model given; what differs: {', '.join(differing)}. Load the model that was attributed, or attribute "
            "this one"
        )
