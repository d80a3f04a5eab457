"""What keeps Caltech-101's old classes over five tasks: one change of the configuration at a time.

python -m experiments.forgetting_caltech101 --scale=mini --seeds=0

``experiments/README.md`` says what was learnt.
"""

import sys

from experiments import gap_caltech101
from experiments.forgetting import of_larger_images
from experiments.framework.making import script

CHANGES = of_larger_images("caltech101", "Caltech-101", gap_caltech101.CHANGES)

if __name__ == "__main__":
    sys.exit(script(CHANGES, __doc__))
