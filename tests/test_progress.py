"""The progress bar, the lines of a log, and the time of a whole run."""

import contextlib
import io
import re
import time
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from test_train import tiny

from skd_jax import extending, loop, progress, train, writer
from skd_jax.experiment import open_experiment
from skd_jax.progress import Progress
from skd_jax.timing import duration, phase_seconds, whole_run

TERMS = {"category": 1.26, "diversity": -1.38, "exploration": -0.342, "explore": 18.3}
TERMS |= {"feature_statistics": 18.8, "imitation": 0.323, "label_entropy": 1.38}


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def states(self) -> list[str]:
        return [state.rstrip() for state in self.getvalue().split("\r") if state]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def terminal(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    return stream


def test_a_log_on_a_full_disk_ends_no_run(monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(progress.sys, "stderr", full)
        monkeypatch.setattr(progress.sys, "stdout", full)
        with Progress(total=10, initial=0, task=0, phase="base") as shown:
            shown.reach(10)
        writer.say("a table")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


def test_progress_on_a_terminal(terminal):
    stream = terminal
    names = {"task": 2, "phase": "delegator", "unit": "round"}
    with Progress(total=50, initial=20, **names, columns=lambda: 200) as shown:
        assert "20/50" in stream.getvalue()
        shown.reach(30, {"cat": jnp.float32(0.12345), "div": -2.0})
        shown.reach(50)
    last = stream.getvalue().split("\r")[-1]
    assert last.startswith("task 2 delegator: 100%")
    assert "50/50" in last
    assert "cat=0.123, div=-2" in last
    assert "round" in last


def test_progress_in_a_log_is_short(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(progress.sys, "stderr", stream)
    with Progress(total=1000, initial=0, task=0, phase="base") as shown:
        for i in range(1000):
            shown.reach(i + 1, {"loss": i})
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2  # its start and its end
    assert "\r" not in stream.getvalue()
    assert lines[-1].startswith("task 0 base: 100%")
    assert lines[-1].endswith("loss=999]")


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (120, "[1:00:00 left, 4.2 rounds/s, imitation=0.323, explore=18.3, category=1.26]"),
        (110, "[1:00:00 left, 4.2 rounds/s, imitation=0.323, explore=18.3]"),
        (100, "[1:00:00 left, imitation=0.323, explore=18.3]"),
        (80, "[1:00:00 left, imitation=0.323]"),
        (60, "[1:00:00 left]"),
        (20, ""),
    ],
)
def test_the_bar_is_readable_in_the_columns_there_are(terminal, columns, shown):
    clock = Clock()
    first = ("skipped", "imitation", "explore")
    names = {"task": 12, "phase": "delegator", "unit": "round", "first": first}
    with Progress(total=30000, initial=0, **names, clock=clock, columns=lambda: columns) as bar:
        bar.reach(1)
        clock.now = 3600.0
        bar.reach(15000, TERMS)
    line = terminal.states()[-2]
    assert line.startswith("task 12 delegator:  50%|"[: columns - 1].rstrip())
    if shown:
        drawn = re.search(r"\|([#█]+)( *)\| 15000/30000 ", line)
        assert drawn and len(drawn[1] + drawn[2]) >= 6
        assert len(drawn[1]) == len(drawn[1] + drawn[2]) // 2
        assert line.endswith(shown)
    assert all(len(state) < columns for state in terminal.states())


@pytest.mark.parametrize("columns", [80, 100])
def test_two_or_three_numbers_stay(terminal, columns):
    clock = Clock()
    names = {"task": 1, "phase": "learn", "first": ("cil", "classification")}
    with Progress(total=600, initial=0, **names, clock=clock, columns=lambda: columns) as bar:
        bar.reach(1)
        clock.now = 30.0
        bar.reach(300, {"classification": 1.73, "consolidation": 0.11, "cil": 0.14})
    assert "cil=0.14, classification=1.73" in terminal.states()[-2]


def test_compiling_is_said_and_counts_into_no_rate(terminal):
    clock = Clock()
    with Progress(total=100, initial=40, task=0, phase="base", clock=clock) as shown:
        clock.now = 75.0
        assert shown.line().endswith("40/100 [01:15, compiling]")
        shown.reach(41)
        assert "compiling" not in shown.line() and shown.seconds is None
        clock.now = 95.0
        shown.reach(51)
        assert shown.seconds == 2.0 and shown.measured == 20.0
        assert shown.line().endswith("51/100 [01:35<01:38, 2.0 s/step]")
        clock.now = 96.0
        assert shown.line().endswith("51/100 [01:36<01:37, 2.0 s/step]")


def test_the_bar_ticks_by_itself(terminal, monkeypatch):
    monkeypatch.setattr(progress, "_TICK", 0.01)
    clock = Clock()
    with Progress(total=9, initial=0, task=0, phase="base", clock=clock) as shown:
        clock.now = 7.0
        deadline = time.monotonic() + 20
        while not any("[00:07, compiling]" in state for state in terminal.states()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        shown.say("a line", lambda line: terminal.write(f"{line}\n"))
        assert re.search(r"\r +\ra line\n", terminal.getvalue())
    assert not shown._thread.is_alive()
    last = len(terminal.getvalue())
    time.sleep(0.05)
    assert len(terminal.getvalue()) == last and terminal.getvalue().endswith("\n")


def test_time_of_a_whole_run():
    experiment = open_experiment(tiny())
    base, delegator, learn, *_ = phases = experiment.phases
    assert (base.cost, delegator.cost, learn.cost) == (3 * 128, 16 * 19, 4 * 128 + 5 * 16)
    each = 2 / base.cost  # seconds a pass
    seconds = phase_seconds(phases, {"base": 2.0})
    assert seconds[0] == 12.0
    assert seconds[1] == pytest.approx(4 * each * delegator.cost)
    known = {"base": 2.0, "delegator": 1000.0, "learn": 5.0}
    assert phase_seconds(phases, known) == [12, 4000, 20, 2000, 20]
    assert whole_run(phases, known, 1, 1, "cpu") == [
        "phase 2 of 5: about 1 h 41 min in all, 84 min left; 67 min of it for task 0, delegator"
    ]
    assert len(whole_run(phases, {"base": 40000.0}, 0, 3, None)) == 1
    line, warning = whole_run(phases, {"base": 40000.0}, 0, 3, "cpu")
    assert line.endswith("(not yet measured, a rough estimate: delegator, learn)")
    assert warning == "warning: that is more than a day on this CPU; take scale=mini, or a GPU"


def test_an_estimate_adds_up_phases_of_one_name(monkeypatch):
    experiment = open_experiment(tiny())
    monkeypatch.setattr(extending, "Stepping", lambda *_: lambda state, *_: (state, None))
    found = extending.estimate(experiment)
    steps = dict.fromkeys(found, 0)
    for phase in experiment.phases:
        steps[phase.name] += phase.steps
    assert {name: count for name, (count, _) in found.items()} == steps
    assert len(experiment.phases) == 5 and len(found) == 3


def test_durations():
    found = [duration(s) for s in (0.2, 50, 720, 11400, 187200)]
    assert found == ["1 s", "50 s", "12 min", "3 h 10 min", "2 days 4 h"]


def test_a_run_says_how_long_it_takes_once_a_phase(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MEASURED_SECONDS", 1e-9)
    said = []
    config = tiny(stage_two__delegator=False)
    train.train(config, tmp_path, said.append)
    told = [line for line in said if line.startswith("phase ")]
    assert [line.split(":")[0] for line in told] == [f"phase {n} of 3" for n in (1, 2, 3)]
    assert told[0].endswith("(not yet measured, a rough estimate: learn)")
    assert "estimate" not in told[1] + told[2]
