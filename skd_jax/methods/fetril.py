"""FeTrIL: frozen features, and new classes' features moved to where old classes were.

F_0 never learns again, and each class leaves its mean. For a past class P, the new class C whose
mean is the most similar to P's lends its features: f~ = f(x) + m_P - m_C for x of C are
pseudo-features of P, whose mean is m_P exactly. A linear classifier learns the real features of the
new classes and the pseudo-features of the past ones.

The classifier is the paper's linear support vector machine: one against the rest, squared hinge,
L2 with cost C = 1, features at length 1. It is solved by the finite Newton method (Keerthi and
DeCoste, JMLR 2005): each iteration is a ridge regression on the examples inside the margin. The
paper's other classifier, a linear layer (64.7 / 63.4 with ResNet-18), is left out.

Taken from the paper: C by cosine (the released code: by distance), all features normalised (the
released code leaves the first 512 as they are, a bug). Where classes differ in size, a past class
gets as many pseudo-features as a new class has images in the mean, from those of C in turn, moved
by the mean of those that were taken.
The base classes are told apart by T_0's own head until the first task. The augmentation of T_0's
training decides the number: here it is that of all methods, and the code's is far stronger.

Keeps the means. Published: 65.4 / 65.1 with ResNet-32 (PyCIL, AutoAugment and
Cutout), 66.3 / 65.2 with ResNet-18.

References:
  Petit et al., "FeTrIL: Feature Translation for Exemplar-Free Class-Incremental Learning", WACV
  2023.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from skd_jax.config import Limits
from skd_jax.losses import unit
from skd_jax.methods import ncm, ridge
from skd_jax.methods.class_means import KeptMeans, add, joined, nearness, no_sums
from skd_jax.methods.collecting import Collected, collected, features
from skd_jax.methods.linear_head import KeptHead, scores
from skd_jax.methods.phase import Method, Phase, Setting
from skd_jax.methods.phases import sweep

ITERATIONS = 50  # of the Newton method at most; it takes some ten


@dataclasses.dataclass(frozen=True)
class Settings:
    """FeTrIL."""

    name: str = "fetril"
    cost: float = 1.0  # C of the support vector machine
    unit_length: bool = True  # the classifier's features at length 1


@struct.dataclass
class KeptFetril(KeptHead, KeptMeans):
    """T_0, the means of all classes seen [K, F], and the head, None until the first task."""


def translated(found: jax.Array, new_mean: jax.Array, old_mean: jax.Array) -> jax.Array:
    """f~ = f + m_P - m_C: features [n, F] of C as features of P; means [F]."""
    return found + (old_mean - new_mean)[None]


def lenders(old: jax.Array, new: jax.Array) -> jax.Array:
    """For each past class the new one whose mean is the most similar, int32 [n_O].

    Args:
      old: means of past classes, [n_O, F].
      new: means of new classes, [n_N, F].
    """
    return jnp.argmax(nearness(old, new, "cosine"), axis=-1)


def pseudo_features(
    state: Collected, old: jax.Array, new: jax.Array, each: int
) -> tuple[jax.Array, jax.Array]:
    """Features of past classes: [n_O * each, F], and their labels.

    Args:
      state: the features of the new classes, whose labels follow the past ones'.
      old: means of past classes, [n_O, F].
      new: means of new classes, [n_N, F].
      each: how many of each class.
    """
    classes = jnp.where(state.valid, state.labels - len(old), len(new))
    of_class = jnp.argsort(classes, stable=True)  # rows of the first class, then of the second
    count = jnp.bincount(classes, length=len(new))
    begin = jnp.cumsum(count) - count
    lender = lenders(old, new)
    turn = jnp.arange(each)[None] % jnp.maximum(count[lender], 1)[:, None]
    found = state.rows[of_class[begin[lender][:, None] + turn]]  # [n_O, each, F]
    of_all = (count[lender] == each)[:, None]
    taken = jnp.where(of_all, new[lender], jnp.mean(found, axis=1))  # else m_P would be missed
    moved = jax.vmap(translated)(found, taken, old)
    return moved.reshape(-1, moved.shape[-1]), jnp.repeat(jnp.arange(len(old)), each)


def support_vectors(
    found: jax.Array, labels: jax.Array, valid: jax.Array, classes: int, cost: float
) -> jax.Array:
    """The linear support vector machines of each class against the rest, [D, K].

    Each minimises ||w||^2 / 2 + cost * sum_i max(0, 1 - y_i w . f_i)^2.

    Args:
      found: features [n, D].
      labels: int32 [n].
      valid: bool [n], those that count.
      classes: K.
      cost: C.
    """

    def one(label: jax.Array) -> jax.Array:
        sign = jnp.where(labels == label, 1.0, -1.0)

        def violating(weights: jax.Array) -> jax.Array:
            margin = sign * jnp.matmul(found, weights, precision="highest")
            return valid & (margin < 1)

        def iterate(at: tuple) -> tuple:
            _, active, number = at
            inside = jnp.where(active[:, None], found, 0.0)
            gram = jnp.matmul(inside.T, inside, precision="highest")
            products = jnp.matmul(inside.T, sign[:, None], precision="highest")
            weights = ridge.solve(ridge.Statistics(gram, products), 1 / (2 * cost))[:, 0]
            return weights, violating(weights), number + 1

        def goes_on(at: tuple[tuple, jax.Array]) -> jax.Array:
            (_, active, number), before = at
            return (number < ITERATIONS) & jnp.any(active != before)

        start = jnp.zeros(found.shape[1]), valid, jnp.int32(0)
        begun = iterate(start), valid
        (weights, _, _), _ = jax.lax.while_loop(
            goes_on, lambda at: (iterate(at[0]), at[0][1]), begun
        )
        return weights

    return jax.lax.map(one, jnp.arange(classes)).T


def phases(setting: Setting, task: int, over: Callable[..., Phase] = sweep) -> list[Phase]:
    """One pass over the task's images; of the base's, or of others in their place, means alone."""
    if not task:
        return [over(setting, 0, "means", add, None, no_sums(setting, 0), ncm.keep)]
    settings, classes = setting.config.method, setting.classes[task]
    width, each = setting.nets.features.num_features, setting.images[task] // classes

    def finish(state: Collected, kept: KeptFetril, take: Any) -> KeptFetril:
        del take
        assert kept.means is not None
        means, weights = head(state, kept.means, classes, each, settings)
        return dataclasses.replace(kept, means=means, weights=weights)

    more = {"finish": finish, "ends_task": True}
    return [collected(setting, task, "head", features, width, setting.images[task], **more)]


@jax.jit(static_argnames=("classes", "each", "static"))
def head(
    state: Collected, old: jax.Array, classes: int, each: int, static: Settings
) -> tuple[jax.Array, jax.Array]:
    """The means of all classes seen [K, F] and their classifier [F + 1, K], after a task.

    Args:
      state: the features of its images.
      old: means of past classes, [n_O, F].
      classes: n_N, the number of its classes.
      each: how many pseudo-features a past class gets.
      static: the settings.
    """
    one_hot = jax.nn.one_hot(state.labels - len(old), classes) * state.valid[:, None]
    sums = jnp.matmul(one_hot.T, state.rows, precision="highest")
    new = sums / jnp.maximum(jnp.sum(one_hot, axis=0), 1)[:, None]
    pseudo, pseudo_labels = pseudo_features(state, old, new, each)
    found = jnp.concatenate([state.rows, pseudo])
    if static.unit_length:
        found = unit(found)
    found = jnp.pad(found, ((0, 0), (0, 1)), constant_values=1.0)
    labels = jnp.concatenate([state.labels, pseudo_labels])
    means = joined(old, new)
    met = jnp.any(means != 0, axis=1)  # others are of no image, and get no weights
    valid = jnp.concatenate([state.valid, met[pseudo_labels]])
    weights = support_vectors(found, labels, valid, len(means), static.cost)
    return means, jnp.where(met[None], weights, 0.0)


METHOD = Method(
    "fetril",
    Settings,
    phases,
    kept=KeptFetril,
    scores=scores,
    # Above it, float32 cannot tell how far the margins are.
    check=Limits("method.", positive=("cost",), at_most={"cost": 1e4}).check,
    family="frozen features",
    keeps="class means",
)
