"""Class means: summed over a pass of images, and which of them is nearest.

m_c is the mean of f(x) over some images of class c, in eval mode, of the features as they are.
Nearest by distance is argmin ||f - m_c||; by cosine, lengths do not count.

References:
  Rebuffi et al., "iCaRL", CVPR 2017, whose means are of unit-length features.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from skd_jax import parallel, steps
from skd_jax.losses import unit
from skd_jax.methods.phase import Metrics, Setting
from skd_jax.methods.phases import features
from skd_jax.state import Batch, Kept

RULES = ("cosine", "distance")


@struct.dataclass
class KeptMeans(Kept):
    """T_n, and the mean feature of each class seen, float32 [K, F]; None before the base's."""

    means: jax.Array | None = None


@struct.dataclass
class Sums:
    """Of the task's images so far: features by class [k, F] and their number [k].

    ``first`` is the label of the first class, int32: an array, so that all tasks share a program.
    """

    features: jax.Array
    count: jax.Array
    first: jax.Array

    def means(self) -> jax.Array:
        """The mean of each class, [k, F]; 0 for a class without an image."""
        return self.features / jnp.maximum(self.count, 1)[:, None]


def no_sums(setting: Setting, task: int) -> Callable[[Any], Sums]:
    """What begins the sums of a task's classes: a phase's ``init``."""
    classes, first = setting.classes[task], setting.seen(task) - setting.classes[task]
    width = setting.nets.features.num_features

    def init(kept: Any) -> Sums:
        del kept
        return Sums(jnp.zeros((classes, width)), jnp.zeros((classes,)), jnp.int32(first))

    return init


def add(
    static: None,
    nets: steps.Networks,
    state: Sums,
    kept: Kept,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Sums, Metrics]:
    """Adds a batch: a phase's step."""
    del static, key, rates
    assert kept.classifier is not None
    found = features(nets, kept.classifier, batch.images)
    new, count = added(state, found, batch.labels, batch.valid, nets.axis_name)
    return new, {"images": jnp.sum(count)}


def added(
    state: Sums, found: jax.Array, labels: jax.Array, valid: jax.Array, axis_name: str | None
) -> tuple[Sums, jax.Array]:
    """The sums with this device's share of a batch, and how many each class has in it, [k].

    Args:
      state: the sums.
      found: features [B, F].
      labels: int32 [B], positions in the head.
      valid: bool [B], those that count.
      axis_name: mapped axis the batch is split over, or None.
    """
    one_hot = jax.nn.one_hot(labels - state.first, len(state.count)) * valid[:, None]
    sums = jnp.matmul(one_hot.T, found, precision="highest"), jnp.sum(one_hot, axis=0)
    total, count = parallel.total(sums, axis_name)
    return Sums(state.features + total, state.count + count, state.first), count


def joined(old: jax.Array | None, new: jax.Array) -> jax.Array:
    """Means of classes seen before, None if there were none, and of new ones: [K, F]."""
    return new if old is None else jnp.concatenate([old, new])


def nearness(found: jax.Array, means: jax.Array, rule: str) -> jax.Array:
    """How near features [B, F] are to means [K, F], by "distance" or "cosine": [B, K]."""
    if rule == "distance":
        return -jnp.sum(jnp.square(found[:, None] - means[None]), axis=-1)
    return jnp.matmul(unit(found), unit(means).T, precision="highest")
