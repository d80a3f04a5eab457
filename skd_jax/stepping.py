"""Making steps of a phase: their images, keys and rates, handed to the one compiled entry point."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from skd_jax import groups, parallel, steps
from skd_jax.data import ReplicaImages, TaskImages, epoch_batches, filled, ordered_batches
from skd_jax.methods.phase import Metrics, Phase, Setting, phase_keys


class Stepping:
    """Makes any steps of one phase: ``stepping(state, kept, start, stop)``."""

    def __init__(
        self,
        phase: Phase,
        setting: Setting,
        mesh: Mesh | None = None,
        images: TaskImages | ReplicaImages | None = None,
        most: int = 1,
        seeds: Sequence[int] = (),
    ):
        """Takes what does not change from step to step.

        Args:
          phase: whose steps are made.
          setting: of the run.
          mesh: the devices to compute on.
          images: of the phase's task; None if it reads none.
          most: steps of one call. Shorter ones are filled up: one program makes all of them.
          seeds: of R replicas, whose states, kept and metrics have a leading axis [R, ...]; without
            any there is one run, of the setting's seed.
        """
        if (images is None) != (phase.reads == "nothing"):
            has = "no images" if images is None else "images"
            raise ValueError(f"phase {phase.name!r} reads {phase.reads}, and was given {has}")
        self._phase, self._setting, self._mesh, self._images = phase, setting, mesh, images
        self._most = min(most, phase.steps)
        self._seeds = tuple(seeds)
        if seeds:
            keys = [phase_keys(seed, phase.task, phase.number)[1] for seed in seeds]
            self._key = groups.distribute(mesh, keys)
        else:
            self._key = parallel.replicate(mesh, setting.keys(phase.task, phase.number)[1])

    def __call__(
        self, state: Any, kept: Any, start: int, stop: int, then: int | None = None
    ) -> tuple[Any, Metrics]:
        """Makes steps ``start`` to ``stop`` - 1; the state is donated.

        Args:
          state: in training.
          kept: from earlier phases.
          start: the first step.
          stop: the step after the last, at most ``most`` later.
          then: where the call after this one will stop, if it is known: its images are begun.

        Returns:
          The next state, and the metrics of each step, [most] or [most, K] (behind the replicas'
          axis), of which the first ``stop - start`` count.
        """
        arguments = self.arguments(state, kept, start, stop)
        if self._images is not None and then is not None and stop < then:
            self._images.prefetch(self._indices(self._images, stop, then)[0])
        return steps.advance(*arguments, mesh=self._mesh)

    def arguments(self, state: Any, kept: Any, start: int, stop: int) -> tuple:
        """What :func:`skd_jax.steps.advance` is called with, but for the mesh."""
        phase, setting = self._phase, self._setting
        count, most = stop - start, self._most
        if not 0 < count <= most:
            raise ValueError(f"a call of {count} steps, not of 1 to {most}")
        numbers = np.arange(start, stop, dtype=np.int32)
        numbers, rates = filled((numbers, phase.rates(numbers)), most)
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
            rates,
            np.int32(count) if most > 1 else None,
        )

    def _batches(self, start: int, stop: int) -> Any:
        """Images, labels and which of them count."""
        images = self._images
        if images is None:
            return None
        indices, valid = self._indices(images, start, stop)
        found, sizes = images.fetch(indices, self._most), indices.shape[1:]
        valid = filled(valid[:, *parallel.local_part(self._mesh, sizes)], self._most)
        return (*found, parallel.split(self._mesh, valid, sizes))

    def _indices(
        self, images: TaskImages | ReplicaImages, start: int, stop: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Which images, int32 [steps, B] or [steps, R, B], and which of them count."""
        phase, seeds = self._phase, self._seeds or (self._setting.config.seed,)
        if phase.reads == "in_order":
            found = [ordered_batches(start, stop, images.n, phase.batch)] * len(seeds)
        else:
            of = phase.task, phase.number, start, stop, images.n, phase.batch
            batches = [epoch_batches(seed, *of) for seed in seeds]
            found = [(some, np.ones(some.shape, bool)) for some in batches]
        if not self._seeds:
            return found[0]
        indices, valid = (np.stack(each, axis=1) for each in zip(*found, strict=True))
        return indices, valid
