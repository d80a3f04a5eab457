r"""Figure 5: accuracy after each task, of SKD with and without its parts, or of any methods.

    python -m experiments.figure5 --scale=mini --seeds=0,1,2
    python -m experiments.figure5 --scale=mini --methods=skd,lwf,ncm --datasets=cifar100 --tasks=5 \
        --results=experiments/results/methods

With ``--methods`` they are compared from one T_0: a table and a picture for each data set and
number of tasks. Those that were run before stay in both. At mini scale the committed ones lie in
another folder than the paper's tables, which is named above.
"""

import sys

from experiments.framework.comparison import Comparison
from experiments.framework.curves import FOUR, TWO, exhibit
from experiments.framework.scripts import script

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

# CIFAR-100 from 50 base classes, 5 and 10 tasks, and the backbone; averages with the base step, but
# for those that say "last". Whose numbers they are, where not the method's own paper's.
PUBLISHED = {
    "finetune": ("last 9.01", "last 4.76", "ResNet-18, FCS"),
    "joint": ("last 69.9", "last 69.9", "ResNet-32, ABD"),
    "ewc": ("24.48", "21.20", "ResNet-18, PASS"),
    "lwf": ("last 24.01", "last 16.52", "ResNet-18, FCS"),
    "lwf_mc": ("45.93", "27.43", "ResNet-18, PASS"),
    "sdc": ("55.67", "56.09", "ResNet-32, implied by SKD's text"),
    "icarl": ("57.17", "52.57", "ResNet-32, LUCIR, the variant by a softmax"),
    "eeil": ("60.37", "56.05", "ResNet-18, SSRE"),
    "bic": ("56.86", "53.21", "ResNet-32, PODNet, without the correction"),
    "lucir": ("63.42", "60.18", "ResNet-32"),
    "mnemonics": ("63.34", "62.28", "ResNet-32, from checkpoints only"),
    "tpcil": ("65.34", "63.58", "ResNet-32, not verified"),
    "fetril": ("65.38", "65.10", "ResNet-32, PyCIL, AutoAugment"),
    "abd": ("62.40", "58.97", "ResNet-32, R-DFCIL"),
    "rdfcil": ("64.78", "61.71", "ResNet-32"),
    "skd": ("61.42", "59.62", "ResNet-32"),
}


def published(dataset: str, tasks: int) -> dict[str, str]:
    """Published numbers of a benchmark, with their backbones, by the method's name."""
    if dataset != "cifar100" or tasks not in (5, 10):
        return {}
    column = (5, 10).index(tasks)
    return {name: f"{row[column]}; {row[2]}" for name, row in PUBLISHED.items()}


# Training images of a class in the mean, of those that are learned.
EACH = {
    "cifar100": 500,
    "imagenet_subset": 1300,
    "caltech101": 69,
    "flowers102": 64,
    "digits": 126,
}
COMPARISONS = tuple(
    Comparison("figure5", dataset, tasks, EACH[dataset], published(dataset, tasks)).exhibit
    for dataset, tasks in (*((dataset, tasks) for dataset, tasks, _ in PANELS), ("digits", 3))
)

if __name__ == "__main__":
    sys.exit(script(__doc__, EXHIBIT, comparisons=COMPARISONS))
