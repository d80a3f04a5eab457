"""Tables of the paper, ours beside its: means over seeds, as Markdown and as HTML."""

import dataclasses
import html
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skd_jax import page
from skd_jax.methods import METHODS
from skd_jax.methods.phase import logits

if TYPE_CHECKING:
    from experiments.framework.study import Options

NOT_RUN = "not run"
SCALES = {  # what is said of their numbers
    "mini": "mini scale (a small task, not the paper's)",
    "midi": "midi scale (all classes, but smaller images and networks than the paper's)",
    "paper": "the paper's scale",
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One number of a table.

    Attributes:
      ours: one value a seed that has been run, in percent or points.
      paper: the paper's number, if it gives one.
      applies: whether there could be a number.
      of_seeds: whether ``ours`` are seeds; else one plain number.
      said: words, where there is no number.
      less_is_better: the difference from the paper is positive where ours is better, so less here.
    """

    ours: tuple[float, ...] = ()
    paper: float | None = None
    applies: bool = True
    of_seeds: bool = True
    said: str = ""
    less_is_better: bool = False

    @property
    def seeds(self) -> int:
        """How many seeds there are numbers of."""
        return len(self.ours) if self.of_seeds else 0

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
            return NOT_RUN if self.applies else ""
        if not self.of_seeds:
            return f"{self.mean:.0f}"
        if self.deviation is None:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} ± {self.deviation:.2f}"

    def words(self, with_seeds: bool = True) -> list[str]:
        """Itself, the number of seeds, the paper's number and the difference, as far as known.

        Args:
          with_seeds: whether the number of seeds is said.
        """
        parts = [str(self)]
        if self.seeds and with_seeds:
            parts.append(f"n={self.seeds}")
        if self.paper is not None:
            parts.append(f"paper {self.paper:.2f}")
            if self.ours:
                better = self.mean - self.paper
                parts.append(f"{-better if self.less_is_better else better:+.2f}")
        return parts


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

    def turned(self) -> "Table":
        """The same with rows and columns exchanged: for many columns and few rows."""
        names, rows = zip(*self.rows, strict=True)
        turned = tuple(zip(self.columns, zip(*rows, strict=True), strict=True))
        return dataclasses.replace(self, columns=names, rows=turned)

    def markdown(self) -> str:
        """As GitHub shows it."""
        lines = [
            f"### {self.title}",
            "",
            f"| | {' | '.join(self.columns)} |",
            f"| --- |{' --- |' * len(self.columns)}",
            *(
                f"| {name} | {' | '.join('; '.join(words) for words in cells)} |"
                for name, cells in self._worded()
            ),
            "",
        ]
        return "\n".join([*lines, *filter(None, (self._below(), self.source)), ""])

    def html(self) -> str:
        """As a section of a page."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        worded = [(html.escape(name), cells) for name, cells in self._worded()]
        body = "".join(f"<tr><th>{name}</th>{self._html(cells)}</tr>" for name, cells in worded)
        note = f"<p>{html.escape(self._below())}</p>" if self._below() else ""
        kind = " class=many" if len(self.columns) > page.COLUMNS else ""
        return (
            f"<section><h2>{html.escape(self.title)}</h2><div class=wide><table{kind}><thead>"
            "<tr><th></th>"
            f"{head}</tr></thead><tbody>{body}</tbody></table></div>{note}"
            f"<p class=source>{html.escape(self.source)}</p></section>"
        )

    def _counts(self) -> set[int]:
        """The numbers of seeds that its cells are of."""
        return {cell.seeds for _, cells in self.rows for cell in cells if cell.seeds}

    def _worded(self) -> list[tuple[str, list[list[str]]]]:
        """Its rows in words; the number of seeds once a row, or below, where cells agree in it."""
        rows, differ = [], len(self._counts()) > 1
        for name, cells in self.rows:
            of_row = {cell.seeds for cell in cells if cell.seeds}
            mixed = len(of_row) > 1
            count = f"; n={of_row.pop()}" if differ and len(of_row) == 1 else ""
            rows.append((name + count, [cell.words(mixed) for cell in cells]))
        return rows

    def _below(self) -> str:
        """What is said under it: the number of seeds, where all cells have the same, and a note."""
        counts = self._counts()
        if len(counts) != 1:
            return self.note
        (count,) = counts
        many = f"{count} seeds" if count > 1 else "one seed"
        return " ".join(filter(None, (f"Each number is of {many} (n={count}).", self.note)))

    def _html(self, cells: Sequence[Sequence[str]]) -> str:
        def one(column: str, words: Sequence[str]) -> str:
            first, *others = map(html.escape, words)
            kind = " class=missing" if first == NOT_RUN else ""
            small = f"<small>{', '.join(others)}</small>" if others else ""
            return f'<td{kind} data-column="{html.escape(column)}">{first}{small}</td>'

        return "".join(map(one, self.columns, cells))

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


def difference(ours: float, theirs: float) -> str:
    """How far one number, in percent, is from another, in words."""
    return f"{abs(ours - theirs):.1f} points {'above' if ours > theirs else 'below'}"


def command(name: str, options: "Options", seeds: Sequence[int], dataset: str = "") -> str:
    """What makes, or made, what the script of that name shows, or shows of one data set."""
    of_seeds = ",".join(map(str, seeds))
    words = f"python -m experiments.{name} --scale={options.scale} --seeds={of_seeds}"
    words += f" --datasets={dataset}" if dataset else ""
    return f"{words} --results={options.elsewhere}" if options.elsewhere else words


def source(
    name: str,
    options: "Options",
    summaries: Sequence[dict[str, Any]],
    dataset: str = "",
    networks: Mapping[str, Hashable] | None = None,
    before: str = "",
) -> str:
    """Where numbers are from: what made them, and the runs they were taken from.

    Args:
      name: of the script.
      options: the scale of the runs, and where they lie.
      summaries: of the runs.
      dataset: named in the command, where the script has a table for each.
      networks: that of each method, by its name, where they are of several: T_0 is compared within
        each. None: all are of one.
      before: what is said before the command.
    """
    kind = SCALES[options.scale]
    if not summaries:
        return f"Not run: {command(name, options, (0, 1, 2), dataset)}"
    seeds = sorted({s["seed"] for s in summaries})
    devices = sorted({s["device"] for s in summaries})
    dates = sorted({s["date"] for s in summaries})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    count = f"{len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} ({', '.join(map(str, seeds))})"
    return (
        f"{kind[0].upper()}{kind[1:]}; {count}, {len(summaries)} "
        f"{'run' if len(summaries) == 1 else 'runs'}; {'; '.join(devices)}; {when}. "
        f"{_teachers(summaries, networks or {})}{before}{command(name, options, seeds, dataset)}"
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
