"""New outputs learned anew when a task's features are: a phase of stage two, not in the paper.

Old classes are learned from pseudo images and new ones from real images, and a head that sees both
learns to tell pseudo from real. This one does not see pseudo images. The features of an old class P
are those of the real images of the new class C whose mean is the most similar, moved by the means:
f + m_P - m_C, as FeTrIL has them, where m_P is the mean of the pseudo images of P. There are as
many of each old class as of a new one in the mean. On these and on the new classes' own features
the new outputs minimise the cross-entropy over all outputs; the old outputs stay as they are.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from skd_jax import steps
from skd_jax.methods.class_means import Sums, add, no_sums
from skd_jax.methods.collecting import Collected, collect, features
from skd_jax.methods.fetril import pseudo_features
from skd_jax.methods.phase import Metrics, Phase, Setting, logits
from skd_jax.methods.phases import sweep
from skd_jax.methods.skd.steps import draw, with_delegator
from skd_jax.models import Delegator
from skd_jax.state import Batch, Params

NUMBER = 6  # the phase's, in random keys
ACCURACY = 10.0  # the distance from the minimum falls to exp(-ACCURACY) of what it was


@struct.dataclass
class Seen:
    """Features of the task's images, and sums of those of pseudo images by old class."""

    new: Collected
    old: Sums


@dataclasses.dataclass(frozen=True)
class _Drawing:
    """What a step depends on that is no array."""

    delegator: Delegator


def phase(setting: Setting, task: int, delegator: Delegator) -> Phase:
    """One pass over the task's images, with as many pseudo images beside them.

    Args:
      setting: of the run; its ``config.method.stage_two.new_outputs`` is the weight decay.
      task: its number, 1 or more.
      delegator: the architecture.
    """
    classes, images = setting.classes[task], setting.images[task]
    each, decay = images // classes, setting.config.method.stage_two.new_outputs
    size = -(-images // setting.config.base.batch) * setting.config.base.batch
    no_old = no_sums(dataclasses.replace(setting, classes=(setting.seen(task - 1),)), 0)

    def init(kept: Any) -> Seen:
        rows = jnp.zeros((size, setting.nets.features.num_features))
        return Seen(
            Collected(rows, jnp.zeros(size, jnp.int32), jnp.zeros(size, bool)), no_old(kept)
        )

    def finish(state: Seen, kept: Any, take: Any) -> Any:
        del take
        params = kept.classifier.params
        head = learned(state, params["head"], each, decay)
        classifier = dataclasses.replace(kept.classifier, params={**params, "head": head})
        return dataclasses.replace(kept, classifier=classifier)

    return sweep(
        setting,
        task,
        "head",
        _look,
        _Drawing(delegator),
        init,
        finish,
        NUMBER,
        draws=True,
        ends_task=True,
        passes=7 * setting.config.base.batch,  # D, T_n on both
    )


def _look(
    static: _Drawing,
    nets: steps.Networks,
    state: Seen,
    kept: Any,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Seen, Metrics]:
    """Takes a batch's features, and those of as many pseudo images, of the old class they get."""
    new, metrics = collect(features, nets, state.new, kept, batch, key, rates)
    pseudo = draw(with_delegator(nets, static.delegator), kept.delegator, key, len(batch.images))
    outputs = logits(None, nets, kept, pseudo)[:, : len(state.old.count)]
    labels = jnp.argmax(outputs, axis=-1).astype(jnp.int32)
    drawn = Batch(pseudo, labels, jnp.ones_like(batch.valid))
    old, _ = add(None, nets, state.old, kept, drawn, key, rates)
    return Seen(new, old), metrics


@partial(jax.jit, static_argnames=("each", "decay"))
def learned(seen: Seen, head: Params, each: int, decay: float) -> Params:
    """The head with its new outputs learned anew.

    Args:
      seen: the features; as many classes have sums as there are old outputs.
      head: ``kernel`` [F, K] and ``bias`` [K].
      each: how many features an old class gets.
      decay: see :func:`minimum`.
    """
    new, count = seen.new, len(seen.old.count)
    one_hot = jax.nn.one_hot(new.labels - count, head["bias"].shape[0] - count)
    one_hot = one_hot * new.valid[:, None]
    sums = jnp.matmul(one_hot.T, new.rows, precision="highest")
    means = sums / jnp.maximum(jnp.sum(one_hot, axis=0), 1)[:, None]
    moved, labels = pseudo_features(new, seen.old.means(), means, each)
    found = jnp.concatenate([new.rows, moved])
    # A class of which nothing was drawn has no mean.
    valid = jnp.concatenate([new.valid, (seen.old.count > 0)[labels]])
    return minimum(found, jnp.concatenate([new.labels, labels]), valid, head, count, decay)


def minimum(
    found: jax.Array, labels: jax.Array, valid: jax.Array, head: Params, old: int, decay: float
) -> Params:
    """The head whose new outputs W, b minimise CE + decay / 2 * |s W|^2.

    The others stay. CE is the mean cross-entropy over all outputs, and s^2 the mean square of the
    features' length, so that their scale does not matter. By Nesterov's gradient descent from 0 on
    f / s, where the curvature is at most 1 + decay, and at least decay but for b.

    Args:
      found: features, float32 [n, F].
      labels: int32 [n].
      valid: bool [n], those that count.
      head: ``kernel`` [F, K] and ``bias`` [K].
      old: the number of outputs that stay; the first ones.
      decay: above 0.
    """
    product = partial(jnp.matmul, precision="highest")
    share = valid / jnp.maximum(jnp.sum(valid), 1)
    square = jnp.sum(share * jnp.sum(jnp.square(found), axis=-1))
    scale = jnp.maximum(jnp.sqrt(square), jnp.finfo(jnp.float32).tiny)
    held = product(found, head["kernel"][:, :old]) + head["bias"][None, :old]
    of_one = found / scale
    of_old = jax.nn.logsumexp(held, axis=-1, keepdims=True)
    target = jax.nn.one_hot(labels - old, head["bias"].shape[0] - old)  # 0 for an old class

    def loss(outputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        weights, bias = outputs
        scores = product(of_one, weights) + bias[None]
        total = jax.nn.logsumexp(jnp.concatenate([of_old, scores], axis=-1), axis=-1)
        entropy = jnp.sum(share * (total - jnp.sum(target * scores, axis=-1)))
        return entropy + 0.5 * decay * jnp.sum(jnp.square(weights))

    slow = math.sqrt(decay / (1 + decay))
    step, momentum = 1 / (1 + decay), (1 - slow) / (1 + slow)

    def descend(_: Any, at: tuple) -> tuple:
        here, ahead = at
        gradient = jax.grad(loss)(ahead)
        there = jax.tree.map(lambda x, g: x - step * g, ahead, gradient)
        return there, jax.tree.map(lambda x, y: x + momentum * (x - y), there, here)

    zero = jnp.zeros_like(head["kernel"][:, old:]), jnp.zeros_like(head["bias"][old:])
    (weights, bias), _ = jax.lax.fori_loop(0, math.ceil(ACCURACY / slow), descend, (zero, zero))
    return {
        "kernel": jnp.concatenate([head["kernel"][:, :old], weights / scale], axis=1),
        "bias": jnp.concatenate([head["bias"][:old], bias]),
    }
