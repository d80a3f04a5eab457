"""What limits the first task: what is replayed, or how it is learned beside the new classes?

python -m experiments.replay --scale=mini --seeds=0

SKD does without old images; here, to find out, T_1 is also trained with real ones in D_0's place,
and from the start on all classes at once. None of it is used by any other result.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.framework import derived, study
from experiments.framework.exhibit import Exhibit
from experiments.framework.making import make_runs
from experiments.framework.scripts import script
from experiments.framework.tables import Cell, Table, source
from skd_jax import evaluate
from skd_jax.data import prepare
from skd_jax.experiment import Experiment, open_experiment
from skd_jax.loop import no_images
from skd_jax.methods.skd.phases import KeptDelegator, stage_two
from skd_jax.state import Network
from skd_jax.stepping import Stepping
from skd_jax.train import restore

NAME = "replay"
TITLE = "The first of five tasks: pseudo images, and real ones in their place"
DATASET, TASKS = "cifar100", 5
SETTINGS: dict[str, dict[str, float]] = {  # of stage two; factors of the configuration's beta
    "as it is": {},
    "balanced = 0.5": {"balanced": 0.5},
    "balanced = 0.5, beta x 3": {"balanced": 0.5, "beta": 3.0},
}
KINDS = ("pseudo", "real")
NOTE = (
    "Top-1 on base and new classes together, and on each. Real images are the base classes' "
    "training images, mirrored at random, with the labels and features that T_0 gives them, as "
    "pseudo images have. The last row trains a T_0 on all these classes."
)


class RealImages(nn.Module):
    """Draws real images in a delegator's place: a z picks one, and whether it is mirrored.

    Attributes:
      z_dim: as a delegator's.
      axis_name: as a delegator's; not used.
    """

    z_dim: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, z: jax.Array, train: bool) -> jax.Array:
        """The images [B, S, S, C] that z [B, z_dim] picks among the params ``images``."""
        del train
        images: Any = self.get_variable("params", "images")
        share = jax.scipy.stats.norm.cdf(z[:, 0])
        index = jnp.clip((share * len(images)).astype(jnp.int32), 0, len(images) - 1)
        picked = images[index]
        return jnp.where(z[:, 1, None, None, None] > 0, picked[:, :, ::-1], picked)


def _student(options: study.Options, seed: int) -> study.Run:
    return study.student(DATASET, options.scale, seed)


def _joint(options: study.Options, seed: int) -> study.Run:
    """T_0's training on the base and the first task's classes."""
    data = study.learner(DATASET, options.scale, seed, TASKS).config_dict().data
    total = data.max_classes or 100
    classes = data.base_classes + (total - data.base_classes) // TASKS
    fields = (("data.base_classes", classes),)
    return study.Run(DATASET, options.scale, seed, "replay/joint", "tasks=1", fields, 1)


def runs(options: study.Options) -> list[study.Run]:
    """The runs that it begins with."""
    return [run(options, seed) for seed in options.seeds for run in (_student, _joint)]


def make(options: study.Options) -> None:
    """Makes the runs that are missing, and learns the first task in every way."""
    make_runs(runs(options), options)
    for seed in options.seeds:
        what = f"learning the first task of seed {seed} in {len(SETTINGS) * len(KINDS)} ways"
        of = functools.partial(_made_of, options, seed)
        run = study.learner(DATASET, options.scale, seed, TASKS)
        start = _student(options, seed)
        derived.make(_path(options, seed), of, [start], options, what, learn_all, run, options)


def learn_all(run: study.Run, options: study.Options) -> dict[str, dict[str, list[float]]]:
    """Accuracies on base classes, new classes and both, by setting and kind of old image."""
    return {
        name: {kind: _learn(run, options, changes, kind) for kind in KINDS}
        for name, changes in SETTINGS.items()
    }


def _learn(
    run: study.Run, options: study.Options, changes: dict[str, float], kind: str
) -> list[float]:
    assert run.start
    _, kept = restore(run.start.folder(options.results))
    config = run.config(options.results, options.data_dir)
    two = config.method.stage_two
    two = dataclasses.replace(two, **{**changes, "beta": changes.get("beta", 1.0) * two.beta})
    method = dataclasses.replace(config.method, stage_two=two)
    experiment = open_experiment(dataclasses.replace(config, method=method))
    module = None
    if kind == "real":
        module, kept = _with_real_images(experiment, kept)
    phase = stage_two(experiment.setting, 1, module)
    state, length = phase.init(kept), 25
    stepping = Stepping(phase, experiment.setting, None, experiment.stream.open(1), length)
    for start in range(0, phase.steps, length):
        state, _ = stepping(state, kept, start, min(start + length, phase.steps))
    kept = phase.finish(state, kept, no_images)
    row = evaluate.accuracy(experiment, evaluate.predictions(experiment, kept, 2))
    return [accuracy or 0.0 for accuracy in (*row.accuracies, row.top1)]


def _with_real_images(experiment: Experiment, kept: KeptDelegator) -> tuple[Any, KeptDelegator]:
    base = experiment.stream.open(0)
    images, _ = base.fetch(np.arange(base.n, dtype=np.int32)[None])
    params = {"images": prepare(experiment.config.data, jnp.asarray(images[0]))}
    real: Any = RealImages(experiment.config.method.delegator.z_dim)
    return real, dataclasses.replace(kept, delegator=Network(params, {}))


def _path(options: study.Options, seed: int) -> Path:
    return _student(options, seed).folder(options.results).parent.parent / f"{NAME}.json"


def _made_of(options: study.Options, seed: int) -> list[Any] | None:
    """The T_0, S_0 and settings it is made of."""
    if found := study.summary(_student(options, seed), options):
        settings = study.beyond_defaults(study.learner(DATASET, options.scale, seed, TASKS))
        return [found["accuracy_matrix"], found["delegator"], settings, SETTINGS]
    return None


def _found(options: study.Options, seed: int) -> dict[str, Any] | None:
    return derived.read(_path(options, seed), _made_of(options, seed))


def table(options: study.Options) -> Table:
    """What has been learned."""
    seeds = tuple(seed for seed in options.seeds if _found(options, seed))
    options = dataclasses.replace(options, seeds=seeds or options.seeds)
    found = [x for seed in seeds if (x := _found(options, seed))]
    rows = []
    for name in SETTINGS:
        cells: Iterator[Cell] = (
            Cell(tuple(100 * x[name][kind][which] for x in found))
            for kind in KINDS
            for which in (2, 0, 1)
        )
        rows.append((name, tuple(cells)))
    joint = study.summaries([_joint(options, seed) for seed in options.seeds], options)
    both = Cell(tuple(100 * s["accuracy_matrix"][0][0] for s in joint))
    no = Cell(applies=False)
    rows.append(("all classes at once", (no, no, no, both, no, no)))
    columns = tuple(f"{kind} images: {of}, %" for kind in KINDS for of in ("all", "base", "new"))
    where = source(NAME, options.scale, study.summaries(runs(options), options))
    return Table(TITLE, columns, tuple(rows), where, NOTE)


EXHIBIT = Exhibit(NAME, TITLE, runs, make=make, table=table)

if __name__ == "__main__":
    sys.exit(script(__doc__, EXHIBIT))
