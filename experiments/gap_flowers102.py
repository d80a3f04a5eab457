"""What widens and narrows the gap on Flowers-102, where lambda is 20: one change at a time.

python -m experiments.gap_flowers102 --scale=mini --seeds=0

``experiments/README.md`` says what was learnt.
"""

import dataclasses
import sys

from experiments import gap, study
from experiments.making import script

CHANGES = dataclasses.replace(
    gap.CHANGES,
    NAME="gap_flowers102",
    TITLE="The gap between T_0 and S_0 on Flowers-102: one change at a time",
    whole=lambda scale, seed: study.student("flowers102", scale, seed),
    changes={
        "the student learns in the explore step": lambda c: {"stage_one.student_explores": True},
        gap.KL: gap.CHANGES.changes[gap.KL],
    },
)

if __name__ == "__main__":
    sys.exit(script(CHANGES, __doc__))
