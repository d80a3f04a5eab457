"""Making steps of a phase: their images, keys and rates, handed to the one compiled entry point."""

from typing import Any

import numpy as np
from jax.sharding import Mesh

from skd_jax import parallel, steps
from skd_jax.data import TaskImages, epoch_batches, ordered_batches
from skd_jax.methods.phase import Metrics, Phase, Setting


class Stepping:
    """Makes any steps of one phase: ``stepping(state, kept, start, stop)``."""

    def __init__(
        self,
        phase: Phase,
        setting: Setting,
        mesh: Mesh | None = None,
        images: TaskImages | None = None,
    ):
        """Takes what does not change from step to step.

        Args:
          phase: whose steps are made.
          setting: of the run.
          mesh: the devices to compute on.
          images: of the phase's task; None if it reads none.
        """
        if (images is None) != (phase.reads == "nothing"):
            has = "no images" if images is None else "images"
            raise ValueError(f"phase {phase.name!r} reads {phase.reads}, and was given {has}")
        self._phase, self._setting, self._mesh, self._images = phase, setting, mesh, images
        _, key = setting.keys(phase.task, phase.number)
        self._key = parallel.replicate(mesh, key)

    def __call__(self, state: Any, kept: Any, start: int, stop: int) -> tuple[Any, Metrics]:
        """Makes steps ``start`` to ``stop`` - 1; the state is donated.

        Returns:
          The next state, and the metrics of each step, [stop - start] or [stop - start, K].
        """
        return steps.advance(*self.arguments(state, kept, start, stop), mesh=self._mesh)

    def arguments(self, state: Any, kept: Any, start: int, stop: int) -> tuple:
        """What :func:`skd_jax.steps.advance` is called with, but for the mesh."""
        phase, setting = self._phase, self._setting
        numbers = np.arange(start, stop, dtype=np.int32)
        return (
            phase.step,
            phase.static,
            setting.nets,
            setting.config.data,
            phase.reads,
            phase.draws,
            state,
            kept,
            self._batches(start, stop),
            self._key,
            numbers,
            phase.rates(numbers),
        )

    def _batches(self, start: int, stop: int) -> Any:
        """Images, labels and which of them count; the next call's images are begun."""
        images = self._images
        if images is None:
            return None
        indices, valid = self._indices(images, start, stop)
        found = images.fetch(indices)
        if stop < self._phase.steps:
            later = min(2 * stop - start, self._phase.steps)
            images.prefetch(self._indices(images, stop, later)[0])
        columns = parallel.local_columns(self._mesh, self._phase.batch)
        return (*found, parallel.split(self._mesh, valid[:, columns], self._phase.batch))

    def _indices(self, images: TaskImages, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        phase = self._phase
        if phase.reads == "in_order":
            return ordered_batches(start, stop, images.n, phase.batch)
        key = (self._setting.config.seed, phase.task, phase.number)
        found = epoch_batches(*key, start, stop, images.n, phase.batch)
        return found, np.ones(found.shape, bool)
