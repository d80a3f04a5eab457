"""What narrows the gap where Eq. 7 is the largest term by far: one change at a time.

python -m experiments.gap_caltech101 --scale=mini --seeds=0

``experiments/README.md`` says what was learnt.
"""

import sys

from experiments import gap
from experiments.framework.making import script

SAME = ("the student rests in the explore step", "Eq. 7 weighs a tenth", gap.KL)
CHANGES = gap.of_larger_images(
    "caltech101",
    "Caltech-101",
    {
        **{name: gap.CHANGES.changes[name] for name in SAME},
        "Eq. 7 weighs a hundredth": lambda c: {
            "stage_one.terms.feature_statistics": c.stage_one.terms.feature_statistics / 100
        },
    },
)

if __name__ == "__main__":
    sys.exit(script(CHANGES, __doc__))
