"""The quadratic penalty of EWC, MAS and SI: weights that matter to old tasks stay where they were.

sum_i Omega_i (theta_i - theta'_i)^2, with theta' the weights of T_n and Omega_i how much weight i
matters, which is what the three methods differ in. All parameters are held, those of BN and the old
rows of the head included; new rows have no theta', and BN's running moments are not held. Beside
T_n, which is theta' itself, only Omega is kept: as many numbers as T_n has.

The classification loss runs over the new outputs, as in FACIL and PyCIL. (So old rows of the head
feel weight decay and the penalty alone; where Omega is small, they shrink.) A step descends it by
SGD and then takes the penalty implicitly, see :func:`pulled`: a gradient step on the penalty
diverges where the rate times its curvature exceeds 2 (1 + momentum), and the few largest Omega
would set how large a weight may be. (Libraries cut Omega instead: PyCIL at 1e-4, Avalanche at
1e-3.)
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from skd_jax import losses, parallel, steps
from skd_jax.methods.finetune import new_outputs
from skd_jax.methods.phase import Metrics, Phase, Setting
from skd_jax.methods.phases import sweep
from skd_jax.state import Batch, Kept, Network, Params, Trained

IMPORTANCE = 6  # the number in random keys of the pass that finds Omega


@struct.dataclass
class KeptImportance(Kept):
    """T_n, and Omega, a tree like T_n's params, float32; None before T_0's is known."""

    importance: Params | None = None


def quadratic(importance: Params, params: Params, anchor: Params) -> jax.Array:
    """Sum of Omega (theta - theta')^2.

    Args:
      importance: Omega, like ``anchor``.
      params: theta; its head may have more outputs, which count nothing.
      anchor: theta'.
    """

    def one(weight: jax.Array, value: jax.Array, before: jax.Array) -> jax.Array:
        value = value[tuple(slice(n) for n in before.shape)]
        return jnp.sum(weight * jnp.square(value - before))

    parts = jax.tree.map(one, importance, params, anchor)
    return jnp.sum(jnp.stack(jax.tree.leaves(parts)))


def accumulated(old: Params | None, new: Params, decay: float = 1.0) -> Params:
    """Decay * Omega + Omega of a new task, whose head may have more outputs."""
    if old is None:
        return new

    def one(before: jax.Array, found: jax.Array) -> jax.Array:
        more = [(0, n - m) for m, n in zip(before.shape, found.shape, strict=True)]
        return decay * jnp.pad(before, more) + found

    return jax.tree.map(one, old, new)


def penalised(
    nets: steps.Networks,
    config: steps.HasDecay,
    strength: float,
    state: Trained,
    kept: KeptImportance,
    batch: Batch,
    rate: jax.Array,
) -> tuple[Trained, Any, Metrics]:
    """A step on the cross-entropy over new outputs + strength * the penalty.

    Without T_n, which is T_0's own training, all outputs are new and there is no penalty.

    Returns:
      The next state, not guarded; the gradient of the cross-entropy alone; what to log.
    """
    network, anchor = state.network, kept.classifier
    outputs = None if anchor is None else new_outputs(state, kept)
    one_hot = jax.nn.one_hot(batch.labels, network.params["head"]["kernel"].shape[-1])

    def objective(features: jax.Array, logits: jax.Array) -> tuple[jax.Array, Metrics]:
        del features
        loss = losses.classification_loss(logits, one_hot, outputs)
        return loss, {"classification": loss}

    grads, stats, metrics = steps.gradients(nets, network, batch.images, batch.labels, objective)
    new = steps.update(state, grads, stats, steps.sgd(config), rate)
    if anchor is not None:
        assert kept.importance is not None
        value = strength * quadratic(kept.importance, network.params, anchor.params)
        metrics = {"loss": metrics["classification"] + value, **metrics, "penalty": value}
        far = 2 * strength * rate / (1 - config.momentum)
        params = pulled(kept.importance, new.network.params, anchor.params, far)
        new = Trained(Network(params, new.network.batch_stats), new.optimiser)
    return new, grads, metrics


def pulled(importance: Params, params: Params, anchor: Params, far: jax.Array) -> Params:
    """Where an implicit step on the penalty ends: (theta + far Omega theta') / (1 + far Omega).

    With ``far`` = 2 * strength * rate / (1 - momentum) it is at rest where the gradient of the
    whole loss is 0, as SGD with momentum is, and it does not overshoot whatever Omega is.

    Args:
      importance: Omega, like ``anchor``.
      params: theta; its head may have more outputs, which stay.
      anchor: theta'.
      far: a scalar.
    """

    def one(weight: jax.Array, value: jax.Array, before: jax.Array) -> jax.Array:
        held = tuple(slice(n) for n in before.shape)
        share = far * weight / (1 + far * weight)
        return value.at[held].add(share * (before - value[held]))

    return jax.tree.map(one, importance, params, anchor)


def by_example(
    value: Callable[..., jax.Array],
    of: Callable[[jax.Array], jax.Array],
    params: Params,
    examples: Any,
    valid: jax.Array,
) -> Params:
    """Sum over examples of a function of each one's own gradient: one vmap.

    Args:
      value: (params, example) to a scalar.
      of: what is made of each number of the gradient d value / d theta: its square, for instance.
      params: theta.
      examples: a pytree of arrays [B, ...].
      valid: bool [B], the examples that count.
    """

    def one(example: Any) -> Params:
        return jax.tree.map(of, jax.grad(value)(params, example))

    def counted(each: jax.Array) -> jax.Array:
        mask = valid.reshape(-1, *(1,) * (each.ndim - 1))
        return jnp.sum(jnp.where(mask, each, 0.0), axis=0)

    return jax.tree.map(counted, jax.vmap(one)(examples))


@struct.dataclass
class Measured:
    """Of the task's images so far: the sum that Omega is the mean of, and their number."""

    sums: Params
    count: jax.Array


def measure(
    value: Callable[..., jax.Array],
    of: Callable[[jax.Array], jax.Array],
    nets: steps.Networks,
    state: Measured,
    classifier: Network,
    batch: Batch,
    more: Any = None,
) -> tuple[Measured, Metrics]:
    """Adds a batch; the network is in eval mode, so that an image's outputs are its own.

    Args:
      value: (logits [K], the example's part of ``more``) to a scalar.
      of: see :func:`by_example`.
      nets: the architecture.
      state: so far.
      classifier: T_n.
      batch: this device's share of a batch.
      more: a pytree of arrays [B, ...].
    """
    module = nets.classifier(classifier.params)

    def of_params(params: Params, example: Any) -> jax.Array:
        image, beside = example
        network = Network(params, classifier.batch_stats)
        return value(steps.eval_mode(module, network, image[None])[1][0], beside)

    params = parallel.varying(classifier.params, nets.axis_name)
    found = by_example(of_params, of, params, (batch.images, more), batch.valid)
    sums, images = parallel.total((found, jnp.sum(batch.valid)), nets.axis_name)
    images = images.astype(jnp.float32)
    new = Measured(jax.tree.map(jnp.add, state.sums, sums), state.count + images)
    return new, {"images": images}


def importance(
    setting: Setting, task: int, step: Callable, static: Hashable, decay: float = 1.0, **more: Any
) -> Phase:
    """A pass over the task's images, after which Omega is decay * Omega + their mean."""

    def init(kept: KeptImportance) -> Measured:
        assert kept.classifier is not None
        return Measured(jax.tree.map(jnp.zeros_like, kept.classifier.params), jnp.float32(0.0))

    def finish(state: Measured, kept: KeptImportance, take: Any) -> KeptImportance:
        del take
        mean = jax.tree.map(lambda x: x / state.count, state.sums)
        return dataclasses.replace(kept, importance=accumulated(kept.importance, mean, decay))

    return sweep(setting, task, "importance", step, static, init, finish, IMPORTANCE, **more)
