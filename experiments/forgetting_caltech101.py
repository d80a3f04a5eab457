"""What keeps Caltech-101's old classes over five tasks: one change of the configuration at a time.

python -m experiments.forgetting_caltech101 --scale=mini --seeds=0

``experiments/README.md`` says what was learnt.
"""

import dataclasses
import sys

from experiments import forgetting, study
from experiments.making import script

CHANGES = dataclasses.replace(
    forgetting.CHANGES,
    NAME="forgetting_caltech101",
    TITLE="Forgetting over five tasks on Caltech-101: one change at a time",
    whole=lambda scale, seed: study.learner("caltech101", scale, seed, tasks=5),
    changes={forgetting.HALF_WAY: forgetting.CHANGES.changes[forgetting.HALF_WAY]},
)

if __name__ == "__main__":
    sys.exit(script(CHANGES, __doc__))
