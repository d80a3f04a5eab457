"""Figure 5: accuracy after each task.

python -m experiments.figure5 --scale=mini --seeds=0,1,2
"""

import sys

from experiments.framework.curves import FOUR, TWO, exhibit
from experiments.framework.making import script

PANELS = (
    ("cifar100", 1, TWO),
    ("cifar100", 2, TWO),
    ("cifar100", 5, FOUR),
    ("cifar100", 10, FOUR),
    ("imagenet_subset", 5, TWO),
    ("imagenet_subset", 10, TWO),
    ("caltech101", 10, TWO),
    ("flowers102", 10, TWO),
)
EXHIBIT = exhibit("figure5", "Figure 5: accuracy after each task", PANELS)


if __name__ == "__main__":
    sys.exit(script(__doc__, EXHIBIT))
