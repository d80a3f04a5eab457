"""The steps on tiny networks: what each changes, what it leaves alone, what it computes."""

import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_data_sources import RGB
from test_losses import (
    numpy_cross_entropy,
    numpy_diversity,
    numpy_psi,
    numpy_softmax,
    numpy_statistics,
)
from test_models import fill, same_bits

from configs import digits
from skd_jax import losses, steps
from skd_jax.config import Data, Supervised
from skd_jax.data import augment_normalised
from skd_jax.errors import UserError
from skd_jax.losses import feature_consolidation_loss
from skd_jax.methods import from_config_dict
from skd_jax.methods.phase import Phase, Setting
from skd_jax.methods.phases import base
from skd_jax.methods.skd import METHOD, settings, terms
from skd_jax.methods.skd import steps as skd_steps
from skd_jax.methods.skd.phases import KeptDelegator, stage_one, stage_two
from skd_jax.methods.skd.settings import StageOne, StageTwo
from skd_jax.methods.skd.steps import StageOneState
from skd_jax.models import MOMENTS, Classifier, Delegator, ResNet, grow_head
from skd_jax.state import Kept, Network, Trained

# One block each: compiling is nearly all the time these tests take.
FEATURES = ResNet(blocks=(1,), width=8, large_stem=False)
NETS = skd_steps.Networks(FEATURES, Delegator(image_size=8, channels=3, z_dim=6, widths=(8, 4)))
ONE = StageOne(
    epochs=1,
    finetune_epochs=1,
    rounds_per_epoch=1,
    imitate_steps=2,
    batch=8,
    student_lr=0.1,
    delegator_lr=1e-3,
    drop_every=1,
    finetune_drop_every=1,
    momentum=0.9,
    weight_decay=5e-4,
    student_explores=True,
    terms=(
        ("category", 0.5),
        ("diversity", 2.0),
        ("exploration", 20.0),
        ("feature_statistics", 1.0),
    ),
    term_modules=("skd_jax.methods.skd.terms",),
    feature_source="teacher",
    feature_distance="variance",
)
TWO = StageTwo(
    epochs=1,
    batch=8,
    lr=0.1,
    drop_epochs=(),
    momentum=0.9,
    weight_decay=5e-4,
    delegator=True,
    beta=5.0,
    adaptive=True,
    gamma=1.0,
    classification="all",
)
BASE = Supervised(1, 8, 0.1, (), 0.9, 5e-4)
OLD, NEW = 4, 2  # classes
KEY = jax.random.key(7)
IMAGES, Z = jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 6))
POOL = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3))
POOL = (POOL * np.random.default_rng(1).uniform(0, 1, (20, 1, 1, 3))).astype(np.uint8)  # tints
GAMMA = jnp.float32(0.3)
CROPPED = dataclasses.replace(RGB, augment="crop", pad=1, flip=True)

imitate = jax.jit(skd_steps.imitate, static_argnums=(0, 1, 6))
explore = jax.jit(skd_steps.explore, static_argnums=(0, 1, 2, 9))
cil = jax.jit(skd_steps.cil, static_argnums=(0, 1, 10))


def setting(one: StageOne = ONE, data: Data = RGB) -> Setting:
    """Of a run of these networks and sections, of 8 images a task."""
    delegator = settings.Delegator(z_dim=6, widths=(8, 4), upsample="resize", helper_bn=True)
    config = dataclasses.replace(
        from_config_dict(digits.get_config()),
        data=data,
        base=BASE,
        method=settings.Settings("skd", delegator, one, TWO),
    )
    return Setting(config, steps.Networks(FEATURES), classes=(OLD, NEW), images=(8, 8))


def advance(
    phase: Phase, state, kept, batches, key, numbers, rates, data=RGB, mesh=None, count=None
):
    """Steps of a phase by the one compiled entry point."""
    return steps.advance(
        phase.step,
        phase.static,
        steps.Networks(FEATURES),
        data,
        phase.reads,
        phase.draws,
        state,
        kept,
        batches,
        key,
        numbers,
        rates,
        count,
        mesh=mesh,
    )


def predict(images, mesh=None):
    """T_n's classes of images."""
    return steps.predict(METHOD.scores, None, NETS, RGB, Kept(TEACHER), images, mesh=mesh)


def batches(images, labels) -> tuple:
    """Of which every image counts."""
    return images, labels, np.ones(labels.shape, bool)


# What an explore step counts beside its terms.
WATCHED = {"label_entropy", "label_shares", "skipped"}


def copy(tree):
    """Arrays of its own on the device, to be donated or compared with later."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)


def network(module, example, seed: int) -> Network:
    variables = copy(fill(module, example, seed))
    return Network(variables["params"], variables["batch_stats"])


TEACHER = network(Classifier(FEATURES, OLD), IMAGES, 0)
STUDENT = network(FEATURES, IMAGES, 1)
DELEGATOR = network(NETS.delegator, Z, 2)
TEACHER_BITS, DELEGATOR_BITS = jax.tree.map(np.array, (TEACHER, DELEGATOR))


def stage_one_state() -> StageOneState:
    student, delegator = copy(STUDENT), copy(DELEGATOR)
    return StageOneState(
        Trained(student, steps.sgd(ONE).init(student.params)),
        Trained(delegator, skd_steps.adam().init(delegator.params)),
    )


def stage_two_state(new: int = NEW) -> Trained:
    student = copy(TEACHER)
    params = grow_head(student.params, jax.random.key(3), new)
    return Trained(student.replace(params=params), steps.sgd(TWO).init(params))


def latents(seed: int = 0, batch: int = 8) -> jax.Array:
    return skd_steps.latent(jax.random.key(seed), jnp.arange(batch), 6)


def weights(**changes: float) -> dict[str, jax.Array]:
    return {name: jnp.float32(weight) for name, weight in {**dict(ONE.terms), **changes}.items()}


def run_explore(config: StageOne = ONE, rates=(0.1, 1e-3), **changes: float):
    functions = terms.lookup(config)
    wanted = {
        name: jnp.float32(changes.get(name, dict(config.terms)[name])) for name, _ in functions
    }
    rates = jnp.float32(rates[0]), jnp.float32(rates[1])
    return explore(NETS, config, functions, stage_one_state(), TEACHER, latents(), wanted, *rates)


def delegator_gradient(state: StageOneState) -> np.ndarray:
    """The gradient of the first explore step, which Adam's first moment holds a tenth of."""
    leaves = jax.tree.leaves(state.delegator.optimiser.mu)
    return np.concatenate([np.ravel(leaf) for leaf in leaves]) / 0.1


def same_anywhere(a, b) -> bool:
    """Some leaf is the same to the bit."""
    return any(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def assert_close(a, b, **tolerance) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def assert_same_state(a: StageOneState, b: StageOneState, explore_steps: int) -> None:
    """Equal to rounding. The delegator's weights may differ by Adam's steps where the gradient is
    nothing but rounding, as it is for a bias before a batch normalisation."""
    assert_close(a.student, b.student, rtol=1e-3, atol=1e-4)
    gradients = delegator_gradient(a), delegator_gradient(b)
    np.testing.assert_allclose(*gradients, atol=1e-3 * np.abs(gradients[0]).max())
    assert_close(a.delegator.network, b.delegator.network, atol=2.1e-3 * explore_steps)


@jax.jit
def train_mode(student, delegator, teacher, z):
    """All that an explore step sees of its batch, by the modules' own apply."""
    both = ["batch_stats", MOMENTS]
    images, _ = NETS.delegator.apply(delegator.variables(), z, True, mutable=["batch_stats"])
    (features, logits), seen = Classifier(FEATURES, OLD).apply(
        teacher.variables(), images, False, mutable=[MOMENTS]
    )
    student_features, own = FEATURES.apply(student.variables(), images, True, mutable=both)
    return features, logits, student_features, seen[MOMENTS]["features"], own[MOMENTS]


def pairs(tree) -> list:
    """(mean, variance) of each layer, by name."""
    if "mean" in tree:
        return [(np.array(tree["mean"]), np.array(tree["var"]))]
    return [pair for name in sorted(tree) for pair in pairs(tree[name])]


# First weights


def test_first_weights_are_float32_of_their_own_and_follow_from_the_key():
    initial = inspect.unwrap(steps.initial)  # tests remember what it has drawn
    one, again, other = (initial(FEATURES, jax.random.key(k), (1, 8, 8, 3)) for k in (1, 1, 2))
    assert same_bits(one, again) and not same_bits(one, other)
    leaves = jax.tree.leaves(one)
    assert all(x.dtype == jnp.float32 and not x.weak_type for x in leaves)  # else compiled twice
    assert len({x.unsafe_buffer_pointer() for x in leaves}) == len(leaves)  # a step takes them over
    asked = jax.eval_shape(lambda: initial(FEATURES, jax.random.key(1), (1, 8, 8, 3)))
    assert jax.tree.map(jnp.shape, asked) == jax.tree.map(jnp.shape, one)


# The optimiser and the latent vectors


def test_sgd_is_pytorchs_and_a_lower_rate_leaves_the_momentum_alone():
    params, stats = np.array([1.0, -2.0, 0.5]), {}
    gradients = np.array([[0.3, -0.1, 0.0], [-0.2, 0.4, 1.0], [0.1, 0.1, -0.5]])
    state = Trained(
        Network({"w": jnp.float32(params)}, stats), steps.sgd(ONE).init({"w": jnp.zeros(3)})
    )
    buffer = None
    for rate, gradient in zip((0.1, 0.1, 0.01), gradients, strict=True):
        state = steps.update(
            state, {"w": jnp.float32(gradient)}, stats, steps.sgd(ONE), jnp.float32(rate)
        )
        decayed = gradient + 5e-4 * params  # torch.optim.SGD, line by line
        buffer = decayed if buffer is None else 0.9 * buffer + decayed
        params = params - rate * buffer
        np.testing.assert_allclose(state.network.params["w"], params, rtol=1e-6)


def test_rates_drop_by_ten_at_each_epoch_named():
    rates = steps.dropped(0.1, np.array([0, 79, 80, 119, 120, 159]), (80, 120))
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)
    assert rates.dtype == jnp.float32


def test_a_latent_row_depends_on_the_key_and_its_index_alone():
    rows = skd_steps.latent(KEY, jnp.arange(64), 6)
    assert rows.shape == (64, 6)
    assert same_bits(rows[:5], skd_steps.latent(KEY, jnp.arange(5), 6))
    assert not np.any(rows[:5] == skd_steps.latent(jax.random.key(8), jnp.arange(5), 6))
    assert len(np.unique(rows)) == rows.size


def test_latents_are_standard_normal():
    z = skd_steps.latent(KEY, jnp.arange(2000), 20)
    assert abs(float(z.mean())) < 0.02
    assert float(z.var()) == pytest.approx(1, abs=0.03)
    np.testing.assert_allclose(np.cov(z.T), np.eye(20), atol=0.12)


# Stage one


def test_imitate_teaches_the_student_and_leaves_the_delegators_weights_to_the_bit():
    state, z = stage_one_state(), latents()
    teacher_features, _, features, *_ = train_mode(STUDENT, DELEGATOR, TEACHER, z)
    found = []
    for _ in range(6):
        state, metrics = imitate(NETS, ONE, state, TEACHER, z, jnp.float32(0.1))
        found.append(float(metrics["imitation"]))
    assert found[0] == pytest.approx(numpy_psi(teacher_features, features), rel=1e-3)
    assert found[-1] < 0.8 * found[0]
    before = stage_one_state()
    assert same_bits(state.delegator.network.params, before.delegator.network.params)
    assert same_bits(state.delegator.optimiser, before.delegator.optimiser)
    assert not same_anywhere(
        state.delegator.network.batch_stats, before.delegator.network.batch_stats
    )
    assert not same_anywhere(state.student.network, before.student.network)


def test_imitate_can_teach_the_length_of_features_too():
    z = latents()
    teacher_features, _, first, *_ = train_mode(STUDENT, DELEGATOR, TEACHER, z)
    before = float(losses.length_discrepancy(teacher_features, first))
    found, gradients = {}, {}
    for weight in (0.0, 0.3, 1.0):
        one, state = dataclasses.replace(ONE, feature_length=weight), stage_one_state()
        seen = []
        for _ in range(20):
            state, metrics = imitate(NETS, one, state, TEACHER, z, jnp.float32(0.1))
            gradients.setdefault(weight, state.student.optimiser)  # momentum: of the first step
            seen.append(metrics)
        assert seen[0]["imitation"] == pytest.approx(numpy_psi(teacher_features, first), rel=1e-3)
        assert seen[-1]["imitation"] < 0.8 * seen[0]["imitation"]
        assert ("feature_length" in metrics) == (weight > 0)
        if weight:
            assert seen[0]["feature_length"] == pytest.approx(before, rel=1e-3)
        _, _, features, *_ = train_mode(state.student.network, DELEGATOR, TEACHER, z)
        found[weight] = float(losses.length_discrepancy(teacher_features, features))
    assert found[1.0] < 0.1 * before and found[0.3] < 0.4 * before < found[0.0]
    for none, some, whole in zip(*map(jax.tree.leaves, gradients.values()), strict=True):
        np.testing.assert_allclose(some, 0.7 * none + 0.3 * whole, rtol=1e-3, atol=1e-5)


def test_rates_of_a_cosine_fall_from_the_rate_to_nothing():
    rates = steps.half_cosine(0.1, np.array([0, 10, 20, 30, 39]), 40)
    assert rates.dtype == np.float32
    assert rates[:4] == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], rel=1e-5)
    assert 0 < rates[4] == pytest.approx(0.1 * np.sin(np.pi / 80) ** 2, rel=1e-5)


def test_explore_changes_student_and_delegator_each_at_its_rate():
    state, _ = run_explore(rates=(0.1, 1e-3))
    slower, _ = run_explore(rates=(0.1, 1e-4))
    assert not same_anywhere(state.student.network, STUDENT)
    assert same_bits(slower.student, state.student)
    (trace,) = (part.trace for part in state.student.optimiser if hasattr(part, "trace"))
    expected = jax.tree.map(lambda p, t: p - 0.1 * t, STUDENT.params, trace)
    assert_close(state.student.network.params, expected, atol=1e-6)

    # Adam's first step: the rate times the gradient over its own length, a coordinate.
    for rate, one in ((1e-3, state), (1e-4, slower)):
        gradient = jax.tree.map(lambda m: m / 0.1, one.delegator.optimiser.mu)
        expected = jax.tree.map(
            lambda p, g, rate=rate: p - rate * g / (jnp.abs(g) + 1e-8), DELEGATOR.params, gradient
        )
        assert_close(one.delegator.network.params, expected, atol=2e-2 * rate)
    assert not same_anywhere(state.delegator.network.batch_stats, DELEGATOR.batch_stats)


def test_explores_terms_equal_numpy_on_what_the_networks_give():
    _, metrics = run_explore()
    features, logits, student_features, moments, _ = train_mode(
        STUDENT, DELEGATOR, TEACHER, latents()
    )
    logits = np.float64(logits)
    expected = {
        "exploration": -numpy_psi(features, student_features),
        "category": numpy_cross_entropy(logits, logits.argmax(-1)),
        "diversity": numpy_diversity(numpy_softmax(logits)),
        "feature_statistics": numpy_statistics(
            pairs(moments), pairs(TEACHER.batch_stats["features"]), "variance"
        ),
    }
    assert set(metrics) == {"explore", *expected, *WATCHED}
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_explores_total_is_the_weighted_sum_of_its_terms():
    for changes in ({}, {"exploration": 1.0, "diversity": 0.0}):
        _, metrics = run_explore(**changes)
        total = sum(float(metrics[name]) * float(w) for name, w in weights(**changes).items())
        assert float(metrics["explore"]) == pytest.approx(total, rel=1e-5)


def test_every_term_pulls_the_delegator_and_the_pulls_add_up():
    full = delegator_gradient(run_explore()[0])
    none = dict.fromkeys(dict(ONE.terms), 0.0)
    total = np.zeros_like(full)
    for name, weight in ONE.terms:
        alone = delegator_gradient(run_explore(**{**none, name: weight})[0])
        without = delegator_gradient(run_explore(**{name: 0.0})[0])
        assert np.linalg.norm(alone) > 1e-3, name
        scale = np.abs(full).max()
        np.testing.assert_allclose(full - without, alone, atol=1e-3 * scale, err_msg=name)
        total += alone
    np.testing.assert_allclose(total, full, atol=1e-3 * np.abs(full).max())


@pytest.mark.parametrize("removed", [name for name, _ in ONE.terms])
@pytest.mark.parametrize("how", ["weight 0", "left out"])
def test_a_removed_term_is_not_computed(removed, how):
    kept = tuple((name, weight) for name, weight in ONE.terms if name != removed)
    zero = ((removed, 0.0),) if how == "weight 0" else ()
    config = dataclasses.replace(ONE, terms=kept + zero)
    functions = terms.lookup(config)
    assert [name for name, _ in functions] == [name for name, _ in kept]
    rate = jnp.float32(0.1)
    _, metrics = jax.eval_shape(
        partial(skd_steps.explore, NETS, config, functions),
        *(stage_one_state(), TEACHER, latents(), weights(), rate, rate),
    )
    assert set(metrics) == {"explore", *dict(kept), *WATCHED}


def test_a_removed_term_equals_one_of_weight_0():
    config = dataclasses.replace(ONE, terms=ONE.terms[:3])
    removed, zero = run_explore(config)[0], run_explore(feature_statistics=0.0)[0]
    a, b = delegator_gradient(removed), delegator_gradient(zero)
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())


def test_feature_statistics_of_the_student_are_the_students():
    config = dataclasses.replace(ONE, feature_source="student")
    state, metrics = run_explore(config)
    by_teacher, teacher_metrics = run_explore()
    moments = train_mode(STUDENT, DELEGATOR, TEACHER, latents())[-1]
    expected = numpy_statistics(pairs(moments), pairs(TEACHER.batch_stats["features"]), "variance")
    assert float(metrics["feature_statistics"]) == pytest.approx(expected, rel=1e-3)
    assert abs(expected - float(teacher_metrics["feature_statistics"])) > 0.1
    a, b = delegator_gradient(state), delegator_gradient(by_teacher)
    assert np.abs(a - b).max() > 0.01 * np.abs(b).max()


@terms.term
def redness(e: terms.Explored) -> jax.Array:
    """A term that only this module has."""
    return jnp.mean(jnp.abs(e.images[..., 0] - e.images[..., 1]))


@terms.term
def category(e: terms.Explored) -> jax.Array:
    """A term that skd_jax.methods.skd.terms has too."""
    return redness(e)


# Both at once: one compilation less.
CUSTOM = dataclasses.replace(
    ONE,
    student_explores=False,
    terms=(("exploration", 1.0), ("redness", 2.0)),
    term_modules=("skd_jax.methods.skd.terms", __name__),
)


def test_a_student_that_does_not_explore_stays_as_it_is_to_the_bit():
    state, _ = run_explore(CUSTOM)
    assert same_bits(state.student, stage_one_state().student)
    assert not same_anywhere(state.delegator.network.batch_stats, DELEGATOR.batch_stats)
    assert np.linalg.norm(delegator_gradient(state)) > 1e-3


def test_a_term_of_ones_own_module_is_minimised():
    _, metrics = run_explore(CUSTOM)
    assert set(metrics) == {"explore", "exploration", "redness", *WATCHED}
    total = float(metrics["exploration"]) + 2 * float(metrics["redness"])
    assert float(metrics["explore"]) == pytest.approx(total, rel=1e-5)
    alone = dataclasses.replace(CUSTOM, terms=(("redness", 2.0),))
    assert np.linalg.norm(delegator_gradient(run_explore(alone)[0])) > 1e-3


def test_the_first_module_with_a_terms_name_is_taken():
    def found(*modules: str):
        config = dataclasses.replace(ONE, terms=(("category", 1.0),), term_modules=modules)
        return terms.lookup(config)

    assert found(__name__, "skd_jax.methods.skd.terms") == (("category", category),)
    assert found("skd_jax.methods.skd.terms", __name__) == (("category", terms.category),)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"terms": (("diversty", 1.0),)}, "config.method.stage_one.terms.diversty"),
        ({"terms": (("diversty", 0.0), *ONE.terms)}, "config.method.stage_one.terms.diversty"),
        (
            {"term_modules": ("no_such_module",)},
            "config.method.stage_one.term_modules: .*no_such_module",
        ),
    ],
)
def test_a_term_or_module_that_is_not_there_is_named(changes, named):
    with pytest.raises(UserError, match=named):
        terms.lookup(dataclasses.replace(ONE, **changes))


def rounds(
    state: StageOneState,
    numbers: list[int],
    rates=(0.1, 1e-3),
    key=KEY,
    one=ONE,
    data=RGB,
    **changes,
):
    n = len(numbers)
    each = {
        "weights": {name: jnp.full(n, weight) for name, weight in weights(**changes).items()},
        "student": jnp.full(n, rates[0], jnp.float32),
        "delegator": jnp.full(n, rates[1], jnp.float32),
    }
    kept = KeptDelegator(TEACHER)
    phase = stage_one(setting(one, data), 0)
    return advance(phase, state, kept, None, key, jnp.array(numbers), each)


def test_two_rounds_in_one_call_equal_two_calls_of_one():
    together, metrics = rounds(stage_one_state(), [3, 4])
    state, first = rounds(stage_one_state(), [3])
    state, second = rounds(state, [4])
    assert set(metrics) == {"imitation", "explore", *dict(ONE.terms), *WATCHED}
    for name, values in metrics.items():
        assert (len(values), len(first[name])) == (2, 1)
        np.testing.assert_allclose(values, [first[name][0], second[name][0]], rtol=1e-4, atol=1e-5)
    assert_same_state(together, state, 2)


def test_a_round_says_what_length_lacks_too():
    one = dataclasses.replace(ONE, feature_length=0.5)
    rates = weights(), jnp.float32(0.1), jnp.float32(1e-3)
    functions = terms.lookup(one)
    shapes = jax.eval_shape(
        lambda state: skd_steps.round_(NETS, one, functions, state, TEACHER, KEY, *rates),
        stage_one_state(),
    )
    assert shapes[1]["feature_length"].shape == shapes[1]["imitation"].shape == ()


@pytest.mark.parametrize("augment", [False, True])
def test_a_round_is_imitate_steps_each_of_a_new_z_and_one_explore_step(augment):
    one = dataclasses.replace(ONE, augment=augment)
    out, metrics = rounds(stage_one_state(), [5], one=one, data=CROPPED)
    key = jax.random.fold_in(KEY, 5)
    zs = [skd_steps.latent(jax.random.fold_in(key, i), jnp.arange(8), 6) for i in range(3)]
    state, imitation = stage_one_state(), []

    def altered(i):
        own = jax.random.fold_in(key, 3 + i)
        return (partial(augment_normalised, CROPPED, own, jnp.arange(8)),) if augment else ()

    for i, z in enumerate(zs[:2]):
        state, seen = imitate(NETS, ONE, state, TEACHER, z, jnp.float32(0.1), *altered(i))
        imitation.append(float(seen["imitation"]))
    state, seen = explore(
        NETS,
        ONE,
        terms.lookup(ONE),
        *(state, TEACHER, zs[2], weights(), jnp.float32(0.1), jnp.float32(1e-3), *altered(2)),
    )
    assert float(metrics["imitation"][0]) == pytest.approx(np.mean(imitation), rel=1e-4)
    assert float(metrics["explore"][0]) == pytest.approx(float(seen["explore"]), rel=1e-4)
    assert_same_state(out, state, 1)
    if augment:
        _, plain = imitate(NETS, ONE, stage_one_state(), TEACHER, zs[0], jnp.float32(0.1))
        assert imitation[0] != float(plain["imitation"])


def test_rounds_with_other_numbers_keys_rates_and_weights_do_not_recompile():
    rounds(stage_one_state(), [0])
    before = steps.advance.jitted._cache_size()
    one, first = rounds(stage_one_state(), [8], rates=(0.0, 1e-3))
    assert same_bits(one.student.network.params, STUDENT.params)
    other, second = rounds(one, [9], rates=(0.05, 0.0), key=jax.random.key(1), exploration=1.0)
    assert not same_anywhere(other.student.network.params, STUDENT.params)
    assert float(first["explore"][0]) != float(second["explore"][0])
    assert steps.advance.jitted._cache_size() == before


def test_a_delegator_of_rate_0_keeps_its_weights_through_a_round():
    state, _ = rounds(stage_one_state(), [0], rates=(0.1, 0.0))
    assert same_bits(state.delegator.network.params, DELEGATOR.params)


def test_rounds_leave_the_teacher_readable_and_unchanged_to_the_bit():
    rounds(stage_one_state(), [0])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(TEACHER))
    assert same_bits(TEACHER, TEACHER_BITS)


# Supervised training


def run_supervised(state: Trained, number: int, rate: float = 0.1, key=KEY, batch=range(8)):
    return advance(
        base(setting()),
        state,
        Kept(),
        batches(POOL[None, list(batch)], np.arange(20)[None, list(batch)] % OLD),
        key,
        jnp.array([number]),
        jnp.array([rate], jnp.float32),
    )


def test_supervised_steps_lower_the_cross_entropy_and_compile_once():
    state = Trained(copy(TEACHER), steps.sgd(BASE).init(TEACHER.params))
    state, first = run_supervised(state, 0)
    before = steps.advance.jitted._cache_size()
    for number in range(1, 8):
        state, metrics = run_supervised(state, number)
    assert set(metrics) == {"classification", "train_accuracy", "skipped"}
    assert float(metrics["classification"][0]) < 0.9 * float(first["classification"][0])
    assert float(metrics["train_accuracy"][0]) >= float(first["train_accuracy"][0])
    run_supervised(state, 3, rate=0.01, key=jax.random.key(1), batch=range(5, 13))
    assert steps.advance.jitted._cache_size() == before


def test_a_supervised_steps_loss_equals_numpy():
    state = Trained(copy(TEACHER), steps.sgd(BASE).init(TEACHER.params))
    _, metrics = run_supervised(state, 0)
    images = (POOL[:8] / np.float32(255) - 0.5) / 0.5
    _, logits, _ = classify(TEACHER, TEACHER, jnp.float32(images))
    labels = [i % OLD for i in range(8)]
    assert float(metrics["classification"][0]) == pytest.approx(
        numpy_cross_entropy(logits, labels), rel=1e-3
    )
    accuracy = np.mean(np.argmax(logits, -1) == np.array(labels))
    assert float(metrics["train_accuracy"][0]) == pytest.approx(accuracy)


# Stage two


@jax.jit
def classify(learner: Network, teacher: Network, images: jax.Array):
    """Train-mode features and logits of the learner, eval-mode ones of the teacher."""
    (features, logits), _ = NETS.classifier(learner.params).apply(
        learner.variables(), images, True, mutable=["batch_stats"]
    )
    return features, logits, Classifier(FEATURES, OLD).apply(teacher.variables(), images, False)


NEW_IMAGES = jnp.float32(np.random.default_rng(5).normal(size=(8, 8, 8, 3)))
NEW_LABELS = [4, 5, 5, 4, 4, 4, 5, 4]


def both_kinds() -> jax.Array:
    """x^ of the step below: pseudo images, then as many new ones."""
    pseudo = jax.jit(lambda d, z: NETS.delegator.apply(d.variables(), z, False))(
        DELEGATOR, skd_steps.latent(KEY, jnp.arange(8), 6)
    )
    return jnp.concatenate([pseudo, NEW_IMAGES])


def run_cil_step(config: StageTwo, delegator: Network | None, gamma=GAMMA, data=None):
    return cil(
        NETS,
        config,
        stage_two_state(),
        TEACHER,
        delegator,
        NEW_IMAGES,
        jnp.array(NEW_LABELS),
        KEY,
        gamma,
        jnp.float32(0.1),
        data,
    )


def head_gradient(state: Trained) -> dict[str, np.ndarray]:
    """The gradient of the first step with respect to the head."""
    (trace,) = (part.trace for part in state.optimiser if hasattr(part, "trace"))
    before = stage_two_state().network.params["head"]
    return jax.tree.map(lambda t, p: np.array(t - 5e-4 * p), trace["head"], before)


@pytest.mark.parametrize("data", [None, CROPPED])
def test_cil_with_a_delegator_learns_from_as_many_pseudo_images_under_the_teachers_labels(data):
    _, metrics = run_cil_step(TWO, DELEGATOR, data=data)
    images = both_kinds()
    if data:
        own = jax.random.fold_in(KEY, skd_steps.NO_EXAMPLE)
        pseudo = augment_normalised(data, own, jnp.arange(8), images[:8])
        assert jnp.max(jnp.abs(pseudo - images[:8])) > 0.1
        images = images.at[:8].set(pseudo)
    features, logits, (target, old_logits) = classify(stage_two_state().network, TEACHER, images)
    assert logits.shape == (16, OLD + NEW)
    labels = [*np.argmax(old_logits[:8], -1), *NEW_LABELS]
    classification, consolidation = numpy_cross_entropy(logits, labels), numpy_psi(target, features)
    assert consolidation > 0.01
    assert float(metrics["classification"]) == pytest.approx(classification, rel=1e-3)
    assert float(metrics["consolidation"]) == pytest.approx(consolidation, rel=1e-3)
    assert float(metrics["cil"]) == pytest.approx(0.3 * classification + consolidation, rel=1e-3)


@pytest.mark.parametrize("balanced", [0.0, 0.4, 1.0])
def test_cil_balanced_weighs_old_and_new_images_as_their_classes_or_in_part(balanced):
    _, metrics = run_cil_step(dataclasses.replace(TWO, balanced=balanced), DELEGATOR)
    images = both_kinds()
    _, logits, (_, old_logits) = classify(stage_two_state().network, TEACHER, images)
    of_pseudo = numpy_cross_entropy(logits[:8], np.argmax(old_logits[:8], -1))
    of_new = numpy_cross_entropy(logits[8:], NEW_LABELS)
    by_class = (OLD * of_pseudo + NEW * of_new) / (OLD + NEW)
    expected = (1 - balanced) * (of_pseudo + of_new) / 2 + balanced * by_class
    assert OLD != NEW
    assert float(metrics["classification"]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("choice", ["local", "local_old_head_fixed", "real", "real_old_head_fixed"])
def test_local_cil_adds_cross_entropies_among_new_classes_and_all(choice):
    two = dataclasses.replace(TWO, classification=choice, balanced=1.0)
    state, metrics = run_cil_step(two, DELEGATOR)
    before, after = stage_two_state().network.params, state.network.params
    images = both_kinds()
    _, logits, (_, old_logits) = classify(stage_two_state().network, TEACHER, images)
    of_pseudo = numpy_cross_entropy(logits[:8], np.argmax(old_logits[:8], -1))
    of_new = numpy_cross_entropy(logits[8:], NEW_LABELS)
    local = numpy_cross_entropy(logits[8:, OLD:], [label - OLD for label in NEW_LABELS])
    every = (OLD * of_pseudo + NEW * of_new) / (OLD + NEW)
    assert float(metrics["classification"]) == pytest.approx(0.5 * local + every, rel=1e-3)
    old_head = [part["head"]["kernel"][:, :OLD] for part in (before, after)]
    assert same_bits(*old_head) == choice.endswith("old_head_fixed")
    assert not same_anywhere(before["features"], after["features"])
    other, _ = run_cil_step(dataclasses.replace(two, balanced=0.0), DELEGATOR)
    head = other.network.params["head"]["kernel"][:, OLD:]
    assert not np.any(head == after["head"]["kernel"][:, OLD:])
    features = (x["features"] for x in (other.network.params, after))
    apart = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.max(np.abs(a - b)), *features)))
    assert (apart < 1e-6) == choice.startswith("local")  # what weighs for the head alone there
    # Without gamma nothing but consolidation is left, whose gradient the head does not have.
    of_local, of_all = (
        run_cil_step(config, DELEGATOR, jnp.float32(0))[0].network.params for config in (two, TWO)
    )
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-6), of_local["features"], of_all["features"]
    )


def test_features_learn_classes_from_real_images_alone_and_the_head_from_all():
    two = dataclasses.replace(TWO, classification="real", balanced=1.0, weight_decay=0.0)
    state, _ = run_cil_step(two, DELEGATOR)
    images, before = both_kinds(), stage_two_state().network
    _, _, (target, old_logits) = classify(before, TEACHER, images)
    labels = jnp.array([*np.argmax(old_logits[:8], -1), *NEW_LABELS])

    def cross_entropies(logits):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]

    def objective(params, of_pseudo):
        features, logits, _ = classify(Network(params, before.batch_stats), TEACHER, images)
        each = cross_entropies(logits)
        every = (OLD * of_pseudo * each[:8].mean() + NEW * each[8:].mean()) / (OLD + NEW)
        local = jax.nn.log_softmax(logits[8:, OLD:])[jnp.arange(8), labels[8:] - OLD]
        consolidation = feature_consolidation_loss(target, features)
        return GAMMA * (every - 0.5 * local.mean()) + consolidation

    without, with_pseudo = (jax.jit(jax.grad(objective))(before.params, w) for w in (0.0, 1.0))
    step = jax.tree.map(lambda a, b: (a - b) / 0.1, before.params, state.network.params)
    for part, expected in (("features", without), ("head", with_pseudo)):
        close = partial(np.testing.assert_allclose, rtol=2e-3, atol=2e-5)
        jax.tree.map(close, step[part], expected[part])
    assert not same_anywhere(without["features"], with_pseudo["features"])


@pytest.mark.parametrize("choice", ["all", "real_old_head_fixed"])
def test_a_head_at_full_rate_takes_its_step_divided_by_gamma_and_features_their_own(choice):
    two = dataclasses.replace(TWO, classification=choice)
    before = stage_two_state().network.params["head"]
    weighed, _ = run_cil_step(two, DELEGATOR)
    found, _ = run_cil_step(dataclasses.replace(two, head_at_full_rate=True), DELEGATOR)
    decay = TWO.weight_decay / float(GAMMA)
    of_one, _ = run_cil_step(
        dataclasses.replace(two, weight_decay=decay), DELEGATOR, jnp.float32(1)
    )
    head = found.network.params["head"]
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=1e-6), head, of_one.network.params["head"]
    )
    assert not same_bits(head, weighed.network.params["head"])
    assert same_bits(found.network.params["features"], weighed.network.params["features"])
    assert same_bits(head["kernel"][:, :OLD], before["kernel"][:, :OLD]) == (choice != "all")


@pytest.mark.parametrize("choice", ["local", "real_old_head_fixed"])
def test_local_cil_without_a_delegator_adds_the_same_of_new_images_alone(choice):
    _, metrics = run_cil_step(dataclasses.replace(TWO, classification=choice), None)
    _, logits, _ = classify(stage_two_state().network, TEACHER, NEW_IMAGES)
    local = numpy_cross_entropy(logits[:, OLD:], [label - OLD for label in NEW_LABELS])
    expected = 0.5 * local + numpy_cross_entropy(logits, NEW_LABELS)
    assert float(metrics["classification"]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("choice", ["all", "new", "old_head_fixed"])
def test_cil_without_a_delegator_learns_from_new_images_alone(choice):
    state, metrics = run_cil_step(dataclasses.replace(TWO, classification=choice), None)
    features, logits, (target, _) = classify(stage_two_state().network, TEACHER, NEW_IMAGES)
    if choice == "new":
        expected = numpy_cross_entropy(logits[:, OLD:], [label - OLD for label in NEW_LABELS])
    else:
        expected = numpy_cross_entropy(logits, NEW_LABELS)
    assert float(metrics["classification"]) == pytest.approx(expected, rel=1e-3)
    assert float(metrics["consolidation"]) == pytest.approx(numpy_psi(target, features), rel=1e-3)

    before, after = stage_two_state().network.params, state.network.params
    assert not same_anywhere(before["features"], after["features"])
    assert not np.any(before["head"]["kernel"][:, OLD:] == after["head"]["kernel"][:, OLD:])
    old_head = [part["head"]["kernel"][:, :OLD] for part in (before, after)]
    old_bias = [part["head"]["bias"][:OLD] for part in (before, after)]
    if choice == "old_head_fixed":
        assert same_bits(*old_head) and same_bits(*old_bias)
    elif choice == "new":  # weight decay alone
        np.testing.assert_allclose(old_head[1], old_head[0] * (1 - 0.1 * 5e-4), rtol=1e-6)
    else:
        assert np.abs(old_head[1] - old_head[0]).max() > 1e-3


def test_gamma_weighs_the_classification():
    states = [run_cil_step(TWO, DELEGATOR, jnp.float32(gamma))[0] for gamma in (0.3, 0.6, 0.0)]
    single, double, none = (head_gradient(state) for state in states)
    for name in ("kernel", "bias"):
        assert np.abs(single[name]).max() > 1e-2
        np.testing.assert_allclose(double[name], 2 * single[name], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(none[name], np.zeros_like(none[name]), atol=1e-6)


def run_cil(state: Trained, teacher: Network, number=0, rate=0.1, gamma=0.3, key=KEY, first=0):
    labels = OLD + np.arange(20)[None, first : first + 8] % NEW
    rates = {"gamma": jnp.array([gamma], jnp.float32), "rate": jnp.array([rate], jnp.float32)}
    return advance(
        stage_two(setting(), 1),
        state,
        KeptDelegator(teacher, DELEGATOR),
        batches(POOL[None, first : first + 8], labels),
        key,
        jnp.array([number]),
        rates,
    )


def test_cil_compiles_once_a_head_size_and_leaves_teacher_and_delegator_to_the_bit():
    state, first = run_cil(stage_two_state(), TEACHER)
    before = steps.advance.jitted._cache_size()
    assert all(values.shape == (1,) for values in first.values())
    state, second = run_cil(
        state, TEACHER, number=7, rate=0.01, gamma=0.9, key=jax.random.key(2), first=4
    )
    assert float(first["cil"][0]) != float(second["cil"][0])
    assert steps.advance.jitted._cache_size() == before

    run_cil(stage_two_state(new=3), TEACHER)
    assert steps.advance.jitted._cache_size() == before + 1

    kept = jax.tree.leaves((TEACHER, DELEGATOR))
    assert not any(leaf.is_deleted() for leaf in kept)
    assert same_bits((TEACHER, DELEGATOR), (TEACHER_BITS, DELEGATOR_BITS))


def test_a_cil_steps_pseudo_images_follow_from_key_and_step_number():
    totals = {}
    for name, number, key in (
        ("a", 0, KEY),
        ("b", 0, KEY),
        ("c", 1, KEY),
        ("d", 0, jax.random.key(1)),
    ):
        _, metrics = run_cil(stage_two_state(), TEACHER, number=number, key=key)
        totals[name] = float(metrics["cil"][0])
    assert totals["a"] == totals["b"]
    assert len(set(totals.values())) == 3


# Evaluation


def test_predict_is_the_greatest_logit_in_eval_mode():
    (found,) = predict(POOL[None])
    images = jnp.float32((POOL / np.float32(255) - 0.5) / 0.5)
    _, logits = jax.jit(lambda t, x: Classifier(FEATURES, OLD).apply(t.variables(), x, False))(
        TEACHER, images
    )
    assert found.dtype == jnp.int32
    assert same_bits(found, np.argmax(logits, -1))
    assert len(set(found.tolist())) > 1


def test_pseudo_images_are_the_eval_mode_delegators():
    images = skd_steps.pseudo_images(NETS, DELEGATOR, KEY, 5)
    expected = jax.jit(lambda d, z: NETS.delegator.apply(d.variables(), z, False))(
        DELEGATOR, skd_steps.latent(KEY, jnp.arange(5), 6)
    )
    np.testing.assert_allclose(images, expected, atol=1e-5)
