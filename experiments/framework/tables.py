"""Tables of the paper, ours beside its: means over seeds, as Markdown and as HTML."""

import dataclasses
import html
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skd_jax.methods import METHODS
from skd_jax.methods.phase import logits


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
      ours: one value a seed that has been run, in percent or points.
      paper: the paper's number, if it gives one.
      applies: whether there could be a number.
      of_seeds: whether ``ours`` are seeds; else one plain number.
      said: words, where there is no number.
    """

    ours: tuple[float, ...] = ()
    paper: float | None = None
    applies: bool = True
    of_seeds: bool = True
    said: str = ""

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return float(np.mean(self.ours))

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds; None of one."""
        return float(np.std(self.ours, ddof=1)) if len(self.ours) > 1 else None

    def __str__(self) -> str:
        if self.said:
            return self.said
        if not self.ours:
            return "not run" if self.applies else ""
        if not self.of_seeds:
            return f"{self.mean:.0f}"
        if self.deviation is None:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} ± {self.deviation:.2f}"

    def words(self, separator: str) -> str:
        """With the number of seeds; the paper's number and the difference, where there are both."""
        parts = [str(self)]
        if self.ours and self.of_seeds:
            parts.append(f"n={len(self.ours)}")
        if self.paper is not None:
            parts.append(f"paper {self.paper:.2f}")
            if self.ours:
                parts.append(f"{self.mean - self.paper:+.2f}")
        return separator.join(parts)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of cells, and where they are from.

    Attributes:
      title: of the table.
      columns: the head of each column, the rows' names aside.
      rows: a name and as many cells as columns.
      source: what the numbers were made with: scale, seeds, device, date, command.
      note: what a reader has to know beside.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    source: str
    note: str = ""

    def markdown(self) -> str:
        """As GitHub shows it."""
        lines = [
            f"### {self.title}",
            "",
            f"| | {' | '.join(self.columns)} |",
            f"| --- |{' --- |' * len(self.columns)}",
            *(
                f"| {name} | {' | '.join(cell.words('; ') for cell in cells)} |"
                for name, cells in self.rows
            ),
            "",
        ]
        return "\n".join([*lines, *filter(None, (self.note, self.source)), ""])

    def html(self) -> str:
        """As a section of a page."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        body = "".join(
            f"<tr><th>{html.escape(n)}</th>{_html(cells)}</tr>" for n, cells in self.rows
        )
        note = f"<p>{html.escape(self.note)}</p>" if self.note else ""
        return (
            f"<section><h2>{html.escape(self.title)}</h2><div class=wide><table><thead>"
            "<tr><th></th>"
            f"{head}</tr></thead><tbody>{body}</tbody></table></div>{note}"
            f"<p class=source>{html.escape(self.source)}</p></section>"
        )

    def json(self) -> dict[str, Any]:
        """All of it, for programs."""
        rows = [
            {
                "name": name,
                "cells": [{"ours": list(c.ours), "paper": c.paper, "shown": str(c)} for c in cells],
            }
            for name, cells in self.rows
        ]
        return {**dataclasses.asdict(self), "rows": rows}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG, which may not be there yet; what it shows, and what its numbers are from."""

    path: Path
    title: str
    source: str


def _html(cells: Sequence[Cell]) -> str:
    def one(cell: Cell) -> str:
        first, *others = html.escape(cell.words("|")).split("|")
        kind = "" if cell.ours or cell.said else " class=missing"
        return f"<td{kind}>{first}<small>{', '.join(others)}</small></td>"

    return "".join(one(cell) for cell in cells)


def command(name: str, scale: str, seeds: Sequence[int], dataset: str = "") -> str:
    """What makes, or made, what the script of that name shows, or shows of one data set."""
    words = f"python -m experiments.{name} --scale={scale} --seeds={','.join(map(str, seeds))}"
    return f"{words} --datasets={dataset}" if dataset else words


def source(
    name: str,
    scale: str,
    summaries: Sequence[dict[str, Any]],
    dataset: str = "",
    networks: Mapping[str, Hashable] | None = None,
) -> str:
    """Where numbers are from: what made them, and the runs they were taken from.

    Args:
      name: of the script.
      scale: of the runs.
      summaries: of the runs.
      dataset: named in the command, where the script has a table for each.
      networks: that of each method, by its name, where they are of several: T_0 is compared within
        each. None: all are of one.
    """
    kind = "mini scale (a small task, not the paper's)" if scale == "mini" else "the paper's scale"
    if not summaries:
        return f"Not run: {command(name, scale, (0, 1, 2), dataset)}"
    seeds = sorted({s["seed"] for s in summaries})
    devices = sorted({s["device"] for s in summaries})
    dates = sorted({s["date"] for s in summaries})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    count = f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} ({', '.join(map(str, seeds))})"
    return (
        f"{kind[0].upper()}{kind[1:]}; {count}, {len(summaries)} "
        f"{'run' if len(summaries) == 1 else 'runs'}; {'; '.join(devices)}; {when}. "
        f"{_teachers(summaries, networks or {})}{command(name, scale, seeds, dataset)}"
    )


def _teachers(summaries: Sequence[dict[str, Any]], networks: Mapping[str, Hashable]) -> str:
    """A warning where runs of one network, data set, seed and base classes start from several T_0.

    A method that trains T_0 itself has one of its own.
    """
    found: dict[tuple[str, int, Hashable], set[float]] = {}
    for s in summaries:
        method = METHODS.get(s["method"])
        if method and method.scores is not logits:  # whose accuracy is not that of T_0's head
            continue
        own = s["method"] if method and method.base else None
        network = networks.get(s["method"])
        which = s["dataset"], s["seed"], (s["classes_per_task"][0], own, network)
        found.setdefault(which, set()).add(s["accuracy_matrix"][0][0])
    return "".join(
        f"Not all runs of {dataset}, seed {seed} start from the same T_0 (accuracies "
        f"{', '.join(f'{100 * accuracy:.2f}' for accuracy in sorted(accuracies))} %). "
        for (dataset, seed, _), accuracies in found.items()
        if len(accuracies) > 1
    )
