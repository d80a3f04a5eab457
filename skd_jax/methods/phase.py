"""The seam between the loop and a method: a run is a list of phases."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from skd_jax.data import TaskImages
from skd_jax.state import Carry

State = Any
Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Phase:
    """One stretch of training, resumable at any step.

    Attributes:
      name: "base", "delegator", "learn": what the report calls it.
      task: the task whose classes it reads, or for stage one the task n of T_n.
      steps: how many steps (rounds, for stage one) it takes.
      reads_images: whether it trains on the task's images.
      unit: what a step is called in the progress bar.
      init: what is in training at step 0, from what earlier phases left.
      call: steps ``start`` to ``stop`` - 1; metrics are arrays [stop - start]. ``state`` is
        donated.
      finish: what this phase leaves to the next.
    """

    name: str
    task: int
    steps: int
    reads_images: bool
    unit: str
    init: Callable[[Carry], State]
    call: Callable[[State, Carry, TaskImages | None, int, int], tuple[State, Metrics]]
    finish: Callable[[State, Carry], Carry]
