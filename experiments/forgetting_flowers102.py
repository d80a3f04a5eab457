"""What keeps Flowers-102's old classes over five tasks: one change of the configuration at a time.

python -m experiments.forgetting_flowers102 --scale=mini --seeds=0

``experiments/README.md`` says what was learnt.
"""

import dataclasses
import sys

from experiments import forgetting, study
from experiments.making import script

CHANGES = dataclasses.replace(
    forgetting.CHANGES,
    NAME="forgetting_flowers102",
    TITLE="Forgetting over five tasks on Flowers-102: one change at a time",
    whole=lambda scale, seed: study.learner("flowers102", scale, seed, tasks=5),
    changes={forgetting.HALF_WAY: forgetting.CHANGES.changes[forgetting.HALF_WAY]},
)

if __name__ == "__main__":
    sys.exit(script(CHANGES, __doc__))
