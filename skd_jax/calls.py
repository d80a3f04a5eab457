"""Compiled calls under way: how many steps one makes, and how far the host is ahead.

A run notices a signal between two calls, and what has been handed to a device cannot be called
back. So what is under way is bounded by time: a second of calls of half a second or less each, or
one step that takes longer than that.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax

from skd_jax import parallel

SECONDS = 0.5  # of one call, at most, unless it is of one step; and half of what is under way
AHEAD = 4  # calls, at most, while another is begun: each holds its images
EVERY = 500  # calls, of which these are timed; the least counts, since others share the machine
MEASURED = range(2, 5)


class Calls:
    """The calls of one phase.

    Attributes:
      length: steps that the next one is to make.
    """

    def __init__(
        self,
        most: int,
        ended: Callable[[int], None] = lambda step: None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Nothing is under way yet.

        Args:
          most: steps of a call, however short they are.
          ended: is told each time a call has ended, and the step it ended before.
          clock: seconds.
        """
        self.length = 1
        self._most, self._ended, self._clock = most, ended, clock
        self._under_way: deque[tuple[int, Any]] = deque()
        self._ahead = 0  # calls that may be under way when the next one is begun
        self._made = 0
        self._reached = 0  # the step that the latest call ends before
        self._least = math.inf  # seconds a step, of the calls that are being timed

    def begin(self, call: Callable[[], tuple[Any, Any]], stop: int) -> tuple[Any, Any]:
        """Begins a call, and waits until no more are under way than may be.

        Args:
          call: begins it; returns (state, metrics), which its end makes readable.
          stop: the step it ends before.
        """
        # The same calls in every process: what they find is compared.
        self._made = self._made % EVERY + 1
        timed = self._made in MEASURED
        if timed:
            self.wait()
        since = self._clock()
        state, metrics = call()
        self._under_way.append((stop, metrics))
        self.wait(0 if timed else self._ahead)
        if timed:
            seconds = (self._clock() - since) / (stop - self._reached)
            self._least = min(self._least, seconds)
            if self._made == MEASURED[-1]:
                self._choose(parallel.slowest(self._least))
                self._least = math.inf
        self._reached = stop
        return state, metrics

    def _choose(self, seconds: float) -> None:
        """Sets lengths by the seconds of a step."""
        self.length = max(1, min(self._most, int(SECONDS / max(seconds, 1e-9))))
        under_way = 2 * SECONDS / max(self.length * seconds, 1e-9)
        # More than one where they are short: the host may have to wait for a core.
        self._ahead = min(AHEAD, max(0, int(under_way) - 1))

    def wait(self, left: int = 0) -> None:
        """Waits until no more than ``left`` calls are under way."""
        while len(self._under_way) > left:
            stop, metrics = self._under_way.popleft()
            jax.block_until_ready(metrics)
            self._ended(stop)
