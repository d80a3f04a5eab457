"""Exemplars: a few training images of each class, kept as they are, and how they are chosen.

They are in the method's ``kept``, so they are in the checkpoints and count as ``kept_bytes``. A
phase reads them as its ``replay``, mixed with the task's own images and drawn uniformly from both:
an epoch of n + m images. Nothing else knows them, and a task's exemplars are chosen while its
images are there.

Herding (iCaRL, Algorithm 4): phi(x) is the feature at length 1, mu its mean over the class, and
p_k = argmin over images not taken yet of || mu - (phi(x) + sum_{j<k} phi(p_j)) / k ||. The programs
of iCaRL and LUCIR maximise inner products and allow repeats, which is the same order until the
first repeat.

References:
  Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from skd_jax.config import Limits, Supervised, learning
from skd_jax.losses import unit
from skd_jax.methods import phases as shared
from skd_jax.methods.collecting import Collected, collected, features
from skd_jax.methods.phase import SWEEP, Phase, Replay, Setting, Take
from skd_jax.state import Kept


@dataclasses.dataclass(frozen=True)
class Settings(Supervised):
    """What the settings of methods with exemplars share."""

    exemplars: int = 20  # a class; all of its images where it has fewer


def limits(
    at_least_one: tuple[str, ...] = (), at_least_two: tuple[str, ...] = (), **more: Any
) -> Limits:
    """The limits of such settings, and of more fields; see :class:`skd_jax.config.Limits`."""
    found = learning("method.", **more)
    numbers = (*found.at_least_one, "exemplars", *at_least_one)
    return dataclasses.replace(found, at_least_one=numbers, at_least_two=at_least_two)


@struct.dataclass
class Exemplars:
    """Class by class, in the order they were chosen in: uint8 [M, S, S, C] and int32 [M]."""

    images: jax.Array
    labels: jax.Array

    def first(self, count: int) -> "Exemplars":
        """Those of the first classes, ``count`` in all."""
        return Exemplars(self.images[:count], self.labels[:count])


@struct.dataclass
class KeptExemplars(Kept):
    """T_n, and the exemplars of the classes seen; None before the base's are chosen."""

    exemplars: Exemplars | None = None


def numbers(setting: Setting, task: int) -> tuple[int, ...]:
    """How many exemplars each class of a task has."""
    return tuple(min(setting.config.method.exemplars, n) for n in setting.by_class(task))


def count(setting: Setting, tasks: int) -> int:
    """How many exemplars the classes of the first tasks have together."""
    return sum(sum(numbers(setting, task)) for task in range(tasks))


def of_first(setting: Setting, tasks: int) -> Replay:
    """The exemplars of the first tasks, for a phase to read."""
    total = count(setting, tasks)

    def of(kept: KeptExemplars) -> tuple[jax.Array, jax.Array]:
        assert kept.exemplars is not None
        found = kept.exemplars.first(total)
        return found.images, found.labels

    return Replay(total, of)


def learn(setting: Setting, task: int, step: Callable, static: Any, **more: Any) -> Phase:
    """T_n learns the task's images and the exemplars of the classes before; see phases.learn."""
    replay = of_first(setting, task)
    images = setting.images[task] + replay.count
    config = setting.config.method
    found = {"images": images, "replay": replay, **more}
    return shared.learn(setting, task, config, step, static, **found)


# Choosing them


@functools.partial(jax.jit, static_argnames="number")
def herding(features: jax.Array, candidates: jax.Array, number: int) -> jax.Array:
    """The images whose mean stays closest to that of all, in the order they are taken.

    Args:
      features: phi, [n, F].
      candidates: bool [n], the images of the class.
      number: how many to take. What is taken beyond the number of candidates means nothing.

    Returns:
      Indices, int32 [number].
    """
    weight = candidates / jnp.sum(candidates)
    mean = jnp.sum(features * weight[:, None], axis=0)

    def take(carry: tuple[jax.Array, jax.Array], k: jax.Array) -> Any:
        total, left = carry
        means = (features + total[None]) / k
        distance = jnp.sum(jnp.square(mean[None] - means), axis=-1)
        nearest = jnp.argmin(jnp.where(left, distance, jnp.inf))
        return (total + features[nearest], left.at[nearest].set(False)), nearest

    start = jnp.zeros_like(mean), candidates
    _, order = jax.lax.scan(take, start, jnp.arange(1.0, number + 1.0))
    return order.astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="classes")
def means_of_units(features: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
    """The mean of each class's features at length 1, itself at length 1: [K, F] of [n, F]."""
    one_hot = jax.nn.one_hot(labels, classes)
    return unit(jnp.matmul(one_hot.T, unit(features), precision="highest"))


def select(
    setting: Setting,
    task: int,
    name: str = "select",
    number: int = SWEEP,
    leave: Callable[[Any, jax.Array, jax.Array], Any] | None = None,
    **more: Any,
) -> Phase:
    """Chooses the exemplars of a task's classes, from its images by T_n, and keeps the others.

    Args:
      setting: of the run.
      task: its number.
      name: of the phase.
      number: of the phase in random keys.
      leave: (kept, features [M, F] of all exemplars, features [n, F] of the task's images), both
        by T_n, to what is kept; a feature is 0 where its image's batch was left out. Without it the
        old exemplars are not read.
      more: other fields of :class:`Phase`.
    """
    images, chosen, old = setting.images[task], numbers(setting, task), count(setting, task)
    width, first = setting.nets.features.num_features, setting.seen(task) - setting.classes[task]
    labels = np.repeat(np.arange(first, setting.seen(task), dtype=np.int32), chosen)
    of = np.repeat(np.arange(first, setting.seen(task)), setting.by_class(task))
    replay = of_first(setting, task) if leave and task else None

    def finish(state: Collected, kept: KeptExemplars, take: Take) -> KeptExemplars:
        found, valid = unit(state.rows[:images]), state.valid[:images]

        def order_of(own: np.ndarray, number: int) -> jax.Array:
            # A class whose images were not all met may be left with too few of them.
            candidates = jnp.where(jnp.sum(own & valid) >= number, own & valid, own)
            return herding(found, candidates, max(chosen))[:number]

        order = [order_of(of == first + k, n) for k, n in enumerate(chosen)]
        indices = jnp.concatenate(order)
        new = Exemplars(take(indices), jnp.asarray(labels))
        all_, rows = new, state.rows[indices]
        if kept.exemplars is not None and task:
            all_ = jax.tree.map(
                lambda a, b: jnp.concatenate([a, b]), kept.exemplars.first(old), new
            )
            rows = jnp.concatenate([state.rows[images : images + old], rows])
        kept = dataclasses.replace(kept, exemplars=all_)
        return leave(kept, rows, state.rows[:images]) if leave else kept

    return collected(
        setting,
        task,
        name,
        features,
        width,
        images + (replay.count if replay else 0),
        finish=finish,
        number=number,
        replay=replay,
        **{"ends_task": True, **more},
    )
