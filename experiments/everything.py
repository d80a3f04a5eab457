"""Every run, table and figure, then the report: what the others make one by one.

python -m experiments.everything --scale=mini --seeds=0,1,2
"""

import sys

from experiments import report, study
from experiments.making import script


def make(told: study.Options) -> None:
    """Makes the runs that are missing, all seeds of a table before the next one's."""
    for module in report.MODULES:
        module.make(told)


def draw(told: study.Options) -> None:
    """Draws all of it, and writes the report."""
    report.write(told.results, told.results)


if __name__ == "__main__":
    sys.exit(script(sys.modules[__name__], __doc__))
