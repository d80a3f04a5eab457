"""What keeps Flowers-102's old classes over five tasks: one change of the configuration at a time.

python -m experiments.forgetting_flowers102 --scale=mini --seeds=0

``experiments/README.md`` says what was learnt.
"""

import sys

from experiments import gap_flowers102
from experiments.forgetting import of_larger_images
from experiments.framework.making import script

CHANGES = of_larger_images("flowers102", "Flowers-102", gap_flowers102.CHANGES)

if __name__ == "__main__":
    sys.exit(script(CHANGES, __doc__))
