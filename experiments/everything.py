"""Every run, table and figure, then the report: what the others make one by one.

python -m experiments.everything --scale=mini --seeds=0,1,2

The laboratory, gap and forgetting are of the first seed; their own scripts take more.
"""

import dataclasses
import sys
from typing import Any

from experiments import forgetting, gap, laboratory, making, report, study
from experiments.making import make_runs, script

OF_ONE_SEED = (laboratory, gap.CHANGES, forgetting.CHANGES)


def _told(module: Any, told: study.Options) -> study.Options:
    seeds = told.seeds[:1] if module in OF_ONE_SEED else told.seeds
    return dataclasses.replace(told, seeds=seeds)


def make(told: study.Options) -> None:
    """Makes the runs that are missing, a table's before the next one's."""
    every = [run for module in report.MODULES for run in module.runs(_told(module, told))]
    make_runs(every, told)
    for module in report.MODULES:
        making.make(module, _told(module, told))


def draw(told: study.Options) -> None:
    """Draws all of it, and writes the report."""
    report.write(told.results, told.results)


if __name__ == "__main__":
    sys.exit(script(sys.modules[__name__], __doc__))
