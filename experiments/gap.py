"""What narrows the gap between T_0 and S_0: one change of the configuration at a time.

python -m experiments.gap --scale=mini --seeds=0 --datasets=cifar100

A table for each data set; all that are there without ``--datasets``.
``experiments/README.md`` says what was learnt.
"""

import dataclasses
import sys
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from experiments.framework import study
from experiments.framework.changes import Change, Changes
from experiments.framework.scripts import script


def _weight(c: Any) -> float:
    """Of Eq. 7."""
    return c.method.stage_one.terms.feature_statistics


def _cosine(c: Any) -> dict[str, Any]:
    del c
    return {"method.stage_one.schedule": "cosine"}


def _imitate_steps(c: Any, steps: int, longer: Fraction) -> dict[str, Any]:
    """So many imitate steps a round, and rounds ``longer``, which cost as much as before."""
    one = c.method.stage_one
    return {
        "method.stage_one.imitate_steps": steps,
        "method.stage_one.epochs": int(longer * one.epochs),
        "method.stage_one.drop_every": int(longer * one.drop_every),
    }


def _twice_the_rounds(c: Any) -> dict[str, Any]:
    one = c.method.stage_one
    return {
        "method.stage_one.epochs": 2 * one.epochs,
        "method.stage_one.drop_every": 2 * one.drop_every,
    }


def _student_cosine(c: Any) -> dict[str, Any]:
    del c
    return {"method.stage_one.schedule": "student_cosine"}


def _augmented(c: Any) -> dict[str, Any]:
    return {**_student_cosine(c), "method.stage_one.augment": True}


def _with_length(c: Any, weight: float) -> dict[str, Any]:
    return {**_augmented(c), "method.stage_one.feature_length": weight}


def _at_length(summary: Any) -> float | None:
    share = summary["delegator"][0].get("student_accuracy_at_length")
    return None if share is None else 100 * share


COSINE = "the rates fall as a cosine"
STUDENT_COSINE = "S_n's rate alone falls as a cosine"
AUGMENTED = f"{STUDENT_COSINE}, pseudo images are augmented"
TWICE_AUGMENTED = f"{AUGMENTED}, twice the rounds"
LENGTH = f"{AUGMENTED}, S_n learns their features' length"
TWICE_TENTH_OF_LENGTH = f"{LENGTH} by a tenth of that weight, twice the rounds"
TWO_STEPS = "2 imitate steps, 7/4 of the rounds"
TEN_STEPS = "10 imitate steps, 7/12 of the rounds"
KL = "Eq. 7 of Gaussians' KL x 50"
CIFAR100 = Changes(
    "gap",
    "gap",
    "The gap between T_0 and S_0: one change at a time",
    lambda scale, seed: study.student("cifar100", scale, seed),
    {
        "twice the rounds": _twice_the_rounds,
        "twice the batch, half the rounds": lambda c: {
            "method.stage_one.batch": 2 * c.method.stage_one.batch,
            "method.stage_one.epochs": c.method.stage_one.epochs // 2,
            "method.stage_one.drop_every": c.method.stage_one.drop_every // 2,
        },
        TWO_STEPS: lambda c: _imitate_steps(c, 2, Fraction(7, 4)),
        TEN_STEPS: lambda c: _imitate_steps(c, 10, Fraction(7, 12)),
        "the rates drop each 3/5 of that": lambda c: {
            "method.stage_one.drop_every": 3 * c.method.stage_one.drop_every // 5
        },
        COSINE: _cosine,
        f"twice the rounds, and {COSINE}": lambda c: {
            "method.stage_one.epochs": 2 * c.method.stage_one.epochs,
            **_cosine(c),
        },
        STUDENT_COSINE: _student_cosine,
        AUGMENTED: _augmented,
        TWICE_AUGMENTED: lambda c: {**_augmented(c), **_twice_the_rounds(c)},
        LENGTH: lambda c: _with_length(c, 1.0),
        TWICE_TENTH_OF_LENGTH: lambda c: {**_with_length(c, 0.1), **_twice_the_rounds(c)},
        "the student's rate / 3": lambda c: {
            "method.stage_one.student_lr": c.method.stage_one.student_lr / 3
        },
        "the delegator's rate x 3": lambda c: {
            "method.stage_one.delegator_lr": 3 * c.method.stage_one.delegator_lr
        },
        "the student rests in the explore step": lambda c: {
            "method.stage_one.student_explores": False
        },
        "Eq. 7 of S_n's moments": lambda c: {"method.stage_one.feature_source": "student"},
        "Eq. 7 of standard deviations": lambda c: {"method.stage_one.feature_distance": "std"},
        "Eq. 7 weighs a tenth": lambda c: {
            "method.stage_one.terms.feature_statistics": _weight(c) / 10
        },
        "Eq. 7 weighs 10 times": lambda c: {
            "method.stage_one.terms.feature_statistics": _weight(c) * 10
        },
        KL: lambda c: {
            "method.stage_one.feature_distance": "kl_of_running",
            "method.stage_one.terms.feature_statistics": 50.0,
        },
        "S_n learns outputs (KL), not features": lambda c: {"method.stage_one.discrepancy": "kl"},
        "lambda x 10": lambda c: {
            "method.stage_one.terms.exploration": 10 * c.method.stage_one.terms.exploration
        },
    },
    {
        "S_0, %": lambda s: 100 * s["delegator"][0]["student_accuracy"],
        "gap, points": lambda s: 100 * s["delegator"][0]["gap"],
        "S_0 at T_0's length, %": _at_length,
    },
    compared="S_0, %",
    remark="At T_0's length: S_0's features, whose length Eq. 1 leaves free, times the number by "
    "which those of pseudo images are as long as T_0's (blank: not measured).",
)


def _of_larger_images(dataset: str, title: str, changes: Mapping[str, Change]) -> Changes:
    """The same table of these changes on another data set.

    Args:
      dataset: its config's file.
      title: its name.
      changes: what is changed, by name.
    """
    return dataclasses.replace(
        CIFAR100,
        name=f"gap_{dataset}",
        title=f"The gap between T_0 and S_0 on {title}: one change at a time",
        whole=lambda scale, seed: study.student(dataset, scale, seed),
        changes=changes,
    )


SAME = ("the student rests in the explore step", "Eq. 7 weighs a tenth", KL)
CALTECH101 = _of_larger_images(  # where Eq. 7 is the largest term by far
    "caltech101",
    "Caltech-101",
    {
        **{name: CIFAR100.changes[name] for name in SAME},
        "Eq. 7 weighs a hundredth": lambda c: {
            "method.stage_one.terms.feature_statistics": _weight(c) / 100
        },
    },
)
FLOWERS102 = _of_larger_images(  # where lambda is 20
    "flowers102",
    "Flowers-102",
    {
        "the student learns in the explore step": lambda c: {
            "method.stage_one.student_explores": True
        },
        KL: CIFAR100.changes[KL],
    },
)
TABLES = (CIFAR100, CALTECH101, FLOWERS102)
EXHIBITS = tuple(table.exhibit for table in TABLES)

if __name__ == "__main__":
    sys.exit(script(__doc__, *EXHIBITS))
