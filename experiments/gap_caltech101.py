"""What narrows the gap where Eq. 7 is the largest term by far: one change at a time.

python -m experiments.gap_caltech101 --scale=mini --seeds=0

``experiments/README.md`` says what was learnt.
"""

import dataclasses
import sys

from experiments import gap, study
from experiments.making import script

SAME = (
    "the student rests in the explore step",
    "Eq. 7 weighs a tenth",
    gap.KL,
)
CHANGES = dataclasses.replace(
    gap.CHANGES,
    NAME="gap_caltech101",
    TITLE="The gap between T_0 and S_0 on Caltech-101: one change at a time",
    whole=lambda scale, seed: study.student("caltech101", scale, seed),
    changes={
        **{name: gap.CHANGES.changes[name] for name in SAME},
        "Eq. 7 weighs a hundredth": lambda c: {
            "stage_one.terms.feature_statistics": c.stage_one.terms.feature_statistics / 100
        },
    },
)

if __name__ == "__main__":
    sys.exit(script(CHANGES, __doc__))
