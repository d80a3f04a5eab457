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

from experiments.framework import changes, derived, study
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
SETTINGS: dict[str, dict[str, Any]] = {  # of stage two; factors of the configuration's beta
    "as it is": {},
    "balanced = 0.5": {"balanced": 0.5},
    "balanced = 0.5, beta x 3": {"balanced": 0.5, "beta": 3.0},
    "local cross-entropy, old head fixed, balanced = 1": {
        "classification": "local_old_head_fixed",
        "balanced": 1.0,
    },
}
KINDS = ("pseudo", "real")
MEASURES = ("all", "base", "new", "base taken for new")
NOTE = (
    "Top-1 on base and new classes together, and on each; and how many of the base classes' test "
    "images T_1 takes for new classes. Real images are the base classes' "
    "training images, mirrored at random, with the labels and features that T_0 gives them, as "
    "pseudo images have. The last row trains a T_0 on all these classes. "
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
        run, start = study.learner(DATASET, options.scale, seed, TASKS), _student(options, seed)
        for name, fields in SETTINGS.items():
            what = f"learning the first task of seed {seed}, {name}, beside both kinds of images"
            of = functools.partial(_made_of, options, seed, name)
            path = _path(options, seed, name)
            derived.make(path, of, [start], options, what, learn, run, options, fields)


def learn(
    run: study.Run, options: study.Options, fields: dict[str, Any]
) -> dict[str, dict[str, float]]:
    """What T_1 is worth, by kind of old image: shares, named as in ``MEASURES``."""
    return {kind: _learn(run, options, fields, kind) for kind in KINDS}


def _learn(
    run: study.Run, options: study.Options, fields: dict[str, Any], kind: str
) -> dict[str, float]:
    assert run.start
    _, kept = restore(run.start.folder(options.results))
    config = run.config(options.results, options.data_dir)
    two = config.method.stage_two
    two = dataclasses.replace(two, **_fields(two.beta, fields))
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
    predicted = evaluate.predictions(experiment, kept, 2)
    row = evaluate.accuracy(experiment, predicted)
    base = len(experiment.schedule[0])
    found = (row.top1, *row.accuracies, float(np.mean(predicted[0] >= base)))
    return {name: share for name, share in zip(MEASURES, found, strict=True) if share is not None}


def _with_real_images(experiment: Experiment, kept: KeptDelegator) -> tuple[Any, KeptDelegator]:
    base = experiment.stream.open(0)
    images, _ = base.fetch(np.arange(base.n, dtype=np.int32)[None])
    params = {"images": prepare(experiment.config.data, jnp.asarray(images[0]))}
    real: Any = RealImages(experiment.config.method.delegator.z_dim)
    return real, dataclasses.replace(kept, delegator=Network(params, {}))


def _path(options: study.Options, seed: int, setting: str) -> Path:
    folder = _student(options, seed).folder(options.results).parent.parent
    return folder / f"{NAME}_{changes.folder(setting)}.json"


def _made_of(options: study.Options, seed: int, setting: str) -> list[Any] | None:
    """The T_0, S_0 and settings it is made of."""
    if found := study.summary(_student(options, seed), options):
        settings = study.beyond_defaults(study.learner(DATASET, options.scale, seed, TASKS))
        return [found["accuracy_matrix"], found["delegator"], settings, SETTINGS[setting]]
    return None


def _found(options: study.Options, seed: int, setting: str) -> dict[str, Any] | None:
    return derived.read(_path(options, seed, setting), _made_of(options, seed, setting))


def table(options: study.Options) -> Table:
    """What has been learned."""
    every = {
        (seed, name): _found(options, seed, name) for seed in options.seeds for name in SETTINGS
    }
    shown = [name for name in SETTINGS if any(every[seed, name] for seed in options.seeds)]
    seeds = tuple(  # of which there are all rows that are shown
        seed for seed in options.seeds if shown and all(every[seed, name] for name in shown)
    )
    options = dataclasses.replace(options, seeds=seeds or options.seeds)
    rows = []
    for name in SETTINGS:
        found = [x for seed in options.seeds if (x := every[seed, name])]
        cells: Iterator[Cell] = (
            Cell(tuple(100 * x[kind][measure] for x in found if measure in x[kind]))
            for kind in KINDS
            for measure in MEASURES
        )
        rows.append((name, tuple(cells)))
    joint = study.summaries([_joint(options, seed) for seed in options.seeds], options)
    both = Cell(tuple(100 * s["accuracy_matrix"][0][0] for s in joint))
    no = Cell(applies=False)
    rows.append(("all classes at once", (*(no,) * len(MEASURES), both, no, no, no)))
    columns = tuple(f"{kind} images: {of}, %" for kind in KINDS for of in MEASURES)
    where = source(NAME, options, study.summaries(runs(options), options))
    return Table(TITLE, columns, tuple(rows), where, NOTE + _set(options))


def _set(options: study.Options) -> str:
    """What each row sets, in words."""
    usual = study.learner(DATASET, options.scale, 0, TASKS).config_dict().method.stage_two
    every = {name: _fields(usual.beta, of) for name, of in SETTINGS.items() if of}
    return changes.in_words(
        {n: {f"method.stage_two.{k}": x for k, x in of.items()} for n, of in every.items()}
    )


def _fields(beta: float, fields: dict[str, Any]) -> dict[str, Any]:
    """Those of one of ``SETTINGS``, with beta itself."""
    return {**fields, "beta": fields["beta"] * beta} if "beta" in fields else fields


EXHIBIT = Exhibit(NAME, TITLE, runs, make=make, table=table)

if __name__ == "__main__":
    sys.exit(script(__doc__, EXHIBIT))
