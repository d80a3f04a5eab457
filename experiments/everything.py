"""Every run, table and figure, then the report: what the others make one by one.

python -m experiments.everything --scale=mini --seeds=0,1,2

The laboratory, gap, forgetting and replay are of the first seed; their own scripts take more.
"""

import sys

from experiments import making, report, study
from experiments.making import make_runs, script


def make(told: study.Options) -> None:
    """Makes the runs that are missing, a table's before the next one's."""
    planned = report.planned(told)
    make_runs([run for module, its in planned for run in module.runs(its)], told)
    for module, its in planned:
        making.make(module, its)


def draw(told: study.Options) -> None:
    """Draws all of it, and writes the report."""
    report.write(told.results, told.results)


if __name__ == "__main__":
    sys.exit(script(sys.modules[__name__], __doc__))
