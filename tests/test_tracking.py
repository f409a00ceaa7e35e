"""Trackers: the real ones, without a network, and one of our own."""

import sqlite3

import pytest
import torch
from accelerate.tracking import GeneralTracker, on_main_process

import hf_coar as coar
from hf_coar.errors import CoarError
from hf_coar.runs import tracking


class Listed(GeneralTracker):
    """Keeps everything."""

    name, requires_logging_directory = "listed", False

    def __init__(self):
        super().__init__()
        self.config, self.entries, self.finished = None, [], False

    @property
    def tracker(self):
        return self.entries

    def start(self):
        pass

    @on_main_process
    def store_init_configuration(self, values):
        self.config = values

    @on_main_process
    def log(self, values, step=None, **keywords):
        self.entries.append((step, values))

    @on_main_process
    def finish(self):
        self.finished = True


@pytest.fixture
def attributed(mlp, tmp_path):
    def run(log_with, out=None, **keywords):
        method = coar.PathGradient(rounds=2)
        out = tmp_path / "run" if out is None else out
        return coar.attribute(
            mlp.model, [mlp.batch, mlp.batch], method=method, ablated_fraction=0.25, out=out, progress=False,
            log_with=log_with, **keywords,
        )  # fmt: skip

    return run


def test_a_tracker_of_your_own_gets_units_passes_and_figures(attributed, mlp, monkeypatch):
    monkeypatch.setattr(tracking, "_APART", 0.0)
    tracker = Listed()
    attributions = attributed(tracker)
    assert (
        tracker.finished and tracker.config["task"] == "attribute" and tracker.config["method.name"] == "path_gradient"
    )
    assert all(isinstance(value, str | int | float | bool) for value in tracker.config.values())
    steps = [(step, values["units"]) for step, values in tracker.entries if "units" in values]
    assert steps[0] == (1, 1) and steps[-1] == (8, 8)  # two batches: rounds, flips, far reads, fresh sets
    passes = attributions.config["cost"] * len(attributions)
    spent = [values for _, values in tracker.entries if "forward_passes" in values][-1]
    assert 0.9 * passes <= spent["forward_passes"] <= passes  # a method may count passes beside those of its units
    assert spent["forward_passes_per_second"] > 0
    [(_, figures)] = [entry for entry in tracker.entries if "reliability" in entry[1]]
    assert figures["reliability"] == pytest.approx(attributions.stability())

    judge = Listed()
    data = [mlp.batch, mlp.batch]
    report = coar.evaluate(
        attributions, mlp.model, data, fractions=(0.25,), n_masks=5, progress=False, log_with=[judge]
    )
    logged = {name: value for _, values in judge.entries for name, value in values.items()}
    assert logged["correlation at 0.25"] == report.correlation[0.25] and logged["slope at 0.25"] == report.slope[0.25]


def test_passes_of_a_regression_are_one_a_mask_and_example(mlp):
    tracker = Listed()
    method = coar.Regression(n_masks=70)  # two parts
    coar.attribute(mlp.model, [mlp.batch], method=method, ablated_fraction=0.25, progress=False, log_with=tracker)
    last = {name: value for _, values in tracker.entries for name, value in values.items()}
    assert last["units"] == 2 and last["forward_passes"] == 70 * len(mlp.batch["labels"])
    assert "reliability" not in last  # there are no standard errors


def test_what_was_there_already_counts_as_done_but_not_for_the_rate(attributed):
    first, second = Listed(), Listed()
    attributed(first)
    attributed(second)
    last = {name: value for _, values in second.entries for name, value in values.items()}
    assert last["units"] == 8 and "forward_passes_per_second" not in last


def test_trackers_are_closed_after_an_error(attributed, monkeypatch):
    tracker = Listed()
    monkeypatch.setattr(coar.PathGradient, "fit", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attributed(tracker)
    assert tracker.finished
    tracking.current().unit(1.0, 1.0)  # outside of the block nothing is logged
    assert tracker.entries == []


def test_numbers_do_not_depend_on_trackers(attributed, tmp_path):
    plain, tracked = attributed(None), attributed(Listed(), tmp_path / "other")
    assert torch.equal(plain.weights, tracked.weights)
    assert plain.config == tracked.config


def test_tensorboard_gets_scalars(attributed, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    attributions = attributed("tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "logs" / "hf_coar"))
    events.Reload()
    [reliability] = events.Scalars("reliability")
    assert reliability.value == pytest.approx(attributions.stability(), abs=1e-6)
    passes = attributions.config["cost"] * len(attributions)
    assert events.Scalars("forward_passes")[-1].value == pytest.approx(passes, rel=0.1)


def test_trackio_gets_figures_without_a_network(attributed, tmp_path, monkeypatch, capsys):
    pytest.importorskip("trackio")
    import trackio.sqlite_storage as storage
    import trackio.utils as utils

    for module in (storage, utils):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    attributed("trackio")
    assert capsys.readouterr().out == ""  # standard output belongs to results
    [database] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        logged = " ".join(str(row) for row in connection.execute("select * from metrics"))
    assert "forward_passes" in logged and "reliability" in logged


def test_errors_say_what_to_do(attributed, mlp):
    with pytest.raises(CoarError, match="joy"):
        attributed("joy")
    with pytest.raises(CoarError, match=r"out=…"):
        coar.attribute(mlp.model, [mlp.batch], log_with="tensorboard", progress=False)
    with pytest.raises(CoarError, match="pip install wandb"):
        attributed("wandb")
