"""A T_0 that is kept as it is and learns nothing: what every method is to be held against."""

from collections.abc import Mapping
from typing import Any

import numpy as np

LABEL = "T_0 kept, nothing learned"


def accuracies(summary: Mapping[str, Any]) -> np.ndarray:
    """Its top-1 on all classes seen, after the base step and after each task.

    It is right on the base classes as often as before and wrong on all others, so that its accuracy
    falls with the base classes' share of the test images.

    Args:
      summary: of any run that starts from this T_0, with T_0's accuracy as its base step's.

    Returns:
      [tasks + 1], each in 0 to 1.
    """
    return summary["top1_seen"][0] / np.cumsum(test_images(summary))


def summary_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What its own summary would say of accuracies, forgetting, bytes and seconds.

    Args:
      summary: see :func:`accuracies`.

    Returns:
      The summary with these fields, and ``method``, replaced.
    """
    seen, tasks = accuracies(summary).tolist(), len(summary["classes_per_task"])
    rows = [[seen[0], *[0.0] * n, *[None] * (tasks - 1 - n)] for n in range(tasks)]
    return {
        **summary,
        "method": LABEL,
        "accuracy_matrix": rows,
        "top1_seen": seen,
        "average_incremental_accuracy": float(np.mean(seen)),
        "average_incremental_accuracy_without_base": float(np.mean(seen[1:] or [np.nan])),
        "final_accuracy": seen[-1],
        "forgetting": 0.0,
        "kept_bytes": 0,
        "seconds": {},
    }


def test_images(summary: Mapping[str, Any]) -> np.ndarray:
    """How many test images each task has, the base step's being 1.

    A step's accuracy on all classes is the mean of those on each task, weighted by this. Where that
    leaves it open, or the run ended before, all classes have as many.
    """
    classes = summary["classes_per_task"]
    found = np.array(classes) / classes[0]
    for n in range(1, len(summary["accuracy_matrix"])):  # a run may end before its last task
        row = np.array(summary["accuracy_matrix"][n][: n + 1], np.float64)
        all_of_them = summary["top1_seen"][n]
        others, last = found[:n] @ (row[:n] - all_of_them), all_of_them - row[n]
        implied = others / last if abs(last) > 1e-9 else np.nan
        if implied > 0:
            found[n] = implied
    return found
