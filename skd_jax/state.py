"""What training carries from step to step, as pytrees."""

from typing import Any

import jax
import optax
from flax import struct

Params = dict[str, Any]
CLASSIFIES = "classifies"  # metadata of what of ``Kept`` is the classifier, or a part of it


@struct.dataclass
class Network:
    """One network's variables, float32: ``params`` and the BN layers' running ``batch_stats``."""

    params: Params
    batch_stats: Params

    def variables(self) -> dict[str, Params]:
        """What ``module.apply`` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


@struct.dataclass
class Trained:
    """A network in training and its optimiser's state."""

    network: Network
    optimiser: optax.OptState


@struct.dataclass
class Batch:
    """This device's share of a batch of one task's images.

    Attributes:
      images: float32 [B, S, S, C], normalised; augmented if the phase reads them shuffled.
      labels: int32 [B], positions in the head.
      valid: bool [B]; False fills the last batch of a phase that reads in order.
    """

    images: jax.Array
    labels: jax.Array
    valid: jax.Array


@struct.dataclass
class Kept:
    """What one phase leaves to the next; a method that keeps more adds fields to it.

    Attributes:
      classifier: T_n; None before the base phase has ended.
    """

    classifier: Network | None = struct.field(default=None, metadata={CLASSIFIES: True})
