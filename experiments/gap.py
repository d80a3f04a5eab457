"""What narrows the gap between T_0 and S_0: one change of the configuration at a time.

python -m experiments.gap --scale=mini --seeds=0

Differences are from the first row, seed by seed. ``experiments/README.md`` says what was learnt.
"""

import sys
from typing import Any

from experiments import study
from experiments.tables import Cell, Table, source

NAME = "gap"
TITLE = "The gap between T_0 and S_0: one change at a time"
DATASET = "cifar100"
CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "twice the rounds": {"stage_one.epochs": 80, "stage_one.drop_every": 68},
    "twice the batch, half the rounds": {
        "stage_one.batch": 64,
        "stage_one.epochs": 20,
        "stage_one.drop_every": 17,
    },
    "rates drop at half the rounds": {"stage_one.drop_every": 20},
    "the student's rate / 3": {"stage_one.student_lr": 0.03},
    "the delegator's rate x 3": {"stage_one.delegator_lr": 0.003},
    "the student rests in the explore step": {"stage_one.student_explores": False},
    "Eq. 7 of S_n's moments": {"stage_one.feature_source": "student"},
    "Eq. 7 of standard deviations": {"stage_one.feature_distance": "std"},
    "Eq. 7 weighs 0.1": {"stage_one.terms.feature_statistics": 0.1},
    "lambda 10": {"stage_one.terms.exploration": 10.0},
}


def run(told: study.Options, seed: int, name: str) -> study.Run:
    """The run of one change."""
    return study.changed(study.student(DATASET, told.scale, seed), "gap", name, CHANGES[name])


def runs(told: study.Options) -> list[study.Run]:
    """The runs whose results it shows."""
    return [run(told, seed, name) for name in CHANGES for seed in told.seeds]


def make(told: study.Options) -> None:
    """Makes the runs that are missing."""
    study.make(runs(told), told)


def table(told: study.Options) -> Table:
    """What has been run of it."""
    rows, first = [], {}
    for name in CHANGES:
        found = study.summaries([run(told, seed, name) for seed in told.seeds], told)
        gaps = {s["seed"]: 100 * s["delegator"][0]["gap"] for s in found}
        first = first or gaps
        change = tuple(gap - first[seed] for seed, gap in gaps.items() if seed in first)
        minutes = tuple(s["seconds"]["delegator"] / 60 for s in found)
        student = tuple(100 * s["delegator"][0]["student_accuracy"] for s in found)
        cells = (Cell(student), Cell(tuple(gaps.values())), Cell(change), Cell(minutes))
        rows.append((name, cells))
    columns = ("S_0, %", "gap, points", "change of the gap", "minutes")
    where = source(told.command(NAME), told.scale, study.summaries(runs(told), told))
    return Table(TITLE, columns, tuple(rows), where)


def draw(told: study.Options) -> None:
    """Writes the table."""
    study.write_table(told, NAME, table(told))


if __name__ == "__main__":
    sys.exit(study.script(sys.modules[__name__]))
