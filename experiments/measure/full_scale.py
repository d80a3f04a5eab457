r"""A benchmark at the paper's own size: a few steps of each kind on the real images, timed.

    python -m experiments.measure.full_scale --config=configs/caltech101.py \
        --workdir=runs/full_scale --config.data.data_dir=DIR

Runs supervised steps, rounds of stage one and CIL steps at the configured network, image size and
batch, checks that every loss is finite, and writes seconds a step, compile seconds and memory to
``WORKDIR/NAME_BATCH.json``. A round that needs more memory than there is, by XLA's own account, is
compiled but not run. ``--mock`` takes random images where the data set is not at hand (ImageNet).
"""

import dataclasses
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from skd_jax import steps
from skd_jax.config import Config
from skd_jax.evaluate import device_description
from skd_jax.experiment import open_experiment
from skd_jax.loop import no_images
from skd_jax.main import command
from skd_jax.methods import method_of
from skd_jax.stepping import Stepping

COUNT = flags.DEFINE_integer("count", 2, "Timed steps of each kind, after the first.")
MOCK = flags.DEFINE_bool("mock", False, "Random images instead of the data set.")
GIB = 2**30
DYNAMIC = 6  # the first argument of steps.advance that is not static


class MockSource:
    """Random images, as many as fill a batch: 1,000 classes to choose a subset of, or 100."""

    def __init__(self, config: Config):
        data = config.data
        classes = 1000 if data.subset else data.base_classes + 10 * data.tasks
        names = (f"class {i}" for i in range(classes))
        self.class_names = (*data.exclude_classes, *names)
        self._shape = (data.load_size, data.load_size, data.channels)
        a_task = ((data.subset or classes) - data.base_classes) // data.tasks
        base = -(-config.base.batch // data.base_classes)
        self._each = max(base, -(-config.method.stage_two.batch // a_task)) + 1

    def labels(self, split: str) -> np.ndarray:
        del split
        return np.repeat(np.arange(len(self.class_names), dtype=np.int32), self._each)

    def read(self, split: str, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        del split
        generator = np.random.RandomState(int(indices[0]))
        return generator.randint(0, 256, (len(indices), *self._shape)).astype(np.uint8)

    def forget(self, indices: Sequence[int] | np.ndarray) -> None:
        pass


def measure(config: Config, workdir: str) -> None:
    """Measures the three kinds of step and writes the report."""
    jax.config.update("jax_enable_compilation_cache", False)  # so that compiling is timed
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, devices=1))
    experiment = open_experiment(config, MockSource(config) if MOCK.value else None)
    stream, (base, delegator, learn) = experiment.stream, experiment.phases[:3]
    report: dict[str, Any] = {
        "dataset": "mocked " * MOCK.value + config.data.name,
        "network": f"{config.model.family} ResNet-{config.model.depth}",
        "image_size": config.data.image_size,
        "pseudo_batch": config.method.stage_one.batch,
        "new_batch": config.method.stage_two.batch,
        "device": device_description(),
        "date": date.today().isoformat(),
    }

    setting, kept = experiment.setting, method_of(config).kept()
    supervised = Stepping(base, setting, None, stream.open(0))
    report["supervised"] = timed(lambda s, i: supervised(s, kept, i, i + 1), base.init(kept))
    kept = base.finish(base.init(kept), kept, no_images)

    rounds = Stepping(delegator, setting, None, None)
    report["round"] = round_report(rounds, kept, delegator.init(kept))
    kept = delegator.finish(delegator.init(kept), kept, no_images)
    gc.collect()

    cil = Stepping(learn, setting, None, stream.open(1))
    report["cil"] = timed(lambda s, i: cil(s, kept, i, i + 1), learn.init(kept))
    report["peak_memory_gib"] = peak_memory() / GIB

    Path(workdir).mkdir(parents=True, exist_ok=True)
    name = f"{config.data.name}_{config.method.stage_one.batch}.json"
    text = json.dumps(report, indent=2)
    (Path(workdir) / name).write_text(text + "\n")
    print(text)


def peak_memory() -> int:
    """The most bytes used so far: of the accelerator, or of this process on a CPU."""
    if jax.default_backend() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"]


def round_report(rounds: Stepping, kept: Any, state: Any) -> dict[str, Any]:
    """Compiles a round, and times it if it fits in memory."""
    since = time.perf_counter()
    lowered = steps.advance.jitted.lower(*rounds.arguments(state, kept, 0, 1))
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - since
    analysis = compiled.memory_analysis()
    needs = analysis.temp_size_in_bytes if analysis else 0
    found: dict[str, Any] = {"compile_seconds": compile_seconds, "temporaries_gib": needs / GIB}
    has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if jax.default_backend() == "cpu" and needs > 0.95 * has:
        return found | {"not_run": f"needs more than the machine's {has / GIB:.0f} GiB"}

    def call(state: Any, i: int) -> Any:
        return compiled(*rounds.arguments(state, kept, i, i + 1)[DYNAMIC:])

    return found | timed(call, state)


def timed(call: Callable[[Any, int], tuple[Any, dict]], state: Any) -> dict[str, Any]:
    """Seconds of the first call and of each later one, and the last losses."""
    seconds, losses = [], {}
    for i in range(COUNT.value + 1):
        since = time.perf_counter()
        state, metrics = jax.block_until_ready(call(state, i))
        seconds.append(time.perf_counter() - since)
        losses = {name: float(value[-1]) for name, value in metrics.items() if value.ndim == 1}
        bad = [name for name, value in losses.items() if not np.isfinite(value)]
        if bad:
            raise FloatingPointError(f"{bad} not finite at step {i}")
    return {"first_seconds": seconds[0], "seconds": float(np.min(seconds[1:])), "losses": losses}


if __name__ == "__main__":
    sys.exit(command(measure))
