"""ABD and R-DFCIL: hand-worked numbers, each step against NumPy and on shards, whole runs."""

import dataclasses
import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guarded import no_old_images
from test_losses import numpy_softmax
from test_methods import GENERATORS, tiny
from test_models import same_bits
from test_train import at_row, bits, rows, silent

from configs import caltech101, cifar100, digits, flowers102, imagenet_subset
from experiments import quality
from skd_jax import losses, steps, train
from skd_jax.errors import UserError
from skd_jax.experiment import planned
from skd_jax.methods import METHODS, abd, from_config_dict, inversion, rdfcil
from skd_jax.methods.phase import setting_of
from skd_jax.methods.phases import features
from skd_jax.methods.skd.phases import delegator_module
from skd_jax.methods.skd.steps import draw
from skd_jax.state import Batch

OLD, NEW = 4, 3
KEY = jax.random.key(1)


def array(*values) -> jax.Array:
    return jnp.array(values, jnp.float32)


# Hand-worked numbers


@pytest.mark.parametrize(
    ("shares", "expected"),
    [((0.5, 0.25, 0.25), 0.053605), ((1 / 3, 1 / 3, 1 / 3), 0), ((1, 0, 0), 1), ((1,), 0)],
)
def test_class_balance_by_hand(shares, expected):
    found, gradient = jax.jit(jax.value_and_grad(inversion.class_balance_loss))(array(shares))
    assert found == pytest.approx(expected, abs=1e-6)
    assert np.isfinite(gradient).all()


def test_statistics_are_the_divergence_of_the_batch_from_the_running_moments():
    distance = jax.jit(partial(losses.feature_statistics_loss, distance="kl_of_running"))
    running, batch = [(array(0), array(1))], [(array(1), array(2))]
    assert distance(batch, running) == pytest.approx(0.346574, abs=1e-5)
    assert distance(running, batch) == pytest.approx(0.653426, abs=1e-5)
    assert distance(batch, batch) == 0


def test_the_blur_is_wider_than_its_name_and_leaves_a_constant_image():
    smoothness = jax.jit(losses.smoothness_loss)
    assert smoothness(jnp.ones((1, 8, 8, 1))) == pytest.approx(0, abs=1e-12)
    dot = jnp.zeros((1, 9, 9, 1)).at[0, 4, 4, 0].set(1.0)
    taps = np.exp(-(np.arange(-2, 3) ** 2) / 4)
    kernel = np.outer(taps, taps) / taps.sum() ** 2
    assert kernel[2, 2] == pytest.approx(0.0922, abs=1e-4)
    kernel[2, 2] -= 1
    assert smoothness(dot) == pytest.approx(np.sum(kernel**2) / 81, rel=1e-5)


def test_the_published_generator_has_as_many_parameters():
    for name in GENERATORS:
        config = from_config_dict(cifar100.get_config(f"method={name}"))
        module = delegator_module(config)
        z = jax.ShapeDtypeStruct((1, 1000), jnp.float32)
        shapes = jax.eval_shape(lambda z, m=module: m.init(KEY, z, False), z)
        assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == 8_423_939
        defaults = METHODS[name].settings(*(160, 128, 0.1, (80, 120), 0.9, 5e-4))
        assert config.method == defaults  # published values, but for the benchmark's schedule


@pytest.mark.parametrize("scale", ["full", "mini"])
@pytest.mark.parametrize("name", GENERATORS)
def test_every_benchmark_has_both(name, scale):
    for benchmark in (caltech101, cifar100, digits, flowers102, imagenet_subset):
        config = from_config_dict(benchmark.get_config(f"method={name},scale={scale}")).method
        skd = from_config_dict(benchmark.get_config(f"scale={scale}")).method
        rounds = skd.stage_one.epochs * skd.stage_one.rounds_per_epoch
        assert config.inversion.steps == (rounds if name == "abd" else rounds // 2)
        assert config.delegator == dataclasses.replace(skd.delegator, z_dim=1000)
        assert config.epochs == skd.stage_two.epochs
        assert config.lr == skd.stage_two.lr


def test_abds_class_weights_and_distillation_by_hand():
    weights = jax.jit(abd.class_weights, static_argnums=(0, 1))(50, 60)
    np.testing.assert_allclose(weights, [5 / 6] * 50 + [1 / 6] * 10, rtol=1e-6)
    assert weights[0] == pytest.approx(0.8333, abs=1e-4)
    head = array([1, 0, 0], [0, 2, 0]).T  # the rows (1, 0) and (0, 2), and a feature neither sees

    @jax.jit
    def distilled(drift):
        old = array([0.5, -1, 2])
        return abd.distillation_loss(old @ head, (old + drift) @ head)

    assert distilled(array([0.3, 0.1, 0])) == pytest.approx(0.065, rel=1e-5)
    assert distilled(array([0, 0, 9])) == 0  # orthogonal to all old rows
    assert distilled(array([0, 0, 0])) == 0


def test_abds_head_loss_weighs_each_example_as_its_class():
    logits, labels = array([0, 0, 0], [1, 2, 0]), jax.nn.one_hot(jnp.array([0, 2]), 3)
    found = jax.jit(abd.head_loss)(logits, labels, array(2 / 3, 2 / 3, 1 / 3)[0:3])
    second = np.log(np.exp([1.0, 2.0, 0.0]).sum())
    assert found == pytest.approx((2 / 3 * np.log(3) + 1 / 3 * second) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (50, 10, (0.310110, 0.867023, 2.890076)),
        (90, 10, (0.231142, 1.163233, 3.877444)),
        (50, 5, (0.245597, 0.857304, 2.857679)),
        (50, 2, (0.2, 0.75, 2.5)),
    ],
)
def test_rdfcils_weights_are_those_of_the_table(old, new, expected):
    found = rdfcil.loss_weights(rdfcil.Settings(1, 1, 0.1, (), 0.9, 0.0), old, new)
    assert tuple(found.values()) == pytest.approx(expected, abs=1e-6)
    assert list(found) == ["local", "hard", "relation"]


def test_hard_distillation_by_hand():
    found = jax.jit(rdfcil.hard_distillation_loss)(array([1, 2, 3]), array([1.5, 2, 1]))
    assert found == pytest.approx(0.833333, abs=1e-6)


def test_relations_by_hand():
    loss = jax.jit(rdfcil.relation_loss)
    one, other = array([0, 0], [1, 0], [0, 1]), array([0, 0], [1, 0], [1, 1])
    corners = [(0, 1, 2), (1, 0, 2), (2, 0, 1)]
    for points, expected in ((one, (0, 0.707107, 0.707107)), (other, (0.707107, 0, 0.707107))):
        found = jax.jit(rdfcil.relations)(points)
        np.testing.assert_allclose([found[c] for c in corners], expected, atol=1e-6)
        np.testing.assert_array_equal(found, np.swapaxes(found, 1, 2))
    assert loss(one, other) == pytest.approx(0.104757, abs=1e-6)
    assert loss(one, 3 * other + array([5, -2])) == pytest.approx(0.104757, abs=1e-5)
    assert loss(one, 3 * one + array([5, -2])) == pytest.approx(0, abs=1e-6)
    same = array([0, 0], [0, 0], [1, 2], [3, 1])  # equal points have no direction
    three = array([0, 0], [1, 0], [0, 1], [2, 2])
    value, gradient = jax.jit(jax.value_and_grad(rdfcil.relation_loss, argnums=1))(three, same)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    assert np.any(gradient)


def test_inverse_frequencies():
    found = jax.jit(rdfcil.class_weights)(array(8, 2, 0, 4)[0:4])
    np.testing.assert_allclose(found, [1, 4, 8, 2])


# Steps


@cache
def stage(name: str):
    """(setting, what is kept before the generator, the phases of task 1) of random networks."""
    config = tiny(name, method__weight_decay=0.0)
    setting = setting_of(config, (OLD, NEW), (640, 640))
    base, *phases = planned(setting)
    network = base.init(None).network
    stats = jax.tree.map(lambda x: x + 0.1, network.batch_stats)
    kept = METHODS[name].kept(dataclasses.replace(network, batch_stats=stats))
    return setting, kept, phases


@cache
def begun(name: str, index: int):
    """(phase, its state, what is kept before it), after a step of learning, if it comes later."""
    _, kept, phases = stage(name)
    for number, phase in enumerate(phases[:index]):
        state = on_one(name, number)[0] if number else phase.init(kept)
        kept = phase.finish(state, kept, None)
    return phases[index], phases[index].init(kept), kept


IMAGES = jax.random.normal(jax.random.key(5), (16, 8, 8, 1))
BATCH = Batch(IMAGES, jnp.arange(16) % NEW + OLD, jnp.ones(16, bool))


def stepped(name: str, index: int, shards: int = 0):
    """(new state, metrics) of a phase's first step, of one device or of each shard."""
    setting = stage(name)[0]
    phase, state, kept = begun(name, index)
    batch = BATCH if phase.reads == "shuffled" else None
    rates = jax.tree.map(lambda x: jnp.asarray(x[0]), phase.rates(np.arange(1)))
    if not shards:
        step = partial(phase.step, phase.static, setting.nets)
        return jax.jit(step)(state, kept, batch, KEY, rates)
    step = partial(phase.step, phase.static, setting.nets.over("shards"))
    split = jax.tree.map(lambda x: x.reshape(shards, -1, *x.shape[1:]), batch)
    axes = (None, None, None if batch is None else 0, None, None)
    mapped = jax.vmap(step, in_axes=axes, axis_name="shards", axis_size=shards)
    return jax.jit(mapped)(state, kept, split, KEY, rates)


on_one = cache(stepped)
STEPS = [("abd", 0), ("abd", 1), ("rdfcil", 1), ("rdfcil", 2)]


@pytest.mark.parametrize(("name", "index"), STEPS)
def test_a_step_on_shards_is_the_step_on_one_device(name, index):
    expected, metrics = on_one(name, index)
    found, of_shards = stepped(name, index, shards=2)
    assert not metrics["skipped"]
    for key, value in metrics.items():
        for shard in of_shards[key]:
            np.testing.assert_allclose(shard, value, rtol=1e-4, atol=1e-5, err_msg=key)
    if index == 0:  # Adam turns a gradient that is only rounding into a whole step
        found, expected = found.optimiser.mu, expected.optimiser.mu
    for several, one in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        for shard in several:
            np.testing.assert_allclose(shard, one, rtol=1e-3, atol=2e-5)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return -np.log(numpy_softmax(logits)[np.arange(len(labels)), labels])


def double(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def forward(name: str):
    """What T_n and T_{n+1} make of the 16 images and of as many of D, and all labels."""
    setting = stage(name)[0]
    phase, state, kept = begun(name, 1)
    nets, trained = setting.nets, getattr(state, "classifier", state)
    both = inversion.with_delegator(nets, phase.static.delegator)
    images = jnp.concatenate([IMAGES, draw(both, kept.delegator, KEY, 16)])
    teacher = nets.classifier(kept.classifier.params)
    old = steps.eval_mode(teacher, kept.classifier, images)
    network = trained.network
    classifier = nets.classifier(network.params)
    new, *_ = steps.train_mode(classifier, network.params, network.batch_stats, images)
    labels = np.concatenate([BATCH.labels, np.argmax(old[1][16:], axis=-1)])
    return [double(x) for x in (*old, *new)], labels, trained, images


def test_an_abd_step_has_the_loss_worked_out_in_numpy():
    (f_old, _, f, z), labels, trained, images = forward("abd")
    metrics = on_one("abd", 1)[1]
    kept = begun("abd", 1)[2]
    local = 3 / 7 * np.mean(cross_entropy(z[:16, OLD:], labels[:16] - OLD))
    weights = np.where(labels < OLD, 4 / 7, 3 / 7)
    head = np.mean(weights * cross_entropy(z, labels))
    drift = (f - f_old) @ double(kept.classifier.params["head"]["kernel"])
    distillation = np.mean(np.sum(drift**2, axis=1) / OLD)
    assert metrics["local"] == pytest.approx(local, rel=1e-4)
    assert metrics["head"] == pytest.approx(head, rel=1e-4)
    assert metrics["distillation"] == pytest.approx(distillation, rel=1e-3)
    assert metrics["loss"] == pytest.approx(local + head + 0.1 * distillation, rel=1e-4)

    # The head's own loss moves the head and nothing else. At step 0 the trace is the gradient.
    nets = stage("abd")[0].nets
    network, classifier = trained.network, nets.classifier(trained.network.params)

    def without_the_head(params):
        (found, logits), *_ = steps.train_mode(classifier, params, network.batch_stats, images)
        old = steps.head(nets, kept.classifier, jnp.float32(f_old))
        new = jnp.arange(OLD + NEW) >= OLD
        loss = abd.local_loss(logits[:16], jax.nn.one_hot(labels[:16], 7), new, 3 / 7)
        return loss + 0.1 * abd.distillation_loss(old, steps.head(nets, kept.classifier, found))

    gradient = jax.jit(jax.grad(without_the_head))(network.params)
    (trace,) = (p.trace for p in on_one("abd", 1)[0].optimiser if hasattr(p, "trace"))
    for one, other in zip(
        jax.tree.leaves(trace["features"]), jax.tree.leaves(gradient["features"]), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
    error = weights[:, None] * (numpy_softmax(z) - np.eye(7)[labels]) / 32
    of_bias = trace["head"]["bias"] - gradient["head"]["bias"]
    np.testing.assert_allclose(of_bias, error.sum(axis=0), atol=1e-5)


def test_an_rdfcil_step_has_the_loss_worked_out_in_numpy():
    (f_old, z_old, f, z), labels, *_ = forward("rdfcil")
    state, metrics = on_one("rdfcil", 1)
    maps = begun("rdfcil", 1)[1].maps.network.params

    def angles(points):
        direction = points[None] - points[:, None]
        length = np.linalg.norm(direction, axis=-1, keepdims=True)
        direction = np.divide(direction, length, where=length > 0, out=np.zeros_like(direction))
        return np.einsum("ijd,ikd->ijk", direction, direction)

    ours, theirs = f[:16] @ double(maps["student"]), f_old[:16] @ double(maps["teacher"])
    assert ours.shape == (16, 2 * f.shape[1])
    expected = {
        "local": np.mean(cross_entropy(z[:16, OLD:], labels[:16] - OLD)),
        "hard": np.mean(np.abs(z[16:, :OLD] - z_old[16:])),
        "relation": np.mean(np.abs(angles(ours) - angles(theirs))),
    }
    weights = rdfcil.loss_weights(stage("rdfcil")[0].config.method, OLD, NEW)
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=1e-3), key
    total = sum(weights[key] * value for key, value in expected.items())
    assert metrics["loss"] == pytest.approx(total, rel=1e-3)
    np.testing.assert_array_equal(state.counts, np.bincount(labels, minlength=7))
    for name in ("student", "teacher"):
        assert np.any(state.maps.network.params[name] != maps[name])


def test_the_heads_phase_learns_the_head_alone_and_rare_classes_weigh_more():
    setting = stage("rdfcil")[0]
    phase, state, kept = begun("rdfcil", 2)
    new, metrics = on_one("rdfcil", 2)
    both = inversion.with_delegator(setting.nets, phase.static.delegator)
    images = jnp.concatenate([IMAGES, draw(both, kept.delegator, KEY, 16)])
    teacher = setting.nets.classifier(kept.teacher.params)
    z_old = double(steps.eval_mode(teacher, kept.teacher, images)[1])
    head = kept.classifier.params["head"]
    z = double(features(setting.nets, kept.classifier, images)) @ double(head["kernel"])
    z += double(head["bias"])
    labels = np.concatenate([BATCH.labels, z_old[16:].argmax(axis=1)])
    counts = np.bincount(labels, minlength=7)
    np.testing.assert_array_equal(new.counts, kept.counts + counts)
    weights = (1 / np.maximum(new.counts, 1))[labels]
    loss = np.sum(weights * cross_entropy(z, labels)) / np.sum(weights)
    hard = np.mean(np.abs(z[16:, :OLD] - z_old[16:]))
    assert metrics["head"] == pytest.approx(loss, rel=1e-4)
    assert metrics["hard"] == pytest.approx(hard, rel=1e-3)
    weight = rdfcil.loss_weights(setting.config.method, OLD, NEW)["hard"]
    assert metrics["loss"] == pytest.approx(0.5 * loss + weight * hard, rel=1e-3)
    assert np.any(new.head.network.params["kernel"] != state.head.network.params["kernel"])
    end = phase.finish(new, kept, None)
    assert same_bits(end.classifier.params["features"], kept.classifier.params["features"])
    assert same_bits(end.classifier.params["head"], new.head.network.params)
    assert jax.tree.leaves(dataclasses.replace(end, classifier=None)) == []


def test_a_generators_step_has_its_terms_and_changes_the_generator_alone():
    phase, state, kept = begun("abd", 0)
    new, metrics = on_one("abd", 0)
    names = ("category", "balance", "statistics", "smoothness")
    weights = dict(zip(names, (1, 1, 50, 1e-3), strict=True))
    assert {k: float(v[0]) for k, v in phase.rates(np.arange(2))["weights"].items()} == (
        pytest.approx(weights)
    )
    total = sum(weights[name] * metrics[name] for name in names)
    assert metrics["inversion"] == pytest.approx(float(total), rel=1e-5)
    assert metrics["label_shares"].shape == (OLD,)
    generator, z = phase.static.delegator, jnp.zeros((1, phase.static.delegator.z_dim))
    assert generator.apply(state.network.variables(), z, False).shape == (1, 8, 8, 1)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    # Logits are divided by 1,000, so that no class can be sure.
    assert metrics["category"] == pytest.approx(np.log(OLD), rel=1e-2)
    assert phase.finish(new, kept, None).classifier is kept.classifier
    # A generator of a later task begins anew, whatever is kept.
    later = dataclasses.replace(kept, delegator=new.network)
    assert same_bits(phase.init(later), state)


# Whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datafree")
    for name in GENERATORS:
        images = 20 if name == "abd" else 0
        config = tiny(name, data__tasks=1, run__quality_images=images)
        with no_old_images():
            train.train(config, folder / name, silent)
    return folder


@pytest.mark.parametrize("name", GENERATORS)
def test_a_run_keeps_nothing_and_shows_what_its_generator_draws(finished, name):
    found = json.loads((finished / name / "summary.json").read_text())
    assert found["method"] == name
    assert found["kept_bytes"] == 0
    assert len(found["top1_seen"]) == 2
    (row,) = found["generator"]
    assert row["teacher_accuracy"] == found["top1_seen"][0]
    assert row["student_accuracy"] is None
    assert sum(row["label_shares"]) == pytest.approx(1, abs=1e-5)
    assert (finished / name / "pseudo_images_0.png").exists()
    names = [row["phase"] for row in rows(finished / name)]
    expected = ["base", "generator", "learn", *(["head"] if name == "rdfcil" else [])]
    assert list(dict.fromkeys(names)) == expected


def test_a_generator_has_a_page_of_its_quality(finished, tmp_path):
    quality.show(finished / "abd", tmp_path)
    text = (tmp_path / "quality.html").read_text()
    assert "classes drawn" in text
    assert "smoothness" in quality.terms(finished / "abd", 0)


@pytest.mark.parametrize(("name", "phase"), [("abd", "generator"), ("rdfcil", "head")])
def test_an_interrupted_run_ends_with_the_same_bits(finished, name, phase, tmp_path):
    steps = [row["global_step"] for row in rows(finished / name) if row["phase"] == phase]
    config = tiny(name, data__tasks=1)
    with at_row(steps[0]):
        train.train(config, tmp_path / "run", silent)
    train.train(config, tmp_path / "run", silent)
    assert rows(tmp_path / "run", ("time",)) == rows(finished / name, ("time",))
    assert bits(train.restore(tmp_path / "run")[1]) == bits(train.restore(finished / name)[1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inversion__steps", 0),
        ("inversion__temperature", 0.0),
        ("inversion__statistics", -1.0),
        ("delegator__widths", (4,)),
        ("epochs", 0),
    ],
)
@pytest.mark.parametrize("name", GENERATORS)
def test_what_cannot_be_used_is_named(name, field, value):
    with pytest.raises(UserError, match=r"config\.method\." + field.replace("__", r"\.")):
        tiny(name, **{f"method__{field}": value})
