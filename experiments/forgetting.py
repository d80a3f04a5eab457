"""What keeps the old classes over five tasks: one change of the configuration at a time.

python -m experiments.forgetting --scale=mini --seeds=0

Differences are from the first row, seed by seed. ``experiments/README.md`` says what was learnt.
"""

import sys
from typing import Any

from experiments import study
from experiments.tables import Cell, Table, source

NAME = "forgetting"
TITLE = "Forgetting over five tasks: one change at a time"
DATASET, TASKS = "cifar100", 5
CHANGES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "D_n fine-tuned a sixth as long": {
        "stage_one.finetune_epochs": 1,
        "stage_one.finetune_drop_every": 1,
    },
    "D_n fine-tuned 3 times as long": {
        "stage_one.finetune_epochs": 18,
        "stage_one.finetune_drop_every": 15,
    },
    "every class weighs the same in Eq. 10": {"stage_two.balanced": True},
    "new weights of the head as long as old ones": {"stage_two.align_head": True},
    "both": {"stage_two.balanced": True, "stage_two.align_head": True},
    "beta x 3": {"stage_two.beta": 3.0},
    "beta / 3": {"stage_two.beta": 0.33},
    "half the epochs": {"stage_two.epochs": 10, "stage_two.drop_epochs": (5, 7)},
    "a tenth of the rate": {"stage_two.lr": 0.01},
}


def run(told: study.Options, seed: int, name: str) -> study.Run:
    """The run of one change."""
    whole = study.learner(DATASET, told.scale, seed, TASKS)
    return study.changed(whole, "forgetting", name, CHANGES[name])


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
        averages = {s["seed"]: 100 * s["average_incremental_accuracy"] for s in found}
        first = first or averages
        change = tuple(x - first[seed] for seed, x in averages.items() if seed in first)
        matrices = [s["accuracy_matrix"] for s in found]
        cells = (
            Cell(tuple(averages.values())),
            Cell(change),
            Cell(tuple(100 * s["final_accuracy"] for s in found)),
            Cell(tuple(100 * matrix[-1][0] for matrix in matrices)),
            Cell(tuple(100 * matrix[-1][-1] for matrix in matrices)),
        )
        rows.append((name, cells))
    columns = (
        *("average, %", "change", "final, %"),
        *("base classes at the end, %", "last task's classes at the end, %"),
    )
    where = source(told.command(NAME), told.scale, study.summaries(runs(told), told))
    return Table(TITLE, columns, tuple(rows), where)


def draw(told: study.Options) -> None:
    """Writes the table."""
    study.write_table(told, NAME, table(told))


if __name__ == "__main__":
    sys.exit(study.script(sys.modules[__name__]))
