"""Accuracy against the number of classes seen, mean and deviation over seeds: Figures 5 to 8."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from experiments.framework import kept, study
from experiments.framework.exhibit import Exhibit
from experiments.framework.panels import SMALL, row_by_row, save
from experiments.framework.study import Options, Run
from experiments.framework.tables import Picture, source

LABELS = {
    "skd": "SKD",
    "no_alw": "without ALW",
    "no_skd": "without SKD",
    "no_skd_no_alw": "without SKD and ALW",
}
MOST_TICKS = 8  # at an axis of half the page's width
TWO = ("skd", "no_skd")
FOUR = tuple(LABELS)
Panel = tuple[str, int, tuple[str, ...]]  # data set, tasks, some of study.LEARNERS


def exhibit(name: str, title: str, panels: Sequence[Panel]) -> Exhibit:
    """A figure of such panels; the other methods that the paper's figures show are not drawn.

    Args:
      name: of its script and file.
      title: of the figure.
      panels: in the paper's order.
    """

    def pictures(options: Options) -> list[Picture]:
        where = source(name, options, study.summaries(runs(options, panels), options))
        return [Picture(options.out / f"{name}.png", title, where)]

    return Exhibit(
        name,
        title,
        lambda options: runs(options, panels),
        draw=lambda options: draw(options, panels, options.out / f"{name}.png"),
        pictures=pictures,
    )


def runs(options: Options, panels: Sequence[Panel]) -> list[Run]:
    """The runs behind some panels."""
    return [
        study.learner(dataset, options.scale, seed, tasks, name)
        for dataset, tasks, names in panels
        for seed in options.seeds
        for name in names
    ]


def draw(options: Options, panels: Sequence[Panel], path: Path) -> None:
    """Draws the panels that have results side by side; none, if there are none."""
    shown = [panel for panel in panels if study.summaries(runs(options, [panel]), options)]
    if not shown:
        path.unlink(missing_ok=True)
        return
    figure, grid = row_by_row(len(shown), columns=1, height=3.9)
    for axes, panel in zip(grid, shown, strict=True):
        _draw(options, panel, axes)
    save(figure, path)


def _draw(options: Options, panel: Panel, axes: Axes) -> None:
    dataset, tasks, names = panel
    same: dict[int, dict[str, Any]] = {}  # a run of each seed, all from one T_0
    for number, name in enumerate(names):
        found = study.summaries(runs(options, [(dataset, tasks, (name,))]), options)
        if found:
            curve(axes, found, LABELS[name], "osD^"[number % 4] + "-", f"C{number}")
            same = {summary["seed"]: summary for summary in found} | same
    kept_as_it_is(axes, [same[seed] for seed in sorted(same)])
    finish(axes, f"{dataset}, {tasks} {'task' if tasks == 1 else 'tasks'}")


def curve(
    axes: Axes, found: Sequence[dict[str, Any]], name: str, line: str, color: str, **more: Any
) -> None:
    """Draws the mean over some runs' seeds, and the deviation.

    Args:
      axes: to draw on.
      found: the runs' summaries; at least one.
      name: in the legend.
      line: marker and style, as matplotlib has them.
      color: of it.
      more: for ``axes.plot``.
    """
    top1 = np.array([summary["top1_seen"] for summary in found])
    seen = list(accumulate(found[0]["classes_per_task"]))
    mean, spread = top1.mean(axis=0), top1.std(axis=0, ddof=1 if len(top1) > 1 else 0)
    average = np.mean([summary["average_incremental_accuracy"] for summary in found])
    label = f"{name}: {average:.1%} ({len(found)})"
    axes.plot(seen, mean, line, color=color, label=label, **more)
    axes.fill_between(seen, mean - spread, mean + spread, color=color, alpha=0.15)


def kept_as_it_is(axes: Axes, found: Sequence[dict[str, Any]]) -> None:
    """Draws the curve of a T_0 that learns nothing.

    Args:
      axes: to draw on.
      found: the summary of a run of each seed, as :func:`kept.accuracies` takes it; at least one.
    """
    curve(axes, [kept.summary_of(summary) for summary in found], "T_0 kept", "--", "black")


def finish(axes: Axes, title: str, **legend: Any) -> None:
    """Titles, ticks and the legend of a panel of curves.

    Ticks are at the numbers of classes that there are points of; where those are many, at every
    second or third of them.
    """
    seen = sorted({x for line in axes.lines for x in np.asarray(line.get_xdata()).tolist()})
    axes.set_title(title)
    axes.set_xlabel("classes seen")
    axes.set_ylabel("top-1 on all classes seen")
    axes.set_xticks(seen[:: -(-len(seen) // MOST_TICKS)])
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(title="average (seeds)", fontsize=SMALL, title_fontsize=SMALL, **legend)
