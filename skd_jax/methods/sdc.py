"""Semantic drift compensation on EWC: old class means follow the features' drift.

T_n learns a task as EWC has it. The old classes' means are then of features that are no more, and
no old image is there to take them anew. But new images show how features moved:
delta_i = f_t(x_i) - f_{t-1}(x_i), w_ic = exp(-||f_{t-1}(x_i) - mu_c||^2 / (2 sigma^2)), and once a
task, for every old class, mu_c <- mu_c + sum_i w_ic delta_i / sum_i w_ic. An image is of the class
whose mean is nearest.

Taken: cross-entropy on T_0 and EWC of all its weights, so that it starts from the T_0 of all
methods; nearest by distance, the means not renormalised; images for means and drift unaugmented.
The paper learns an embedding of unit length by a triplet loss (margin 0, Adam 1e-6, EWC's weight
1e7), its code of CIFAR-100 from a softmax-trained base, and there F is of the last task alone. Its
sigma (0.3; 0.2 on CIFAR-100) belongs to features of length 1, so here it is in units of the old
means' mean length. Users could not reproduce its numbers.

Keeps F and the class means; T_{n-1} from the end of the learning to that of the drift.

References:
  Yu et al., "Semantic Drift Compensation for Class-Incremental Learning", CVPR 2020.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from skd_jax import parallel, steps
from skd_jax.config import Config, Limits
from skd_jax.methods import ewc, finetune, ncm
from skd_jax.methods.class_means import KeptMeans, add, nearness, no_sums
from skd_jax.methods.penalty import KeptImportance
from skd_jax.methods.phase import Method, Metrics, Phase, Setting, logits
from skd_jax.methods.phases import features, learn, sweep
from skd_jax.state import Batch, Network, Trained

DRIFT = 7  # the number of its pass in random keys


@dataclasses.dataclass(frozen=True)
class Settings(ewc.Settings):
    """SDC + EWC."""

    name: str = "sdc"
    sigma: float = 0.2  # of the Gaussian, in units of the old means' mean length


@struct.dataclass
class KeptDrifting(KeptMeans, KeptImportance):
    """T_n, F and the means, and T_{n-1} until the drift from it is known."""

    previous: Network | None = None


@struct.dataclass
class Drift:
    """Of the task's images so far, for each old class c.

    Attributes:
      nearest: the largest exponent of a weight, [K]; weights are relative to it, so that they do
        not all underflow.
      weights: sum of w_ic, [K].
      moved: sum of w_ic delta_i, [K, F].
    """

    nearest: jax.Array
    weights: jax.Array
    moved: jax.Array


def no_drift(means: jax.Array) -> Drift:
    """Of no image; means [K, F]."""
    zeros = jnp.zeros(len(means))
    return Drift(zeros - 1e30, zeros, jnp.zeros_like(means))


def drifted(
    state: Drift,
    old: jax.Array,
    new: jax.Array,
    valid: jax.Array,
    means: jax.Array,
    sigma: jax.Array | float,
    axis_name: str | None = None,
) -> Drift:
    """Adds images.

    Args:
      state: so far.
      old: f_{t-1}(x_i), [B, F].
      new: f_t(x_i), [B, F].
      valid: bool [B], those that count.
      means: mu_c, [K, F].
      sigma: of the Gaussian.
      axis_name: mapped axis the batch is split over.
    """
    exponents = nearness(old, means, "distance") / (2 * sigma**2)
    exponents = jnp.where(valid[:, None], exponents, -1e30)
    nearest = jnp.maximum(state.nearest, parallel.largest(exponents.max(axis=0), axis_name))
    weights = jnp.where(valid[:, None], jnp.exp(exponents - nearest[None]), 0.0)
    moved = jnp.matmul(weights.T, new - old, precision="highest")
    total, moved = parallel.total((jnp.sum(weights, axis=0), moved), axis_name)
    before = jnp.exp(state.nearest - nearest)
    return Drift(nearest, before * state.weights + total, before[:, None] * state.moved + moved)


def step(
    static: Settings,
    nets: steps.Networks,
    state: Drift,
    kept: KeptDrifting,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Drift, Metrics]:
    """Adds a batch to the drift."""
    del key, rates
    assert kept.classifier is not None and kept.previous is not None and kept.means is not None
    old = features(nets, kept.previous, batch.images)
    new = features(nets, kept.classifier, batch.images)
    sigma = static.sigma * jnp.mean(jnp.linalg.norm(kept.means, axis=-1))
    found = drifted(state, old, new, batch.valid, kept.means, sigma, nets.axis_name)
    images = parallel.total(jnp.sum(batch.valid), nets.axis_name)
    return found, {"images": images.astype(jnp.float32)}


def scores(static: Any, nets: steps.Networks, kept: KeptMeans, images: jax.Array) -> jax.Array:
    """Minus the squared distance to each mean, [B, K]."""
    if kept.means is None:  # T_0 before the base's means are known
        return logits(static, nets, kept, images)
    assert kept.classifier is not None
    return nearness(features(nets, kept.classifier, images), kept.means, "distance")


def phases(setting: Setting, task: int) -> list[Phase]:
    """Learning, the drift of the old means, the means of the task's classes, and F."""
    settings = setting.config.method

    def learned(state: Trained, kept: KeptDrifting, take: Any) -> KeptDrifting:
        del take
        return dataclasses.replace(kept, classifier=state.network, previous=kept.classifier)

    def init(kept: KeptDrifting) -> Drift:
        assert kept.means is not None
        return no_drift(kept.means)

    def compensated(state: Drift, kept: KeptDrifting, take: Any) -> KeptDrifting:
        del take
        assert kept.means is not None
        means = kept.means + state.moved / state.weights[:, None]
        return dataclasses.replace(kept, means=means, previous=None)

    more = {"finish": learned, "ends_task": False}
    first = [
        learn(setting, task, settings, ewc.step, settings, **more),
        sweep(setting, task, "drift", step, settings, init, compensated, DRIFT),
    ]
    sums = no_sums(setting, task)
    means = sweep(setting, task, "means", add, None, sums, ncm.keep, ends_task=True)
    return [*(first if task else ()), means, ewc.found(setting, task)]


def check(config: Config) -> None:
    """Raises UserError for a field that is outside its limits."""
    ewc.LIMITS.check(config)
    Limits("method.", positive=("sigma",)).check(config)


METHOD = Method(
    "sdc",
    Settings,
    phases,
    kept=KeptDrifting,
    scores=scores,
    check=check,
    warnings=finetune.warnings,
    keeps="weights' importance, class means",
)
