"""Figure 6: ImageNet-Subset, 1 and 2 tasks.

python -m experiments.figure6 --scale=mini --seeds=0,1,2
"""

import sys
from pathlib import Path

from experiments import curves, study
from experiments.tables import source

NAME = "figure6"
TITLE = "Figure 6: ImageNet-Subset, 1 and 2 tasks"
PANELS: tuple[curves.Panel, ...] = tuple(("imagenet_subset", tasks, curves.TWO) for tasks in (1, 2))


def make(told: study.Options) -> None:
    """Makes the runs that are missing."""
    study.make(curves.runs(told, PANELS), told)


def draw(told: study.Options) -> None:
    """Draws what has been run of it."""
    curves.draw(told, PANELS, told.out / f"{NAME}.png")


def pictures(told: study.Options) -> list[tuple[Path, str]]:
    """The picture and its source."""
    summaries = study.summaries(curves.runs(told, PANELS), told)
    return [(told.out / f"{NAME}.png", source(told.command(NAME), told.scale, summaries))]


if __name__ == "__main__":
    sys.exit(study.script(sys.modules[__name__]))
