"""What training carries from step to step, as pytrees."""

from typing import Any

import optax
from flax import struct

Params = dict[str, Any]


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
class StageOneState:
    """S_n (its feature extractor; it needs no head) and D_n."""

    student: Trained
    delegator: Trained


@struct.dataclass
class Carry:
    """What one phase leaves to the next.

    Attributes:
      classifier: T_n; None before the base phase has ended.
      delegator: D_n, or D_{n-1} until stage one of task n has ended; None before the first.
      student: S_n, from the end of stage one until it has been measured.
    """

    classifier: Network | None = None
    delegator: Network | None = None
    student: Network | None = None
