"""What narrows the gap between T_0 and S_0: one change of the configuration at a time.

python -m experiments.gap --scale=mini --seeds=0

Differences are from the first row, seed by seed. ``experiments/README.md`` says what was learnt.
"""

import sys

from experiments import study
from experiments.making import script
from experiments.tables import Cell, Table, source

NAME = "gap"
TITLE = "The gap between T_0 and S_0: one change at a time"
DATASET = "cifar100"
CHANGES: dict[str, study.Change] = {
    "as it is": lambda c: {},
    "twice the rounds": lambda c: {
        "stage_one.epochs": 2 * c.stage_one.epochs,
        "stage_one.drop_every": 2 * c.stage_one.drop_every,
    },
    "twice the batch, half the rounds": lambda c: {
        "stage_one.batch": 2 * c.stage_one.batch,
        "stage_one.epochs": c.stage_one.epochs // 2,
        "stage_one.drop_every": c.stage_one.drop_every // 2,
    },
    "the rates drop at 3/5 of what they did": lambda c: {
        "stage_one.drop_every": 3 * c.stage_one.drop_every // 5
    },
    "the student's rate / 3": lambda c: {"stage_one.student_lr": c.stage_one.student_lr / 3},
    "the delegator's rate x 3": lambda c: {"stage_one.delegator_lr": 3 * c.stage_one.delegator_lr},
    "the student rests in the explore step": lambda c: {"stage_one.student_explores": False},
    "Eq. 7 of S_n's moments": lambda c: {"stage_one.feature_source": "student"},
    "Eq. 7 of standard deviations": lambda c: {"stage_one.feature_distance": "std"},
    "Eq. 7 weighs a tenth": lambda c: {
        "stage_one.terms.feature_statistics": c.stage_one.terms.feature_statistics / 10
    },
    "lambda x 10": lambda c: {"stage_one.terms.exploration": 10 * c.stage_one.terms.exploration},
}


def run(told: study.Options, seed: int, name: str) -> study.Run:
    """The run of one change."""
    return study.changed(study.student(DATASET, told.scale, seed), "gap", name, CHANGES[name])


def runs(told: study.Options) -> list[study.Run]:
    """The runs whose results it shows."""
    return [run(told, seed, name) for name in CHANGES for seed in told.seeds]


def table(told: study.Options) -> Table:
    """What has been run of it."""
    rows, first = [], {}  # the gap of "as it is", by seed
    for name in CHANGES:
        found = study.summaries([run(told, seed, name) for seed in told.seeds], told)
        gaps = {s["seed"]: 100 * s["delegator"][0]["gap"] for s in found}
        if name == "as it is":
            first = gaps
        change = tuple(gap - first[seed] for seed, gap in gaps.items() if seed in first)
        student = tuple(100 * s["delegator"][0]["student_accuracy"] for s in found)
        cells = (Cell(student), Cell(tuple(gaps.values())), Cell(change))
        rows.append((name, cells))
    columns = ("S_0, %", "gap, points", "change of the gap")
    where = source(NAME, told.scale, study.summaries(runs(told), told))
    return Table(TITLE, columns, tuple(rows), where)


if __name__ == "__main__":
    sys.exit(script(sys.modules[__name__], __doc__))
