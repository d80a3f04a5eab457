"""Exemplar-free and frozen-feature methods: hand-worked numbers, and tiny whole runs of each."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guarded import Guarded, no_old_images
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.svm import LinearSVC
from test_train import TINY, at_row, bits, rows, silent

from configs import digits
from skd_jax import experiment, metrics, parallel, steps, train
from skd_jax.config import Config
from skd_jax.data import open_source
from skd_jax.errors import UserError
from skd_jax.experiment import planned
from skd_jax.methods import (
    METHODS,
    ewc,
    fetril,
    from_config_dict,
    lda,
    lucir,
    mas,
    ncm,
    penalty,
    ridge,
    sdc,
    si,
)
from skd_jax.methods.class_means import nearness
from skd_jax.methods.collecting import Collected
from skd_jax.methods.distillation import binary_loss, binary_targets, distillation_loss
from skd_jax.methods.phase import setting_of
from skd_jax.state import Batch

# The other methods' whole runs are in test_methods.py and test_extend.py, and, by family, in
# test_exemplars.py, test_datafree.py and test_train.py.
ELSEWHERE = ("finetune", "joint", "lwf", "ncm", "ridge", "pseudo_ncm")
FAMILIES = ("exemplars", "generator")
NAMES = [n for n, m in METHODS.items() if n not in ELSEWHERE and m.family not in FAMILIES]
PENALISED = ("ewc", "mas", "si", "sdc")
LONG = ("pseudo_ridge", "pseudo_lda")  # as pseudo_fetril, with another head


def marked(names) -> list:
    """Names as parameters, the long runs among the slow tests."""
    return [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in names]


def tiny(method: str, **changes) -> Config:
    """One task of 3 classes after 4, on a network of next to nothing."""
    config = digits.get_config(f"tasks=1,method={method}")
    own = ("method.stage_one", "method.delegator") if "stage_one" in config.method else ()
    shared = {n: x for n, x in TINY.items() if not n.startswith("method.") or n.startswith(own)}
    shared |= {"model.width": 2, "data.max_classes": 7}
    if "epochs" in config.method:
        shared |= {"method.epochs": 2, "method.batch": 64, "method.drop_epochs": (1,)}
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    config.update_from_flattened_dict({**shared, **changes})
    return from_config_dict(config)


# Hand-worked numbers


def test_the_same_accuracies_make_three_averages():
    row = metrics.Row((30, 9), (50, 10))  # 60 % of 50 old classes, 90 % of 10 new ones
    assert sum(row.correct) / sum(row.total) == 0.65
    assert np.mean(row.accuracies) == 0.75
    steps_ = [76.86, 69.62, 64.64, 59.26, 55.92, 54.41]
    assert metrics.average_incremental_accuracy(steps_) == pytest.approx(63.452, abs=5e-4)
    without = metrics.average_incremental_accuracy_without_base(steps_)
    assert without == pytest.approx(60.770, abs=5e-4)


def test_distillation_says_nothing_of_new_outputs():
    teacher, student = jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 1.0, 0.7]])
    loss = jax.jit(lambda z: distillation_loss(teacher, z[:, :2], 2.0))
    assert loss(student) == pytest.approx(0.693147, abs=1e-6)
    assert jax.jit(jax.grad(loss))(student)[0, 2] == 0
    powers = jax.nn.softmax(teacher) ** 0.5  # p^(1/T), made to sum to 1
    assert powers[0, 0] / powers.sum() == pytest.approx(0.731059, abs=1e-6)


def test_a_teacher_that_is_matched_leaves_its_entropy():
    teacher = jnp.array([[2.0, 0.0]])
    loss, gradient = jax.jit(jax.value_and_grad(lambda z: distillation_loss(teacher, z, 2.0)))(
        teacher
    )
    assert loss == pytest.approx(0.693147 - 0.110944, abs=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_binary_loss_takes_the_teachers_sigmoid_for_old_classes():
    teacher, student = jnp.array([[np.log(3)]]), jnp.array([[0.0, np.log(3)]])
    for label in (1, 0):  # the label of an old class is not used
        targets = jax.jit(binary_targets, static_argnums=2)(teacher, jnp.array([label]), 2)
        np.testing.assert_allclose(targets, [[0.75, label]], rtol=1e-6)
    targets = jnp.array([[0.75, 1.0]])
    loss = jax.jit(binary_loss)(student, targets)
    assert loss == pytest.approx(0.693147 + 0.287682, abs=1e-6)
    assert loss / 2 == pytest.approx(0.490415, abs=1e-6)  # mammoth's mean


def test_the_penalty_and_its_gradient():
    fisher, theta, anchor = jnp.array([2.0, 0.5]), jnp.array([1.0, -1.0]), jnp.array([0.5, 1.0])
    value = jax.jit(jax.value_and_grad(lambda p: 4 / 2 * penalty.quadratic([fisher], p, [anchor])))
    found, gradient = value([theta])
    assert found == 5
    np.testing.assert_allclose(gradient[0], [4, -4])
    grown, gradient = value([jnp.array([1.0, -1.0, 9.0])])  # a new output has no anchor
    assert grown == 5
    np.testing.assert_allclose(gradient[0], [4, -4, 0])


def test_a_step_is_at_rest_where_the_whole_loss_is_least_and_never_overshoots():
    omega, anchor = [jnp.array([0.3, 1e6])], [jnp.array([1.0, 1.0])]
    rate, momentum, strength = 0.1, 0.9, 2.0

    @jax.jit
    def body(_, at):
        theta, velocity = at
        velocity = momentum * velocity + theta[0]  # of the loss theta^2 / 2
        theta = [theta[0] - rate * velocity]
        return penalty.pulled(omega, theta, anchor, 2 * strength * rate / (1 - momentum)), velocity

    start = [jnp.array([5.0, 5.0])], jnp.zeros(2)
    (theta,), _ = jax.lax.fori_loop(0, 500, body, start)
    stiff = 2 * strength * omega[0]
    np.testing.assert_allclose(
        theta, stiff / (1 + stiff), rtol=1e-4
    )  # theta + stiff (theta - 1) = 0
    grown = penalty.pulled(omega, [jnp.array([5.0, 5.0, 7.0])], anchor, 1.0)[0]
    assert grown[2] == 7


def by_example(value, of, theta, *examples):
    """The mean over examples, through jit."""
    examples = [jnp.array(x) for x in examples]
    valid = jnp.ones(len(examples[0]), bool)
    found = jax.jit(penalty.by_example, static_argnums=(0, 1))
    return found(value, of, jnp.array(theta), examples, valid) / len(valid)


def logistic(w, example):
    """Log-likelihood of the label y: logits (0, w x)."""
    x, y = example
    return ewc.log_likelihood(jnp.stack([jnp.zeros(()), w * x]), y)


@pytest.mark.parametrize(("labels", "batch_squared"), [((1, 1), 1.0), ((1, 0), 0.25)])
def test_fisher_squares_each_examples_own_gradient(labels, batch_squared):
    x = (1.0, 3.0)
    assert by_example(logistic, jnp.square, 0.0, x, labels) == pytest.approx(1.25)
    mean = by_example(logistic, lambda g: g, 0.0, x, labels)
    assert mean**2 == pytest.approx(batch_squared)  # FACIL, PyCIL, Avalanche


def test_fisher_by_the_labels_it_is_of():
    w = np.log(3.0)  # p = 0.75 at x = 1
    of = {y: by_example(logistic, jnp.square, w, (1.0,), (y,)) for y in (0, 1)}
    assert of[1] == pytest.approx(0.0625)  # true label 1; and the arg-max
    assert of[0] == pytest.approx(0.5625)
    assert 0.75 * of[1] + 0.25 * of[0] == pytest.approx(0.1875)  # the mean of drawn ones


def test_fisher_over_tasks_and_heads():
    add = jax.jit(penalty.accumulated)
    one, two = [jnp.array([2.0, 0.5])], [jnp.array([1.0, 3.0])]
    np.testing.assert_allclose(add(one, two, 0.9)[0], [2.8, 3.45], rtol=1e-6)
    np.testing.assert_allclose(add(one, [jnp.array([1.0, 3.0, 7.0])], 0.9)[0], [2.8, 3.45, 7])
    np.testing.assert_array_equal(add(None, two, 0.9)[0], two[0])  # the first task's alone


def norm(z, _):
    return jnp.linalg.norm(z)


@pytest.mark.parametrize(
    ("outputs", "theta", "x", "squared", "plain"),
    [
        (lambda w, x: (w * x)[None], 2.0, (1.0, -3.0), 20, 2),
        (lambda w, x: w * x, (3.0, 4.0), (2.0,), (24, 32), (1.2, 1.6)),
    ],
)
def test_sensitivity_of_the_squared_norm(outputs, theta, x, squared, plain):
    for of, expected in ((mas.squared_norm, squared), (norm, plain)):
        found = by_example(lambda w, e, of=of: of(outputs(w, e[0]), None), jnp.abs, theta, x)
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_sensitivity_does_not_cancel():
    def value(w, example):
        return w[0] + w[1] * example[0]  # not squared, so that signs differ

    def squared(w, example):
        return mas.squared_norm(value(w, example)[None])

    np.testing.assert_allclose(by_example(squared, jnp.abs, (1.0, 0.0), (1.0, -1.0)), [2, 2])
    mean = by_example(squared, lambda g: g, (1.0, 0.0), (1.0, -1.0))
    np.testing.assert_allclose(jnp.abs(mean), [2, 0])


def path(rate: float, count: int) -> tuple[jax.Array, jax.Array]:
    """(theta, omega) after steps on (theta - 2)^2 / 2."""

    def body(_, at):
        theta, omega = at
        gradient = theta - 2
        after = theta - rate * gradient
        return after, si.walked(omega, gradient, theta, after)

    return jax.jit(lambda: jax.lax.fori_loop(0, count, body, (jnp.zeros(()), jnp.zeros(()))))()


def test_the_path_of_a_weight():
    end, omega = path(0.5, 3)
    assert (end, omega) == (1.75, 2.625)
    found = jax.jit(si.of_path)(omega, jnp.zeros(()), end, 0.1)
    assert found == pytest.approx(0.830040, abs=1e-6)
    value = 0.5 * penalty.quadratic([found], [jnp.float32(1.25)], [end])
    assert value == pytest.approx(0.103755, abs=1e-6)
    steps_ = round(np.log(1 / 8) / np.log(1 - 0.005))  # as far by steps 100 times smaller
    assert path(0.005, steps_)[1] == pytest.approx(1.96875, rel=0.01)  # the drop of the loss
    assert si.walked(jnp.zeros(()), jnp.ones(()), jnp.zeros(()), jnp.float32(0.2)) == -0.2
    assert si.of_path(jnp.float32(-0.2), jnp.zeros(()), jnp.ones(()), 0.1) == 0


OLD = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
NEW = jnp.array([[0.1, 0.0], [1.2, 0.1], [0.0, 2.5]])


def drift(old, new, means, sigma, parts=1):
    """Mean drift of each class, taken in some parts."""

    @jax.jit
    def found(old, new, means):
        state = sdc.no_drift(means)
        for part in range(parts):
            chosen = slice(part, None, parts)
            valid = jnp.ones(len(old[chosen]), bool)
            state = sdc.drifted(state, old[chosen], new[chosen], valid, means, sigma)
        return state.moved / state.weights[:, None]

    return found(old, new, means)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    ("sigma", "expected"),
    [(1.0, (0.127051, 0.073669)), (0.5, (0.111887, 0.012064)), (1e4, (0.1, 0.2))],
)
def test_drift_of_a_mean(sigma, expected, parts):
    found = drift(OLD, NEW, jnp.zeros((1, 2)), sigma, parts)
    np.testing.assert_allclose(found, [expected], atol=1e-6)
    weights = jnp.exp(nearness(jnp.zeros((1, 2)), OLD, "distance") / 2)
    np.testing.assert_allclose(weights[0], [1, 0.606531, 0.135335], rtol=1e-5)


def test_drift_where_all_points_move_alike_or_not_at_all_or_are_far():
    means = jnp.array([[0.3, 0.1], [5.0, -2.0]])
    np.testing.assert_allclose(drift(OLD, OLD + 0.25, means, 0.7), np.full((2, 2), 0.25), rtol=1e-5)
    assert not drift(OLD, OLD, means, 0.7).any()
    nearest = drift(OLD, NEW, means, 1e-3, parts=3)  # every weight underflows
    np.testing.assert_allclose(nearest, [[0.1, 0.0], [0.2, 0.1]], atol=1e-6)


def test_features_are_moved_from_the_most_similar_class():
    f, new, old = jnp.array([[1.0, 2.0]]), jnp.array([0.0, 1.0]), jnp.array([3.0, -1.0])
    np.testing.assert_array_equal(jax.jit(fetril.translated)(f, new, old), [[4, 0]])
    old, new = jnp.array([[0.2, 0.3]]), jnp.array([[2.0, 3.0], [0.5, 0.0]])
    assert jax.jit(fetril.lenders)(old, new)[0] == 0
    assert nearness(old, new, "distance").argmax() == 1  # the released code's


def recorded(seed: int) -> tuple[Collected, jax.Array, jax.Array]:
    """Features of classes 2, 3 and 4, and the means of classes 0, 1 and of these."""
    rng = np.random.default_rng(seed)
    labels = np.array([3, 2, 4, 2, 3, 4, 2, 3, 4, 2, 3, 4, 0, 0])
    features = rng.normal(size=(14, 5)) + np.eye(5)[labels] * 3
    valid = np.arange(14) < 12
    means = [features[valid & (labels == c)].mean(axis=0) for c in (2, 3, 4)]
    state = Collected(jnp.float32(features), jnp.array(labels), jnp.array(valid))
    return state, jnp.float32(rng.normal(size=(2, 5))), jnp.float32(np.array(means))


def test_pseudo_features_have_the_mean_of_the_class_they_stand_for():
    state, old, new = recorded(0)
    found, labels = jax.jit(fetril.pseudo_features, static_argnums=3)(state, old, new, 4)
    np.testing.assert_array_equal(labels, [0] * 4 + [1] * 4)
    np.testing.assert_allclose(found.reshape(2, 4, 5).mean(axis=1), old, atol=1e-5)
    more, _ = fetril.pseudo_features(state, old, new, 6)  # more than there are: in turn
    np.testing.assert_array_equal(more[4:6], more[:2])


@pytest.mark.parametrize("each", [2, 5])
def test_pseudo_features_have_that_mean_where_classes_differ_in_size(each):
    rows = jnp.float32([[1, 0], [0, 1], [0, 3], [0, 5]])
    state = Collected(rows, jnp.array([1, 2, 2, 2]), jnp.ones(4, bool))
    old, new = jnp.float32([[0, 4]]), jnp.float32([[1, 0], [0, 3]])
    found, _ = fetril.pseudo_features(state, old, new, each)
    assert len(found) == each
    np.testing.assert_allclose(found.mean(axis=0), [0, 4], atol=1e-6)


def test_a_class_after_the_others_is_told_by_a_support_vector_machine():
    state, old, new = recorded(1)
    means, weights = fetril.head(state, old, 3, 4, fetril.Settings())
    np.testing.assert_allclose(means, np.concatenate([old, new]), rtol=1e-5)
    pseudo, pseudo_labels = fetril.pseudo_features(state, old, new, 4)
    found = np.concatenate([state.rows[:12], pseudo])
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    labels = np.concatenate([state.labels[:12], pseudo_labels])
    theirs = LinearSVC(C=1.0, tol=1e-10, max_iter=100000).fit(found, labels)
    expected = np.concatenate([theirs.coef_.T, theirs.intercept_[None]])
    np.testing.assert_allclose(weights, expected, atol=2e-4)


@pytest.mark.parametrize("name", ["ridge", "lda", "fetril"])
def test_a_class_that_was_never_drawn_is_never_the_answer(name):
    random = np.random.default_rng(0)
    labels = jnp.arange(24) % 2 + 1  # of three classes 0 has no image
    found = jnp.float32(random.normal(size=(24, 8)) + 4 * np.eye(8)[labels])
    if name == "ridge":
        weights = ridge.solve(ridge.statistics(found, labels, 3), 1.0)
    elif name == "lda":
        state = lda.added(gaussians(3, 8), found, labels, labels > 0)
        weights = lda.discriminants(state.means, state.scatter / 24, 1e-4)
    else:
        old = jnp.stack([jnp.zeros(8), found[labels == 1].mean(axis=0)])
        state = Collected(found, jnp.full(24, 2), labels == 2)
        _, weights = fetril.head(state, old, 1, 12, fetril.Settings())
    assert not weights[:, 0].any() and weights[:, 1:].any(axis=0).all()
    setting = setting_of(tiny(name))
    below = -jnp.abs(weights)  # with which the scores of all others are negative
    kept = METHODS[name].kept(planned_network(setting), weights=below)
    queries = jnp.float32(random.normal(size=(64, 8, 8, 1)))
    scores = METHODS[name].scores(setting.config.method, setting.nets, kept, queries)
    assert np.isfinite(scores).all() and scores.argmax(axis=1).min() > 0


def planned_network(setting):
    """T_0 of random weights."""
    return planned(setting_of(setting.config, (3, 2), (16, 16)))[0].init(None).network


def test_a_ridge_head_through_jit():
    features = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    whole = jax.jit(ridge.statistics, static_argnums=2)(features, jnp.array([0, 0, 1, 1]), 2)
    weights = jax.jit(ridge.solve)(whole, 1.0)
    np.testing.assert_allclose(weights, np.array([[6, 1], [-2, 7]]) / 11, rtol=1e-6)


@pytest.mark.parametrize("rule", ["cosine", "distance"])
def test_means_do_not_depend_on_the_order_of_later_tasks(rule):
    """NCM's own phases, the later two tasks swapped."""
    setting = setting_of(tiny("ncm", method__rule=rule), (3, 2, 2), (16, 16, 16))
    method, nets, random = METHODS["ncm"], setting.nets, np.random.default_rng(0)
    network = planned_network(setting)
    images = jnp.float32(random.normal(size=(3, 16, 8, 8, 1)))
    step = jax.jit(ncm.add, static_argnums=(0, 1))

    def predicted(order: tuple[int, ...]) -> np.ndarray:
        kept = method.kept(network)
        for task, which in enumerate(order):
            (phase,) = method.phases(setting, task)
            first, classes = setting.seen(task) - setting.classes[task], setting.classes[task]
            labels = first + jnp.arange(16) % classes
            batch = Batch(images[which], labels, jnp.ones(16, bool))
            state, _ = step(None, nets, phase.init(kept), kept, batch, None, None)
            kept = phase.finish(state, kept, None)
        found = method.scores(setting.config.method, nets, kept, images.reshape(-1, 8, 8, 1))
        return np.asarray(found.argmax(axis=1))

    here, there = predicted((0, 1, 2)), predicted((0, 2, 1))
    assert len(np.unique(here)) == 7
    np.testing.assert_array_equal(here, np.array([0, 1, 2, 5, 6, 3, 4])[there])


def gaussians(classes: int, width: int) -> lda.Gaussians:
    return lda.Gaussians(
        jnp.zeros(classes), jnp.zeros((classes, width)), jnp.zeros((width, width)), jnp.int32(0)
    )


def test_discriminants_are_scikit_learns_whatever_the_batches():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    found = rng.normal(size=(60, 4)) @ rng.normal(size=(4, 4)) + 100 + 3 * np.eye(3, 4)[labels]
    valid = np.arange(60) < 57
    add = jax.jit(lda.added)
    state = gaussians(3, 4)
    for part in range(0, 60, 20):
        some = slice(part, part + 20)
        state = add(state, *map(jnp.array, (np.float32(found[some]), labels[some], valid[some])))
    weights = lda.discriminants(state.means, state.scatter / 57, 1e-6)
    # Their covariance is over n - K.
    theirs = LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(3, 1 / 3))
    theirs.fit(found[:57], labels[:57])
    np.testing.assert_allclose(state.means, theirs.means_, rtol=1e-5)
    np.testing.assert_allclose(state.scatter / 57, theirs.covariance_, rtol=1e-2, atol=1e-3)
    queries = rng.normal(size=(200, 4)) * 3 + found.mean(axis=0)
    scores = queries @ np.asarray(weights[:4], np.float64) + np.asarray(weights[4])
    assert np.mean(scores.argmax(axis=1) == theirs.predict(queries)) > 0.98


def test_shares_of_a_batch_add_up():
    """Under a mapped axis: LDA's scatter, the drift, LUCIR's ranking, and what is put together."""
    rng = np.random.default_rng(0)
    found, labels = jnp.float32(rng.normal(size=(8, 3))), jnp.arange(8) % 2
    valid = jnp.arange(8) < 7
    shares = [x.reshape(4, 2, *x.shape[1:]) for x in (found, labels, valid)]
    mapped = partial(jax.vmap, axis_name="batch")
    cosines, ranked = (
        jnp.tanh(jnp.float32(rng.normal(size=(8, 5)))),
        jnp.array([0, 1, *[2, 3, 4] * 2]),
    )
    rank = partial(lucir.ranking_loss, num_old=2, nearest=2, margin=0.5)
    of_shares = mapped(partial(rank, axis_name="batch"))(
        cosines.reshape(4, 2, 5), ranked.reshape(4, 2)
    )
    np.testing.assert_array_equal(of_shares[1:], 0)  # all exemplars are the first device's
    assert of_shares.mean() == pytest.approx(float(rank(cosines, ranked)), rel=1e-5)
    assert of_shares[0] > 0

    def share(f, y, v):
        state = lda.added(gaussians(2, 3), f, y, v, "batch")
        moved = sdc.drifted(
            sdc.no_drift(jnp.ones((2, 3))), f, f**2, v, jnp.ones((2, 3)), 0.5, "batch"
        )
        return state, moved, parallel.together(f, "batch")

    whole = lda.added(gaussians(2, 3), found, labels, valid)
    none = sdc.no_drift(jnp.ones((2, 3)))
    moved = sdc.drifted(none, found, found**2, valid, jnp.ones((2, 3)), 0.5)
    for one, other in zip(
        jax.tree.leaves(mapped(share)(*shares)),
        jax.tree.leaves((whole, moved, found)),
        strict=True,
    ):
        for device in range(4):
            np.testing.assert_allclose(one[device], other, rtol=1e-5, atol=1e-5)


# Whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of a method, made when it is first asked for, on a source that raises."""
    folder = tmp_path_factory.mktemp("comparators")

    def of(name: str):
        if not (folder / name).exists():
            with no_old_images():
                train.train(tiny(name), folder / name, silent)
        return folder / name

    return of


def test_a_source_that_raises_does():
    config = tiny("ewc")
    names = open_source(config.data).class_names
    schedule = experiment.class_schedule(config.data, names)

    def read(*tasks):
        source = Guarded(config.data)
        labels = source.labels("train")
        rows_ = [np.flatnonzero(labels == schedule[task][0])[:2] for task in tasks]
        return source, rows_

    source, (old, new) = read(0, 1)
    source.read("train", old)
    source.read("train", new)
    with pytest.raises(RuntimeError, match="an old image"):
        source.read("train", old)
    source, both = read(0, 1)
    with pytest.raises(RuntimeError, match="an old image"):
        source.read("train", np.concatenate(both))


FEATURES, CLASSES = 8, 7  # of a ResNet-8 of width 2


@pytest.mark.parametrize("name", marked(NAMES))
def test_a_run_of_each_method_sees_no_old_image_and_says_what_it_keeps(finished, name):
    found = json.loads((finished(name) / "summary.json").read_text())
    assert found["method"] == name
    assert [sum(x is not None for x in row) for row in found["accuracy_matrix"]] == [1, 2]
    _, kept = train.restore(finished(name))
    params = sum(x.size for x in jax.tree.leaves(kept.classifier.params))
    means, head = CLASSES * FEATURES, CLASSES * (FEATURES + 1)
    size = {
        "lwf_mc": 0,
        **dict.fromkeys(("ewc", "mas", "si"), params),
        "sdc": params + means,
        "lda": means + FEATURES**2 + 1,
        "fetril": means,
        "ridge": (FEATURES + 1) ** 2 + head,
    }
    drawn = sum(x.size for x in jax.tree.leaves(getattr(kept, "delegator", None)))
    assert found["kept_bytes"] == 4 * (size[name.removeprefix("pseudo_")] + drawn)
    assert (drawn > 0) == name.startswith("pseudo_")


@pytest.mark.parametrize("name", marked(NAMES))
def test_an_interrupted_run_of_each_ends_with_the_same_bits(finished, name, tmp_path):
    made = [row["global_step"] for row in rows(finished(name))]
    with at_row(made[len(made) // 2 + 1]):
        train.train(tiny(name), tmp_path / "run", silent)
    train.train(tiny(name), tmp_path / "run", silent)
    assert rows(tmp_path / "run", ("time",)) == rows(finished(name), ("time",))
    assert bits(train.restore(tmp_path / "run")[1]) == bits(train.restore(finished(name))[1])


@pytest.mark.parametrize("name", marked(n for n in NAMES if n not in ("lwf_mc", *PENALISED)))
def test_frozen_features_stay_t_0s(finished, name):
    """All these runs have one T_0, that of the methods that learn."""
    one, other = (train.restore(finished(n))[1].classifier for n in (name, "lda"))
    assert bits(one) == bits(other)


def test_a_run_over_pseudo_images_begins_from_the_d_0_that_skd_has_trained(finished, tmp_path):
    train.train(tiny("skd", run__phases=2), tmp_path / "skd", silent)
    start = {"run__start_from": str(tmp_path / "skd")}
    train.train(tiny("pseudo_fetril", **start), tmp_path / "run", silent)
    (one, other) = (train.restore(f)[1] for f in (tmp_path / "run", finished("pseudo_fetril")))
    assert bits(one) == bits(other)
    twice = 2 * tiny("skd").method.stage_one.batch
    with pytest.raises(UserError, match=rf"stage_one\.batch={twice // 2}, not {twice}"):
        changed = tiny("pseudo_fetril", method__stage_one__batch=twice, **start)
        train.train(changed, tmp_path / "other", silent)


# Steps


def kept_before(name: str, finished):
    """(setting, learning phase, what is kept before it): T_0's weights are those after a task."""
    config, kept = train.restore(finished(name))
    cut = jax.tree.map(lambda x: x, kept.classifier)
    head = {n: x[..., :4] for n, x in cut.params["head"].items()}
    classifier = dataclasses.replace(cut, params={**cut.params, "head": head})
    changes = {"classifier": classifier}
    if name in PENALISED:
        importance = jax.tree.map(lambda x: jnp.abs(jnp.sin(100 * x)), classifier.params)
        changes["importance"] = importance
    kept = dataclasses.replace(kept, **changes)
    setting = setting_of(config, (4, 3), (640, 640))
    phase = next(p for p in planned(setting) if p.name == "learn")
    return setting, phase, kept


IMAGES = np.random.default_rng(5).normal(size=(16, 8, 8, 1)).astype(np.float32)
LABELS = np.arange(16) % 3 + 4


def a_step(setting, phase, kept, state, **changes):
    """Of SGD without weight decay, at rate 0.01."""
    static = dataclasses.replace(phase.static, weight_decay=0.0, **changes)
    batch = Batch(jnp.array(IMAGES), jnp.array(LABELS), jnp.ones(16, bool))
    step = jax.jit(phase.step, static_argnums=(0, 1))
    return step(static, setting.nets, state, kept, batch, None, jnp.float32(0.01))


@pytest.mark.parametrize(("name", "factor"), [("ewc", 1), ("mas", 2), ("si", 2)])
def test_a_step_pulls_each_weight_to_its_anchor(finished, name, factor):
    setting, phase, kept = kept_before(name, finished)
    state = phase.init(kept)
    moved = jax.tree.map(lambda x: x + 0.1 * jnp.cos(50 * x), state.network.params)
    network = dataclasses.replace(state.network, params=moved)
    state = dataclasses.replace(state, network=network)
    pulled, metrics_ = a_step(setting, phase, kept, state, weight=3.0)
    free, other = a_step(setting, phase, kept, state, weight=0.0)
    assert metrics_["classification"] == other["classification"]
    total = 0.0
    for path, weight in jax.tree_util.tree_leaves_with_path(kept.importance):
        theta, anchor, one, two = (
            np.asarray(at(tree, path), np.float64)[tuple(slice(n) for n in weight.shape)]
            for tree in (moved, kept.classifier.params, pulled.network.params, free.network.params)
        )
        far = 0.01 / (1 - 0.9) * 3 * factor * np.asarray(weight)
        np.testing.assert_allclose(one, (two + far * anchor) / (1 + far), atol=2e-6)
        total += 3 * factor / 2 * np.sum(np.asarray(weight) * (theta - anchor) ** 2)
    assert metrics_["penalty"] == pytest.approx(total, rel=1e-4)
    new = np.asarray(
        pulled.network.params["head"]["kernel"] - free.network.params["head"]["kernel"]
    )
    assert not new[:, 4:].any()


def at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


def test_the_path_is_of_the_step_that_was_made_and_of_the_loss_alone(finished):
    setting, phase, kept = kept_before("si", finished)
    state = phase.init(kept)
    before = jax.tree.map(np.asarray, state.network.params)
    one, _ = a_step(setting, phase, kept, state, weight=5.0)
    two, _ = a_step(setting, phase, kept, one, weight=5.0)
    free, _ = a_step(setting, phase, kept, state, weight=0.0, momentum=0.0)
    for path, omega in jax.tree_util.tree_leaves_with_path(one.omega):
        start, end, plain = (
            np.asarray(at(tree, path)) for tree in (before, one.network.params, free.network.params)
        )
        gradient = (start - plain) / 0.01
        np.testing.assert_allclose(omega, -gradient * (end - start), atol=1e-5)
    assert bits(two.start) == bits(before)
    assert bits(two.omega) != bits(one.omega)


def test_importance_of_a_network_is_that_of_each_image_in_eval_mode(finished):
    setting, _, kept = kept_before("mas", finished)
    classifier = kept.classifier
    phase = next(p for p in planned(setting) if p.name == "importance" and p.task == 0)
    valid = jnp.arange(16) < 3  # the others fill the batch up
    batch = Batch(jnp.array(IMAGES), jnp.array(LABELS) % 4, valid)
    step = jax.jit(phase.step, static_argnums=(0, 1))
    state, found = step(phase.static, setting.nets, phase.init(kept), kept, batch, None, None)
    assert found["images"] == 3
    module = setting.nets.classifier(classifier.params)

    def of_one(params, image):
        return jnp.sum(module.apply(params, image[None], False)[1] ** 2)

    gradient = jax.jit(jax.grad(of_one))
    each = [gradient(classifier.variables(), image)["params"] for image in IMAGES[:3]]
    expected = jax.tree.map(lambda *g: sum(map(jnp.abs, g)), *each)
    for one, other in zip(jax.tree.leaves(state.sums), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)
    relabelled = dataclasses.replace(batch, labels=batch.labels * 0)
    again, _ = step(phase.static, setting.nets, phase.init(kept), kept, relabelled, None, None)
    assert bits(again) == bits(state)


@pytest.mark.parametrize("labels", ["drawn", "argmax", "true"])
def test_fisher_of_a_network_is_of_the_labels_named(finished, labels):
    setting, _, kept = kept_before("ewc", finished)
    config = dataclasses.replace(
        setting.config, method=dataclasses.replace(setting.config.method, labels=labels)
    )
    setting = dataclasses.replace(setting, config=config)
    phase = ewc.found(setting, 0)
    assert phase.draws == (labels == "drawn")
    batch = Batch(jnp.array(IMAGES), jnp.array(LABELS) % 4, jnp.ones(16, bool))
    key = jax.random.key(3) if phase.draws else None
    step = jax.jit(phase.step, static_argnums=(0, 1))
    state, _ = step(phase.static, setting.nets, phase.init(kept), kept, batch, key, None)
    classifier = kept.classifier
    logits = steps.eval_mode(setting.nets.classifier(classifier.params), classifier, batch.images)[
        1
    ]
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.arange(16))
    of = {
        "true": batch.labels,
        "argmax": logits.argmax(axis=1),
        "drawn": jax.vmap(jax.random.categorical)(keys, logits),
    }[labels]
    # The bias's gradient is one-hot - p.
    error = np.eye(4)[np.asarray(of)] - np.asarray(jax.nn.softmax(logits))
    np.testing.assert_allclose(state.sums["head"]["bias"], (error**2).sum(axis=0), rtol=1e-3)


def test_a_step_of_lwf_mc_moves_the_bias_by_sigmoids(finished):
    setting, phase, kept = kept_before("lwf_mc", finished)
    state, nets, images = phase.init(kept), setting.nets, jnp.array(IMAGES)
    network = state.network
    teacher = steps.eval_mode(nets.classifier(kept.classifier.params), kept.classifier, images)[1]
    module = nets.classifier(network.params)
    (_, z), *_ = steps.train_mode(module, network.params, network.batch_stats, images)
    before = np.asarray(network.params["head"]["bias"])
    new, found = a_step(setting, phase, kept, state)

    def sigmoid(x):
        return 1 / (1 + np.exp(-np.asarray(x, np.float64)))

    target = np.concatenate([sigmoid(teacher), np.eye(7)[LABELS][:, 4:]], axis=1)
    p = sigmoid(z)
    loss = -np.mean(np.sum(target * np.log(p) + (1 - target) * np.log(1 - p), axis=1))
    assert found["classification"] == pytest.approx(loss, rel=1e-4)
    moved = np.asarray(new.network.params["head"]["bias"]) - before
    np.testing.assert_allclose(moved, -0.01 * (p - target).mean(axis=0), atol=1e-6)


# SI's T_0


def test_si_has_the_t_0_of_all_methods_and_no_other_may_stand_in(finished, tmp_path):
    bases = [
        [r for r in rows(finished(n), ("time",)) if r["phase"] == "base"] for n in ("si", "mas")
    ]
    for one, other in zip(*bases, strict=True):
        np.testing.assert_allclose(one["classification"], other["classification"], rtol=1e-3)
    workdir = tmp_path / "first"
    train.train(tiny("lwf_mc", run__phases=1), workdir, silent)
    with pytest.raises(UserError, match="si has to watch the training of T_0"):
        train.train(tiny("si", run__start_from=str(workdir)), tmp_path / "si", silent)
    train.train(tiny("si", run__phases=1), tmp_path / "own", silent)
    with pytest.raises(UserError, match=r"config\.method\.xi=0\.1, not 0\.2"):
        changed = tiny("si", run__start_from=str(tmp_path / "own"), method__xi=0.2)
        train.train(changed, tmp_path / "si", silent)
    config = tiny("si", run__start_from=str(tmp_path / "own"))
    train.train(config, tmp_path / "si", silent)
    assert bits(train.restore(tmp_path / "si")[1]) == bits(train.restore(finished("si"))[1])


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("ewc", "labels", "guessed"),
        ("ewc", "gamma", -1.0),
        ("mas", "weight", -1.0),
        ("si", "xi", 0.0),
        ("sdc", "sigma", 0.0),
        ("sdc", "weight", -1.0),
        ("lda", "shrinkage", 1.0),
        ("fetril", "cost", 0.0),
        ("fetril", "cost", 1e5),
        ("pseudo_fetril", "cost", 0.0),
        ("pseudo_ridge", "stage_one.batch", 0),
    ],
)
def test_a_setting_that_cannot_be_is_named(name, field, value):
    with pytest.raises(UserError, match=rf"config\.method\.{field.replace('.', chr(92) + '.')}"):
        tiny(name, **{f"method__{field.replace('.', '__')}": value})
