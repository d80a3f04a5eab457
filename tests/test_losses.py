"""Eq. 1-12 against numpy float64 loops and literal numbers, and their gradients where they bend."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from skd_jax import losses

DISTANCES = ("variance", "std", "squared", "kl")

psi = jax.jit(losses.feature_cosine_discrepancy)
category = jax.jit(losses.category_loss)
pseudo_label = jax.jit(losses.pseudo_label)
diversity = jax.jit(losses.diversity_loss, static_argnames="axis_name")
statistics = jax.jit(losses.feature_statistics_loss, static_argnames="distance")
classification = jax.jit(losses.classification_loss)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one_hot(labels: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[labels]


def moments(seed: int, widths: tuple[int, ...] = (3, 5)) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=c).astype(np.float32), rng.uniform(0.3, 2, c).astype(np.float32))
        for c in widths
    ]


# The equations once more, in float64, one example and one class at a time.


def numpy_psi(teacher: np.ndarray, student: np.ndarray) -> float:
    total = 0.0
    for a, b in zip(np.float64(teacher), np.float64(student), strict=True):
        total += 1 - a @ b / math.sqrt((a @ a) * (b @ b))
    return total / len(teacher)


def numpy_cross_entropy(logits: np.ndarray, labels: list[int]) -> float:
    total = 0.0
    for row, label in zip(np.float64(logits), labels, strict=True):
        total -= math.log(math.exp(row[label]) / sum(math.exp(v) for v in row))
    return total / len(labels)


def numpy_softmax(logits: np.ndarray) -> np.ndarray:
    return np.array([[math.exp(v) / sum(map(math.exp, row)) for v in row] for row in logits])


def numpy_diversity(scores: np.ndarray) -> float:
    share = [sum(column) / len(column) for column in np.float64(scores).T]
    return sum(w * math.log(w) for w in share if w > 0)


def numpy_statistics(batch, running, distance: str) -> float:
    total = 0.0
    for (mean, var), (mean_t, var_t) in zip(batch, running, strict=True):
        mean, var, mean_t, var_t = map(np.float64, (mean, var, mean_t, var_t))
        if distance == "variance":
            total += np.linalg.norm(mean - mean_t) + np.linalg.norm(var - var_t)
        elif distance == "std":
            total += np.linalg.norm(mean - mean_t) + np.linalg.norm(var**0.5 - var_t**0.5)
        elif distance == "squared":
            total += np.linalg.norm(mean - mean_t) ** 2 + np.linalg.norm(var - var_t) ** 2
        else:  # KL(batch || running) of normals with BN's epsilon, mean over channels and layers
            sd, sd_t = np.sqrt(var + 1e-5), np.sqrt(var_t + 1e-5)
            kl = np.log(sd_t / sd) + (sd**2 + (mean - mean_t) ** 2) / (2 * sd_t**2) - 0.5
            total += kl.mean() / len(batch)
    return total


def assert_finite(tree) -> None:
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(leaf).all()


# Eq. 1-3


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        ([[1, 0]], [[0, 1]], 1.0),
        ([[1, 2]], [[10, 20]], 0.0),
        ([[1, 2]], [[-3, -6]], 2.0),
        ([[1, 0]], [[1, 1]], 0.29289322),
        ([[3, 4], [1, 0]], [[4, 3], [0, 2]], 0.52),
    ],
)
def test_psi_by_hand(teacher, student, expected):
    out = psi(jnp.float32(np.array(teacher)), jnp.float32(np.array(student)))
    assert float(out) == pytest.approx(expected, abs=1e-6)


def test_psi_equals_numpy_whatever_the_features_lengths():
    teacher, student = normal(0, 7, 5), normal(1, 7, 5)
    expected = numpy_psi(teacher, student)
    for scale in (1.0, 1e-10, 1e10):
        assert float(psi(teacher, student * np.float32(scale))) == pytest.approx(expected, abs=1e-6)


def test_imitation_is_psi_and_exploration_its_negative():
    teacher, student = normal(0, 7, 5), normal(1, 7, 5)
    expected = numpy_psi(teacher, student)
    assert float(losses.imitation_loss(teacher, student)) == pytest.approx(expected, abs=1e-6)
    assert float(losses.exploration_loss(teacher, student)) == pytest.approx(-expected, abs=1e-6)
    assert float(losses.feature_consolidation_loss(teacher, student)) == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize("zero", ["teacher", "student", "both"])
def test_a_zero_feature_counts_as_cosine_0_and_has_gradient_0(zero):
    teacher, student = normal(0, 3, 5), normal(1, 3, 5)
    if zero != "student":
        teacher[1] = 0
    if zero != "teacher":
        student[1] = 0
    value, grads = jax.jit(jax.value_and_grad(losses.feature_cosine_discrepancy, (0, 1)))(
        teacher, student
    )
    others = [0, 2]
    assert float(value) == pytest.approx((2 * numpy_psi(teacher[others], student[others]) + 1) / 3)
    assert_finite(grads)
    for zeroed, grad in zip(("teacher", "student"), grads, strict=True):
        if zero in (zeroed, "both"):
            assert not np.any(grad[1])
        assert np.all(np.any(grad[jnp.array(others)], axis=1))


@pytest.mark.parametrize(
    "length",
    [
        1e12,
        1e-12,
        1e-15,
        1e15,
    ],
)
def test_psi_gradient_is_finite_and_inverse_to_the_features_length(length):
    teacher, student = normal(0, 3, 5), normal(1, 3, 5)
    grad = jax.jit(jax.grad(losses.feature_cosine_discrepancy, 1))
    scaled = grad(teacher, student * np.float32(length)) * np.float32(length)
    np.testing.assert_allclose(scaled, grad(teacher, student), rtol=1e-4, atol=1e-6)


def test_psi_gradient_equals_numerical_differences():
    check_grads(
        psi,
        (normal(0, 3, 4), normal(1, 3, 4)),
        order=1,
        modes=["rev"],
        eps=1e-2,
        atol=1e-3,
        rtol=1e-2,
    )


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        ([[3, 4]], [[3, 4]], 0.0),
        ([[3, 4]], [[-4, 3]], 0.0),  # the direction is Eq. 1's
        ([[3, 4]], [[0, 10]], 0.5),
        ([[3, 4]], [[0, 0]], 0.5),
        ([[3, 4], [0, 2]], [[0, 10], [0, 1]], 0.3125),
        ([[3, 4], [0, 0]], [[0, 10], [7, 1]], 0.25),  # a zero feature has no length to learn
        ([[0, 0]], [[np.nan, 1]], 0.0),
    ],
)
def test_length_discrepancy_by_hand(teacher, student, expected):
    out = losses.length_discrepancy(jnp.float32(np.array(teacher)), jnp.float32(np.array(student)))
    assert float(out) == pytest.approx(expected, abs=1e-6)


def test_length_discrepancy_and_psi_are_nearly_half_the_relative_square_of_a_small_difference():
    teacher = normal(0, 7, 5)
    student = teacher + 1e-2 * normal(1, 7, 5)
    square = np.sum(np.float64(student - teacher) ** 2, axis=1)
    expected = np.mean(0.5 * square / np.sum(np.float64(teacher) ** 2, axis=1))
    both = losses.length_discrepancy(teacher, student) + psi(teacher, student)
    assert float(both) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("zero", ["teacher", "student"])
def test_length_discrepancy_has_gradient_0_where_a_feature_is_zero_and_keeps_nan(zero):
    teacher, student = normal(0, 3, 5), normal(1, 3, 5)
    (teacher if zero == "teacher" else student)[1] = 0
    grad = jax.jit(jax.grad(losses.length_discrepancy, 1))(teacher, student)
    assert_finite(grad)
    assert not np.any(grad[1]) and np.all(np.any(grad[jnp.array([0, 2])], axis=1))
    for harmed in (teacher, student):
        harmed[2] = np.nan
        assert np.isnan(losses.length_discrepancy(teacher, student))
        harmed[2] = 1.0


# Eq. 4, 5


@pytest.mark.parametrize(
    ("logits", "labels", "expected"),
    [
        ([[0, 0]], [0], 0.69314718),
        ([[math.log(3), 0]], [0], 0.28768207),
        ([[math.log(3), 0]], [1], 1.38629436),
        ([[1000, 0]], [0], 0.0),
        ([[1000, 0]], [1], 1000.0),
        ([[0, 0], [math.log(3), 0]], [0, 1], 1.03972077),
    ],
)
def test_category_and_classification_by_hand(logits, labels, expected):
    logits = jnp.float32(np.array(logits))
    for loss in (category, classification):
        out = loss(logits, one_hot(labels, 2))
        assert float(out) == pytest.approx(expected, abs=1e-6)


def test_category_equals_numpy_cross_entropy_and_its_gradient_is_softmax_less_label():
    logits, labels = normal(0, 6, 4), [0, 3, 2, 1, 1, 0]
    value, grad = jax.jit(jax.value_and_grad(losses.category_loss))(logits, one_hot(labels, 4))
    assert float(value) == pytest.approx(numpy_cross_entropy(logits, labels), abs=1e-6)
    np.testing.assert_allclose(
        grad, (numpy_softmax(logits) - one_hot(labels, 4)) / 6, atol=1e-6, rtol=1e-5
    )
    check_grads(
        lambda x: category(x, one_hot(labels, 4)),
        (logits,),
        order=1,
        modes=["rev"],
        eps=1e-2,
        atol=1e-3,
        rtol=1e-2,
    )


def test_pseudo_label_is_the_one_hot_of_the_greatest_logit():
    out = pseudo_label(jnp.array([[0.1, 0.3, 0.2], [-1.0, -2.0, -3.0], [0.0, 0.0, 5.0]]))
    np.testing.assert_array_equal(out, [[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    assert out.dtype == jnp.float32


def test_no_gradient_flows_through_the_pseudo_label():
    logits, weight = normal(0, 6, 4), normal(1, 6, 4)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(losses.pseudo_label(x) * weight)))(logits)
    assert not np.any(grad)
    labels = pseudo_label(logits)
    with_own = jax.grad(lambda x: losses.category_loss(x, losses.pseudo_label(x)))(logits)
    with_constant = jax.grad(losses.category_loss)(logits, labels)
    np.testing.assert_array_equal(with_own, with_constant)


# Eq. 6


@pytest.mark.parametrize("classes", [2, 5, 100])
def test_diversity_of_uniform_scores_is_minus_log_k(classes):
    scores = np.full((4, classes), 1 / classes, np.float32)
    assert float(diversity(scores)) == pytest.approx(-math.log(classes), rel=1e-5)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([2, 2, 2], 0.0),
        ([0, 1, 0, 1], -0.69314718),
        ([0, 1, 2], -1.09861229),
        ([0, 0, 0, 1], -0.56233514),
    ],
)
def test_diversity_of_certain_scores_by_hand(labels, expected):
    assert float(diversity(one_hot(labels, 3))) == pytest.approx(expected, abs=1e-6)


def test_diversity_equals_numpy_and_its_gradient_numerical_differences():
    scores = np.float32(numpy_softmax(2 * normal(0, 6, 4)))
    assert float(diversity(scores)) == pytest.approx(numpy_diversity(scores), abs=1e-6)
    grad = jax.jit(jax.grad(losses.diversity_loss))(scores)
    expected = np.broadcast_to((np.log(np.float64(scores).mean(0)) + 1) / 6, (6, 4))
    np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)
    check_grads(diversity, (scores,), order=1, modes=["rev"], eps=1e-3, atol=1e-3, rtol=2e-2)


def test_a_class_with_score_0_adds_0_to_diversity_and_has_gradient_0():
    scores = np.array([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0]], np.float32)
    value, grad = jax.jit(jax.value_and_grad(losses.diversity_loss))(scores)
    assert float(value) == pytest.approx(0.375 * math.log(0.375) + 0.625 * math.log(0.625))
    assert_finite(grad)
    assert not np.any(grad[:, 2]) and np.any(grad[:, 0])


@pytest.mark.parametrize("gap", [50.0, 87.0, 90.0, 95.0, 100.0, 200.0])
def test_diversity_stays_finite_where_a_softmax_underflows(gap):
    logits = jnp.array([[0.0, 1.0, -gap], [1.0, 0.0, -gap]])
    value, grad = jax.jit(jax.value_and_grad(lambda x: losses.diversity_loss(jax.nn.softmax(x))))(
        logits
    )
    assert float(value) == pytest.approx(-math.log(2), abs=1e-6)
    assert_finite(grad)


def test_diversity_over_shards_is_that_of_the_whole_batch_and_not_their_mean():
    scores = np.float32(numpy_softmax(3 * normal(0, 16, 5)))
    shards = scores.reshape(4, 4, 5)
    loss = functools.partial(losses.diversity_loss, axis_name="devices")
    whole, whole_grad = jax.value_and_grad(losses.diversity_loss)(scores)

    split = jax.jit(jax.vmap(loss, axis_name="devices"))
    np.testing.assert_allclose(split(shards), np.full(4, numpy_diversity(scores)), rtol=1e-5)
    grad = jax.grad(lambda s: jnp.mean(split(s)))(shards)
    np.testing.assert_allclose(grad.reshape(16, 5), whole_grad, rtol=1e-4, atol=1e-7)

    mean_of_shards = np.mean([numpy_diversity(shard) for shard in shards])
    assert abs(mean_of_shards - float(whole)) > 0.05


# Eq. 7


@pytest.mark.parametrize(
    ("distance", "expected"),
    [
        ("variance", 5 + 8.0),  # |(3, 4)| + |(0, 9 - 1)|
        ("std", 5 + 2.0),  # |(3, 4)| + |(0, 3 - 1)|
        ("squared", 25 + 64.0),
        ("kl", (4.5 + (0.5 * (16 + 9 - 1) - math.log(3))) / 2),
    ],
)
def test_feature_statistics_by_hand(distance, expected):
    batch = [(jnp.array([3.0, 4.0]), jnp.array([1.0, 9.0]))]
    running = [(jnp.zeros(2), jnp.ones(2))]
    assert float(statistics(batch, running, distance)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("distance", DISTANCES)
def test_feature_statistics_equal_numpy_and_numerical_differences(distance):
    batch, running = moments(0), moments(1)
    out = statistics(batch, running, distance)
    assert float(out) == pytest.approx(numpy_statistics(batch, running, distance), rel=1e-5)
    check_grads(
        lambda b: statistics(b, running, distance),
        (batch,),
        order=1,
        modes=["rev"],
        eps=1e-2,
        atol=1e-2,
        rtol=2e-2,
    )


@pytest.mark.parametrize("distance", DISTANCES)
def test_equal_moments_have_distance_0_and_gradient_0(distance):
    batch = moments(0)
    grad = jax.grad(lambda b, r: losses.feature_statistics_loss(b, r, distance))
    value, grads = statistics(batch, batch, distance), jax.jit(grad)(batch, batch)
    assert float(value) == pytest.approx(0, abs=1e-6)
    for leaf in jax.tree.leaves(grads):
        np.testing.assert_allclose(leaf, np.zeros_like(leaf), atol=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dead", ["batch", "running", "both"])
def test_a_channel_without_variance_leaves_value_and_gradient_finite(distance, dead):
    batch, running = moments(0), moments(1)
    if dead != "running":
        batch[0][1][1] = 0
    if dead != "batch":
        running[0][1][1] = 0
    value, grads = jax.jit(
        jax.value_and_grad(lambda b, r: losses.feature_statistics_loss(b, r, distance))
    )(batch, running)
    assert float(value) == pytest.approx(numpy_statistics(batch, running, distance), rel=1e-3)
    assert_finite(grads)
    assert np.all(grads[1][1])  # the other channels learn on


def test_the_default_distance_is_the_variance():
    batch, running = moments(0), moments(1)
    assert float(losses.feature_statistics_loss(batch, running)) == pytest.approx(
        numpy_statistics(batch, running, "variance"), rel=1e-5
    )


def test_feature_statistics_refuse_other_distances_and_unpaired_layers():
    with pytest.raises(ValueError, match="median"):
        losses.feature_statistics_loss(moments(0), moments(1), "median")
    with pytest.raises(ValueError, match="zip"):
        losses.feature_statistics_loss(moments(0), moments(1)[:1])


# Eq. 8-12


def test_explore_objective_is_the_weighted_sum_of_its_terms():
    values = {"exploration": -0.5, "category": 2.0, "diversity": -3.0, "feature_statistics": 7.0}
    weights = {"exploration": 20.0, "category": 1.0, "diversity": 1.0, "feature_statistics": 0.1}
    out = jax.jit(losses.explore_objective)(jax.tree.map(jnp.float32, values), weights)
    assert float(out) == pytest.approx(-10.3)
    assert out.dtype == jnp.float32


def test_classification_over_all_outputs_equals_numpy_and_numerical_differences():
    logits, labels = normal(0, 5, 6), [5, 0, 2, 3, 1]
    loss = functools.partial(classification, labels=one_hot(labels, 6))
    assert float(loss(logits)) == pytest.approx(numpy_cross_entropy(logits, labels), abs=1e-6)
    check_grads(loss, (logits,), order=1, modes=["rev"], eps=1e-2, atol=1e-3, rtol=1e-2)


def test_masked_outputs_leave_the_softmax_and_have_gradient_0():
    logits, labels = 30 * normal(0, 5, 6), [5, 4, 4, 3, 5]
    outputs = np.arange(6) >= 3
    value, grad = jax.jit(jax.value_and_grad(losses.classification_loss))(
        logits, one_hot(labels, 6), outputs
    )
    new = [label - 3 for label in labels]
    assert float(value) == pytest.approx(numpy_cross_entropy(logits[:, 3:], new), rel=1e-5)
    assert_finite(grad)
    assert not np.any(grad[:, :3])
    expected = (numpy_softmax(np.float64(logits[:, 3:])) - one_hot(new, 3)) / 5
    np.testing.assert_allclose(grad[:, 3:], expected, atol=1e-6, rtol=1e-4)


def test_cil_objective_weighs_the_classification_alone():
    out = jax.jit(losses.cil_objective)(jnp.float32(2.0), jnp.float32(0.5), jnp.float32(0.1))
    assert float(out) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("num_tasks", "per_task", "expected"),
    [
        (5, 10, [0.1, 0.05, 0.033, 0.025, 0.02]),  # the paper's list
        (1, 50, [0.1]),
        (2, 25, [0.1, 0.05]),
        (10, 5, [0.1, 0.05, 0.033, 0.025, 0.02, 0.017, 0.014, 0.013, 0.011, 0.01]),
    ],
)
def test_adaptive_weights_are_the_papers(num_tasks, per_task, expected):
    gammas = [
        losses.adaptive_loss_weight(5.0, num_tasks, [per_task] * n) for n in range(1, num_tasks + 1)
    ]
    assert [round(gamma, 3) for gamma in gammas] == expected


def test_adaptive_weight_counts_unequal_tasks():
    assert losses.adaptive_loss_weight(6.0, 2, [10]) == pytest.approx(0.3)
    assert losses.adaptive_loss_weight(6.0, 2, [10, 20]) == pytest.approx(0.1)


# Types


def test_bfloat16_inputs_give_float32_losses_computed_in_float32():
    teacher, student = jnp.bfloat16(normal(0, 6, 5)), jnp.bfloat16(normal(1, 6, 5))
    logits, labels = jnp.bfloat16(normal(2, 6, 4)), [0, 1, 2, 3, 0, 1]
    scores = jax.nn.softmax(logits)
    hot = one_hot(labels, 4)
    cross_entropy = numpy_cross_entropy(np.float64(logits), labels)
    for out, expected in (
        (psi(teacher, student), numpy_psi(np.float64(teacher), np.float64(student))),
        (category(logits, hot), cross_entropy),
        (classification(logits, hot), cross_entropy),
        (diversity(scores), numpy_diversity(np.float64(scores))),
    ):
        assert out.dtype == jnp.float32 and out.shape == ()
        assert float(out) == pytest.approx(expected, abs=1e-5)
    assert pseudo_label(logits).dtype == jnp.float32
