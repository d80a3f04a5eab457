"""What a run is judged by: accuracy per task, averages, forgetting, and the summary of them all.

Accuracies are fractions in [0, 1]; only :func:`table`, which people read, shows percent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skd_jax.output import listed

SUMMARY = (  # what a summary holds beside the reports of phases
    *("method", "dataset", "seed", "classes_per_task", "class_order", "class_names"),
    *("accuracy_matrix", "top1_seen", "average_incremental_accuracy", "final_accuracy"),
    *("average_incremental_accuracy_without_base", "forgetting", "kept_bytes"),
    *("skipped_steps", "seconds", "device", "date", "remarks"),
)
Matrix = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Row:
    """Test images classified rightly after one step, over all classes seen, by the image's task.

    Counts, not ratios: tasks differ in size, and top-1 over all seen is not the mean over tasks.

    Attributes:
        correct: Entry j counts the images of task j that were classified rightly.
        total: Entry j counts the images of task j. Only a model that came without images of its
            classes has none, for task 0.

    Raises:
        ValueError: The two differ in length, are empty, or hold impossible counts.
    """

    correct: tuple[int, ...]
    total: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.total or len(self.correct) != len(self.total):
            raise ValueError(f"need one count a task, got {self.correct} of {self.total}")
        pairs = list(zip(self.correct, self.total, strict=True))
        if any(not 0 <= c <= t for c, t in pairs) or any(t == 0 for _, t in pairs[1:]):
            raise ValueError(f"impossible counts: {self.correct} of {self.total}")

    @property
    def accuracies(self) -> tuple[float | None, ...]:
        """Accuracy on each task's test images; None where there are none."""
        return tuple(c / t if t else None for c, t in zip(self.correct, self.total, strict=True))

    @property
    def top1(self) -> float | None:
        """Accuracy on the test images of all classes seen; None where a task has none."""
        return sum(self.correct) / sum(self.total) if all(self.total) else None


def accuracy_matrix(rows: Sequence[Row], tasks: int) -> list[list[float | None]]:
    """Returns A, where A[i][j] is the accuracy on task j after step i; None where j > i.

    Args:
        rows: One a step done, row i counting tasks 0..i.
        tasks: Number of columns: all tasks of the run, those still to come included.

    Raises:
        ValueError: A row does not count exactly the tasks learned by its step, or there are more
            rows than tasks.
    """
    if len(rows) > tasks:
        raise ValueError(f"{len(rows)} rows for {tasks} tasks")
    for step, row in enumerate(rows):
        if len(row.total) != step + 1:
            raise ValueError(f"row {step} must count {step + 1} tasks, not {len(row.total)}")
    return [[*row.accuracies, *[None] * (tasks - len(row.total))] for row in rows]


def average_incremental_accuracy(top1_seen: Sequence[float | None]) -> float | None:
    """Mean over the base step and every incremental step of top-1 on all classes seen.

    The paper's "average accuracy", as LUCIR reports it. Steps without test images do not count.

    References:
        Hou et al., Learning a Unified Classifier Incrementally via Rebalancing, CVPR 2019.
    """
    measured = [top1 for top1 in top1_seen if top1 is not None]
    return float(np.mean(measured)) if measured else None


def average_incremental_accuracy_without_base(top1_seen: Sequence[float | None]) -> float | None:
    """The same mean without the base step, which some papers report; None before a first task."""
    return average_incremental_accuracy(top1_seen[1:])


def forgetting(matrix: Matrix) -> float | None:
    """How far old tasks have fallen below their best, in [-1, 1]; 0.0 after the base step alone.

    Mean over tasks j < last of max_{j <= i < last} A[i][j] - A[last][j]. Negative where the last
    step improved an old task beyond all steps before it. Tasks without test images do not count;
    where no old task has any, nothing is known: None.

    Args:
        matrix: As :func:`accuracy_matrix` gives it: None, or no entry, where j > i.

    References:
        Chaudhry et al., Riemannian Walk for Incremental Learning: Understanding Forgetting and
        Intransigence, ECCV 2018.
    """
    size = len(matrix)
    last = size - 1
    # As a square array of floats, None becoming NaN.
    accuracy = np.array([[*row, *[None] * size][:size] for row in matrix], np.float64)
    tasks = [task for task in range(last) if not np.isnan(accuracy[last, task])]
    drops = [np.max(accuracy[task:last, task]) - accuracy[last, task] for task in tasks]
    if drops:
        return float(np.mean(drops))
    return None if last else 0.0


def summary(
    *,
    method: str,
    dataset: str,
    seed: int,
    classes_per_task: Sequence[int],
    class_order: Sequence[int],
    class_names: Sequence[Sequence[str]],
    rows: Sequence[Row],
    reports: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    kept_bytes: int = 0,
    skipped_steps: int = 0,
    seconds: Mapping[str, float],
    device: str,
    date: str = "",
    remarks: Sequence[str] = (),
) -> dict[str, Any]:
    """Gathers a run's results as a dictionary that JSON can hold; good after any step.

    Args:
        method: Name of the method.
        dataset: Name of the data set.
        seed: The run's seed.
        classes_per_task: Number of classes of every task of the run, the base first.
        class_order: Original class ids in the order they are learned.
        class_names: The classes of every task, by name.
        rows: One a step done, at least the base's.
        reports: What phases have reported, a list of rows by the phase's name.
        kept_bytes: What the method keeps between tasks beside the classifier.
        skipped_steps: Steps that met a number that is not finite and changed nothing.
        seconds: Wall-clock seconds by phase, and of evaluations.
        device: What it ran on, in words.
        date: The day it ended, YYYY-MM-DD.
        remarks: What somebody should know who looks no further, a line each.

    Raises:
        ValueError: No rows; rows that do not fit the tasks; or an order that does not hold the
            tasks' classes.
    """
    if not rows:
        raise ValueError("a summary needs at least the base step's row")
    if sum(classes_per_task) != len(class_order):
        raise ValueError(f"{len(class_order)} classes in order, {sum(classes_per_task)} in tasks")
    matrix = accuracy_matrix(rows, len(classes_per_task))
    top1_seen = [row.top1 for row in rows]
    return {
        "method": method,
        "dataset": dataset,
        "seed": int(seed),
        "classes_per_task": [int(n) for n in classes_per_task],
        "class_order": [int(c) for c in class_order],
        "class_names": [list(names) for names in class_names],
        "accuracy_matrix": matrix,
        "top1_seen": top1_seen,
        "average_incremental_accuracy": average_incremental_accuracy(top1_seen),
        "average_incremental_accuracy_without_base": average_incremental_accuracy_without_base(
            top1_seen
        ),
        "final_accuracy": top1_seen[-1],
        "forgetting": forgetting(matrix),
        **{name: [dict(row) for row in found] for name, found in (reports or {}).items()},
        "kept_bytes": int(kept_bytes),
        "skipped_steps": int(skipped_steps),
        "seconds": {phase: float(s) for phase, s in seconds.items()},
        "device": device,
        "date": date,
        "remarks": list(remarks),
    }


SPREAD = (
    "average_incremental_accuracy",
    "average_incremental_accuracy_without_base",
    "final_accuracy",
    "forgetting",
)


def over_seeds(summaries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What runs that differ in their seeds have found together, as a dictionary that JSON can hold.

    Args:
        summaries: Two or more, as :func:`summary` gives them.

    Returns:
        ``mean`` and ``deviation``, the sample standard deviation, of the numbers named in
        ``SPREAD`` and, as lists, of ``top1_seen``; None where a run has none. ``seeds``,
        ``skipped_steps`` and ``remarks`` are those of all; the rest is the same in each.
    """
    first = summaries[0]

    def over(reduce: Callable[[Sequence[float]], Any], values: Sequence[Any]) -> float | None:
        return None if any(x is None for x in values) else float(reduce(values))

    def every(reduce: Callable[[Sequence[float]], Any]) -> dict[str, Any]:
        found: dict[str, Any] = {n: over(reduce, [s[n] for s in summaries]) for n in SPREAD}
        tops = zip(*(s["top1_seen"] for s in summaries), strict=True)
        return found | {"top1_seen": [over(reduce, step) for step in tops]}

    same = ("method", "dataset", "classes_per_task", "kept_bytes", "seconds", "device", "date")
    return {
        **{name: first[name] for name in same},
        "seeds": [s["seed"] for s in summaries],
        "mean": every(np.mean),
        "deviation": every(lambda values: np.std(values, ddof=1)),
        "skipped_steps": sum(s["skipped_steps"] for s in summaries),
        "remarks": [f"seed {s['seed']}: {line}" for s in summaries for line in s["remarks"]],
    }


def spread_in_words(found: Mapping[str, Any]) -> str:
    """The numbers of :func:`over_seeds`, on one line for people."""
    means, deviations, seeds = found["mean"], found["deviation"], found["seeds"]
    parts = [
        f"{name.replace('_', ' ')} {100 * means[name]:.2f} +- {100 * deviations[name]:.2f}"
        for name in SPREAD
        if means[name] is not None
    ]
    return f"seeds {seeds[0]} to {seeds[-1]}, mean and sample deviation in %: {', '.join(parts)}"


def failed(row: Row, class_names: Sequence[Sequence[str]]) -> list[str]:
    """What of the accuracies wants attention, and what to do about it, a line each.

    Args:
        row: The newest.
        class_names: The classes of every task, by name.
    """
    counts = enumerate(zip(row.correct, row.total, strict=True))
    tasks = [task for task, (correct, total) in counts if total and not correct]
    if not tasks:
        return []
    words = "; ".join(f"task {task}: {listed(class_names[task], 10)}" for task in tasks)
    return [
        f"of some tasks no test image is classified rightly ({words}): if they are old, the method "
        "has to hold on to them more; if the newest, train longer or let it hold less"
    ]


def table(rows: Sequence[Row]) -> str:
    """Returns the results so far as fixed-width text, in percent.

    One line a step: accuracy on each task learned, on all classes seen, and the average of the
    latter up to that step.
    """

    def line(head: str, cells: Sequence[str]) -> str:
        return f"{head:<12}" + "".join(f"{cell:>9}" for cell in cells)

    top1_seen = [row.top1 for row in rows]
    tasks = [f"task {j}" for j in range(len(rows))]
    lines = [line("accuracy, %", [*tasks, "seen", "average"])]
    for step, row in enumerate(rows):
        averages = [row.top1, average_incremental_accuracy(top1_seen[: step + 1])]
        numbers = ["-" if a is None else f"{100 * a:.2f}" for a in [*row.accuracies, *averages]]
        blanks = [""] * (len(rows) - step - 1)
        cells = numbers[: step + 1] + blanks + numbers[step + 1 :]
        lines.append(line(f"after {step}", cells))
    return "\n".join(lines)
