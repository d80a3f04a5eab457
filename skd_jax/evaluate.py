"""What is measured between the phases, for the report only: it changes nothing."""

import os
from collections.abc import Callable

import jax
import numpy as np

from skd_jax import metrics, parallel, steps
from skd_jax.experiment import Experiment
from skd_jax.methods import skd
from skd_jax.state import Carry, Network

PICTURE = 3  # the number in the random key of the pseudo images' picture, after the phases'


def test_accuracy(
    experiment: Experiment,
    network: Network,
    tasks: int,
    between: Callable[[], None] = lambda: None,
) -> metrics.Row:
    """Of a classifier, on the test images of the first ``tasks`` tasks.

    ``between`` is called after each batch and may raise to stop.
    """
    config, mesh = experiment.config, experiment.mesh
    nets = skd.networks(config)
    size = parallel.round_up(config.run.eval_batch, mesh)
    mine = parallel.local_columns(mesh, size)
    correct, total = [], []
    for task in range(tasks):
        images, labels = experiment.test.task(task)
        right = 0
        for start in range(0, len(labels), size):
            batch = images[start : start + size]
            padded = np.zeros((size, *batch.shape[1:]), batch.dtype)
            padded[: len(batch)] = batch
            placed = parallel.split(mesh, padded[None, mine], size)
            predicted = steps.predict(nets, config.data, network, placed, mesh=mesh)
            wanted = labels[start : start + size]
            right += int(np.sum(np.asarray(predicted)[0, : len(batch)] == wanted))
            between()
        correct.append(right)
        total.append(len(labels))
    return metrics.Row(tuple(correct), tuple(total))


def student(carry: Carry) -> Network:
    """S_n's features under T_n's head: the classifier that Table I measures."""
    assert carry.classifier is not None and carry.student is not None
    return Network(
        {"features": carry.student.params, "head": carry.classifier.params["head"]},
        {"features": carry.student.batch_stats},
    )


def pseudo_images(experiment: Experiment, delegator: Network, task: int) -> np.ndarray:
    """What D_n draws of ``config.run.pseudo_images`` z, normalised float32 [n, S, S, C]."""
    config = experiment.config
    _, key = skd.phase_keys(config.seed, task, PICTURE)
    key = parallel.replicate(experiment.mesh, key)
    nets = skd.networks(config)
    return np.asarray(steps.pseudo_images(nets, delegator, key, config.run.pseudo_images))


def device_description() -> str:
    """What this process computes on, in words."""
    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    return f"{device.device_kind}{cores}, jax {jax.__version__}"
