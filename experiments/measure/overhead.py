r"""What guarding and saving cost, as a share of the steps between two saves.

    python -m experiments.measure.overhead --config=digits --out=experiments/results/overhead

Two compiled programs of the same steps, one with the check that leaves out a step that is not
finite and one without, run in turns in this process, so that what else the machine does falls on
both alike; medians are compared. A save is timed until training may go on (is all finite, digests,
the copy that Orbax takes) and until it lies on the disk, which goes on beside training; both count
here against the default interval, ``config.run.checkpoint_every``.
"""

import argparse
import functools
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import jax
import numpy as np

from experiments.framework.scripts import exit_code
from experiments.measure.full_scale import MockSource
from skd_jax import steps
from skd_jax.checkpoint import Checkpoints
from skd_jax.compiler import Compiled
from skd_jax.evaluate import device_description
from skd_jax.experiment import open_experiment
from skd_jax.loop import all_finite, no_images
from skd_jax.methods import from_config_dict, method_of
from skd_jax.methods.phase import Phase
from skd_jax.methods.skd import steps as skd_steps
from skd_jax.paths import given_path
from skd_jax.stepping import Stepping

STATIC = ("step", "static", "nets", "data", "reads", "draws", "mesh")
GUARDING: tuple[Any, ...] = (steps, skd_steps)  # the modules whose steps check


def unguarded() -> Compiled:
    """The compiled steps, traced without their check."""
    function: Any = getattr(steps.advance, "__wrapped__")  # noqa: B009

    @functools.wraps(function)
    def without(*args: Any, **kwargs: Any) -> Any:
        real = steps.guard
        for module in GUARDING:
            module.guard = lambda new, old, metrics: (new, {**metrics, "skipped": np.float32(0)})
        try:
            return function(*args, **kwargs)
        finally:
            for module in GUARDING:
                module.guard = real

    return Compiled(without, static_argnames=STATIC, donate_argnames="state")


def seconds(work: Callable[[], Any]) -> float:
    since = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - since


def guard(phase: Phase, stepping: Stepping, kept: Any, turns: int, count: int) -> dict[str, float]:
    """Median seconds of a step with the check and without."""
    programs = {"guarded": steps.advance, "unguarded": unguarded()}
    taken: dict[str, list[float]] = {key: [] for key in programs}
    states = {key: phase.init(kept) for key in programs}
    for turn in range(turns + 1):
        for key, program in programs.items():
            steps.advance = program

            def work(key: str = key) -> Any:
                metrics = None
                for step in range(count):
                    states[key], metrics = stepping(states[key], kept, step, step + 1)
                return metrics

            spent = seconds(work) / count
            if turn:  # the first compiles
                taken[key].append(spent)
        steps.advance = programs["guarded"]
    found = {key: statistics.median(values) for key, values in taken.items()}
    # Neighbours in time share what else the machine does: the median of their ratios.
    pairs = zip(taken["guarded"], taken["unguarded"], strict=True)
    return found | {"share": statistics.median(a / b for a, b in pairs) - 1}


def save(state: Any, kept: Any, meta: dict, turns: int) -> dict[str, float]:
    """Median seconds of a save: that training waits, and until it is written."""
    waits, writes = [], []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(folder, 2) as checkpoints:
        for step in range(1, turns + 2):
            # Copies: JAX remembers what it has fetched from a device.
            arrays = jax.tree.map(jax.numpy.copy, {"kept": kept, "state": state})
            since = time.perf_counter()
            assert all_finite(arrays)
            checkpoints.save(step, arrays, meta)
            waits.append(time.perf_counter() - since)
            checkpoints.wait()
            writes.append(time.perf_counter() - since)
    return {"waits": statistics.median(waits[1:]), "written": statistics.median(writes[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description="What guarding and saving cost.")
    parser.add_argument("--config", default="digits", help="a module of configs/")
    parser.add_argument(
        "--out", type=given_path, default="runs/overhead", help="folder of the report"
    )
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--count", type=int, default=10, help="steps a turn")
    arguments = parser.parse_args()
    fields = importlib.import_module(f"configs.{arguments.config}").get_config()
    config = from_config_dict(fields)
    source = None if config.data.name == "digits" else MockSource(config)
    experiment = open_experiment(config, source)
    every, kept, rows = config.run.checkpoint_every, method_of(config).kept(), {}
    meta = {"data": experiment.data(), "measured": {}, "window": {}, "phase": 1, "step": 1}
    for phase in experiment.phases[:3]:
        images = experiment.stream.open(phase.task) if phase.reads != "nothing" else None
        stepping = Stepping(phase, experiment.setting, experiment.mesh, images)
        row = guard(phase, stepping, kept, arguments.turns, arguments.count)
        state = phase.init(kept)
        row |= save(state, kept, meta, arguments.turns)
        row["saving_share"] = row["written"] / (every * row["guarded"])
        rows[phase.name] = row
        kept = phase.finish(state, kept, no_images)
        print(f"{phase.name}: {json.dumps(row)}", flush=True)
    report = {
        "config": arguments.config,
        "device": device_description(),
        "date": date.today().isoformat(),
        "turns": arguments.turns,
        "steps_a_turn": arguments.count,
        "checkpoint_every": every,
        "phases": rows,
    }
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{arguments.config}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
