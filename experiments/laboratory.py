"""The delegator laboratory: recipes of data-free methods on one teacher, side by side.

python -m experiments.laboratory --scale=mini --seeds=0

The recipes are in ``configs/recipes.py``. Of several seeds each has a teacher of its own; the table
shows means, the pictures the first seed's.
"""

import sys
from pathlib import Path

from configs.recipes import RECIPES
from experiments import quality
from experiments.framework import study
from experiments.framework.exhibit import Exhibit
from experiments.framework.panels import of_classes, save, side_by_side
from experiments.framework.scripts import script
from experiments.framework.tables import Picture, Table, source

NAME = "laboratory"
TITLE = "Delegator laboratory: recipes on one teacher, CIFAR-100"
DATASET = "cifar100"
TITLES = {
    "images": "pseudo images by class",
    "reports": "classes drawn, and divergence at each BN layer",
    "terms": "training, by term",
}
NOTE = (
    "A recipe is another method's loss in the frame of Algorithm 1, with this benchmark's "
    "networks, optimisers and rounds, not that method whole. "
)


def runs(options: study.Options, name: str | None = None) -> list[study.Run]:
    """The runs of every recipe, or of one."""
    names = (name,) if name else tuple(RECIPES)
    return [
        study.recipe(DATASET, options.scale, seed, recipe)
        for seed in options.seeds
        for recipe in names
    ]


def _reports(options: study.Options, name: str) -> list[dict]:
    return [found for run in runs(options, name) if (found := study.report(run, options))]


def _compared(options: study.Options) -> study.Options:
    """On the seeds of which there is more than SKD's own run, which other tables need too."""
    return study.on_seeds_of(
        [run for name in list(RECIPES)[1:] for run in runs(options, name)], options
    )


def _first(options: study.Options) -> list[study.Run]:
    """The recipes' finished runs of the first seed that has any."""
    for seed in _compared(options).seeds:
        some = [run for run in runs(options) if run.seed == seed and study.report(run, options)]
        if some:
            return some
    return []


def table(options: study.Options) -> Table:
    """Every recipe's quality."""
    options = _compared(options)
    reports = {name: _reports(options, name) for name in RECIPES}
    rows = [(name, quality.cells(found)) for name, found in reports.items()]
    if any(reports.values()):
        some = next(found for found in reports.values() if found)
        rows.append(("real test images", quality.cells(some, real=True)))
    where = source(NAME, options, study.summaries(runs(options), options))
    table = Table(TITLE, tuple(quality.COLUMNS), tuple(rows), where, NOTE + quality.NOTE)
    return table.turned()


def draw(options: study.Options) -> None:
    """Draws classes, layers, terms and pseudo images of every recipe."""
    first = {Path(run.name).name: run for run in _first(options)}
    paths = [options.out / f"{NAME}_{name}.png" for name in TITLES]
    if not first:
        for path in paths:
            path.unlink(missing_ok=True)
        return
    folders = {name: run.folder(options.results) for name, run in first.items()}
    drawn = {name: folder / "pseudo_images_by_class_0.png" for name, folder in folders.items()}
    save(side_by_side(drawn, columns=1), paths[0])
    reports = {name: study.report(run, options) or {} for name, run in first.items()}
    quality.draw_reports(reports, paths[1])
    terms = {name: quality.terms(folder, 0) for name, folder in folders.items()}
    quality.draw_terms(terms, paths[2])


def pictures(options: study.Options) -> list[Picture]:
    """What each recipe draws, its classes and layers, and its training, of one seed."""
    summaries = study.summaries(_first(options), options)
    where = source(NAME, options, summaries)
    titles = {name: f"Delegator laboratory: {title}" for name, title in TITLES.items()}
    titles["images"] = of_classes(titles["images"], summaries)
    return [
        Picture(options.out / f"{NAME}_{name}.png", title, where) for name, title in titles.items()
    ]


EXHIBIT = Exhibit(NAME, TITLE, runs, draw=draw, table=table, pictures=pictures)

if __name__ == "__main__":
    sys.exit(script(__doc__, EXHIBIT))
