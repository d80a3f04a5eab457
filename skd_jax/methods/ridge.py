"""Frozen features and a ridge head: F_0 never learns again; the head is solved for exactly.

G = sum f f^T and B = sum f y^T over all images, y one-hot; W = (G + penalty I)^-1 B. G and B add
over tasks, so the head after any task is that of all images at once, to float32's rounding. Where
features are large and alike, G's rounding may outweigh the penalty: raise it, or take features of
length 1 (``unit_length``).

Keeps G and B; W classifies: an image is of the class with the largest score W^T f. No published
number for this setting, nor penalty.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from skd_jax import parallel, steps
from skd_jax.config import Limits
from skd_jax.methods.linear_head import KeptHead, read, scores
from skd_jax.methods.phase import Method, Metrics, Phase, Setting
from skd_jax.methods.phases import sweep
from skd_jax.state import Batch


@dataclasses.dataclass(frozen=True)
class Settings:
    """A ridge head."""

    name: str = "ridge"
    penalty: float = 1.0  # lambda
    constant: bool = True  # a constant feature 1 beside the network's
    unit_length: bool = False  # features at length 1


@struct.dataclass
class Statistics:
    """What a ridge head is solved from; D features, K classes.

    Attributes:
      gram: G, float32 [D, D].
      products: B, float32 [D, K].
    """

    gram: jax.Array
    products: jax.Array


@struct.dataclass
class KeptRidge(KeptHead):
    """T_0 and W, and of all classes seen G [D, D] and B [D, K]; None before the base's."""

    gram: jax.Array | None = None
    products: jax.Array | None = None


def step(
    static: Settings,
    nets: steps.Networks,
    state: Statistics,
    kept: KeptRidge,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Statistics, Metrics]:
    """Adds a batch."""
    del key, rates
    found = read(static, nets, kept, batch.images, static.constant) * batch.valid[:, None]
    added = statistics(found, batch.labels, state.products.shape[1])
    total = parallel.total(added, nets.axis_name)
    images = parallel.total(jnp.sum(batch.valid), nets.axis_name)
    return jax.tree.map(jnp.add, state, total), {"images": images.astype(jnp.float32)}


def statistics(found: jax.Array, labels: jax.Array, classes: int) -> Statistics:
    """G and B of features [B, D] with labels int32 [B]."""
    one_hot = jax.nn.one_hot(labels, classes)
    return Statistics(
        jnp.matmul(found.T, found, precision="highest"),
        jnp.matmul(found.T, one_hot, precision="highest"),
    )


def solve(of: Statistics, penalty: float) -> jax.Array:
    """W = (G + penalty I)^-1 B, [D, K]."""
    return jnp.linalg.solve(of.gram + penalty * jnp.eye(len(of.gram)), of.products)


def phases(setting: Setting, task: int, over: Callable[..., Phase] = sweep) -> list[Phase]:
    """One pass over the task's images, the base's included, or over other images in their place."""
    settings, new = setting.config.method, setting.classes[task]
    width = setting.nets.features.num_features + settings.constant

    def init(kept: KeptRidge) -> Statistics:
        if kept.gram is None or kept.products is None:
            return Statistics(jnp.zeros((width, width)), jnp.zeros((width, new)))
        return Statistics(jnp.copy(kept.gram), jnp.pad(kept.products, ((0, 0), (0, new))))

    def finish(state: Statistics, kept: KeptRidge, take: Any) -> KeptRidge:
        del take
        weights = solve(state, settings.penalty)
        return dataclasses.replace(kept, gram=state.gram, products=state.products, weights=weights)

    return [over(setting, task, "head", step, settings, init, finish, ends_task=True)]


METHOD = Method(
    "ridge",
    Settings,
    phases,
    kept=KeptRidge,
    scores=scores,
    check=Limits("method.", positive=("penalty",)).check,
    family="frozen features",
    keeps="products of features",
)
