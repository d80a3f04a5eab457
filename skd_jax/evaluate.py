"""What is measured between the phases, for the report only: it changes nothing."""

import os
from collections.abc import Callable, Sequence

import jax
import numpy as np

from skd_jax import metrics, parallel, steps
from skd_jax.experiment import Experiment
from skd_jax.methods import skd
from skd_jax.state import Carry, Network

PICTURE = 3  # the number in the random key of the pseudo images' picture, after the phases'


def predictions(
    experiment: Experiment,
    network: Network,
    tasks: int,
    between: Callable[[], None] = lambda: None,
) -> list[np.ndarray]:
    """A classifier's classes for the test images of the first ``tasks`` tasks, int32 [n] each.

    ``between`` is called after each batch and may raise to stop.
    """
    config, mesh = experiment.config, experiment.mesh
    nets = skd.networks(config)
    size = parallel.round_up(config.run.eval_batch, mesh)
    mine = parallel.local_columns(mesh, size)
    found = []
    for task in range(tasks):
        images, labels = experiment.test.task(task)
        classes = np.zeros(len(labels), np.int32)
        for start in range(0, len(labels), size):
            batch = images[start : start + size]
            padded = np.zeros((size, *batch.shape[1:]), batch.dtype)
            padded[: len(batch)] = batch
            placed = parallel.split(mesh, padded[None, mine], size)
            predicted = steps.predict(nets, config.data, network, placed, mesh=mesh)
            classes[start : start + size] = np.asarray(predicted)[0, : len(batch)]
            between()
        found.append(classes)
    return found


def accuracy(experiment: Experiment, predicted: Sequence[np.ndarray]) -> metrics.Row:
    """How many of a classifier's :func:`predictions` are right."""
    labels = [experiment.test.task(task)[1] for task in range(len(predicted))]
    correct = (int(np.sum(a == b)) for a, b in zip(predicted, labels, strict=True))
    return metrics.Row(tuple(correct), tuple(len(some) for some in labels))


def agreement(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> float:
    """The share of the test images to which two classifiers' predictions give the same class."""
    return float(np.mean(np.concatenate(one) == np.concatenate(other)))


def student(carry: Carry) -> Network:
    """S_n's features under T_n's head: the classifier that Table I measures."""
    assert carry.classifier is not None and carry.student is not None
    return Network(
        {"features": carry.student.params, "head": carry.classifier.params["head"]},
        {"features": carry.student.batch_stats},
    )


def pseudo_images(experiment: Experiment, delegator: Network, task: int, count: int) -> np.ndarray:
    """What D_n, in eval mode, draws of the first ``count`` z: normalised float32 [n, S, S, C]."""
    config = experiment.config
    _, key = skd.phase_keys(config.seed, task, PICTURE)
    key = parallel.replicate(experiment.mesh, key)
    nets = skd.networks(config)
    size = min(count, config.run.eval_batch)
    drawn = [
        np.asarray(steps.pseudo_images(nets, delegator, key, size, start))
        for start in range(0, count, size)
    ]
    return np.concatenate(drawn)[:count]


def device_description() -> str:
    """What this process computes on, in words."""
    device, cores = jax.devices()[0], ""
    if device.platform == "cpu":  # as many as this process may use
        may_use = getattr(os, "sched_getaffinity", None)
        count = len(may_use(0)) if may_use else os.cpu_count()
        cores = f", {count} {'core' if count == 1 else 'cores'}"
    return f"{device.device_kind}{cores}, jax {jax.__version__}"
