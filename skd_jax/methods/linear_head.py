"""A linear head on frozen features, apart from T_0's own: scores W^T f, or W^T (f, 1)."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct

from skd_jax import steps
from skd_jax.losses import unit
from skd_jax.methods.phase import logits
from skd_jax.methods.phases import features
from skd_jax.state import CLASSIFIES, Kept


class Reads(Protocol):
    """Settings of how features are read."""

    @property
    def unit_length(self) -> bool:
        """At length 1, or as they are."""
        ...


@struct.dataclass
class KeptHead(Kept):
    """T_0, and the head W of all classes seen, float32 [D, K]; None before there is one.

    D is F, the number of features, or F + 1 where a constant feature 1 follows them.
    """

    weights: jax.Array | None = struct.field(default=None, metadata={CLASSIFIES: True})


def read(
    static: Reads, nets: steps.Networks, kept: Kept, images: jax.Array, constant: bool
) -> jax.Array:
    """The features that the head is on, [B, D].

    Args:
      static: the method's settings.
      nets: the architecture.
      kept: T_0.
      images: normalised, [B, S, S, C].
      constant: whether a feature 1 follows those of the network, at whatever length they are.
    """
    assert kept.classifier is not None
    found = features(nets, kept.classifier, images)
    if static.unit_length:
        found = unit(found)
    return jnp.pad(found, ((0, 0), (0, 1)), constant_values=1.0) if constant else found


def scores(static: Reads, nets: steps.Networks, kept: KeptHead, images: jax.Array) -> jax.Array:
    """W^T f, [B, K]; the least number for a class of no image, whose weights are all 0."""
    if kept.weights is None:  # T_0 before there is a head
        return logits(static, nets, kept, images)
    constant = kept.weights.shape[0] > nets.features.num_features
    found = read(static, nets, kept, images, constant)
    products = jnp.matmul(found, kept.weights, precision="highest")
    return jnp.where(jnp.any(kept.weights != 0, axis=0), products, jnp.finfo(jnp.float32).min)
