"""Frozen features and nearest class means: F_0 never learns again, each class keeps its mean.

m_c is the mean of f(x) over the class's training images, unaugmented, in eval mode. An image is of
the class whose mean is nearest: by distance, argmin ||f - m_c||, or by cosine.

References:
  Rebuffi et al., "iCaRL", CVPR 2017, whose NCM takes means of unit-length features; here they are
  of the features as they are.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from skd_jax import parallel, steps
from skd_jax.config import Limits
from skd_jax.methods.phase import Method, Metrics, Phase, Setting, logits
from skd_jax.methods.phases import features, sweep
from skd_jax.state import Batch, Kept


@dataclasses.dataclass(frozen=True)
class Settings:
    """Nearest class means."""

    name: str = "ncm"
    rule: str = "cosine"  # what is near: "cosine" or "distance"


@struct.dataclass
class KeptMeans(Kept):
    """T_0, and the mean feature of each class seen, float32 [K, F]; None before the base's."""

    means: jax.Array | None = None


@struct.dataclass
class Sums:
    """Of the task's images so far: features by class [k, F] and their number [k].

    ``first`` is the label of the first class, int32: an array, so that all tasks share a program.
    """

    features: jax.Array
    count: jax.Array
    first: jax.Array


def step(
    static: None,
    nets: steps.Networks,
    state: Sums,
    kept: Kept,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Sums, Metrics]:
    """Adds a batch."""
    del static, key, rates
    assert kept.classifier is not None
    found = features(nets, kept.classifier, batch.images)
    one_hot = jax.nn.one_hot(batch.labels - state.first, len(state.count)) * batch.valid[:, None]
    sums = jnp.matmul(one_hot.T, found, precision="highest"), jnp.sum(one_hot, axis=0)
    added, count = parallel.total(sums, nets.axis_name)
    new = Sums(state.features + added, state.count + count, state.first)
    return new, {"images": jnp.sum(count)}


def scores(static: Settings, nets: steps.Networks, kept: KeptMeans, images: jax.Array) -> jax.Array:
    """Minus the squared distance to each mean, or the cosine, [B, K]."""
    if kept.means is None:  # T_0 before the base's means are known
        return logits(static, nets, kept, images)
    assert kept.classifier is not None
    found = features(nets, kept.classifier, images)
    return nearness(found, kept.means, static.rule)


def nearness(found: jax.Array, means: jax.Array, rule: str) -> jax.Array:
    """How near features [B, F] are to means [K, F], by "distance" or "cosine": [B, K]."""
    if rule == "distance":
        return -jnp.sum(jnp.square(found[:, None] - means[None]), axis=-1)
    return jnp.matmul(unit(found), unit(means).T, precision="highest")


def unit(rows: jax.Array) -> jax.Array:
    """Rows [K, F] at length 1; a zero row stays 0."""
    return rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)


def no_sums(setting: Setting, task: int) -> Callable[[Any], Sums]:
    """What begins the sums of a task's classes: a phase's ``init``."""
    classes, first = setting.classes[task], setting.seen(task) - setting.classes[task]
    width = setting.nets.features.num_features

    def init(kept: Any) -> Sums:
        del kept
        return Sums(jnp.zeros((classes, width)), jnp.zeros((classes,)), jnp.int32(first))

    return init


def phases(setting: Setting, task: int) -> list[Phase]:
    """One pass over the task's images, the base's included."""

    def finish(state: Sums, kept: KeptMeans, take: Any) -> KeptMeans:
        del take
        means = state.features / state.count[:, None]
        if kept.means is not None:
            means = jnp.concatenate([kept.means, means])
        return dataclasses.replace(kept, means=means)

    return [
        sweep(setting, task, "means", step, None, no_sums(setting, task), finish, ends_task=True)
    ]


METHOD = Method(
    "ncm",
    Settings,
    phases,
    kept=KeptMeans,
    scores=scores,
    check=Limits("method.", choices={"rule": ("cosine", "distance")}).check,
)
