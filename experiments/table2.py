"""Table II: S_0's accuracy with one technique off at a time.

python -m experiments.table2 --scale=mini --seeds=0,1,2
"""

import sys

from experiments.framework import study
from experiments.framework.exhibit import Exhibit
from experiments.framework.scripts import script
from experiments.framework.tables import Cell, Table, source

NAME = "table2"
TITLE = "Table II: four techniques, one off at a time"
DATASETS = ("cifar100", "imagenet_subset")
PAPER = {  # CIFAR-100, ImageNet-Subset
    "upper bound": (76.08, 87.68),
    "no_category": (75.76, 46.72),
    "no_diversity": (76.00, 82.68),
    "no_feature_statistics": (75.34, 2.84),
    "no_helper_bn": (76.01, 85.68),
    "skd": (75.86, 86.80),
}
NAMES = {
    "upper bound": "T_0, upper bound",
    "no_category": "without L_cat",
    "no_diversity": "without L_div",
    "no_feature_statistics": "without R_feature",
    "no_helper_bn": "without helper BN",
    "skd": "SKD",
}
NOTE = (
    "S_0 (see Table I) where D_0 was trained without one of its parts. L_cat has T_0 sure of the "
    "class of each pseudo image, L_div has the classes drawn equally often, R_feature brings the "
    "moments of T_0's batch normalisation (BN) layers to those of the real images, and the helper "
    "BN normalises what D_0 draws."
)


def runs(options: study.Options) -> list[study.Run]:
    """The runs whose results it shows."""
    return [
        study.student(dataset, options.scale, seed, ablation)
        for dataset in DATASETS
        for seed in options.seeds
        for ablation in study.ABLATIONS
    ]


def table(options: study.Options) -> Table:
    """What has been run of it."""
    rows, summaries = [], study.summaries(runs(options), options)
    for name, paper in PAPER.items():
        cells = []
        for dataset, number in zip(DATASETS, paper, strict=True):
            key = "teacher_accuracy" if name == "upper bound" else "student_accuracy"
            ablation = "skd" if name == "upper bound" else name
            wanted = [run for run in runs(options) if run.name == f"student/{ablation}"]
            found = study.summaries(wanted, options, dataset)
            cells.append(Cell(tuple(100 * s["delegator"][0][key] for s in found), number))
        rows.append((NAMES[name], tuple(cells)))
    columns = tuple(f"{dataset}: S_0, %" for dataset in DATASETS)
    return Table(TITLE, columns, tuple(rows), source(NAME, options, summaries), NOTE)


EXHIBIT = Exhibit(NAME, TITLE, runs, table=table)

if __name__ == "__main__":
    sys.exit(script(__doc__, EXHIBIT))
