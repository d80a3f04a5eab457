"""A pass over images that keeps a row of each, where what follows needs all of them at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from skd_jax import parallel, steps
from skd_jax.methods.phase import Metrics, Phase, Setting
from skd_jax.methods.phases import features as features_by
from skd_jax.methods.phases import sweep
from skd_jax.state import Batch, Kept


@struct.dataclass
class Collected:
    """A row for each image of a pass, in the pass's order, n of them in whole batches.

    Attributes:
      rows: float32 [n, D]; 0 where the image has not been met.
      labels: int32 [n].
      valid: bool [n]: those that count. Not what fills the last batch up, nor a batch that was left
        out for a number that is not finite.
    """

    rows: jax.Array
    labels: jax.Array
    valid: jax.Array

    def first(self, count: int) -> "Collected":
        """Those of the first images."""
        return Collected(self.rows[:count], self.labels[:count], self.valid[:count])


def collect(
    static: Callable[[steps.Networks, Any, jax.Array], jax.Array],
    nets: steps.Networks,
    state: Collected,
    kept: Any,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Collected, Metrics]:
    """Puts a batch's rows, static(nets, kept, images), in their place: a phase's step.

    The place is that of the step, ``rates``, whatever became of the steps before it.
    """
    del key
    valid = batch.valid.astype(jnp.int32)
    found = static(nets, kept, batch.images) * valid[:, None], batch.labels, valid
    rows, labels, valid = (parallel.together(x, nets.axis_name) for x in found)
    at = rates * len(rows)
    new = Collected(
        jax.lax.dynamic_update_slice_in_dim(state.rows, rows, at, 0),
        jax.lax.dynamic_update_slice_in_dim(state.labels, labels, at, 0),
        jax.lax.dynamic_update_slice_in_dim(state.valid, valid > 0, at, 0),
    )
    return new, {"images": jnp.sum(valid).astype(jnp.float32)}


def no_rows(count: int, width: int) -> Collected:
    """What a pass begins with, of ``count`` rows [width] in whole batches."""
    rows, labels = jnp.zeros((count, width)), jnp.zeros(count, jnp.int32)
    return Collected(rows, labels, jnp.zeros(count, bool))


def collected(
    setting: Setting, task: int, name: str, rows: Callable, width: int, images: int, **more: Any
) -> Phase:
    """A pass that collects rows [width] of ``images`` images; ``more`` has its ``finish``."""
    batch = setting.config.base.batch
    size = -(-images // batch) * batch

    def init(kept: Any) -> Collected:
        del kept
        return no_rows(size, width)

    return sweep(setting, task, name, collect, rows, init, images=images, **more)


def features(nets: steps.Networks, kept: Kept, images: jax.Array) -> jax.Array:
    """T_n's features, [B, F]."""
    assert kept.classifier is not None
    return features_by(nets, kept.classifier, images)
