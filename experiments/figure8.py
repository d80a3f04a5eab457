"""Figure 8: Flowers-102, 1, 2 and 5 tasks.

python -m experiments.figure8 --scale=mini --seeds=0,1,2
"""

import sys

from experiments.framework.curves import TWO, exhibit
from experiments.framework.scripts import script

EXHIBIT = exhibit(
    "figure8",
    "Figure 8: Flowers-102, 1, 2 and 5 tasks",
    tuple(("flowers102", tasks, TWO) for tasks in (1, 2, 5)),
)


if __name__ == "__main__":
    sys.exit(script(__doc__, EXHIBIT))
