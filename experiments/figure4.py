"""Figure 4: real and pseudo images in T_0's feature space (t-SNE), with and without L_cat, L_div.

python -m experiments.figure4 --scale=mini --seeds=0,1,2
"""

import functools
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.lines import Line2D
from sklearn.manifold import TSNE

from experiments.framework import derived, study
from experiments.framework.exhibit import Exhibit
from experiments.framework.making import make_runs
from experiments.framework.panels import SMALL, row_by_row, save
from experiments.framework.scripts import script
from experiments.framework.tables import Cell, Picture, Table, source
from skd_jax.data import prepare
from skd_jax.experiment import Experiment, open_experiment
from skd_jax.methods import skd
from skd_jax.methods.skd import quality
from skd_jax.plots import literal
from skd_jax.train import restore

NAME = "figure4"
TITLE = "Figure 4: real and pseudo images in T_0's feature space"
DATASETS = ("cifar100",)
PANELS = {
    "skd": "pseudo images, SKD",
    "no_category": "SKD without L_cat",
    "no_diversity": "SKD without L_div",
}
COUNT = 500  # images of each kind


def runs(options: study.Options) -> list[study.Run]:
    """The runs whose delegators it shows."""
    return [
        study.student(dataset, options.scale, seed, ablation)
        for dataset in DATASETS
        for seed in options.seeds
        for ablation in PANELS
    ]


def make(options: study.Options) -> None:
    """Makes the runs that are missing, and embeds their images."""
    make_runs(runs(options), options)
    for dataset, seed, some in _groups(options):
        what = f"embedding the images of {dataset}, seed {seed}"
        of = functools.partial(_made_of, some, options)
        derived.make(_path(some, options), of, some, options, what, embed, some, options)


def _groups(options: study.Options) -> list[tuple[str, int, list[study.Run]]]:
    """The runs of each data set and seed."""
    groups = [(dataset, seed) for dataset in DATASETS for seed in options.seeds]
    return [
        (dataset, seed, [r for r in runs(options) if (r.dataset, r.seed) == (dataset, seed)])
        for dataset, seed in groups
        if not options.datasets or dataset in options.datasets
    ]


def _made_of(some: list[study.Run], options: study.Options) -> list[Any] | None:
    """What these runs have found, wherever that was; None unless all are finished."""
    of = ("dataset", "seed", "class_names", "accuracy_matrix", "delegator")
    found = [[summary.get(name) for name in of] for summary in study.summaries(some, options)]
    return found if len(found) == len(some) else None


def _embedding(some: list[study.Run], options: study.Options) -> dict | None:
    """The panels that were embedded, unless they are of other runs than those that are there."""
    return derived.read(_path(some, options), _made_of(some, options))


def embed(runs: list[study.Run], options: study.Options) -> dict:
    """One t-SNE of real training images and of each run's pseudo images.

    Returns:
      For "real" and each run's ablation: ``points`` [n, 2] and ``labels`` [n], the true class of a
      real image and T_0's of a pseudo image.
    """
    features, labels = [], []
    for run in runs:
        config, kept = restore(run.folder(options.results))
        experiment = open_experiment(run.config(options.results, options.data_dir))
        nets = skd.networks(config)
        if not features:
            images, classes = _training_images(experiment)
            features.append(quality.look(experiment, kept.classifier, images).features)
            labels.append(classes)
        images = quality.drawn_images(experiment, nets, kept.delegator, 0, COUNT)
        seen = quality.look(experiment, kept.classifier, images)
        features.append(seen.features)
        labels.append(seen.labels)
    tsne = TSNE(init="pca", random_state=0)
    points = tsne.fit_transform(np.concatenate(features).astype(np.float32))
    parts = np.split(points, np.cumsum([len(some) for some in features])[:-1])
    names = ("real", *(Path(run.name).name for run in runs))
    return {
        name: {"points": np.round(part, 2).tolist(), "labels": classes.tolist()}
        for name, part, classes in zip(names, parts, labels, strict=True)
    }


def _training_images(experiment: Experiment) -> tuple[np.ndarray, np.ndarray]:
    """Training images of the base classes, evenly drawn, with their positions in the head."""
    given = experiment.source.labels("train")
    rows = [np.flatnonzero(given == label) for label in experiment.schedule[0]]
    classes = np.repeat(np.arange(len(rows)), [len(some) for some in rows])
    total = len(classes)
    chosen = np.linspace(0, total - 1, min(COUNT, total)).astype(int)
    stored = experiment.source.read("train", np.concatenate(rows)[chosen])
    return np.asarray(prepare(experiment.config.data, jnp.asarray(stored))), classes[chosen]


def _path(some: list[study.Run], options: study.Options) -> Path:
    return options.out / some[0].dataset / f"seed{some[0].seed}" / f"{NAME}.json"


def draw(options: study.Options) -> None:
    """Draws one picture a data set and seed."""
    for dataset, seed, some in _groups(options):
        path = options.out / f"{NAME}_{dataset}_seed{seed}.png"
        if found := _embedding(some, options):
            [first, *_] = study.summaries(some, options)
            _draw(found, first["class_names"][0], path)
        else:
            path.unlink(missing_ok=True)


def _draw(found: dict, classes: list[str], path: Path) -> None:
    every = np.concatenate([part["points"] for part in found.values()])
    figure, grid = row_by_row(len(found), columns=2, height=2.9)
    titles = {"real": "real images, their classes", **PANELS}
    few = len(classes) <= 10
    for axes, (name, part) in zip(grid, found.items(), strict=True):
        points = np.array(part["points"])
        axes.scatter(*every.T, s=2, color="0.9")
        dots: Any = axes.scatter(
            *points.T,
            s=7,
            c=part["labels"],
            cmap="tab10" if few else "turbo",
            vmin=0,
            vmax=max(1, len(classes) - 1),
        )
        axes.set_title(titles[name], fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
        if name == "real" and few:
            marks = [
                Line2D([], [], ls="", marker="o", color=dots.to_rgba(n))
                for n in range(len(classes))
            ]
            where = "outside lower center"
            figure.legend(
                marks, map(literal, classes), loc=where, ncols=5, fontsize=SMALL, handletextpad=0
            )
    save(figure, path)


def table(options: study.Options) -> Table:
    """What the picture shows, in numbers, and beside it what the picture cannot."""
    rows = []
    kinds = {
        "nearest other pseudo image": "pseudo",
        "from pseudo to nearest real": "pseudo_to_real",
        "from real to nearest pseudo": "real_to_pseudo",
    }
    for name, title in PANELS.items():
        some = [run for run in runs(options) if run.name == f"student/{name}"]
        reports = [found for run in some if (found := study.report(run, options))]
        cells = [Cell(tuple(100 * r["nearest"][kind] for r in reports)) for kind in kinds.values()]
        cells.append(Cell(tuple(np.exp(r["label_entropy"]) for r in reports)))
        cells.append(Cell(tuple(100 * r["confidence"]["pseudo"] for r in reports)))
        rows.append((title, tuple(cells)))
    columns = (*kinds, "classes drawn (exp of the entropy of w)", "T_0's confidence, %")
    note = (
        "Distances are cosine distances times 100 in T_0's feature space, means over pseudo images "
        "and as many real test images."
    )
    where = source(NAME, options, study.summaries(runs(options), options))
    return Table(f"{TITLE}, in numbers", columns, tuple(rows), where, note)


def pictures(options: study.Options) -> list[Picture]:
    """One a data set and seed."""
    return [
        Picture(
            options.out / f"{NAME}_{dataset}_seed{seed}.png",
            f"{TITLE}, {dataset}, seed {seed}",
            source(NAME, options, study.summaries(some, options)),
        )
        for dataset, seed, some in _groups(options)
    ]


EXHIBIT = Exhibit(NAME, TITLE, runs, make=make, draw=draw, table=table, pictures=pictures)

if __name__ == "__main__":
    sys.exit(script(__doc__, EXHIBIT))
