r"""Ends a ResNet-18 run by Ctrl-C at random moments, and measures how long it takes to answer.

    python -m experiments.measure.interrupts --count=20 --out=experiments/results/interrupts

The run is one on an image folder (random images, ten classes) on a terminal, with steps of seconds.
It is told to stop in T_0's training, in the delegator's rounds and in the learning of the new
classes, started again with the same command, and has to go on where it stopped. Moments are drawn
from within a step or two of one that has ended; what is being compiled is finished first.

Then what it costs that few calls are under way: the same steps with all calls handed to the device
at once, in turns in this process, so that what else the machine does falls on both alike.
"""

import argparse
import functools
import itertools
import json
import os
import pty
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from configs import digits, folder
from experiments.framework.scripts import exit_code
from skd_jax.calls import Calls
from skd_jax.evaluate import device_description
from skd_jax.experiment import open_experiment
from skd_jax.loop import no_images
from skd_jax.methods import from_config_dict, method_of
from skd_jax.methods.phase import Phase
from skd_jax.paths import given_path
from skd_jax.stepping import Stepping

PHASES = ("base", "delegator", "learn")
ARGUMENT = "base_classes=6"
FIELDS = {
    "data.image_size": 64,
    "data.load_size": 64,
    "base.epochs": 12,
    "base.drop_epochs": (),
    "base.batch": 16,
    "method.stage_one.batch": 8,
    "method.stage_one.imitate_steps": 1,
    "method.stage_one.epochs": 1,
    "method.stage_one.rounds_per_epoch": 40,
    "method.stage_two.batch": 16,
    "method.stage_two.epochs": 12,
    "method.stage_two.drop_epochs": (),
    "run.pseudo_images": 0,
    "run.quality_images": 0,
}
_BAR = re.compile(r"task \d+ (\w+): +\d+%\|[^|\r\n]*\| (\d+)/\d+ ")


def images(where: Path) -> None:
    """Ten classes of 24 random images of 64 pixels; a fifth of them is for testing."""
    draw = np.random.default_rng(0)
    for name in map(str, range(10)):
        (where / name).mkdir(parents=True)
        for number in range(24):
            pixels = draw.integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(where / name / f"{number}.png")


class Started:
    """A run in a process and on a terminal of its own, and what it shows there."""

    def __init__(self, flags: list[str]):
        self.said = ""
        self.steps: list[tuple[str, int, float]] = []  # phase, number, and when it was shown
        ours, its = pty.openpty()
        command = [sys.executable, "-m", "skd_jax.main", *flags]
        self.process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its)
        os.close(its)
        self._reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self._reader.start()

    def _read(self, terminal: int) -> None:
        try:
            while found := os.read(terminal, 4096):
                self.said += found.decode(errors="replace")
                for phase, step in _BAR.findall(self.said[-400:])[-1:]:
                    if not self.steps or self.steps[-1][:2] != (phase, int(step)):
                        self.steps.append((phase, int(step), time.perf_counter()))
        except OSError:  # how a terminal ends whose other side is closed
            pass
        finally:
            os.close(terminal)

    def ended(self) -> int:
        """Waits for its end; its exit code."""
        code = self.process.wait()
        self._reader.join(10)
        return code

    def lengths(self, phase: str) -> list[float]:
        """Seconds from one step's end to the next one's."""
        seen = [(step, when) for name, step, when in self.steps if name == phase][1:]
        pairs = itertools.pairwise(seen)
        return [(when - before) / (step - last) for (last, before), (step, when) in pairs]


def interrupt(flags: list[str], phase: str, draw: random.Random, went_on: str) -> dict[str, Any]:
    """Starts, or goes on with, a run, and stops it in a phase.

    Args:
      flags: of the run.
      phase: in which it is stopped.
      draw: of the moment.
      went_on: where it has to go on; "" if it begins.

    Returns:
      Seconds from the signal until the step was saved and said, and until the process had ended;
      the lengths of the steps that it showed; and where it stopped.

    Raises:
      AssertionError: it did not go on, or not stop, as it should.
    """
    run = Started(flags)
    while sum(name == phase for name, *_ in run.steps) < 3:  # the state it begins with, two steps
        assert run.process.poll() is None, run.said
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 2) * run.lengths(phase)[-1])
    since, before = time.perf_counter(), len(run.said)
    run.process.send_signal(signal.SIGINT)
    while "stopped at" not in run.said[before:] and run.process.poll() is None:
        time.sleep(0.005)
    saved = time.perf_counter() - since
    code = run.ended()
    ended = time.perf_counter() - since
    assert code == 130, run.said
    assert not went_on or f"going on at {went_on}" in run.said, run.said
    where = re.search(r"stopped at (.*?), which is saved", run.said[before:])
    assert where, run.said
    steps = run.lengths(phase)
    return {"phase": phase, "saved": saved, "ended": ended, "steps": steps, "at": where[1]}


class Unbounded(Calls):
    """As many calls under way as there are."""

    def begin(self, call: Callable[[], tuple[Any, Any]], stop: int) -> tuple[Any, Any]:
        """Begins a call, and waits for none."""
        state, metrics = call()
        self._under_way.append((stop, metrics))
        return state, metrics


def beside(phase: Phase, stepping: Stepping, kept: Any, turns: int, seconds: float) -> dict:
    """Median seconds of a step with few calls under way and with all of them, and their ratio.

    Args:
      phase: whose steps they are.
      stepping: makes them.
      kept: from earlier phases.
      turns: of each, after two that compile and say how many steps make a turn.
      seconds: of one turn, about.
    """
    kinds = {"bounded": Calls(1), "unbounded": Unbounded(1)}
    taken: dict[str, list[float]] = {name: [] for name in kinds}
    states = {name: phase.init(kept) for name in kinds}
    count = 2
    for turn in range(turns + 2):
        for name, calls in kinds.items():
            since = time.perf_counter()
            for step in range(count):

                def call(name: str = name, step: int = step) -> tuple[Any, Any]:
                    return stepping(states[name], kept, step, step + 1)

                states[name], _ = calls.begin(call, step + 1)
            calls.wait()
            if turn > 1:
                taken[name].append((time.perf_counter() - since) / count)
            elif turn and name == "unbounded":
                count = max(2, int(seconds * count / (time.perf_counter() - since)))
    # Neighbours in time share what else the machine does: the median of their ratios.
    pairs = zip(taken["bounded"], taken["unbounded"], strict=True)
    ratio = statistics.median(one / other for one, other in pairs)
    return {name: statistics.median(x) for name, x in taken.items()} | {"ratio": ratio}


def throughput(fields: Any, turns: int, seconds: float) -> dict[str, dict[str, float]]:
    """What :func:`beside` finds for each phase of a configuration, with T_0 and D_0 untrained."""
    config = from_config_dict(fields)
    experiment = open_experiment(config)
    kept, found = method_of(config).kept(), {}
    for phase in experiment.phases[: len(PHASES)]:
        with experiment.opened(phase, kept) as task_images:
            stepping = Stepping(phase, experiment.setting, experiment.mesh, task_images)
            found[phase.name] = beside(phase, stepping, kept, turns, seconds)
            print(f"{phase.name}: {json.dumps(found[phase.name])}", flush=True)
        kept = phase.finish(phase.init(kept), kept, no_images)
    return found


def stops(flags: list[str], count: int, draw: random.Random) -> list[dict[str, Any]]:
    """Interrupts a run ``count`` times, as many in each phase, and lets it come to its end."""
    found: list[dict[str, Any]] = []
    for number in range(count):
        phase = PHASES[number * len(PHASES) // count]
        found.append(interrupt(flags, phase, draw, found[-1]["at"] if found else ""))
        print(json.dumps(found[-1]), flush=True)
    last = Started(flags)
    assert last.ended() == 0 and f"going on at {found[-1]['at']}" in last.said, last.said
    return found


def of_stops(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What :func:`stops` found, in few numbers and in all."""
    steps = {p: [x for row in found if row["phase"] == p for x in row["steps"]] for p in PHASES}
    return {
        "longest": {key: max(row[key] for row in found) for key in ("saved", "ended")},
        "median_step": {phase: statistics.median(x) for phase, x in steps.items() if x},
        "interrupts": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Times how soon a run answers Ctrl-C.")
    parser.add_argument(
        "--out", type=given_path, default="runs/interrupts", help="folder of the report"
    )
    add = functools.partial(parser.add_argument, type=int)
    add("--count", default=20, help="interrupts (%(default)s)")
    add("--turns", default=5, help="of the throughput, each way (%(default)s)")
    add("--seed", default=1, help="of the moments (%(default)s)")
    arguments = parser.parse_args()
    about = {"device": device_description(), "date": date.today().isoformat()}
    arguments.out.mkdir(parents=True, exist_ok=True)

    def write(name: str, found: dict[str, Any]) -> None:
        text = json.dumps({**about, "load": os.getloadavg()[1], **found}, indent=2)
        (arguments.out / f"{name}.json").write_text(text + "\n")

    with tempfile.TemporaryDirectory(prefix="skd_jax_interrupts_") as name:
        data, workdir = Path(name, "images"), Path(name, "run")
        images(data)
        settings = {**FIELDS, "data.data_dir": str(data)}
        if arguments.count:
            flags = [f"--config=configs/folder.py:{ARGUMENT}", f"--workdir={workdir}"]
            flags += [f"--config.{field}={value}" for field, value in settings.items()]
            found = stops(flags, arguments.count, random.Random(arguments.seed))
            write("stops", {"seed": arguments.seed, **of_stops(found)})
        if arguments.turns:
            rates = {"digits": throughput(digits.get_config(), arguments.turns, 3.0)}
            fields = folder.get_config(ARGUMENT)
            fields.update_from_flattened_dict(settings)
            rates["resnet18"] = throughput(fields, arguments.turns, 3.0)
            write("throughput", rates)


if __name__ == "__main__":
    sys.exit(exit_code(main))
