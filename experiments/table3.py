"""Table III: what SKD and ALW are worth to the average accuracy of 5 and 10 tasks.

python -m experiments.table3 --scale=mini --seeds=0,1,2
"""

import sys
from collections.abc import Sequence

from experiments.framework import kept, study
from experiments.framework.exhibit import Exhibit
from experiments.framework.scripts import script
from experiments.framework.tables import Cell, Table, difference, source

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
    "The mean of the accuracies on all classes seen, the base step among them. SKD here is the "
    "delegator, which replays old classes; ALW is adaptive loss weighting: gamma_n of Eq. 12, by "
    "which classification (Eq. 10) counts less, beside keeping the features, the more classes have "
    'been learned. The paper does not say what its "w/o SKD" leaves of Eq. 10, so three readings '
    "are shown beside its one number."
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


def nothing_learned(options: study.Options, dataset: str, tasks: int) -> Cell:
    """The average of a T_0 that is kept as it is."""
    runs = [study.learner(dataset, options.scale, seed, tasks) for seed in options.seeds]
    found = study.summaries(runs, options)
    return Cell(tuple(study.average(kept.summary_of(summary)) for summary in found))


def _of_first_row(first: Sequence[Cell], skd: Sequence[Cell]) -> str:
    """What the row of a T_0 that is kept is there for, and where SKD stands beside it."""
    pairs = [(n, a, b) for n, a, b in zip(TASKS, first, skd, strict=True) if a.ours and b.ours]
    beside = [f"{difference(b.mean, a.mean)} it over {n} tasks" for n, a, b in pairs]
    return (
        "The first row is no method: T_0 is kept as it is and calls every image one of its base "
        "classes, so it is as right on those as before and wrong on all new ones. What learns has "
        "to beat it"
        + (f"; SKD is {' and '.join(beside)}. " if beside else ". ")
        + "Where new classes are few, not to forget is worth more than to learn."
    )


def table(options: study.Options) -> Table:
    """What has been run of it."""
    first = tuple(nothing_learned(options, DATASETS[0], tasks) for tasks in TASKS)
    rows = [(kept.LABEL, first)]
    for name, paper in PAPER.items():
        cells = []
        for tasks, number in zip(TASKS, paper, strict=True):
            wanted = [run for run in runs(options) if run.name == f"tasks{tasks}/{name}"]
            found = study.summaries(wanted, options)
            cells.append(Cell(tuple(map(study.average, found)), number))
        rows.append((NAMES[name], tuple(cells)))
    columns = tuple(f"{tasks} tasks, %" for tasks in TASKS)
    where = source(NAME, options, study.summaries(runs(options), options))
    note = f"{NOTE} {_of_first_row(first, rows[-1][1])}"
    return Table(TITLE, columns, tuple(rows), where, note)


EXHIBIT = Exhibit(NAME, TITLE, runs, table=table)

if __name__ == "__main__":
    sys.exit(script(__doc__, EXHIBIT))
