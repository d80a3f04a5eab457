"""Figure 9: what D_0 draws of each data set.

python -m experiments.figure9 --scale=mini --seeds=0,1,2
"""

import sys

from experiments.framework import study
from experiments.framework.exhibit import Exhibit
from experiments.framework.panels import of_classes, save, side_by_side
from experiments.framework.scripts import script
from experiments.framework.tables import Picture, source

NAME = "figure9"
TITLE = "Figure 9: pseudo images by the class that T_0 gives them"


def runs(options: study.Options, dataset: str | None = None) -> list[study.Run]:
    """The runs whose delegators it shows."""
    datasets = (dataset,) if dataset else study.DATASETS
    return [study.student(name, options.scale, seed) for name in datasets for seed in options.seeds]


def draw(options: study.Options) -> None:
    """Puts the pictures that the runs have drawn side by side, seed by seed."""
    for dataset in study.DATASETS:
        finished = [run for run in runs(options, dataset) if study.summary(run, options)]
        paths = {
            f"seed {run.seed}": run.folder(options.results) / "pseudo_images_by_class_0.png"
            for run in finished
        }
        whole = options.out / f"{NAME}_{dataset}.png"
        if paths:
            save(side_by_side(paths, columns=1), whole)
        else:
            whole.unlink(missing_ok=True)


def pictures(options: study.Options) -> list[Picture]:
    """One a data set, seeds side by side."""
    found = []
    for dataset in study.DATASETS:
        summaries = study.summaries(runs(options, dataset), options)
        where = source(NAME, options, summaries)
        title = of_classes(f"{TITLE}, {dataset}", summaries)
        found.append(Picture(options.out / f"{NAME}_{dataset}.png", title, where))
    return found


EXHIBIT = Exhibit(NAME, TITLE, runs, draw=draw, pictures=pictures)

if __name__ == "__main__":
    sys.exit(script(__doc__, EXHIBIT))
