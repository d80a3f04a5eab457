"""Frozen features and linear discriminant analysis: one mean a class, one covariance for all.

F_0 never learns again. Sigma is the covariance of features about their classes' means, over all
images seen; Lambda = ((1 - shrinkage) Sigma + shrinkage I)^-1, w_c = Lambda m_c and
b_c = - m_c . Lambda m_c / 2: the class of the largest w_c . f + b_c, all classes as likely. Means
and Sigma add up over batches and tasks (Chan's formula), so the head after any task is that of all
images at once, to float32's rounding.

The streaming form's shrinkage is 1e-4, seen in its code. Its covariance starts from the base images
by another estimate (not verified) and goes on growing, or is held; here it is Sigma throughout.
The identity belongs to features whose variances are about 1: raise ``shrinkage``, or take features
of length 1 with a smaller one, where they are far from it.

Keeps the means and the scatter.

References:
  Hayes and Kanan, "Lifelong Machine Learning with Deep Streaming Linear Discriminant Analysis",
  CVPR Workshops 2020.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from skd_jax import parallel, steps
from skd_jax.config import Limits
from skd_jax.methods.class_means import joined
from skd_jax.methods.linear_head import KeptHead, read, scores
from skd_jax.methods.phase import Method, Metrics, Phase, Setting
from skd_jax.methods.phases import sweep
from skd_jax.state import Batch


@dataclasses.dataclass(frozen=True)
class Settings:
    """A head of linear discriminants."""

    name: str = "lda"
    shrinkage: float = 1e-4  # of the covariance, towards the identity
    unit_length: bool = False  # features at length 1


@struct.dataclass
class KeptScatter(KeptHead):
    """T_0 and the head; None before the base's.

    Attributes:
      means: of each class seen, [K, F].
      scatter: sum of (f - m_c)(f - m_c)^T over all images, [F, F].
      images: how many there were.
    """

    means: jax.Array | None = None
    scatter: jax.Array | None = None
    images: jax.Array | None = None


@struct.dataclass
class Gaussians:
    """Of the task's images so far: k classes, from the label ``first`` on.

    Attributes:
      count: images by class, [k].
      means: [k, F].
      scatter: about these means, and of earlier tasks, [F, F].
      first: int32, an array, so that all tasks share a program.
    """

    count: jax.Array
    means: jax.Array
    scatter: jax.Array
    first: jax.Array


def added(
    state: Gaussians,
    found: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
    axis_name: str | None = None,
) -> Gaussians:
    """Adds features [B, F] with labels int32 [B], of which bool [B] count.

    Squares are of differences to the batch's means, and of these to the means so far, so that no
    large numbers cancel.
    """
    one_hot = jax.nn.one_hot(labels - state.first, len(state.count)) * valid[:, None]
    sums = jnp.matmul(one_hot.T, found, precision="highest"), jnp.sum(one_hot, axis=0)
    sums, count = parallel.total(sums, axis_name)
    means = sums / jnp.maximum(count, 1)[:, None]
    centred = found - jnp.matmul(one_hot, means, precision="highest")
    centred = centred * jnp.any(one_hot > 0, axis=-1)[:, None]
    within = jnp.matmul(centred.T, centred, precision="highest")
    moved = means - state.means
    both = jnp.maximum(state.count + count, 1)
    apart = moved * (state.count * count / both)[:, None]
    between = jnp.matmul(moved.T, apart, precision="highest")
    return Gaussians(
        count=state.count + count,
        means=state.means + moved * (count / both)[:, None],
        scatter=state.scatter + parallel.total(within, axis_name) + between,
        first=state.first,
    )


def discriminants(means: jax.Array, covariance: jax.Array, shrinkage: float) -> jax.Array:
    """W of means [K, F] and a covariance [F, F]: [F + 1, K], the b_c in the last row."""
    identity = jnp.eye(len(covariance))
    weights = jnp.linalg.solve((1 - shrinkage) * covariance + shrinkage * identity, means.T)
    bias = -0.5 * jnp.sum(means.T * weights, axis=0)
    return jnp.concatenate([weights, bias[None]])


def step(
    static: Settings,
    nets: steps.Networks,
    state: Gaussians,
    kept: KeptScatter,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Gaussians, Metrics]:
    """Adds a batch."""
    del key, rates
    found = read(static, nets, kept, batch.images, constant=False)
    new = added(state, found, batch.labels, batch.valid, nets.axis_name)
    return new, {"images": jnp.sum(new.count - state.count)}


def phases(setting: Setting, task: int, over: Callable[..., Phase] = sweep) -> list[Phase]:
    """One pass over the task's images, the base's included, or over other images in their place."""
    settings, width = setting.config.method, setting.nets.features.num_features
    classes, first = setting.classes[task], setting.seen(task) - setting.classes[task]

    def init(kept: KeptScatter) -> Gaussians:
        known = kept.scatter
        scatter = jnp.zeros((width, width)) if known is None else jnp.copy(known)
        means = jnp.zeros((classes, width))
        return Gaussians(jnp.zeros((classes,)), means, scatter, jnp.int32(first))

    def finish(state: Gaussians, kept: KeptScatter, take: Any) -> KeptScatter:
        del take
        images = jnp.sum(state.count) + (0.0 if kept.images is None else kept.images)
        means = joined(kept.means, state.means)
        weights = discriminants(means, state.scatter / images, settings.shrinkage)
        return dataclasses.replace(
            kept, means=means, scatter=state.scatter, images=images, weights=weights
        )

    return [over(setting, task, "head", step, settings, init, finish, ends_task=True)]


METHOD = Method(
    "lda",
    Settings,
    phases,
    kept=KeptScatter,
    scores=scores,
    check=Limits("method.", positive=("shrinkage",), below_one=("shrinkage",)).check,
    family="frozen features",
    keeps="class means, a covariance",
)
