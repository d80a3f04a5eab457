"""What the first of five tasks costs the base classes: one change at a time.

python -m experiments.first_task --scale=midi --seeds=0

``experiments/README.md`` says what was learnt.
"""

import sys
from typing import Any

from configs import recipes
from experiments import gap
from experiments.framework import study
from experiments.framework.changes import Change, Changes
from experiments.framework.scripts import script

HALF_WAY = "old and new images weigh half way to their classes"
BY_CLASSES = "old and new images weigh as their classes do"
OURS = "recipe=ours"


def _two(**fields: Any) -> Change:
    """These fields of stage two."""
    changed = {f"method.stage_two.{name}": value for name, value in fields.items()}
    return lambda config: changed


def a_third_of_beta(config: Any) -> dict[str, Any]:
    """Eq. 12's beta / 3."""
    return {"method.stage_two.beta": config.method.stage_two.beta / 3}


def half_the_epochs(config: Any) -> dict[str, Any]:
    """Of stage two, and each drop at half its epoch."""
    two = config.method.stage_two
    return {
        "method.stage_two.epochs": two.epochs // 2,
        "method.stage_two.drop_epochs": tuple(epoch // 2 for epoch in two.drop_epochs),
    }


BALANCED: dict[str, Change] = {
    BY_CLASSES: _two(balanced=1.0),
    HALF_WAY: _two(balanced=0.5),
}
HEADS: dict[str, Change] = {  # and how old and new images weigh
    "old head fixed": _two(classification="old_head_fixed"),
    "old head fixed, as classes do": _two(classification="old_head_fixed", balanced=1.0),
    "local cross-entropy": _two(classification="local"),
    "local cross-entropy, half way": _two(classification="local", balanced=0.5),
    "local cross-entropy, as classes do": _two(classification="local", balanced=1.0),
    "local cross-entropy, old head fixed, half way": _two(
        classification="local_old_head_fixed", balanced=0.5
    ),
    "local cross-entropy, old head fixed, as classes do": _two(
        classification="local_old_head_fixed", balanced=1.0
    ),
    # Features learn from real images alone.
    "real images, old head fixed, half way": _two(
        classification="real_old_head_fixed", balanced=0.5
    ),
    "real images, old head fixed, as classes do": _two(
        classification="real_old_head_fixed", balanced=1.0
    ),
    OURS: _two(**recipes.OURS),  # the same, and gamma slows the features alone
}


def _ours_augmented(config: Any) -> dict[str, Any]:
    return {**HEADS[OURS](config), **gap.CIFAR100.changes[gap.AUGMENTED](config)}


# Pseudo images are augmented here too, and drawn by a delegator that was trained so.
WITH_AUGMENTED: dict[str, Change] = {
    gap.AUGMENTED: gap.CIFAR100.changes[gap.AUGMENTED],
    f"{OURS}, {gap.AUGMENTED}": _ours_augmented,
}
AUGMENTED_STARTS = dict.fromkeys(
    WITH_AUGMENTED, lambda scale, seed: gap.CIFAR100.run(scale, seed, gap.AUGMENTED)
)


def whole_of_ours(scale: str, seed: int) -> study.Run:
    """Five tasks by recipe=ours, which comparisons of methods have too."""
    return study.method("cifar100", scale, seed, 5, "ours")


TABLE = Changes(
    "first_task",
    "first_task",
    "The first of five tasks: one change at a time",
    lambda scale, seed: study.learner("cifar100", scale, seed, tasks=5),
    {
        **BALANCED,
        **HEADS,
        "a third of beta": a_third_of_beta,
        "half the epochs": half_the_epochs,
        **WITH_AUGMENTED,
    },
    {
        "all classes, %": lambda s: 100 * s["top1_seen"][1],
        "base classes, %": lambda s: 100 * s["accuracy_matrix"][1][0],
        "new classes, %": lambda s: 100 * s["accuracy_matrix"][1][1],
    },
    compared="all classes, %",
    remark="Rows of augmented pseudo images start from a D_0 that was trained so.",
    beside_kept=True,
    phases=3,
    starts=AUGMENTED_STARTS,
    made={OURS: whole_of_ours},
)
EXHIBIT = TABLE.exhibit

if __name__ == "__main__":
    sys.exit(script(__doc__, EXHIBIT))
