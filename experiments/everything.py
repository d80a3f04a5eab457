"""Every run, table and figure, then the report: what the others make one by one.

python -m experiments.everything --scale=mini --seeds=0,1,2

The laboratory, the gaps, forgetting and replay are of the first seed, and so is all of Caltech-101,
Flowers-102 and ImageNet-Subset; their own scripts take more.
"""

import dataclasses
import sys

from experiments import figure4, figure5, figure9, replay, report, table1, table2, table3
from experiments.framework import study
from experiments.framework.making import make_runs, script

ALL_SEEDS = (table1, table2, table3, figure4, figure5.FIGURE, figure9)  # and of this data set
DATASET = "cifar100"


def planned(told: study.Options) -> list[study.Run]:
    """The runs that it makes, a table's before the next one's."""
    first = told.seeds[:1]
    return [
        run
        for module in report.MODULES
        for run in module.runs(told)
        if run.seed in first or (module in ALL_SEEDS and run.dataset == DATASET)
    ]


def make(told: study.Options) -> None:
    """Makes the runs that are missing, and what else tables and figures are made of."""
    make_runs(planned(told), told)
    figure4.make(told)
    replay.make(dataclasses.replace(told, seeds=told.seeds[:1]))


def draw(told: study.Options) -> None:
    """Draws all of it, and writes the report."""
    report.write(told.results, told.results)


if __name__ == "__main__":
    sys.exit(script(sys.modules[__name__], __doc__))
