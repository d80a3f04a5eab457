"""What is measured between the phases, for the report only: it changes nothing."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from skd_jax import metrics, parallel, steps
from skd_jax.experiment import Experiment
from skd_jax.machine import cpu_cores
from skd_jax.methods import method_of
from skd_jax.methods.phase import logits
from skd_jax.state import Kept


def predictions(
    experiment: Experiment,
    kept: Any,
    tasks: int,
    between: Callable[[], None] = lambda: None,
) -> list[np.ndarray]:
    """The classes of the test images of the first ``tasks`` tasks, int32 [n] each.

    Args:
      experiment: the run's.
      kept: what classifies: by the method's rule if it is the method's own, else by the head.
      tasks: how many.
      between: called after each batch; it may raise to stop.
    """
    config, mesh, method = experiment.config, experiment.mesh, method_of(experiment.config)
    scores = method.scores if isinstance(kept, method.kept) else logits
    if scores is logits:  # without what else is kept, a program serves all of them
        kept = Kept(kept.classifier)
    static, nets = config.method, steps.networks(config.model)
    size = parallel.round_up(config.run.eval_batch, mesh)
    (mine,) = parallel.local_part(mesh, (size,))
    found = []
    for task in range(tasks):
        images, labels = experiment.test.task(task)
        classes = np.zeros(len(labels), np.int32)
        for start in range(0, len(labels), size):
            batch = images[start : start + size]
            padded = np.zeros((size, *batch.shape[1:]), batch.dtype)
            padded[: len(batch)] = batch
            placed = parallel.split(mesh, padded[None, mine], (size,))
            predicted = steps.predict(scores, static, nets, config.data, kept, placed, mesh=mesh)
            classes[start : start + size] = np.asarray(predicted)[0, : len(batch)]
            between()
        found.append(classes)
    return found


def accuracy(experiment: Experiment, predicted: Sequence[np.ndarray]) -> metrics.Row:
    """How many of :func:`predictions` are right."""
    labels = [experiment.test.task(task)[1] for task in range(len(predicted))]
    correct = (int(np.sum(a == b)) for a, b in zip(predicted, labels, strict=True))
    return metrics.Row(tuple(correct), tuple(len(some) for some in labels))


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a phase's report may look at; nothing of it reaches training.

    Attributes:
      experiment: the run's.
      tasks: how many have been learned.
      workdir: where pictures and reports go.
      between: to be called now and then; it may raise to stop.
    """

    experiment: Experiment
    tasks: int
    workdir: Path
    between: Callable[[], None] = lambda: None

    def predict(self, kept: Kept) -> list[np.ndarray]:
        """See :func:`predictions`, of all tasks learned."""
        return predictions(self.experiment, kept, self.tasks, self.between)

    def accuracy(self, predicted: Sequence[np.ndarray]) -> metrics.Row:
        """See :func:`accuracy`."""
        return accuracy(self.experiment, predicted)


def device_description() -> str:
    """What this process computes on, in words."""
    device, cores = jax.devices()[0], ""
    if device.platform == "cpu":  # as many as this process may use
        count = cpu_cores()
        cores = f", {count} {'core' if count == 1 else 'cores'}"
    return f"{device.device_kind}{cores}, jax {jax.__version__}"
