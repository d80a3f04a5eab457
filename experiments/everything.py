"""Every run, table and figure, then the report: what the others make one by one.

python -m experiments.everything --scale=mini --seeds=0,1,2

The laboratory, the gaps, forgetting and replay are of the first seed, and so is all of Caltech-101,
Flowers-102 and ImageNet-Subset; their own scripts take more.
"""

import sys

from experiments import report, study
from experiments.making import make_runs, script


def make(told: study.Options) -> None:
    """Makes the runs that are missing, a table's before the next one's."""
    planned = report.planned(told)
    make_runs([run for _, _, runs in planned for run in runs], told)
    for module, its, _ in planned:
        if hasattr(module, "make"):
            module.make(its)


def draw(told: study.Options) -> None:
    """Draws all of it, and writes the report."""
    report.write(told.results, told.results)


if __name__ == "__main__":
    sys.exit(script(sys.modules[__name__], __doc__))
