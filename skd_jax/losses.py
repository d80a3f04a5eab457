"""Eq. 1-12 of the paper, one pure function each, in the paper's order. Imports jax and optax only.

Shapes: B images, K classes, F features. Losses are float32 scalars whatever the inputs' dtype.
A loss that is a plain mean over examples may be averaged over devices after the fact. Eq. 6 and
Eq. 7 may not: they are non-linear in a statistic of the whole batch, which has to be averaged over
devices first. Eq. 6 does so over ``axis_name``; Eq. 7 takes moments that
:mod:`skd_jax.models.norm` has averaged already.

References:
  [SKD] "Self-distilled Knowledge Delegator for Exemplar-free Class Incremental Learning".
  [DeepInversion] Yin et al., "Dreaming to Distill", CVPR 2020 (reference 19 of SKD).
  [DFAD] Fang et al., "Data-Free Adversarial Distillation", 2019.
  [ABD] Smith et al., "Always Be Dreaming", ICCV 2021.
  [ZSKT] Micaelli and Storkey, "Zero-shot Knowledge Transfer via Adversarial Belief Matching",
    NeurIPS 2019.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

Moments = tuple[jax.Array, jax.Array]  # (mean, biased variance), float32 [C] each


def feature_cosine_discrepancy(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """Eq. 1: psi = mean over the batch of 1 - cos(F(x), F'(x)).

    Args:
      teacher: features F(x), [B, F].
      student: features F'(x), [B, F].

    Returns:
      A scalar in [0, 2]. A zero feature has no direction: it counts as cos = 0 and has gradient 0
      (a bare division gives NaN for both).
    """
    cosine = jnp.sum(unit(teacher) * unit(student), axis=-1)
    return jnp.mean(1.0 - cosine)


def imitation_loss(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """Eq. 2: L_imi = psi(D(z), T_n, S_n), of features [B, F] on pseudo images."""
    return feature_cosine_discrepancy(teacher, student)


def exploration_loss(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """Eq. 3: L_exp = -L_imi, of features [B, F] on pseudo images."""
    return -imitation_loss(teacher, student)


def length_discrepancy(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """What Eq. 1 leaves free (not in the paper): mean of (||F'(x)|| / ||F(x)|| - 1)^2 / 2.

    Where F' is close to F, this plus Eq. 1 is about ||F(x) - F'(x)||^2 / (2 ||F(x)||^2).

    Args:
      teacher: features F(x), [B, F].
      student: features F'(x), [B, F].

    Returns:
      A scalar of 0 or more, without an upper bound: a short F(x) makes it large. Where F(x) is zero
      there is no length to learn: that row counts as 0 and has gradient 0. A zero F'(x) counts as
      1/2 and has gradient 0.
    """
    lengths = _norm(teacher.astype(jnp.float32), -1), _norm(student.astype(jnp.float32), -1)
    none = lengths[0] <= 0  # NaN is not, and stays NaN
    of_teacher, of_student = (jnp.where(none, 1.0, length) for length in lengths)
    return jnp.mean(0.5 * (of_student / of_teacher - 1.0) ** 2)


def discrepancy(
    teacher: tuple[jax.Array, jax.Array], student: tuple[jax.Array, jax.Array], kind: str = "cosine"
) -> jax.Array:
    """What S_n minimises (Eq. 2) and D_n maximises (Eq. 3) on pseudo images x.

    Args:
      teacher: F_n(x) [B, F] and H_n(F_n(x)), before the softmax [B, K].
      student: F'_n(x) [B, F] and T_n's head on it [B, K]; S_n has no head of its own.
      kind: "cosine" (Eq. 1), "l1" ([DFAD]) or "kl" ([ZSKT]).

    Raises:
      ValueError: ``kind`` is not one of these.
    """
    if kind == "cosine":
        return imitation_loss(teacher[0], student[0])
    if kind == "l1":
        return output_difference(teacher[1], student[1])
    if kind == "kl":
        return output_divergence(teacher[1], student[1])
    raise ValueError(f"unknown discrepancy {kind!r}: use cosine, l1 or kl")


def output_difference(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """[DFAD]'s discrepancy: mean absolute difference of two networks' logits, [B, K] each."""
    return jnp.mean(jnp.abs(teacher.astype(jnp.float32) - student.astype(jnp.float32)))


def output_divergence(teacher: jax.Array, student: jax.Array) -> jax.Array:
    """[ZSKT]'s discrepancy: KL(T || S) of two networks' scores, mean over the batch.

    Args:
      teacher: logits of T, [B, K].
      student: logits of S, [B, K].
    """
    log_t = jax.nn.log_softmax(teacher.astype(jnp.float32))
    log_s = jax.nn.log_softmax(student.astype(jnp.float32))
    return jnp.mean(jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1))


def category_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Eq. 4: L_cat = mean cross-entropy of T_n's scores of D(z) against y'.

    Args:
      logits: T_n's outputs before the softmax, [B, K].
      labels: y' of Eq. 5, one-hot [B, K].
    """
    return jnp.mean(optax.softmax_cross_entropy(logits.astype(jnp.float32), labels))


def pseudo_label(logits: jax.Array) -> jax.Array:
    """Eq. 5: y' = one-hot(argmax T_n(D(z))), float32 [B, K]; no gradient flows through it."""
    one_hot = jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=jnp.float32)
    return jax.lax.stop_gradient(one_hot)


def diversity_loss(scores: jax.Array, axis_name: str | None = None) -> jax.Array:
    """Eq. 6: L_div = sum_k w_k log w_k with w = mean over the batch of T_n's scores.

    Args:
      scores: softmax scores H_n(F_n(D(z))), [B, K]; rows sum to 1.
      axis_name: mapped axis the batch is split over; w is averaged over it before the log.

    Returns:
      The negative entropy of w, in [-log K, 0], least when the batch is spread evenly. A class with
      w_k = 0 adds 0 and has gradient 0 (the limit of the value; the gradient's limit is -inf).
    """
    w = jnp.mean(scores.astype(jnp.float32), axis=0)
    if axis_name is not None:
        w = jax.lax.pmean(w, axis_name)
    absent = w <= 0  # NaN is not, and stays NaN
    return jnp.sum(jnp.where(absent, 0.0, w * jnp.log(jnp.where(absent, 1.0, w))))


def feature_statistics_loss(
    batch: Sequence[Moments], running: Sequence[Moments], distance: str = "variance"
) -> jax.Array:
    """Eq. 7: R_feature = sum_l ||mu_l(D(z)) - mu^_l||_2 + ||sigma_l(D(z)) - sigma^_l||_2.

    Args:
      batch: (mean, variance) of the pseudo batch at the input of each BN layer, [C_l] each.
      running: (mean, variance) that the same BN layers of T_n hold, in the same order.
      distance: how a layer's moments are compared.
        "variance": the norms above with sigma the biased variance, as [DeepInversion]; the default.
        "std": the same with sigma the standard deviation.
        "squared": the variance's and the mean's norms, squared.
        "kl": KL(N(mu, sigma) || N(mu^, sigma^)), mean over channels and layers.
        "kl_of_running": KL(N(mu^, sigma^) || N(mu, sigma)), the same means; [ABD]'s.

    Returns:
      A scalar >= 0. Equal moments have gradient 0 under every distance.

    Raises:
      ValueError: the two sequences differ in length, or ``distance`` is not one of the above.
    """
    layers = [_moment_distance(b, r, distance) for b, r in zip(batch, running, strict=True)]
    total = jnp.sum(jnp.stack(layers))
    return total / len(layers) if distance.startswith("kl") else total


def smoothness_loss(images: jax.Array) -> jax.Array:
    """[ABD]'s image prior: mean squared difference from the same images under a 5x5 blur.

    A Gaussian whose sigma is the root of 2: the exponent of their code is -(d / (2 sigma))^2, with
    sigma 1. Reflected at the borders.

    Args:
      images: [B, H, W, C].
    """
    taps = jnp.exp(-0.25 * jnp.arange(-2.0, 3.0) ** 2)
    taps = taps / jnp.sum(taps)
    height, width = images.shape[1:3]
    x = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    x = sum((taps[i] * x[:, i : i + height] for i in range(5)), start=jnp.float32(0.0))
    x = sum((taps[i] * x[:, :, i : i + width] for i in range(5)), start=jnp.float32(0.0))
    return jnp.mean(jnp.square(images - x))


def explore_objective(
    terms: Mapping[str, jax.Array], weights: Mapping[str, jax.Array | float]
) -> jax.Array:
    """Eq. 8: L_explore = lambda * L_exp + L_cat + L_div + R_feature, or any weighted sum of terms.

    Args:
      terms: the value of each term, by name.
      weights: the weight of each term, by the same names (lambda is the exploration term's).
    """
    return sum((weights[name] * terms[name] for name in sorted(terms)), start=jnp.float32(0.0))


def feature_consolidation_loss(old: jax.Array, new: jax.Array) -> jax.Array:
    """Eq. 9: L_fc = psi(x^, T_n, T_{n+1}), of features [B, F] on pseudo and new images alike."""
    return feature_cosine_discrepancy(old, new)


def classification_loss(
    logits: jax.Array,
    labels: jax.Array,
    outputs: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> jax.Array:
    """Eq. 10: L_cls = mean cross-entropy of T_{n+1} on x^ over all classes seen.

    Args:
      logits: T_{n+1}'s outputs before the softmax, [B, K].
      labels: one-hot [B, K]: true labels of new images, Eq. 5's of pseudo images.
      outputs: bool [K], the outputs the softmax runs over; None is all of them, as the paper has
        it.
      weights: of each example, [B], with mean 1; None, as the paper has it, is 1 each.
    """
    logits = logits.astype(jnp.float32)
    if outputs is not None:
        # Far below any logit, yet finite: 0 * -inf in the cross-entropy would be NaN.
        logits = jnp.where(outputs[None, :], logits, -1e9)
    loss = optax.softmax_cross_entropy(logits, labels)
    return jnp.mean(loss if weights is None else weights * loss)


def cil_objective(
    classification: jax.Array, consolidation: jax.Array, gamma: jax.Array | float
) -> jax.Array:
    """Eq. 11: L_cil = gamma_n * L_cls + L_fc."""
    return gamma * classification.astype(jnp.float32) + consolidation.astype(jnp.float32)


def adaptive_loss_weight(beta: float, num_tasks: int, new_classes: Sequence[int]) -> float:
    """Eq. 12: gamma_n = beta / (N * sum_{i=1..n} |C_i|).

    Args:
      beta: the data set's constant; 5 for 50 new classes gives 0.1 at the first task.
      num_tasks: N, the number of incremental tasks.
      new_classes: |C_1| .. |C_n|, the class counts of the incremental tasks up to this one.
    """
    return beta / (num_tasks * sum(new_classes))


def unit(features: jax.Array) -> jax.Array:
    """Rows of [B, F] at length 1, float32; a zero row stays 0, with gradient 0."""
    features = features.astype(jnp.float32)
    # By the largest entry first, so that no square over- or underflows; the length of a unit vector
    # does not depend on that scale, nor does its gradient.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(features), axis=-1, keepdims=True))
    is_zero = largest <= 0  # NaN is not, and stays NaN
    scaled = jnp.where(is_zero, 0.0, features / jnp.where(is_zero, 1.0, largest))
    square = jnp.sum(scaled**2, axis=-1, keepdims=True)
    return scaled * jax.lax.rsqrt(jnp.where(is_zero, 1.0, square))


def _moment_distance(batch: Moments, running: Moments, distance: str) -> jax.Array:
    mean, var = (moment.astype(jnp.float32) for moment in batch)
    mean_t, var_t = (moment.astype(jnp.float32) for moment in running)
    if distance == "variance":
        return _norm(mean - mean_t) + _norm(var - var_t)
    if distance == "std":
        return _norm(mean - mean_t) + _norm(_sqrt(var) - _sqrt(var_t))
    if distance == "squared":
        return jnp.sum((mean - mean_t) ** 2) + jnp.sum((var - var_t) ** 2)
    if distance in ("kl", "kl_of_running"):
        if distance == "kl_of_running":
            mean, var, mean_t, var_t = mean_t, var_t, mean, var
        var, var_t = var + 1e-5, var_t + 1e-5  # BN's epsilon: a dead channel has no variance
        kl = 0.5 * (jnp.log(var_t / var) + (var + (mean - mean_t) ** 2) / var_t - 1.0)
        return jnp.mean(kl)
    raise ValueError(
        f"unknown distance {distance!r}: use variance, std, squared, kl or kl_of_running"
    )


def _sqrt(x: jax.Array) -> jax.Array:
    """Square root with gradient 0, not infinity, at 0; NaN stays NaN."""
    is_zero = x <= 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, x)))


def _norm(x: jax.Array, axis: int | None = None) -> jax.Array:
    """L2 norm, of all or along ``axis``, with gradient 0, not NaN, at 0."""
    return _sqrt(jnp.sum(x**2, axis))
