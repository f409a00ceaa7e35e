"""The pieces in order: `load` a model and data, `attribute` them, `evaluate` the attributions, `reopen` them."""

import logging
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hf_coar import data as data_module
from hf_coar import estimators, models
from hf_coar.attributions import Attributions, Provenance
from hf_coar.components import Components
from hf_coar.errors import CoarError, check_kind
from hf_coar.estimators import budget as budgets
from hf_coar.estimators import checking, choosing
from hf_coar.estimators.registry import Estimator
from hf_coar.judging import evaluation
from hf_coar.judging.evaluation import Report
from hf_coar.masking import MaskedModel, find_components, fingerprint_of, paired, reopened
from hf_coar.models import outputs
from hf_coar.models.calling import Call
from hf_coar.models.outputs import Output
from hf_coar.plots import page
from hf_coar.runs import engine, heap, preflight, sampling, tracking, units, workers
from hf_coar.runs.problem import Problem
from hf_coar.runs.store import Store
from hf_coar.runs.witness import Witness
from hf_coar.storage import folders
from hf_coar.storage.registry import dotted
from hf_coar.storage.versions import version_of

logger = logging.getLogger(__name__)


def load(
    model: str | Path | nn.Module,
    data: Any,
    split: str | None = None,
    revision: str | None = None,
    data_revision: str | None = None,
    batch_size: int = 32,
    streaming: bool = False,
    max_length: int = 512,
    trust_remote_code: bool = False,
    text: str | None = None,
    pair: str | None = None,
    image: str | None = None,
    label: str | Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    n_examples: int | None = None,
    data_seed: int = 0,
    preprocessor: Any = None,
    architecture: str | Path | nn.Module | None = None,
) -> tuple[nn.Module, data_module.Examples]:
    """A model and a data set with the preprocessing that belongs to the model.

    Args:
        model: Hub id or local folder of a timm or transformers model; a file of weights (`.safetensors`, `.pth`), with
            `architecture`; or the model itself, which is returned as it is.
        data: Hub id, local folder or file (Parquet, CSV, TSV, JSON lines) of a data set; or an object of `datasets`, a
            DataFrame, a list of rows, whose place is not recorded, so that `reopen` wants it again.
        split: such as `"validation[:2000]"`.
        revision: of the model: branch, tag or commit.
        data_revision: of the data set.
        batch_size: examples a batch; changes speed only.
        streaming: read the data while running instead of downloading them first.
        max_length: tokens at which texts are cut; fewer where the model has fewer positions.
        trust_remote_code: run code that comes with the model.
        text: column of the texts. Without a name, columns are found by their types and usual names and by what the
            model reads; where two could be it, the error lists them. What was read is logged.
        pair: column of the second text of each example, which the tokenizer gets as its pair.
        image: column of the images.
        label: column of the labels: class indices or class names, as the model's configuration tells; of a model of
            several classes at once lists of them, or one column of zeros and ones a class, ["toxic", "insult", …].
        columns: by what they are to the model's task, where their names do not say it: {"prompt": …, "answer": …,
            "foil": …}, {"question": …, "context": …, "answers": …} and so on, see docs/tasks.md.
        n_examples: draw so many, as many of each class; all of the split by default.
        data_seed: of that draw.
        preprocessor: Hub id, folder or object of the tokenizer or image processor; the model's own by default. Of
            images also a function from a PIL image to a tensor, such as a transform of torchvision.
        architecture: of a file of weights: a timm name, a folder or Hub id whose `config.json` is of the same model, or
            a module, which is copied.

    Raises:
        ModelError: no such model, or weights that do not fit the architecture.
        DataError: no such data set, or none that the model can read; columns or labels that could be read in two ways.
    """
    columns = {**(columns or {}), **{r: c for r, c in _named(text, pair, image, label).items() if c is not None}}
    if not isinstance(model, str | Path):
        models.check_is_model(model)
    else:
        model = models.load_model(model, revision, trust_remote_code, architecture=architecture)
    return model, data_module.load_data(
        data, model, split, data_revision, batch_size, streaming, max_length, columns, n_examples, data_seed,
        preprocessor,
    )  # fmt: skip


def _named(text: str | None, pair: str | None, image: str | None, label: str | Sequence[str] | None) -> dict[str, Any]:
    return {"text": text, "pair": pair, "image": image, "label": label}


def reopen(attributions: Attributions, **changes: Any) -> tuple[nn.Module, data_module.Examples]:
    """The model and the data of attributions, loaded with all the settings that they were loaded with.

    Local paths that were given relative to some folder are looked for from here, and from the folders around the one
    that the attributions were loaded from. They are followed only of attributions that this user made on this machine:
    what comes from elsewhere may name anything.

    Args:
        attributions: made from what `load` gave, or with models and data sets that know where they come from.
        changes: arguments of `load` that are to be other than recorded, such as `model=`, `data=`, `batch_size=`; those
            that are None change nothing.

    Returns:
        What `load` returns. That they are what was attributed is checked by `evaluate` and `edit`.

    Raises:
        CoarError: it is not known where the model or the data come from; the message says what to give.
        ModelError: the model cannot be loaded.
        DataError: the data cannot be loaded.
    """
    arguments = _loaded_with(attributions, changes)
    model, data = load(**arguments)
    selected = None if changes.get("data") else attributions.provenance.data.get("selected")
    data = data if selected is None else data.select(selected)
    return model, _with_partners(attributions, model, data, arguments)


def _with_partners(attributions: Attributions, model: nn.Module, data: Any, arguments: Mapping[str, Any]) -> Any:
    """The data with the partners whose values stand in, if such do, from where the record has them."""
    stand_in = attributions.components.stand_in
    if stand_in is None or not stand_in.of_partners:
        return data
    if stand_in.source is None and stand_in.data.get("id"):
        of = stand_in.data
        read = {**data_module.settings(of), "data": attributions.found(of["id"])}
        keywords = ("batch_size", "streaming", "trust_remote_code")
        read |= {name: arguments[name] for name in keywords if name in arguments}
        _, others = load(model, **read)
        others = others if of.get("selected") is None else others.select(of["selected"])
        attributions.components = replace(attributions.components, stand_in=reopened(stand_in, others))
    return paired(attributions.components, data)


def reopen_model(attributions: Attributions, **changes: Any) -> nn.Module:
    """The model of attributions alone; see `reopen`, of whose arguments those of `models.load_model` count."""
    arguments = _loaded_with(attributions, changes, ("model",))
    given = (arguments.get(name) for name in ("model", "revision", "trust_remote_code"))
    return models.load_model(*given, architecture=arguments.get("architecture"))


def _loaded_with(
    attributions: Attributions, changes: Mapping[str, Any], needed: Sequence[str] = ("model", "data")
) -> dict[str, Any]:
    """The arguments of `load`: those that are recorded, but for what is given; of another model or data set, none."""
    known = {name: value for name, value in changes.items() if value is not None}
    for what, recorded in (("model", _model_loaded_with), ("data", _data_loaded_with)):
        if what in needed and what not in known:  # what is recorded of one is not true of another
            known = recorded(attributions) | known
        if what in needed and known.get(what) is None:
            raise CoarError(f"the attributions do not say where their {what} came from; give {what}=… (--{what})")
    return {name: value for name, value in known.items() if value is not None}


def _model_loaded_with(attributions: Attributions) -> dict[str, Any]:
    of = attributions.provenance.model
    paths = {"model": of.get("id"), "architecture": of.get("architecture")}
    return {"revision": of.get("revision"), **{name: attributions.found(path) for name, path in paths.items()}}


def _data_loaded_with(attributions: Attributions) -> dict[str, Any]:
    of = attributions.provenance.data
    settings = data_module.settings(of)
    paths = {"data": of.get("id"), "preprocessor": settings.get("preprocessor")}
    return settings | {name: attributions.found(path) for name, path in paths.items()}


def attribute(
    model: nn.Module,
    data: Any,
    components: Components | None = None,
    *,
    output: "str | Output | outputs.OutputFunction" = "auto",
    method: str | Estimator = "auto",
    ablated_fraction: float | None = None,
    call: Call | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    budget: float | str | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    log_with: Any = None,
    overwrite: bool = False,
) -> Attributions:
    """How much every component contributes to the output of every example.

    Args:
        model: any module; changed only while this runs.
        data: anything that can be iterated again and yields batches, mappings of tensors whose first axis is the
            example, or a `datasets` data set; `labels` holds the targets.
        components: from `find_components(model)`, which is the default; they say what stands in for ablated ones.
        output: a name (`hf_coar.outputs.names()`), "auto" for the default of the model's task
            (`hf_coar.tasks.of(model)`), a function (logits, batch) -> [examples], or an `Output`, which may take all
            that the model returns.
        method: an estimator such as `PathGradient(…)` or `Regression(…)`, or the name of one. "auto" takes what suits
            the model, see `estimators.choosing`: leave-one-out with pairs for few components, `PathGradient()` for
            many, `Regression(solver=ARD())` for many in models that let no gradient through.
        ablated_fraction: the fraction of components that masks ablate. Predictions are best for ablations of that size.
            None takes the largest of 5, 2, 1, ½ and ¼ % at which half of the decisions survive on the first examples.
        call: runs the model, a function (model, batch) -> what the output takes, in the place of the task's own call:
            for models that want more than the entries of the batch that their forward names. Give it to `evaluate` too.
        seed: of all draws.
        out: folder of the run: new, empty, or one in which a run stopped, which then resumes; settings that change the
            numbers must be the same. A temporary folder by default.
        budget: decides the number of rounds or masks in the place of the method's own: as many as cost no more than
            this many forward passes an example, or than a time such as `"20 min"` for all of them (one batch is timed
            first; a run that resumes keeps its number).
        batch_size: as `running` has it, for this call.
        progress: the same.
        log_with: the same.
        overwrite: take an `out` that holds other things as well; files of the same names are replaced.

    Returns:
        The attributions, also saved in `out`, with a page `report.html` to look at.

    Raises:
        CoarError: arguments that make no sense; the message says which and what to do.
        RunMismatchError: `out` holds a run with other settings.
        NonFiniteOutputError: the model gave NaN or infinity.
    """
    if components is not None:
        check_kind(components, Components, "components", "what hf_coar.find_components(model, …) gives")
    if ablated_fraction is not None:
        sampling.check_fraction(ablated_fraction)
    sampling.check_seed(seed)
    if out is not None:
        folders.check(out, folders.ATTRIBUTIONS, overwrite)
    chosen = None if method in ("auto", None) else estimators.get(method)
    with _running(batch_size=batch_size, progress=progress, log_with=log_with) as options:
        workers.check_folder(out, options.worker)
        # Components of other attributions serve as well: which weights they were found with is of no matter here.
        masked = MaskedModel(model, replace(components or find_components(model), fingerprint=None))
        masked.check_stand_in_is_of_model()
        data = paired(masked.components, data)
        batches = data_module.batches(data, options.batch_size)
        first = preflight.First(batches)
        bound = preflight.bound(model, first, output, call)
        witness = Witness.of(model, bound, first)
        unit = units.unit_of(witness.values)
        problem = Problem(masked, batches, units.measured_in(bound, unit), ablated_fraction, seed, first=first)
        if ablated_fraction is not None:
            sampling.check_some_ablated(ablated_fraction, len(masked))
        chosen, reasons = choosing.settled(problem, chosen, budget)
        with workers.folder(out) as folder:
            folders.claim(folder, folders.ATTRIBUTIONS, overwrite)
            chosen, reasons = choosing.kept(folder, problem, chosen, reasons)
            chosen = chosen if budget is None else budgets.choose(chosen, budget, problem, folder, "method" in reasons)
            provenance = replace(
                _provenance(problem, data, chosen), call=call and dotted(call), boundary=bound.boundary
            )
            _tell_cost(problem, chosen)
            attributions = _attributed(problem, chosen, provenance, folder, out, witness, unit)
            attributions.provenance = attributions.provenance.found(chosen=tuple(reasons.values()))
            if out is not None and workers.processes().is_main_process:
                if options.report:
                    page.write_first(folder, attributions, batches)  # first, so that the card shows its pictures
                attributions.save_pretrained(folder)
                if workers.team(options.worker).count == 1:  # others may be about to map them
                    problem.store.drop_estimates()
    return attributions


def _attributed(
    problem: Problem, method: Estimator, provenance: Provenance, folder: Path, out: str | Path | None,
    witness: Witness, unit: float,
) -> Attributions:  # fmt: skip
    """Run the method, told to the trackers; `unit` is what the problem's output is measured in."""
    frozen = {"task": "attribute", **provenance.frozen(), **({} if unit == 1 else {"unit_of_outputs": unit})}
    problem.store = Store(folder, {**frozen, "components": problem.components.to_json()})
    witness.check_run(folder)
    problem.first.release()
    with tracking.tracked(engine.current().log_with, out, frozen) as run:
        fit = method.fit(problem).times(unit)
        cost = method.cost(problem.size) if fit.cost is None else fit.cost
        provenance = provenance.found(cost=cost, checked=fit.checked, skipped=tuple(problem.store.skipped))
        attributions = Attributions(
            fit.weights, fit.bias, fit.standard_errors, problem.components, problem.identity, provenance,
            forecast=fit.forecast,
        )  # fmt: skip
        attributions.made_here = True
        unchecked = "checked on no fresh masks: coar.evaluate tells how well these attributions predict"
        logger.info("%s", checking.said(fit.checked, problem.ablated_fraction) if fit.checked else unchecked)
        reliability = attributions.stability()
        warnings = checking.warnings_of(fit.checked, reliability, problem.ablated_fraction, method.better)
        for warning in warnings:
            logger.warning("%s", warning)
        attributions.provenance = attributions.provenance.found(warnings=(*problem.warnings, *warnings))
        run.figures({"reliability": reliability})
    return attributions


def evaluate(
    attributions: Attributions,
    model: nn.Module,
    data: Any,
    *,
    fractions: Sequence[float] | float | None = None,
    n_masks: int = 100,
    seed: int = 1,
    output: "str | Output | outputs.OutputFunction | None" = None,
    call: Call | None = None,
    out: str | Path | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
    log_with: Any = None,
    overwrite: bool = False,
) -> Report:
    """Compare predictions with the model's outputs under fresh random masks.

    Args:
        attributions: to be judged.
        model: the model that was attributed.
        data: the data that were attributed, in the same order.
        fractions: ablated fractions to judge at, or one; None for the fitted one, a quarter of it, and one of four
            components.
        n_masks: masks a fraction; the cost is one forward pass a mask and example.
        seed: of the masks, which are others than those of any fit, whatever its seed.
        output: the attributed output; needed only if it was a function of your own.
        call: how the model was run; needed only if it was a function of your own.
        out: folder of the run, which resumes; a temporary one by default.
        batch_size: as `running` has it, for this call.
        progress: the same.
        log_with: the same.
        overwrite: as for `attribute`.

    Returns:
        The report; its figures are also saved as `evaluation.json` in `out`, with a page `report.html` to look at.

    Raises:
        CoarError: a fraction outside (0, 1), or fewer than 3 masks.
        ModelMismatchError: another model.
        DataError: other data.
    """
    check_kind(attributions, Attributions, "attributions", "what attribute or Attributions.from_pretrained gives")
    if out is not None:
        folders.claim(out, folders.ATTRIBUTIONS, overwrite)
    settings = {"task": "evaluate", "n_masks": n_masks, "seed": seed, "fit": attributions.provenance.to_json()}
    with (
        _running(batch_size=batch_size, progress=progress, log_with=log_with) as options,
        tracking.tracked(options.log_with, out, settings) as run,
    ):
        report = evaluation.evaluate(attributions, model, data, fractions, n_masks, seed, output, call, out)
        run.figures({f"correlation at {fraction:g}": value for fraction, value in report.correlation.items()})
        run.figures({f"slope at {fraction:g}": value for fraction, value in report.slope.items()})
        run.figures({"reliability": report.mean_reliability})
        if out is not None and options.report and workers.processes().is_main_process:
            page.write(out, attributions, report, data)
    return report


@contextmanager
def _running(**given: Any) -> Iterator[engine.Running]:
    """What a call says of speed, where it says anything, is as if it stood in a `running` block of its own."""
    with heap.kept(), engine.running(**{name: value for name, value in given.items() if value is not None}) as options:
        yield options


def _provenance(problem: Problem, data: Any, method: Estimator) -> Provenance:
    """Everything that determines the numbers."""
    return Provenance(
        model={**models.record(problem.model), "fingerprint": fingerprint_of(problem.model, anew=True)},
        data=data_module.describe(data),
        granularity=problem.components.granularity,
        n_components=len(problem.components),
        ablation=problem.components.stand_in and problem.components.stand_in.provenance(),
        output=problem.output.name,
        unit=problem.output.unit,
        boundary=problem.output.boundary,
        boundary_known=True,
        alignment=problem.output.alignment,
        method=method.settings(),
        ablated_fraction=problem.ablated_fraction,
        seed=problem.seed,
        dtype=engine.current().dtype,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    """Major and minor version of the libraries that compute; a patch release does not stop a run from resuming."""
    names = ("hf_coar", "torch", "transformers", "timm")
    return {name: ".".join(version_of(name).split("+")[0].split(".")[:2]) for name in names}


def _tell_cost(problem: Problem, method: Estimator) -> None:
    count = operator.length_hint(problem.data)  # 0 for a stream, whose length raises TypeError
    length = f"{count} batches" if count else "a stream of batches"
    logger.info(
        "attribute: %d components, output %s, method %s: %g forward passes an example, on %s",
        len(problem.components), problem.output.name, method.name, method.cost(problem.size), length,
    )  # fmt: skip
