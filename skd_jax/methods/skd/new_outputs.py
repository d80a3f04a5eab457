"""New outputs learned anew once a task's features are: a phase of stage two, not in the paper.

Old classes are learned from pseudo images and new ones from real images, and a head that is trained
on both to the end learns to tell pseudo from real. So pseudo images give class means alone here.
The features of an old class P are those of the real images of a new class C, moved by the means:
f + m_P - m_C [FeTrIL], where C is the new class whose mean is the most similar to m_P by cosine,
and m_P the mean of the pseudo images that T_{n+1}, by its old outputs, takes for P. Each old class
weighs as much as a new one in the mean. On these and on the new classes' own features the new
outputs minimise the cross-entropy over all outputs; the old outputs stay as they are.

With ``keep_means``, m_P of a class that a task has learned is the mean of its real images, which is
kept from that task on, and the outputs of all such classes are learned again with the new ones.
Only the base's outputs stay then, and only base classes need the means of pseudo images.

References:
  [FeTrIL] Petit et al., "FeTrIL: Feature Translation for Exemplar-Free Class-Incremental Learning",
    WACV 2023.
  [Boehning] "Multinomial logistic regression algorithm", 1992: the bound of the curvature.
  [Nesterov] "Introductory Lectures on Convex Optimization", 2004, 2.2: constant momentum.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from skd_jax import steps
from skd_jax.compiler import compiled
from skd_jax.methods.class_means import Sums, added, joined
from skd_jax.methods.collecting import Collected, collect, features, no_rows
from skd_jax.methods.fetril import lenders
from skd_jax.methods.phase import Metrics, Phase, Setting
from skd_jax.methods.phases import sweep
from skd_jax.methods.skd.steps import draw, with_delegator
from skd_jax.models import Delegator
from skd_jax.state import Batch, Params

NUMBER = 6  # the phase's, in random keys
EACH = 50  # pseudo images of an old class in the mean, or more
ACCURACY = 10.0  # the loss comes to exp(-ACCURACY) of what it was above its minimum


@struct.dataclass
class Seen:
    """Features of the task's images, and sums of those of pseudo images by old class."""

    new: Collected
    old: Sums


@dataclasses.dataclass(frozen=True)
class _Beside:
    """What a step depends on that is no array: ``times`` pseudo images beside each image."""

    delegator: Delegator
    times: int


def phase(setting: Setting, task: int, delegator: Delegator) -> Phase:
    """One pass over the task's images, and as many pseudo images or more beside them.

    Args:
      setting: of the run; of ``config.method.stage_two``, ``new_outputs_decay`` is
        :func:`minimum`'s, and ``keep_means`` says whether later classes leave their means.
      task: its number, 1 or more.
      delegator: the architecture.
    """
    config, width, old = setting.config, setting.nets.features.num_features, setting.seen(task - 1)
    batch, sizes = config.base.batch, setting.by_class(task)
    size = -(-setting.images[task] // batch) * batch
    times = max(1, -(-EACH * old // size))

    def init(kept: Any) -> Seen:
        del kept
        no_old = Sums(jnp.zeros((old, width)), jnp.zeros((old,)), jnp.int32(0))
        return Seen(no_rows(size, width), no_old)

    def finish(state: Seen, kept: Any, take: Any) -> Any:
        del take
        params, two = kept.classifier.params, config.method.stage_two
        head, new = learned(state, params["head"], sizes, two.new_outputs_decay, kept.later_means)
        classifier = dataclasses.replace(kept.classifier, params={**params, "head": head})
        means = joined(kept.later_means, new) if two.keep_means else None
        return dataclasses.replace(kept, classifier=classifier, later_means=means)

    return sweep(
        setting,
        task,
        "head",
        _look,
        _Beside(delegator, times),
        init,
        finish,
        NUMBER,
        draws=True,
        ends_task=True,
        passes=(1 + 5 * times) * batch,  # T_n on both, and D
    )


def _look(
    static: _Beside,
    nets: steps.Networks,
    state: Seen,
    kept: Any,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Seen, Metrics]:
    """Takes the features of a batch, and adds up those of pseudo images by old class."""
    new, metrics = collect(features, nets, state.new, kept, batch, key, rates)
    count = static.times * len(batch.images)
    pseudo = draw(with_delegator(nets, static.delegator), kept.delegator, key, count)
    classifier = kept.classifier
    found, logits = steps.eval_mode(nets.classifier(classifier.params), classifier, pseudo)
    labels = jnp.argmax(logits[:, : len(state.old.count)], axis=-1)
    old, _ = added(state.old, found, labels, jnp.ones(count, bool), nets.axis_name)
    return Seen(new, old), metrics


@compiled(static_argnames=("sizes", "decay"))
def learned(
    seen: Seen,
    head: Params,
    sizes: tuple[int, ...],
    decay: float,
    real: jax.Array | None = None,
) -> tuple[Params, jax.Array]:
    """The head with its new outputs learned anew, and the means of the new classes.

    Args:
      seen: the features; those of new images lie class by class.
      head: ``kernel`` float32 [F, K] and ``bias`` [K], of the old outputs and then the new ones.
      sizes: the number of images of each new class.
      decay: see :func:`minimum`.
      real: the means of real images of the last n_R old classes, float32 [n_R, F], in place of
        those of pseudo images; their outputs are learned anew too. None: of none.

    Returns:
      The head, of the same shapes; and the means of the new classes' features, [n_N, F].
    """
    place = np.arange(max(sizes))[None] + (np.cumsum(sizes) - sizes)[:, None]
    is_there = np.arange(max(sizes))[None] < np.array(sizes)[:, None]
    place = np.where(is_there, place, 0)
    rows, weight = seen.new.rows[place], (seen.new.valid[place] & is_there).astype(jnp.float32)
    count = jnp.maximum(jnp.sum(weight, axis=1), 1)
    new, old = jnp.sum(rows * weight[:, :, None], axis=1) / count[:, None], seen.old.means()
    there, held = seen.old.count > 0, len(old)
    if real is not None:
        held -= len(real)
        old, there = joined(old[:held], real), joined(there[:held], jnp.any(real != 0, axis=1))
    lender = lenders(old, new)
    # A class of which nothing was drawn has no mean, and stands nowhere.
    of_old = jnp.mean(count) / count[lender] * there
    weights = weight, weight[lender] * of_old[:, None]
    return minimum(rows, lender, old - new[lender], weights, head, decay, held), new


def minimum(
    rows: jax.Array,
    lender: jax.Array,
    moves: jax.Array,
    weights: tuple[jax.Array, jax.Array],
    head: Params,
    decay: float,
    held: int,
) -> Params:
    """The head whose outputs W, b after the first ones minimise CE + decay / 2 * |s W|^2.

    CE is the weighted mean cross-entropy over all outputs, and s^2 the weighted mean square of the
    features' length, so that their scale does not matter. By gradient descent with momentum
    [Nesterov] from 0 on f / s, where the curvature is at most 1 + decay [Boehning], and that of W
    at least decay.

    Args:
      rows: features of m images of each new class, float32 [n_N, m, F].
      lender: the new class whose features stand for an old class, moved: int32 [n_O].
      moves: by what they are, [n_O, F].
      weights: of the new classes' features [n_N, m], and of those that stand for old ones [n_O, m].
      head: ``kernel`` [F, n_O + n_N] and ``bias`` [n_O + n_N].
      decay: above 0.
      held: the number of outputs, n_O or fewer, that stay as they are, the first ones.

    Returns:
      The same shapes.
    """
    product, old = partial(jnp.matmul, precision="highest"), len(lender)
    kernel, bias = head["kernel"], head["bias"]
    least = jnp.finfo(jnp.float32).tiny  # of no image, nothing is divided by 0
    total = jnp.maximum(jnp.sum(weights[0]) + jnp.sum(weights[1]), least)
    of_new, of_old = weights[0] / total, weights[1] / total

    def of_held(found: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Log sum exp of the held outputs on features [m, F], and the square of their length."""
        logits = product(found, kernel[:, :held]) + bias[None, :held]
        return jax.nn.logsumexp(logits, axis=-1), jnp.sum(jnp.square(found), axis=-1)

    held_new, square = jax.vmap(of_held)(rows)
    # One class after the other: moved features of all would be n_O / n_N times as large.
    held_old, moved_square = jax.lax.map(
        lambda at: of_held(rows[at[0]] + at[1][None]), (lender, moves)
    )
    scale = jnp.sqrt(jnp.sum(of_new * square) + jnp.sum(of_old * moved_square))
    scale = jnp.maximum(scale, least)
    rows, moves = rows / scale, moves / scale
    lends = jax.nn.one_hot(lender, len(rows))
    # Of the learned outputs, that of a row's class: of the new ones' rows, and of the old ones'.
    outputs = len(bias) - held
    own_new = jnp.eye(len(rows), outputs, old - held)[:, None]
    own_old = jnp.eye(old, outputs, -held)[:, None]

    def loss(outputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Without a constant, the own outputs of classes whose outputs are held."""
        weight, shift = outputs
        scores = product(rows, weight) + shift[None, None]
        # A product, not a lookup, whose gradient some accelerators add up in any order.
        moved = jnp.einsum("oc,cmk->omk", lends, scores, precision="highest")
        moved = moved + product(moves, weight)[:, None]
        entropy = jnp.sum(of_new * (_with(held_new, scores) - jnp.sum(own_new * scores, axis=-1)))
        entropy = entropy + jnp.sum(of_old * _with(held_old, moved))
        if held < old:
            entropy = entropy - jnp.sum(of_old * jnp.sum(own_old * moved, axis=-1))
        return entropy + 0.5 * decay * jnp.sum(jnp.square(weight))

    slow = math.sqrt(decay / (1 + decay))
    step, momentum = 1 / (1 + decay), (1 - slow) / (1 + slow)

    def descend(_: Any, at: tuple) -> tuple:
        here, ahead = at
        there = jax.tree.map(lambda x, g: x - step * g, ahead, jax.grad(loss)(ahead))
        return there, jax.tree.map(lambda x, y: x + momentum * (x - y), there, here)

    zero = jnp.zeros_like(kernel[:, held:]), jnp.zeros_like(bias[held:])
    (weight, shift), _ = jax.lax.fori_loop(0, math.ceil(ACCURACY / slow), descend, (zero, zero))
    return {
        "kernel": jnp.concatenate([kernel[:, :held], weight / scale], axis=1),
        "bias": jnp.concatenate([bias[:held], shift]),
    }


def _with(held: jax.Array, scores: jax.Array) -> jax.Array:
    """Log sum exp of all outputs, of the held ones' [...] and the others' scores [..., L]."""
    return jnp.logaddexp(held, jax.nn.logsumexp(scores, axis=-1))
