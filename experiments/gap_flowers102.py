"""What widens and narrows the gap on Flowers-102, where lambda is 20: one change at a time.

python -m experiments.gap_flowers102 --scale=mini --seeds=0

``experiments/README.md`` says what was learnt.
"""

import sys

from experiments import gap
from experiments.framework.making import script

CHANGES = gap.of_larger_images(
    "flowers102",
    "Flowers-102",
    {
        "the student learns in the explore step": lambda c: {"stage_one.student_explores": True},
        gap.KL: gap.CHANGES.changes[gap.KL],
    },
)

if __name__ == "__main__":
    sys.exit(script(CHANGES, __doc__))
