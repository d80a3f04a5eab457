"""Being told to stop by a signal: a run notices between two steps, saves and ends."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils

_SIGHUP = getattr(signal, "SIGHUP", None)  # Windows has none
_SIGNALS = tuple(filter(None, (signal.SIGINT, signal.SIGTERM, _SIGHUP)))


class StopSignals:
    """Takes note of Ctrl-C, SIGTERM and SIGHUP while it is entered, instead of ending at once.

    A later Ctrl-C ends at once; under ``nohup`` SIGHUP stays ignored. Of several processes it is
    enough to tell one: JAX's preemption service, which hears SIGTERM, lets all of them stop after
    the same step.
    """

    def __init__(self) -> None:
        self._seen: int | None = None
        self._asked = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        # Python lets only the main thread handle signals; elsewhere they stay as they are.
        if threading.current_thread() is threading.main_thread():
            several = jax.process_count() > 1
            for number in _SIGNALS:
                nohup = number == _SIGHUP and signal.getsignal(number) == signal.SIG_IGN
                if not nohup and not (several and number == signal.SIGTERM):
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._seen is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._seen is not None:
            return
        self._seen = number
        # Not print: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(
                2,
                b"\nstopping after this step, and after what is being compiled; "
                b"Ctrl-C from now on: at once\n",
            )
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # the preemption service tells the others

    def poll(self) -> int | None:
        """What to end with if it is time to stop, else None; all processes ask between any steps.

        Several processes are answered alike, so all have to ask the same number of times.
        """
        if jax.process_count() > 1:
            self._asked += 1
            stop = multihost_utils.reached_preemption_sync_point(self._asked)
            return 128 + (self._seen or signal.SIGTERM) if stop else None
        return None if self._seen is None else 128 + self._seen
