"""The pieces in order: `load` a model and data, `attribute` them, `evaluate` the attributions."""

import logging
import operator
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_coar import data as data_module
from hf_coar import masking, models
from hf_coar.attributions import Attributions
from hf_coar.components import Components, find_components
from hf_coar.estimators import budget as allowance
from hf_coar.estimators import input_paths as gradients
from hf_coar.estimators.path_gradient import PathGradient
from hf_coar.estimators.regression import Regression
from hf_coar.estimators.solvers import ARD
from hf_coar.judging import evaluation
from hf_coar.judging.evaluation import Report
from hf_coar.models import outputs
from hf_coar.models.outputs import Output
from hf_coar.plots import page as report
from hf_coar.runs import engine, sampling, tracking, workers
from hf_coar.runs.problem import Method, Problem
from hf_coar.runs.store import Store

logger = logging.getLogger(__name__)


def load(
    model: str | Path,
    data: str | Path,
    split: str | None = None,
    revision: str | None = None,
    data_revision: str | None = None,
    batch_size: int = 32,
    streaming: bool = False,
    max_length: int = 512,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, data_module.Examples]:
    """A model and a data set with the preprocessing that belongs to the model.

    Args:
        model: Hub id or local folder of a timm or transformers model.
        data: Hub id, local folder or file of a data set.
        split: such as `"validation[:2000]"`.
        revision: of the model: branch, tag or commit.
        data_revision: of the data set.
        batch_size: examples a batch; changes speed only.
        streaming: read the data while running instead of downloading them first.
        max_length: tokens at which texts are cut.
        trust_remote_code: run code that comes with the model.

    Raises:
        ModelError: no such model.
        DataError: no such data set, or none that the model can read.
    """
    loaded = models.load_model(model, revision, trust_remote_code)
    return loaded, data_module.load_data(data, loaded, split, data_revision, batch_size, streaming, max_length)


def attribute(
    model: nn.Module,
    data: Any,
    components: Components | None = None,
    output: "str | Output | outputs.OutputFunction" = "margin",
    method: Method | None = None,
    ablated_fraction: float = 0.05,
    seed: int = 0,
    out: str | Path | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    budget: float | str | None = None,
    log_with: Any = None,
) -> Attributions:
    """How much every component contributes to the output of every example.

    Args:
        model: any module; changed only while this runs.
        data: anything that can be iterated again and yields batches, mappings of tensors whose first axis is the
            example, or a `datasets` data set; `labels` holds the targets.
        components: from `find_components(model)`, which is the default.
        output: a name (`hf_coar.outputs.names()`), or a function (logits, batch) -> [examples].
        method: `PathGradient(…)`, `Regression(…)` or one of `baselines`. By default `PathGradient()`, or
            `Regression(solver=ARD())` for models that let no gradient through.
        ablated_fraction: the fraction of components that masks ablate. Predictions are best for ablations of that size.
        seed: of all draws.
        out: folder of the run. It resumes where it stopped; settings that change the numbers must then be the same. A
            temporary folder by default.
        batch_size: changes speed only; for `datasets` objects and what `load` gives.
        progress: show a progress bar.
        budget: decides the number of rounds or masks in the place of the method's own: as many as cost no more than
            this many forward passes an example, or than a time such as `"20 min"` for all of them (one batch is timed
            first; a run that resumes keeps its number).
        log_with: where figures of the run go while it runs: "trackio", "tensorboard", "wandb", an
            `accelerate.tracking.GeneralTracker`, or several of them; see `tracking`.

    Returns:
        The attributions, also saved in `out`, with a page `report.html` to look at.

    Raises:
        CoarError: arguments that make no sense; the message says which and what to do.
        RunMismatchError: `out` holds a run with other settings.
        NonFiniteOutputError: the model gave NaN or infinity.
    """
    sampling.check_fraction(ablated_fraction)
    sampling.check_seed(seed)
    output = outputs.get(output)
    components = components or find_components(model)
    masking.check_same_model(model, components)
    batches = data_module.batches(data, batch_size)
    method = method or _default_method(model, batches, components, output)
    with workers.folder(out) as folder:
        problem = Problem(model, batches, components, output, ablated_fraction, seed, None, progress=progress)
        method = method if budget is None else allowance.choose(method, budget, problem, folder)
        config = _config(model, data, components, output, method, ablated_fraction, seed)
        _tell_cost(batches, config)
        store = Store(folder, {"task": "attribute", **config, "components": components.to_json()})
        with tracking.tracked(log_with, out, {"task": "attribute", **config}) as run:
            fit = method.fit(replace(problem, store=store))
            known = {"cost": fit.cost, "checked": fit.checked}
            config |= {name: value for name, value in known.items() if value is not None}
            config |= {"skipped": list(store.skipped)} if store.skipped else {}  # the rows leave these examples out
            attributions = Attributions(fit.weights, fit.bias, fit.standard_errors, components, fit.identity, config)
            run.figures({"reliability": attributions.stability()})
        if out is not None and workers.processes().is_main_process:
            report.write_first(folder, attributions)  # first, so that the card shows its pictures
            attributions.save_pretrained(folder)
    return attributions


def evaluate(
    attributions: Attributions,
    model: nn.Module,
    data: Any,
    fractions: Sequence[float] = (0.05, 0.0125),
    n_masks: int = 100,
    seed: int = 1,
    output: "str | Output | outputs.OutputFunction | None" = None,
    out: str | Path | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    log_with: Any = None,
) -> Report:
    """Compare predictions with the model's outputs under fresh random masks.

    Args:
        attributions: to be judged.
        model: the model that was attributed.
        data: the data that were attributed, in the same order.
        fractions: ablated fractions to judge at.
        n_masks: masks a fraction; the cost is one forward pass a mask and example.
        seed: of the masks; must not be the seed of the fit.
        output: the attributed output; needed only if it was a function of your own.
        out: folder of the run, which resumes; a temporary one by default.
        batch_size: changes speed only.
        progress: show a progress bar.
        log_with: where figures of the run go, as for `attribute`.

    Returns:
        The report; its figures are also saved as `evaluation.json` in `out`, with a page `report.html` to look at.

    Raises:
        CoarError: the seed of the fit, a fraction outside (0, 1), or fewer than 3 masks.
        ModelMismatchError: another model.
        DataError: other data.
    """
    settings = {"task": "evaluate", "n_masks": n_masks, "seed": seed, "fit": attributions.config}
    with tracking.tracked(log_with, out, settings) as run:
        found = evaluation.evaluate(
            attributions, model, data, fractions, n_masks, seed, output, out, batch_size, progress
        )
        run.figures({f"correlation at {fraction:g}": value for fraction, value in found.correlation.items()})
        run.figures({f"slope at {fraction:g}": value for fraction, value in found.slope.items()})
        run.figures({"reliability": found.mean_reliability})
    if out is not None and workers.processes().is_main_process:
        report.write(out, attributions, found)
    return found


def _default_method(model: nn.Module, batches: Any, components: Components, output: Output) -> Method:
    """The best method that the model allows; one forward pass of one example tells."""
    with models.frozen(model), engine.placed(model, workers.processes().device) as device:
        example = data_module.rows(allowance.first_batch(data_module.Chunks(batches)), 0, 1)
        if gradients.reach_gates(model, components, output, data_module.to_device(example, device)):
            return PathGradient()
    method = Regression(solver=ARD())
    logger.warning(
        "no gradient reaches the gates of %s, so that the default method cannot run; taking hf_coar.Regression(n_masks="
        "%d, solver=hf_coar.ARD()), which needs forward passes only, and more of them",
        type(model).__name__, method.n_masks,
    )  # fmt: skip
    return method


def _config(
    model: nn.Module,
    data: Any,
    components: Components,
    output: Output,
    method: Method,
    ablated_fraction: float,
    seed: int,
) -> dict[str, Any]:
    """Everything that determines the numbers."""
    return {
        "model": {**models.record(model), "fingerprint": models.fingerprint(model)},
        "data": data_module.describe(data),
        "granularity": components.granularity,
        "n_components": len(components),
        "output": output.name,
        "unit": output.unit,
        "boundary": output.boundary,
        "method": method.settings(),
        "ablated_fraction": ablated_fraction,
        "seed": seed,
        "cost": method.cost(ablated_fraction, len(components)),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    """Major and minor version of the libraries that compute; a patch release does not stop a run from resuming."""
    from importlib.metadata import version

    names = ("hf_coar", "torch", "transformers", "timm")
    return {name: ".".join(version(name).split("+")[0].split(".")[:2]) for name in names}


def _tell_cost(batches: Any, config: dict[str, Any]) -> None:
    count = operator.length_hint(batches)  # 0 for a stream, whose length raises TypeError
    length = f"{count} batches" if count else "a stream of batches"
    logger.info(
        "attribute: %d components, output %s, method %s: %g forward passes an example, on %s",
        config["n_components"], config["output"], config["method"]["name"], config["cost"], length,
    )  # fmt: skip
