"""How long a whole run takes, from the steps that have been measured."""

import statistics
from collections.abc import Mapping, Sequence

from skd_jax.methods.phase import Phase

DAY = 24 * 3600.0


def phase_seconds(phases: Sequence[Phase], known: Mapping[str, float]) -> list[float]:
    """Seconds of each phase.

    Args:
      phases: of the run.
      known: seconds a step by the phase's name, of one at least. The steps of other phases are
        taken to last as long by their ``passes``.
    """
    by_pass = statistics.median(known[p.name] / p.cost for p in phases if p.name in known)
    return [p.steps * known.get(p.name, by_pass * p.cost) for p in phases]


def whole_run(
    phases: Sequence[Phase], known: Mapping[str, float], number: int, step: int, device: str | None
) -> list[str]:
    """What people are told of a run's time: a line, and a warning if it is more than a day.

    Args:
      phases: all of the run.
      known: see :func:`phase_seconds`.
      number: the phase under way.
      step: of that phase, the next one.
      device: "cpu", "gpu" or "tpu"; None: no warning, as where its advice cannot be taken.
    """
    seconds = phase_seconds(phases, known)
    under_way = seconds[number] * (1 - step / phases[number].steps)
    total, left = sum(seconds), under_way + sum(seconds[number + 1 :])
    longest = max(range(len(phases)), key=lambda i: seconds[i])
    guessed = list(dict.fromkeys(p.name for p in phases if p.name not in known))
    line = (
        f"phase {number + 1} of {len(phases)}: about {duration(total)} in all, {duration(left)} "
        f"left; {duration(seconds[longest])} of it for task {phases[longest].task}, "
        f"{phases[longest].name}"
    )
    if guessed:
        line += f" (not yet measured, a rough estimate: {', '.join(guessed)})"
    lines = [line]
    if device and total > DAY:
        advice = (
            "take scale=mini, or a GPU" if device == "cpu" else "take scale=mini, or more of it"
        )
        lines.append(f"warning: that is more than a day on this {device.upper()}; {advice}")
    return lines


def duration(seconds: float) -> str:
    """Seconds in words: "50 s", "12 min", "3 h 10 min", "2 days 4 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // (24 * 60)} days {minutes // 60 % 24} h"
