"""Every run, table and figure, then the report: what the others make one by one.

python -m experiments.everything --scale=mini --seeds=0,1,2

But for the comparisons of methods, which ``experiments.figure5 --methods`` makes.
The laboratory, the gaps, the first task, forgetting, replay and the heads are of the first seed,
and so is all of Caltech-101, Flowers-102 and ImageNet-Subset; their own scripts take more.
"""

import dataclasses
import sys

from experiments import figure4, figure5, figure9, heads, replay, report, table1, table2, table3
from experiments.framework import study
from experiments.framework.exhibit import Exhibit
from experiments.framework.making import make_runs
from experiments.framework.scripts import script

ALL_SEEDS = tuple(  # and of this data set
    module.EXHIBIT for module in (table1, table2, table3, figure4, figure5, figure9)
)
DATASET = "cifar100"


def runs(options: study.Options) -> list[study.Run]:
    """The runs that anything shows; not all of them are made here."""
    return [run for exhibit in report.EXHIBITS for run in exhibit.runs(options)]


def planned(options: study.Options) -> list[study.Run]:
    """The runs that it makes, a table's before the next one's."""
    first = options.seeds[:1]
    return [
        run
        for exhibit in report.EXHIBITS
        if exhibit not in figure5.COMPARISONS
        for run in exhibit.runs(options)
        if run.seed in first or (exhibit in ALL_SEEDS and run.dataset == DATASET)
    ]


def make(options: study.Options) -> None:
    """Makes the runs that are missing, and what else tables and figures are made of."""
    make_runs(planned(options), options)
    figure4.make(options)
    first = dataclasses.replace(options, seeds=options.seeds[:1])
    replay.make(first)
    heads.make(first)


def draw(options: study.Options) -> None:
    """Draws all of it, and writes the report."""
    report.write(options.results, options.results)


EXHIBIT = Exhibit("everything", "Everything", runs, make=make, draw=draw)

if __name__ == "__main__":
    sys.exit(script(__doc__, EXHIBIT))
