"""The progress of one phase: a bar on a terminal, a line now and then in a log."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from shutil import get_terminal_size
from typing import Self, SupportsFloat

_TICK = 1.0  # seconds between two looks at the clock
_REDRAW = 0.2  # seconds between two states on a terminal, at least
_LOG_SECONDS = 15.0  # between two lines where there is no terminal
_BAR = 6, 30  # characters, at least and at most


class Progress:
    """Rate, time left and losses of one phase.

    On a terminal it ticks every second, whatever the steps take, and says that the first of them
    is being compiled, which counts neither into the rate nor into the time left. Where standard
    error is no terminal it prints a line now and then instead, so that logs stay short.
    """

    def __init__(
        self,
        *,
        total: int,
        initial: int,
        task: int,
        phase: str,
        unit: str = "step",
        first: Sequence[str] = (),
        shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
        columns: Callable[[], int] = lambda: get_terminal_size().columns,
    ):
        """Shows the beginning.

        Args:
          total: steps of the phase.
          initial: steps done by an earlier run; they count as done but not into the rate.
          task: the task the run is in.
          phase: what it is doing.
          unit: what one step is called.
          first: names of the terms that come first, where there is no room for all.
          shown: whether there is one; of several processes, one shows it.
          clock: seconds.
          columns: of the terminal.
        """
        self._head, self._unit, self._first = f"task {task} {phase}", unit, first
        self._total, self._step = total, initial
        self._clock, self._columns = clock, columns
        self._stream, self._shown = sys.stderr, shown
        self._terminal = self._stream.isatty()
        self._terms: dict[str, str] = {}
        self._since = self._drawn = clock()
        self._begun: tuple[int, float] | None = None  # the first step that ended, and when
        self._latest = self._since  # when a step ended
        self._width = 0  # of what is on the screen
        self._lock, self._over = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._draw()
        if self._shown and self._terminal:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def reach(self, step: int, terms: Mapping[str, SupportsFloat] | None = None) -> None:
        """Counts the steps before ``step`` as done.

        Args:
          step: the number of the next one.
          terms: losses to show from now on, by name. Reading an array waits for its computation:
            hand them over when they are logged, not at every step.
        """
        with self._lock:
            if terms is not None:
                first = [name for name in self._first if name in terms]
                order = [*first, *(name for name in terms if name not in first)]
                self._terms = {name: f"{float(terms[name]):.3g}" for name in order}
            if step > self._step:
                self._step, self._latest = step, self._clock()
                self._begun = self._begun or (step, self._latest)
        if self._clock() - self._drawn >= (_REDRAW if self._terminal else _LOG_SECONDS):
            self._draw()

    @property
    def measured(self) -> float:
        """Seconds from the end of the first step to that of the latest."""
        return self._latest - self._begun[1] if self._begun else 0.0

    @property
    def seconds(self) -> float | None:
        """Seconds a step, from the end of the first one on; None before there are two."""
        if self._begun is None or self._step == self._begun[0]:
            return None
        return (self._latest - self._begun[1]) / (self._step - self._begun[0])

    def say(self, line: str, say: Callable[[str], None]) -> None:
        """Has a line said in place of what is on the terminal; the next tick draws anew.

        Args:
          line: for people.
          say: prints it.
        """
        with self._lock:
            if self._shown and self._terminal:
                with contextlib.suppress(OSError, ValueError):
                    self._stream.write(f"\r{' ' * self._width}\r")
                    self._stream.flush()
                self._width = 0
            say(line)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        self._over.set()
        if self._thread:
            self._thread.join()
        self._draw("\n")
        self._shown = False

    def _run(self) -> None:
        while not self._over.wait(_TICK):
            self._draw()

    def _draw(self, end: str = "") -> None:
        if not self._shown:
            return
        with self._lock, contextlib.suppress(OSError, ValueError):  # on a full disk; closed
            if self._over.is_set() and not end:
                return
            self._drawn = self._clock()
            if self._terminal:
                line = self.line(self._columns() - 1)
                self._stream.write(f"\r{line.ljust(self._width)}{end}")
                self._width = len(line)
            else:
                self._stream.write(self.line() + "\n")
            self._stream.flush()

    def line(self, columns: int = 0) -> str:
        """What is shown now, in so many columns; 0 is all of it."""
        done, total, now, seconds = self._step, self._total, self._clock(), self.seconds
        times, rate = _clock(now - self._since), ""
        if self._begun is None and done < total:
            times = f"{times}, compiling"
        if seconds:
            rate = f"{seconds:.1f} s/{self._unit}"
            if seconds < 1:
                rate = f"{1 / seconds:.1f} {self._unit}s/s"
            if done < total:
                left = _clock(max(0.0, (total - done) * seconds - (now - self._latest)))
                times = f"{left} left" if columns else f"{times}<{left}"
        terms = [f"{name}={value}" for name, value in self._terms.items()]
        head = f"{self._head}: {100 * done // max(1, total):3d}%|"

        def tail(rate: str, terms: Sequence[str]) -> str:
            return f"| {done}/{total} [{', '.join(filter(None, (times, rate, *terms)))}]"

        if not columns:
            return f"{head}{self._bar(_BAR[0])}{tail(rate, terms)}"
        # The first that leaves room for a bar; two terms matter more than the rate.
        for end in (
            *(tail(rate, terms[:n]) for n in (3, 2)),
            *(tail("", terms[:n]) for n in (2, 1, 0)),
        ):
            room = columns - len(head) - len(end)
            if room >= _BAR[0]:
                return f"{head}{self._bar(min(room, _BAR[1]))}{end}"
        return f"{head}{self._bar(_BAR[0])}{tail('', ())}"[:columns]

    def _bar(self, width: int) -> str:
        encoding = getattr(self._stream, "encoding", None) or ""
        full = "█" if "utf" in encoding.lower() else "#"
        return (full * (width * self._step // max(1, self._total))).ljust(width)


def _clock(seconds: float) -> str:
    """Seconds as M:SS or H:MM:SS."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
