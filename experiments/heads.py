"""What the features that a run ends with would allow: other heads, learned on real images of all.

python -m experiments.heads --scale=midi --seeds=1

It trains no network and no run: it takes T_0, and those runs over five tasks whose checkpoints are
there. No method may have such a head, which needs the old classes' images; it says how much of what
a method lacks lies in its features, and how much in how they are read.
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.framework import chosen, derived, study
from experiments.framework.comparison import by_family
from experiments.framework.exhibit import Exhibit
from experiments.framework.making import is_over
from experiments.framework.scripts import script
from experiments.framework.tables import Cell, Table, source
from skd_jax import evaluate, steps
from skd_jax.data import prepare
from skd_jax.experiment import Experiment, open_experiment
from skd_jax.methods import from_config_dict, phases
from skd_jax.state import Network
from skd_jax.train import restore

NAME = "heads"
TITLE = "After five tasks: what other heads would make of the same features"
DATASET, TASKS = "cifar100", 5
T_0 = "T_0"
LEARNED: dict[str, Callable[[], Any]] = {  # on the features of real training images of all classes
    "LDA": LinearDiscriminantAnalysis,
    "linear head": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
}
OWN = "its own answers"
HEADS = (OWN, *LEARNED)
MEASURES = ("all", "base", "new")
NOTE = (
    "Top-1 on the test images of all classes, of the base classes and of all later ones. Its own "
    "answers are the method's. LDA has the means of all classes and their covariance, the linear "
    "head is a multinomial logistic regression (scikit-learn's, C = 1), both on the features of "
    "all training images of all classes, old and new, which no method has. Features are those of "
    "the last T_n, or T_0's; methods that classify on T_0's features are not rows. Only runs whose "
    "checkpoints were there could be looked at."
)


def runs(options: study.Options) -> list[study.Run]:
    """Those that it begins with; other methods' are taken where they are."""
    every = _by_name(options)
    return [*every[T_0], *every["skd"]]


def _by_name(options: study.Options) -> dict[str, list[study.Run]]:
    """T_0, and each method that trains its features: a run a seed."""
    found = {T_0: [study.base(DATASET, options.scale, seed) for seed in options.seeds]}
    for name in by_family():
        if study.compared()[name].family != "frozen features":
            fields = chosen.fields(DATASET, TASKS, name, options)
            of = functools.partial(study.method, DATASET, options.scale)
            found[name] = [of(seed, TASKS, name, fields) for seed in options.seeds]
    return found


def make(options: study.Options) -> None:
    """Learns the heads of the runs whose checkpoints are there."""
    if options.dry_run:  # it makes no run
        return
    for name, some in _by_name(options).items():
        for run in some:
            if is_over(run, options):
                what = f"learning other heads on the features of {name}, seed {run.seed}"
                made_of = functools.partial(_made_of, run, options)
                path = _path(run, name, options)
                derived.make(path, made_of, [run], options, what, learn, run, options)


def learn(run: study.Run, options: study.Options) -> dict[str, dict[str, float]]:
    """The accuracies of a run's own answers and of each head: shares, named as in ``MEASURES``."""
    _, found = restore(run.folder(options.results))
    experiment = open_experiment(run.config(options.results, options.data_dir))
    tasks = range(len(experiment.schedule))
    tests = [experiment.test.task(task) for task in tasks]
    labels = np.concatenate([of for _, of in tests])
    train = [_training_images(experiment, task) for task in tasks]
    classes = np.concatenate([of for _, of in train])
    features = _features(experiment, found.classifier, [images for images, _ in train])
    unseen = _features(experiment, found.classifier, [images for images, _ in tests])
    is_base = labels < len(experiment.schedule[0])

    def accuracies(predicted: np.ndarray) -> dict[str, float]:
        right = predicted == labels
        every = (right, right[is_base], right[~is_base])
        return {name: float(np.mean(of)) for name, of in zip(MEASURES, every, strict=True)}

    own = accuracies(np.concatenate(evaluate.predictions(experiment, found, len(tasks))))
    fitted = {name: make().fit(features, classes) for name, make in LEARNED.items()}
    return {OWN: own} | {name: accuracies(head.predict(unseen)) for name, head in fitted.items()}


def _training_images(experiment: Experiment, task: int) -> tuple[np.ndarray, np.ndarray]:
    """A task's, uint8 [n, S, S, C], and their positions in the head, int32 [n]."""
    images = experiment.stream.open(task)
    found, labels = images.fetch(np.arange(images.n, dtype=np.int32)[None])
    images.close()
    return np.asarray(found[0]), np.asarray(labels[0])


def _features(experiment: Experiment, classifier: Network, images: list[np.ndarray]) -> np.ndarray:
    """F(x) of stored images [n, S, S, C]: float32 [n, F]."""
    nets, data = steps.networks(experiment.config.model), experiment.config.data
    of = jax.jit(lambda network, some: phases.features(nets, network, prepare(data, some)))
    size = experiment.config.run.eval_batch
    batches = (some[at : at + size] for some in images for at in range(0, len(some), size))
    return np.concatenate([np.asarray(of(classifier, batch)) for batch in batches])


def _path(run: study.Run, name: str, options: study.Options) -> Path:
    return options.out / run.dataset / f"seed{run.seed}" / f"{NAME}_{name.lower()}.json"


def _made_of(run: study.Run, options: study.Options) -> list[Any] | None:
    """What the run has found, its settings, and those of the heads."""
    found = study.summary(run, options)
    if not found:
        return None
    how = {name: str(head()) for name, head in LEARNED.items()}
    return [found["accuracy_matrix"], study.beyond_defaults(run), how]


def table(options: study.Options) -> Table | None:
    """A row for each method that was looked at; None if none was."""
    rows, looked_at, networks = [], [], {}
    for name, some in _by_name(options).items():
        found = {
            run: heads
            for run in some
            if (heads := derived.read(_path(run, name, options), _made_of(run, options)))
        }
        if found:
            rows.append((name, tuple(_cells(list(found.values())))))
            looked_at += found
            networks[name] = from_config_dict(some[0].config_dict()).model
    if not rows:
        return None
    columns = tuple(f"{head}: {measure}, %" for head in HEADS for measure in MEASURES)
    where = source(NAME, options, study.summaries(looked_at, options), networks=networks)
    return Table(TITLE, columns, tuple(rows), where, NOTE)


def _cells(found: Sequence[Mapping[str, Mapping[str, float]]]) -> Iterator[Cell]:
    """Of a row, from what ``learn`` found of each seed."""
    for head in HEADS:
        for measure in MEASURES:
            yield Cell(tuple(100 * heads[head][measure] for heads in found))


EXHIBIT = Exhibit(NAME, TITLE, runs, make=make, table=table)

if __name__ == "__main__":
    sys.exit(script(__doc__, EXHIBIT))
