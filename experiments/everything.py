"""Every run, table and figure, then the report: what the others make one by one.

python -m experiments.everything --scale=mini --seeds=0,1,2
"""

import sys

from experiments import report, study
from experiments.making import make_runs, script


def make(told: study.Options) -> None:
    """Makes the runs that are missing, a table's before the next one's."""
    make_runs([run for module in report.MODULES for run in module.runs(told)], told)
    for module in report.MODULES:
        module.make(told)


def draw(told: study.Options) -> None:
    """Draws all of it, and writes the report."""
    report.write(told.results, told.results)


if __name__ == "__main__":
    sys.exit(script(sys.modules[__name__], __doc__))
