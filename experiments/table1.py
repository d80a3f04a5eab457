"""Table I: the accuracy of T_0 and of S_0, which learned from D_0 alone.

python -m experiments.table1 --scale=mini --seeds=0,1,2
"""

import sys

from experiments.framework import study
from experiments.framework.exhibit import Exhibit
from experiments.framework.scripts import script
from experiments.framework.tables import Cell, Table, source

NAME = "table1"
TITLE = "Table I: T_0 and S_0"
PAPER = {  # T_0, S_0, gap
    "cifar100": (76.08, 75.86, 0.22),
    "caltech101": (76.64, 75.90, 0.74),
    "flowers102": (84.54, 83.91, 0.63),
    "imagenet_subset": (87.68, 86.80, 0.88),
}


def runs(options: study.Options) -> list[study.Run]:
    """The runs whose results it shows."""
    return [study.student(dataset, options.scale, s) for dataset in PAPER for s in options.seeds]


def table(options: study.Options) -> Table:
    """What has been run of it."""
    rows, summaries = [], []
    for dataset, paper in PAPER.items():
        if not study.has_scale(dataset, options.scale):
            continue
        found = study.summaries(runs(options), options, dataset)
        summaries += found
        first = [summary["delegator"][0] for summary in found]
        teacher = tuple(100 * row["teacher_accuracy"] for row in first)
        student = tuple(100 * row["student_accuracy"] for row in first)
        gap = tuple(a - b for a, b in zip(teacher, student, strict=True))
        agreement = tuple(100 * row["agreement"] for row in first)
        cells = [Cell(teacher, paper[0]), Cell(student, paper[1])]
        cells += [Cell(gap, paper[2], less_is_better=True), Cell(agreement)]
        rows.append((dataset, tuple(cells)))
    columns = ("T_0, %", "S_0, %", "gap, points", "same class as T_0, %")
    note = (
        "T_0 is the classifier that was trained on real images of the base classes. S_0 is a "
        "student of the same shape that saw none of them, only what the delegator D_0 draws; its "
        "features stand under T_0's head. The gap is what S_0 lacks of T_0: less is better."
    )
    where = source(NAME, options, summaries)
    return Table(TITLE, columns, tuple(rows), where, note)


EXHIBIT = Exhibit(NAME, TITLE, runs, table=table)

if __name__ == "__main__":
    sys.exit(script(__doc__, EXHIBIT))
