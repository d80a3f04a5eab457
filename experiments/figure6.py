"""Figure 6: ImageNet-Subset, 1 and 2 tasks.

python -m experiments.figure6 --scale=mini --seeds=0,1,2
"""

import sys

from experiments.framework.curves import TWO, exhibit
from experiments.framework.scripts import script

EXHIBIT = exhibit(
    "figure6",
    "Figure 6: ImageNet-Subset, 1 and 2 tasks",
    tuple(("imagenet_subset", tasks, TWO) for tasks in (1, 2)),
)


if __name__ == "__main__":
    sys.exit(script(__doc__, EXHIBIT))
