"""Table III: what SKD and ALW are worth to the average accuracy of 5 and 10 tasks.

python -m experiments.table3 --scale=mini --seeds=0,1,2
"""

import sys

import numpy as np

from experiments.framework import study
from experiments.framework.exhibit import Exhibit
from experiments.framework.making import script
from experiments.framework.tables import Cell, Table, source

NAME = "table3"
TITLE = "Table III: SKD and ALW, average accuracy on CIFAR-100"
DATASETS = ("cifar100",)
TASKS = (5, 10)
PAPER: dict[str, tuple[float | None, float | None]] = {
    "no_skd_no_alw": (29.16, 18.26),
    "no_skd": (56.35, 49.96),
    "no_skd_new_outputs": (56.35, 49.96),
    "no_skd_old_head_fixed": (56.35, 49.96),
    "no_alw": (None, None),
    "skd": (61.42, 59.62),
}
NAMES = {
    "no_skd_no_alw": "without SKD and ALW",
    "no_skd": "without SKD: Eq. 10 over all outputs",
    "no_skd_new_outputs": "without SKD: Eq. 10 over the new outputs",
    "no_skd_old_head_fixed": "without SKD: old head fixed",
    "no_alw": "without ALW",
    "skd": "SKD",
}
NOTE = (
    "The mean of the accuracies on all classes seen, the base step among them. The paper does not "
    'say what its "w/o SKD" leaves of Eq. 10, so three readings are shown beside its one number.'
)


def runs(options: study.Options) -> list[study.Run]:
    """The runs whose results it shows."""
    return [
        study.learner(dataset, options.scale, seed, tasks, name)
        for dataset in DATASETS
        for seed in options.seeds
        for tasks in TASKS
        for name in study.LEARNERS
    ]


def _nothing_learned(options: study.Options, tasks: int) -> Cell:
    """The average of a classifier that stays T_0, where all classes have as many test images."""
    averages = []
    for seed in options.seeds:
        if found := study.summary(study.learner(DATASETS[0], options.scale, seed, tasks), options):
            seen = np.cumsum(found["classes_per_task"])
            averages.append(100 * found["top1_seen"][0] * np.mean(seen[0] / seen))
    return Cell(tuple(averages))


def table(options: study.Options) -> Table:
    """What has been run of it."""
    rows = [
        ("T_0 kept, nothing learned", tuple(_nothing_learned(options, tasks) for tasks in TASKS))
    ]
    for name, paper in PAPER.items():
        cells = []
        for tasks, number in zip(TASKS, paper, strict=True):
            wanted = [run for run in runs(options) if run.name == f"tasks{tasks}/{name}"]
            found = study.summaries(wanted, options)
            averages = tuple(100 * s["average_incremental_accuracy"] for s in found)
            cells.append(Cell(averages, number))
        rows.append((NAMES[name], tuple(cells)))
    columns = tuple(f"{tasks} tasks, %" for tasks in TASKS)
    where = source(NAME, options.scale, study.summaries(runs(options), options))
    return Table(TITLE, columns, tuple(rows), where, NOTE)


EXHIBIT = Exhibit(NAME, TITLE, runs, table=table)

if __name__ == "__main__":
    sys.exit(script(__doc__, EXHIBIT))
