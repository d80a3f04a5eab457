"""The delegator laboratory: recipes of data-free methods on one teacher, side by side.

python -m experiments.laboratory --scale=mini --seeds=0

The recipes are in ``configs/recipes.py``. Of several seeds each has a teacher of its own; the table
shows means, the pictures the first seed's.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from configs.recipes import RECIPES
from experiments import quality, study
from experiments.tables import Table, source
from skd_jax.writer import read_json

NAME = "laboratory"
TITLE = "Delegator laboratory: recipes on one teacher"
DATASETS = ("cifar100",)


def runs(told: study.Options, name: str | None = None) -> list[study.Run]:
    """The runs of every recipe, or of one."""
    names = (name,) if name else tuple(RECIPES)
    return [
        study.recipe(dataset, told.scale, seed, recipe)
        for dataset in DATASETS
        for seed in told.seeds
        for recipe in names
    ]


def make(told: study.Options) -> None:
    """Makes the runs that are missing."""
    study.make(runs(told), told)


def _reports(told: study.Options, name: str) -> list[dict]:
    folders = [run.folder(told.results) for run in runs(told, name)]
    return [found for f in folders if (found := read_json(f / "delegator_0.json"))]


def table(told: study.Options) -> Table:
    """Every recipe's quality."""
    reports = {name: _reports(told, name) for name in RECIPES}
    rows = [(name, quality.cells(found)) for name, found in reports.items()]
    if any(reports.values()):
        some = next(found for found in reports.values() if found)
        rows.append(("real test images", quality.cells(some, real=True)))
    where = source(told.command(NAME), told.scale, study.summaries(runs(told), told))
    return Table(TITLE, tuple(quality.COLUMNS), tuple(rows), where, quality.NOTE)


def draw(told: study.Options) -> None:
    """Draws classes, layers, terms and pseudo images of every recipe, and writes the table."""
    study.write_table(told, NAME, table(told))
    first = {
        name: runs(told, name)[0].folder(told.results)
        for name in RECIPES
        if study.summary(runs(told, name)[0], told.results)
    }
    if not first:
        return
    reports = {n: found for n, f in first.items() if (found := read_json(f / "delegator_0.json"))}
    quality.draw_reports(reports, told.out / f"{NAME}_reports.png")
    terms = {name: quality.terms(folder, 0) for name, folder in first.items()}
    quality.draw_terms(terms, told.out / f"{NAME}_terms.png")
    _side_by_side(first, told.out / f"{NAME}_images.png")


def _side_by_side(folders: dict[str, Path], path: Path) -> None:
    columns = 3
    rows = -(-len(folders) // columns)
    figure = Figure(figsize=(6.0 * columns, 5.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (name, folder) in zip(grid.flat, folders.items(), strict=False):
        axes.imshow(Image.open(folder / "pseudo_images_by_class_0.png"))
        axes.set_title(name)
    figure.savefig(path, dpi=110)


def pictures(told: study.Options) -> list[tuple[Path, str]]:
    """The pictures and their sources."""
    found = study.summaries([run for run in runs(told) if run.seed == told.seeds[0]], told)
    where = source(told.command(NAME), told.scale, found)
    return [(told.out / f"{NAME}_{name}.png", where) for name in ("images", "reports", "terms")]


if __name__ == "__main__":
    sys.exit(study.script(sys.modules[__name__]))
