"""What narrows the gap on Flowers-102, where S_0 collapses: one change at a time.

python -m experiments.gap_flowers102 --scale=mini --seeds=0

``experiments/README.md`` says what was learnt.
"""

import dataclasses
import sys

from experiments import gap_caltech101, study
from experiments.changes import Changes
from experiments.making import script

CHANGES: Changes = dataclasses.replace(
    gap_caltech101.CHANGES,
    NAME="gap_flowers102",
    TITLE="The gap between T_0 and S_0 on Flowers-102: one change at a time",
    whole=lambda scale, seed: study.student("flowers102", scale, seed),
)

if __name__ == "__main__":
    sys.exit(script(CHANGES, __doc__))
