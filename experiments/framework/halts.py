"""What runs took, without the time in which they were halted.

A process that is stopped as by Ctrl-Z, or whose machine sleeps, does nothing, but its clock goes
on. Its log shows it: a row is written every few steps, and between two of them there is a gap.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from experiments.framework import study

LEAST, TIMES = 200.0, 10  # a gap is a halt from so many seconds, and usual gaps of its phase, on
WORDS = f"a gap in its log of at least {LEAST:.0f} s and {TIMES} times the usual one"


def halts(rows: Sequence[Mapping[str, Any]], counted: float) -> dict[str, float]:
    """The seconds in which a run was halted, but which its clock counted, by phase.

    A run that was ended and started again leaves such a gap too, but its clock does not count that:
    then more time lies between its first and its last row than it counted.

    Args:
      rows: of its log, in their order.
      counted: its seconds, all phases together, without what it took over from another run.
    """
    gaps: dict[str, list[float]] = {}
    for before, row in pairwise(rows):
        gaps.setdefault(row["phase"], []).append(row["time"] - before["time"])
    usual = {phase: float(np.median(found)) for phase, found in gaps.items()}
    long = [
        (gap - usual[phase], phase)
        for phase, found in gaps.items()
        for gap in found
        if gap >= max(LEAST, TIMES * usual[phase])
    ]
    not_counted = sum(map(sum, gaps.values())) - counted
    halted: dict[str, float] = {}
    for gap, phase in sorted(long, reverse=True):
        if gap <= not_counted + LEAST:
            not_counted -= gap
        else:
            halted[phase] = halted.get(phase, 0.0) + gap
    return halted


def seconds(run: study.Run, options: study.Options) -> dict[str, float] | None:
    """Those of a finished run by phase, with what it took over, without halts."""
    found = study.summary(run, options)
    if not found:
        return None
    spent = dict(found["seconds"])
    start = study.summary(run.start, options) if run.start else None
    if start and start["seconds"].get("base") != spent.get("base"):
        start = None  # it was made again since then
    taken_over = start["seconds"] if start else {}
    path = run.folder(options.results) / "metrics.jsonl"
    own = sum(spent.values()) - sum(taken_over.values())
    lost = halts(_rows(path, path.stat().st_mtime_ns), own)
    if run.start and start:
        of_start = seconds(run.start, options) or {}
        for phase, spent_there in taken_over.items():
            lost[phase] = lost.get(phase, 0.0) + spent_there - of_start[phase]
    return {phase: max(0.0, all_of_it - lost.get(phase, 0.0)) for phase, all_of_it in spent.items()}


@functools.lru_cache(maxsize=10_000)
def _rows(path: Path, stamp: int) -> tuple[dict[str, Any], ...]:
    del stamp  # another one, another log
    return tuple(json.loads(line) for line in path.read_text().splitlines())
