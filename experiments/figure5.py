"""Figure 5: accuracy after each task.

python -m experiments.figure5 --scale=mini --seeds=0,1,2
"""

import sys
from pathlib import Path

from experiments import curves, study
from experiments.tables import source

NAME = "figure5"
TITLE = "Figure 5: accuracy after each task"
PANELS: tuple[curves.Panel, ...] = (
    ("cifar100", 1, curves.TWO),
    ("cifar100", 2, curves.TWO),
    ("cifar100", 5, curves.FOUR),
    ("cifar100", 10, curves.FOUR),
    ("imagenet_subset", 5, curves.TWO),
    ("imagenet_subset", 10, curves.TWO),
    ("caltech101", 10, curves.TWO),
    ("flowers102", 10, curves.TWO),
)


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
