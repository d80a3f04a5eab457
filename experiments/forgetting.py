"""What keeps the old classes over five tasks: one change of the configuration at a time.

python -m experiments.forgetting --scale=mini --seeds=0

Differences are from the first row, seed by seed. ``experiments/README.md`` says what was learnt.
"""

import sys

from experiments import study
from experiments.making import script
from experiments.tables import Cell, Table, source

NAME = "forgetting"
TITLE = "Forgetting over five tasks: one change at a time"
DATASET, TASKS = "cifar100", 5
CHANGES: dict[str, study.Change] = {
    "as it is": lambda c: {},
    "D_n fine-tuned a third as long": lambda c: {
        "stage_one.finetune_epochs": c.stage_one.finetune_epochs // 3,
        "stage_one.finetune_drop_every": max(1, c.stage_one.finetune_drop_every // 3),
    },
    "D_n fine-tuned 3 times as long": lambda c: {
        "stage_one.finetune_epochs": 3 * c.stage_one.finetune_epochs,
        "stage_one.finetune_drop_every": 3 * c.stage_one.finetune_drop_every,
    },
    "every class weighs the same in Eq. 10": lambda c: {"stage_two.balanced": 1.0},
    "half way to that": lambda c: {"stage_two.balanced": 0.5},
    "new weights of the head as long as old ones": lambda c: {"stage_two.align_head": True},
    "every class the same, and new weights as long": lambda c: {
        "stage_two.balanced": 1.0,
        "stage_two.align_head": True,
    },
    "beta x 3": lambda c: {"stage_two.beta": 3 * c.stage_two.beta},
    "beta / 3": lambda c: {"stage_two.beta": c.stage_two.beta / 3},
    "half the epochs": lambda c: {
        "stage_two.epochs": c.stage_two.epochs // 2,
        "stage_two.drop_epochs": tuple(epoch // 2 for epoch in c.stage_two.drop_epochs),
    },
    "a tenth of the rate": lambda c: {"stage_two.lr": c.stage_two.lr / 10},
}


def run(told: study.Options, seed: int, name: str) -> study.Run:
    """The run of one change."""
    whole = study.learner(DATASET, told.scale, seed, TASKS)
    return study.changed(whole, "forgetting", name, CHANGES[name])


def runs(told: study.Options) -> list[study.Run]:
    """The runs whose results it shows."""
    return [run(told, seed, name) for name in CHANGES for seed in told.seeds]


def table(told: study.Options) -> Table:
    """What has been run of it."""
    rows, first = [], {}  # the average of "as it is", by seed
    for name in CHANGES:
        found = study.summaries([run(told, seed, name) for seed in told.seeds], told)
        averages = {s["seed"]: 100 * s["average_incremental_accuracy"] for s in found}
        if name == "as it is":
            first = averages
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
    where = source(NAME, told.scale, study.summaries(runs(told), told))
    return Table(TITLE, columns, tuple(rows), where)


if __name__ == "__main__":
    sys.exit(script(sys.modules[__name__], __doc__))
