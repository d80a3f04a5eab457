"""How a run is cut into compiled calls: bounded by time, and without a bearing on the result."""

import dataclasses
import os
import signal
import time

import jax
import numpy as np
import pytest
from test_train import at_row, bits, finished_run, newest, rows, silent, tiny

from skd_jax import experiment, loop, parallel, steps, train
from skd_jax.calls import AHEAD, Calls
from skd_jax.compiler import compiling_for
from skd_jax.errors import Interrupted
from skd_jax.experiment import open_experiment
from skd_jax.methods import method_of
from skd_jax.stepping import Stepping


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The whole run that other modules look at too."""
    return finished_run(tmp_path_factory)


def test_streamed_images_give_what_images_in_memory_give(finished, tmp_path):
    config = tiny(data__in_memory=False)
    train.train(config, tmp_path, silent)
    here, there = rows(tmp_path, ("time",)), rows(finished.workdir, ("time",))
    assert here == there
    carry, carry_ = newest(config, tmp_path)[1], newest(finished.config, finished.workdir)[1]
    assert bits(carry) == bits(carry_)


class Device:
    """A clock, and a device that takes so many seconds a step and works off what it is given."""

    def __init__(self, seconds: float):
        self.seconds, self.now, self.free = seconds, 0.0, 0.0

    def call(self, count: int):
        self.free = max(self.now, self.free) + count * self.seconds
        return None, Result(self, self.free)


class Result:
    def __init__(self, device: Device, ends: float):
        self.device, self.ends = device, ends

    def block_until_ready(self) -> None:
        self.device.now = max(self.device.now, self.ends)


@pytest.mark.parametrize(
    ("seconds", "length"), [(0.001, 25), (0.019, 25), (0.1, 5), (0.4, 1), (0.6, 1), (20.0, 1)]
)
def test_what_is_under_way_takes_a_second_or_a_step(seconds, length):
    device, ended, step, left = Device(seconds), [], 0, []
    calls = Calls(25, ended.append, lambda: device.now)
    for _ in range(40):
        count = calls.length
        calls.begin(lambda count=count: device.call(count), step + count)
        step += count
        left.append(device.free - device.now)  # a signal is looked at now
    assert calls.length == length
    assert max(left) <= max(1.0, seconds)
    busy = device.free - step * seconds  # what the device has waited
    assert busy == pytest.approx(0)
    assert ended == sorted(ended) and ended[-1] >= step - AHEAD * length
    calls.wait()
    assert ended[-1] == step and device.now == device.free


@pytest.mark.parametrize("slow_calls", [(2,), (3, 4)])
def test_one_slow_call_does_not_decide(slow_calls):
    """Something else may have had the machine meanwhile."""
    device, step = Device(0.01), 0
    calls = Calls(25, clock=lambda: device.now)
    for number in range(1, 7):
        device.seconds = 3.0 if number in slow_calls else 0.01
        count = calls.length
        calls.begin(lambda count=count: device.call(count), step + count)
        step += count
    assert calls.length == 25


@pytest.mark.parametrize(("before", "after"), [(0.01, 0.1), (0.6, 0.02)])
def test_steps_are_measured_again(before, after):
    device, step, lengths = Device(before), 0, []
    calls = Calls(25, clock=lambda: device.now)
    for _ in range(520):
        count = calls.length
        calls.begin(lambda count=count: device.call(count), step + count)
        step += count
        lengths.append(calls.length)
        if len(lengths) == 10:
            device.seconds = after
    assert lengths[10] == max(1, min(25, int(0.5 / before)))
    assert lengths[-1] == pytest.approx(0.5 / after, abs=1)


def test_a_calls_images_are_bounded(monkeypatch):
    config = tiny(run__log_every=50, run__checkpoint_every=100)
    base, delegator = open_experiment(config).phases[:2]
    assert loop.steps_per_call(config, base) == 1
    with compiling_for("cuda"):
        assert loop.steps_per_call(config) == loop.steps_per_call(config, base) == 25
        batch = base.batch * config.data.load_size**2 * config.data.channels
        monkeypatch.setattr(loop, "CALL_BYTES", 3 * batch + 1)
        assert loop.steps_per_call(config, base) == 3
        monkeypatch.setattr(loop, "CALL_BYTES", batch - 1)
        assert loop.steps_per_call(config, base) == 1
        assert loop.steps_per_call(config, delegator) == 25  # it reads none
        given = tiny(run__log_every=5, run__checkpoint_every=4, run__steps_per_call=9)
        assert loop.steps_per_call(given, base) == 4


@pytest.mark.parametrize(("seconds", "more"), [(0.02, AHEAD + 1), (0.6, 0)])
def test_a_signal_is_answered_within_a_step(tmp_path, monkeypatch, seconds, more):
    """It comes in the middle of step 5; up to 30 more were made once."""
    made = []

    def work(x):
        time.sleep(seconds)
        made.append(None)
        if len(made) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return x

    zero = np.zeros(1, np.float32)
    slow = jax.jit(lambda x: jax.pure_callback(work, zero, x))

    def stepping(*_):
        return lambda state, *_: (state, {"classification": slow(zero), "skipped": zero})

    monkeypatch.setattr(loop, "Stepping", stepping)
    with pytest.raises(Interrupted, match="stopped at task 0, base"):
        train.train(tiny(base__epochs=20, run__checkpoint_every=50), tmp_path, silent)
    assert 5 <= len(made) <= 5 + more


def test_what_a_phase_does_at_its_end_is_of_its_own_time(tmp_path, monkeypatch):
    """As the heads that are solved then, of ridge, FeTrIL and others; not of the evaluation's.

    And once, where the evaluation is ended by Ctrl-C, after which the phase ends again.
    """
    planned, clock, later = experiment.planned, time.perf_counter, []

    def slow(phase):
        def finish(*given):
            later.append(1000.0)
            if len(later) == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return phase.finish(*given)

        return dataclasses.replace(phase, finish=finish)

    def stepping(*_):
        zero = np.zeros(1, np.float32)
        return lambda state, *_: (state, {"classification": zero, "skipped": zero})

    monkeypatch.setattr(experiment, "planned", lambda s: [slow(p) for p in planned(s)])
    monkeypatch.setattr(loop, "Stepping", stepping)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(later))
    config = tiny(base__epochs=1, run__phases=1)
    with pytest.raises(Interrupted):
        train.train(config, tmp_path, silent)
    seconds = train.train(config, tmp_path, silent)["seconds"]
    assert len(later) == 2 and 2000 > seconds["base"] > 1000 > seconds["evaluate"] > 0


@pytest.mark.parametrize("phase", [0, 1])
def test_one_program_makes_calls_of_any_length_to_the_same_bits(phase):
    opened = open_experiment(tiny())
    kept, found = method_of(opened.config).kept(), []
    if phase:
        base = opened.phases[0]
        kept = base.finish(base.init(kept), kept, loop.no_images)
    phase = opened.phases[phase]
    before = steps.advance.jitted._cache_size()
    with opened.opened(phase, kept) as images:
        stepping = Stepping(phase, opened.setting, None, images, 4)
        for ends in ((1, 4), (2, 4), (4,), (3, 4)):
            state, start = parallel.replicate(None, phase.init(kept)), 0
            metrics = []
            for end in ends:
                state, values = stepping(state, kept, start, end)
                metrics.append({name: x[: end - start] for name, x in values.items()})
                start = end
            whole = jax.tree.map(lambda *x: np.concatenate(x), *metrics)
            found.append(bits((state, whole)))
    assert all(one == found[0] for one in found)
    assert steps.advance.jitted._cache_size() == before + 1
    with pytest.raises(ValueError, match="5 steps, not of 1 to 4"):
        stepping(state, kept, 0, 5)


def test_a_step_is_traced_once_even_one_of_integers_alone():
    traced = []

    def step(static, nets, state, kept, batch, key, rates):
        traced.append(None)
        return state + 1, {"before": state}

    setting = open_experiment(tiny()).setting
    static = (step, None, setting.nets, setting.config.data, "nothing", False)
    numbers = np.arange(4, dtype=np.int32)
    rest = (jax.random.key(0), numbers, np.ones(4, np.float32), np.int32(3))
    state, metrics = steps.advance(*static, np.int32(0), None, None, *rest)
    assert state == 3 and metrics["before"].tolist() == [0, 1, 2, 0]
    assert metrics["skipped"].tolist() == [0, 0, 0, 0]
    assert len(traced) == 1


@pytest.mark.slow
def test_an_interrupted_run_of_several_steps_a_call_ends_the_same_to_the_bit(tmp_path):
    config = tiny(run__steps_per_call=2, run__log_every=2, run__checkpoint_every=2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.train(config, whole, silent)
    with at_row(10):
        train.train(config, cut, silent)
    train.train(config, cut, silent)
    assert rows(whole, ("time",)) == rows(cut, ("time",))
    assert bits(newest(config, whole)[1]) == bits(newest(config, cut)[1])
