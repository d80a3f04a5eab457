"""What the runs behind each table and figure took.

Part of ``python -m experiments.report``.
"""

import statistics
from collections.abc import Sequence

from experiments.framework import halts, study
from experiments.framework.exhibit import Exhibit
from experiments.framework.tables import Cell, Table, source

NAME = "everything"
TITLE = "What it cost"
NOTE = (
    "Minutes by the runs' own clocks, of one core each; other work may have shared it. Time in "
    f"which a run was halted is left out ({halts.WORDS}). Runs that several share count for each, "
    "and once in the last row; what a run took over counts where it was made."
)


def minutes(run: study.Run, options: study.Options) -> float | None:
    """Of a finished run, without halts, and without what it took over, as far as that is known.

    A start that was made again since then took other seconds than those that were taken over.
    """
    found = halts.seconds(run, options)
    if found is None:
        return None
    start = halts.seconds(run.start, options) if run.start else None
    return max(0.0, (sum(found.values()) - sum((start or {}).values())) / 60)


def expected(run: study.Run, options: study.Options) -> float | None:
    """Minutes that it will take, by what the same took of other seeds; None if that is unknown."""
    seeds = study.with_all_seeds(options).seeds
    others = (minutes(run.with_seed(seed), options) for seed in seeds)
    took = [found for found in others if found is not None]
    return statistics.mean(took) if took else None


def estimate(missing: Sequence[study.Run], at_a_time: int, options: study.Options) -> str:
    """How long these runs will take, in words, by what the same took of other seeds; or "".

    Args:
      missing: each after what it starts from.
      at_a_time: so many.
      options: of the command line.
    """
    ends: dict[study.Run, float] = {}  # minutes from now, with a core for each
    known = []
    for run in missing:
        took = expected(run, options)
        known += [] if took is None else [took]
        start = ends.get(run.start, 0.0) if run.start else 0.0
        ends[run] = start + (took or 0.0)
    if not known:
        return ""
    total = max([*ends.values(), sum(known) / at_a_time])
    words = f"{total:.0f} min" if total < 90 else f"{total / 60:.1f} h"
    unknown = f", and {n} of unknown length" if (n := len(missing) - len(known)) else ""
    return f"about {words}, as the same took of other seeds{unknown}"


def table(options: study.Options, exhibits: Sequence[Exhibit]) -> Table:
    """A row for each one's finished runs, and one for all of them."""
    rows, every = [], {}
    for exhibit in exhibits:
        runs = _with_starts(exhibit.runs(options))
        every |= runs
        rows.append((exhibit.name, _cells(list(runs), options)))
    rows.append(("all of it", _cells(list(every), options)))
    where = source(NAME, options, study.summaries(list(every), options))
    return Table(TITLE, ("runs made", "minutes"), tuple(rows), where, NOTE)


def _with_starts(runs: Sequence[study.Run]) -> dict[study.Run, None]:
    found: dict[study.Run, None] = {}
    for run in runs:
        first: study.Run | None = run
        while first:
            found[first] = None
            first = first.start
    return found


def _cells(runs: Sequence[study.Run], options: study.Options) -> tuple[Cell, ...]:
    spent = [found for run in runs if (found := minutes(run, options)) is not None]
    return tuple(Cell((float(number),), of_seeds=False) for number in (len(spent), sum(spent)))
