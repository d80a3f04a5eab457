"""What keeps the old classes over five tasks: one change of the configuration at a time.

python -m experiments.forgetting --scale=mini --seeds=0 --datasets=cifar100

A table for each data set; all that are there without ``--datasets``.
``experiments/README.md`` says what was learnt.
"""

import dataclasses
import sys

from experiments import first_task, gap
from experiments.framework import study
from experiments.framework.changes import Changes
from experiments.framework.scripts import script

HALF_WAY = first_task.HALF_WAY

CIFAR100 = Changes(
    "forgetting",
    "forgetting",
    "Forgetting over five tasks: one change at a time",
    lambda scale, seed: study.learner("cifar100", scale, seed, tasks=5),
    {
        "D_n fine-tuned a third as long": lambda c: {
            "method.stage_one.finetune_epochs": c.method.stage_one.finetune_epochs // 3,
            "method.stage_one.finetune_drop_every": max(
                1, c.method.stage_one.finetune_drop_every // 3
            ),
        },
        "D_n fine-tuned 3 times as long": lambda c: {
            "method.stage_one.finetune_epochs": 3 * c.method.stage_one.finetune_epochs,
            "method.stage_one.finetune_drop_every": 3 * c.method.stage_one.finetune_drop_every,
        },
        **first_task.BALANCED,
        **first_task.HEADS,
        "new weights of the head as long as old ones": lambda c: {
            "method.stage_two.align_head": True
        },
        "as their classes do, and new weights as long": lambda c: {
            "method.stage_two.balanced": 1.0,
            "method.stage_two.align_head": True,
        },
        "beta x 3": lambda c: {"method.stage_two.beta": 3 * c.method.stage_two.beta},
        "beta / 3": first_task.a_third_of_beta,
        "half the epochs": first_task.half_the_epochs,
        "a tenth of the rate": lambda c: {"method.stage_two.lr": c.method.stage_two.lr / 10},
        **first_task.WITH_AUGMENTED,
    },
    {
        "average, %": study.average,
        "final, %": lambda s: 100 * s["final_accuracy"],
        "base classes at the end, %": lambda s: 100 * s["accuracy_matrix"][-1][0],
        "last task's classes at the end, %": lambda s: 100 * s["accuracy_matrix"][-1][-1],
    },
    compared="average, %",
    remark="Rows of augmented pseudo images start from a D_0 that was trained so, as D_n is later.",
    beside_kept=True,
    starts=first_task.AUGMENTED_STARTS,
    made={first_task.OURS: first_task.whole_of_ours},
)


def _of_larger_images(title: str, gaps: Changes) -> Changes:
    """The same on another data set, and with a delegator that narrows the gap there.

    Args:
      title: its name.
      gaps: what narrows the gap there.
    """
    dataset = gaps.dataset
    half_way, of_kl = CIFAR100.changes[HALF_WAY], gaps.changes[gap.KL]
    both = f"{gap.KL}, and half way"
    return dataclasses.replace(
        CIFAR100,
        name=f"forgetting_{dataset}",
        title=f"Forgetting over five tasks on {title}: one change at a time",
        whole=lambda scale, seed: study.learner(dataset, scale, seed, tasks=5),
        changes={
            HALF_WAY: half_way,
            gap.KL: of_kl,
            both: lambda c: {**half_way(c), **of_kl(c)},
        },
        remark=f"Rows of {gap.KL} start from a D_0 that was trained so.",
        made={},
        starts=dict.fromkeys((gap.KL, both), lambda scale, seed: gaps.run(scale, seed, gap.KL)),
    )


TABLES = (
    CIFAR100,
    _of_larger_images("Caltech-101", gap.CALTECH101),
    _of_larger_images("Flowers-102", gap.FLOWERS102),
)
EXHIBITS = tuple(table.exhibit for table in TABLES)

if __name__ == "__main__":
    sys.exit(script(__doc__, *EXHIBITS))
