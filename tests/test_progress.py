"""Progress: a bar on a terminal, whole lines in a log file, the same counts in both."""

import sys
from io import StringIO

import pytest
from other_processes import forked

from hf_coar import cli, demo
from hf_coar.runs import progress
from hf_coar.runs.progress import Progress, duration


class Terminal(StringIO):
    def isatty(self):
        return True


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_log_file_gets_a_line_now_and_then(clock):
    log = StringIO()
    with Progress("gate paths", every=30, stream=log) as bar:
        bar.total = 100
        for _ in range(100):
            clock.now += 2
            bar.update()
    lines = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and len(lines) == 7
    assert lines[0] == "gate paths: 15/100 units (15 %), 30 units/min, 3 min left"
    assert lines[-1] == "gate paths: 100/100 units (100 %), 30 units/min, 3 min in all"


def test_units_that_were_there_do_not_count_for_the_rate(clock):
    log = StringIO()
    bar = Progress("masked passes", every=30, stream=log)
    bar.total = 50
    for _ in range(40):
        clock.now += 0.01
        bar.update(computed=False)
    clock.now += 10
    bar.update()
    assert bar.line() == "masked passes: 41/50 units (82 %), 6 units/min, 90 s left".replace("90 s", duration(90))


def test_the_bar_and_the_log_move_within_a_unit(clock):
    log, screen = StringIO(), Terminal()
    with Progress("gate paths", every=30, stream=log) as bar, Progress("gate paths", stream=screen) as drawn:
        for one in (bar, drawn):
            one.total = 2
            one.expect(40)
        for _ in range(50):  # ten more than expected
            clock.now += 2
            bar.passed()
            drawn.passed()
        assert drawn._bar.n == pytest.approx(0.99)
        bar.update()
        drawn.update()
        assert drawn._bar.n == pytest.approx(1)
    lines = log.getvalue().splitlines()
    assert lines[0] == "gate paths: 0/2 units (19 %), 45 units/h, 2 min left"
    assert lines[-1].startswith("gate paths: 1/2 units (50 %)") and "1/2 units" in screen.getvalue()


def test_a_run_tells_of_every_pass(demo_pair, monkeypatch):
    import hf_coar as coar

    model, data = demo_pair
    seen = []
    monkeypatch.setattr(Progress, "passed", lambda bar: seen.append(bar._expected))
    method = coar.PathGradient(rounds=2, max_outliers=0, n_flips=0, check_masks=0)
    coar.attribute(model, data.select(range(4)), method=method, progress=False)
    assert len(seen) == 21 and set(seen) == {21.0}  # 2 rounds of 10 passes at 5 %, and one with nothing ablated


def test_a_stream_of_unknown_length(clock):
    bar = Progress("passes", stream=StringIO())
    clock.now += 4
    bar.update()
    assert bar.line() == "passes: 1 units, 15 units/min, 4 s in all"


def test_a_terminal_gets_a_bar():
    screen = Terminal()
    with Progress("gate paths", stream=screen) as bar:
        bar.total = 3
        for _ in range(3):
            bar.update()
    assert "\r" in screen.getvalue() and "3/3" in screen.getvalue() and "100%" in screen.getvalue()


def test_silence():
    screen = Terminal()
    with Progress("gate paths", shown=False, stream=screen) as bar:
        bar.total = 1
        bar.update()
    assert screen.getvalue() == "" and bar.n == 1


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_run_whose_errors_go_to_a_file_writes_lines(tmp_path):
    command = ["attribute", demo.MODEL, demo.IMAGES, "--split", "train[:4]"]
    command += ["--rounds", "2", "--batch-size", "2", "--include", "layer3.1.*", "--out", tmp_path / "run"]
    done = forked(lambda: cli.main([str(word) for word in command]))
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    assert any(line.startswith("gate paths: 2/2 units (100 %), ") for line in lines)
    assert not [line for line in lines if "\r" in line or "\033" in line]


def test_a_terminal_without_columns_gets_a_bar_as_well(monkeypatch):
    """In a pseudo-terminal, as `script` and containers make them: its size is 0 × 0."""
    import os
    import pty

    main, side = pty.openpty()
    with os.fdopen(side, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        bar = Progress("gate paths")
        bar.total = 2
        bar.update()
        bar.update()
        bar.close()
        shown = b""
        while b"2/2" not in shown:  # it may come in pieces
            shown += os.read(main, 10_000)
    os.close(main)
    assert b"gate paths" in shown
