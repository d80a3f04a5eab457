"""The other methods: hand-checked numbers, whole runs on digits, and what none of them may see."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from guarded import no_old_images
from ml_collections import ConfigDict
from test_train import TINY, at_row, bits, rows, silent

from configs import digits, recipes
from skd_jax import evaluate, model, steps, train
from skd_jax.config import Config
from skd_jax.data import prepare
from skd_jax.errors import UserError
from skd_jax.experiment import open_experiment, planned
from skd_jax.methods import METHODS, from_config_dict, method_of, ridge
from skd_jax.methods.class_means import nearness
from skd_jax.methods.distillation import distillation_loss
from skd_jax.methods.phase import PICTURES, Family, Phase, Setting, setting_of
from skd_jax.methods.phases import features
from skd_jax.state import Batch

LEARNING = ("finetune", "joint", "lwf")
FROZEN = ("ncm", "ridge")
GENERATORS = ("abd", "rdfcil")  # their runs are in test_datafree.py


def tiny(method: str, **changes) -> Config:
    config = digits.get_config(f"tasks=2,method={method}")
    shared = {name: x for name, x in TINY.items() if not name.startswith("method.")}
    if method in (*LEARNING, *GENERATORS):
        shared |= {"method.epochs": 2, "method.batch": 64, "method.drop_epochs": (1,)}
    if method in GENERATORS:
        shared |= {"method.delegator.widths": (8, 8, 4), "method.delegator.z_dim": 8}
        shared |= {"method.inversion.steps": 4, "method.inversion.batch": 16}
    if method == "rdfcil":
        shared |= {"method.head_epochs": 1}
    config.update_from_flattened_dict(
        {**shared, **{name.replace("__", "."): value for name, value in changes.items()}}
    )
    return from_config_dict(config)


METHODS_AND_RECIPES = (*METHODS, *recipes.OF_STAGE_TWO)  # these recipes have phases of their own


def on_digits(name: str) -> ConfigDict:
    """The configuration of one of them."""
    if name in METHODS:
        return digits.get_config(f"method={name}")
    return recipes.get_config(f"recipe={name},dataset=digits")


def untraced(setting: Setting, traced: set, *more) -> Iterator[tuple[Phase, Any, Any]]:
    """A run's phases with the shapes of their states and of what is kept, for a test of each step.

    All methods begin with the same training of T_0, and several with SKD's of D_0: what a step's
    trace depends on (with ``more``) is in ``traced`` once the test has gone on to the next, and is
    not given again.
    """
    kept = method_of(setting.config).kept()
    for phase in planned(setting):
        state = jax.eval_shape(phase.init, kept)
        rates = jax.eval_shape(lambda p=phase: jax.tree.map(jnp.asarray, p.rates(np.arange(1))))
        of = phase.step, phase.static, phase.reads, phase.draws, phase.batch, rates
        leaves, structure = jax.tree.flatten(
            (of, setting.nets, setting.config.data, state, kept, more)
        )
        if (structure, *leaves) not in traced:
            yield phase, state, kept
            traced.add((structure, *leaves))
        kept = jax.eval_shape(lambda s, k, p=phase: p.finish(s, k, shapes), state, kept)


# Hand-checked numbers


def test_distillation_is_of_softened_outputs_without_the_square_of_the_temperature():
    teacher, student = jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 1.0]])
    assert distillation_loss(teacher, student, 2.0) == pytest.approx(0.693147, abs=1e-6)
    entropy = distillation_loss(teacher, teacher, 2.0)
    assert 0.693147 - entropy == pytest.approx(0.110944, abs=1e-6)  # the divergence
    gradient = jax.grad(lambda s: distillation_loss(teacher, s, 2.0))(teacher)
    np.testing.assert_allclose(gradient, 0, atol=1e-7)


def test_a_ridge_head_is_the_one_worked_out_by_hand_in_either_order():
    features = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    labels = jnp.array([0, 0, 1, 1])
    whole = ridge.statistics(features, labels, 2)
    weights = ridge.solve(whole, 1.0)
    np.testing.assert_allclose(weights, np.array([[6, 1], [-2, 7]]) / 11, rtol=1e-6)
    np.testing.assert_allclose(jnp.ones((1, 2)) @ weights, [[4 / 11, 8 / 11]], rtol=1e-6)
    parts = [ridge.statistics(features[s], labels[s], 2) for s in (slice(0, 2), slice(2, 4))]
    for one, other in (parts, parts[::-1]):
        added = jax.tree.map(jnp.add, one, other)
        np.testing.assert_allclose(ridge.solve(added, 1.0), weights, rtol=1e-6)


def test_nearest_means_by_distance_and_by_cosine():
    means = jnp.array([[2.0, 3.0], [0.5, 0.0]])
    query = jnp.array([[0.2, 0.3]])
    np.testing.assert_allclose(nearness(query, means, "cosine"), [[1.0, 0.5547]], rtol=1e-4)
    np.testing.assert_allclose(nearness(query, means, "distance"), [[-10.53, -0.18]], rtol=1e-5)


# Whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of each method; where old images are not its own, on a source that raises."""
    folder = tmp_path_factory.mktemp("methods")
    for name in (*LEARNING, *FROZEN):
        with nullcontext() if METHODS[name].reads_old_images else no_old_images():
            train.train(tiny(name), folder / name, silent)
    return folder


def summary(folder, name: str) -> dict:
    return json.loads((folder / name / "summary.json").read_text())


@pytest.mark.parametrize("name", [*LEARNING, *FROZEN])
def test_a_run_has_a_row_a_task_and_says_what_it_keeps(finished, name):
    found = summary(finished, name)
    assert found["method"] == name
    assert len(found["top1_seen"]) == 3
    assert [sum(x is not None for x in row) for row in found["accuracy_matrix"]] == [1, 2, 3]
    features, classes = 16, 10  # of a ResNet-8 of width 4
    size = {"ncm": classes * features, "ridge": 17 * 17 + 17 * classes}.get(name, 0)
    images = sum(train.open_experiment(tiny(name)).stream.counts()) if name == "joint" else 0
    assert found["kept_bytes"] == 4 * size + 8 * 8 * images


@pytest.mark.parametrize("name", [*LEARNING, *FROZEN])
def test_an_interrupted_run_ends_with_the_same_bits(finished, name, tmp_path):
    steps = [row["global_step"] for row in rows(finished / name)]
    with at_row(steps[len(steps) // 2 + 1]):
        train.train(tiny(name), tmp_path / "run", silent)
    train.train(tiny(name), tmp_path / "run", silent)
    assert rows(tmp_path / "run", ("time",)) == rows(finished / name, ("time",))
    assert bits(train.restore(tmp_path / "run")[1]) == bits(train.restore(finished / name)[1])


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """T_0 alone."""
    workdir = tmp_path_factory.mktemp("first") / "run"
    train.train(tiny("lwf", run__phases=1), workdir, silent)
    return workdir


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_features_keep_t_0_to_the_bit(finished, first, name):
    t_0, end, learned = (
        train.restore(path)[1].classifier for path in (first, finished / name, finished / "lwf")
    )
    assert bits(end) == bits(t_0)
    assert bits(learned.params["features"]) != bits(t_0.params["features"])


def test_means_are_those_of_all_training_images(finished):
    config, kept = train.restore(finished / "ncm")
    experiment = train.open_experiment(config)
    images, labels = [], []
    for task in range(3):
        opened = experiment.stream.open(task)
        images.append(np.asarray(opened.take(np.arange(opened.n))))
        labels.append(opened.labels)
    nets = experiment.setting.nets
    found = features(nets, kept.classifier, prepare(config.data, jnp.concatenate(images)))
    labels = np.concatenate(labels)
    means = [np.asarray(found, np.float64)[labels == k].mean(axis=0) for k in range(10)]
    np.testing.assert_allclose(kept.means, means, rtol=1e-4, atol=1e-5)


def test_fine_tuning_over_new_outputs_leaves_the_old_rows_to_the_bit(tmp_path):
    config = tiny("finetune", method__outputs="new", method__weight_decay=0.0, run__phases=2)
    train.train(config, tmp_path / "one", silent)
    train.train(
        tiny("finetune", method__outputs="new", method__weight_decay=0.0, run__phases=1),
        tmp_path / "base",
        silent,
    )
    old = train.restore(tmp_path / "base")[1].classifier.params["head"]
    new = train.restore(tmp_path / "one")[1].classifier.params["head"]
    assert bits(new["kernel"][:, :4]) == bits(old["kernel"])
    assert bits(new["bias"][:4]) == bits(old["bias"])


@pytest.mark.parametrize("name", ["finetune", "lwf", "ewc", "mas", "si", "sdc"])
def test_a_task_of_one_class_is_warned_of_where_only_new_outputs_are_learned(name, capsys):
    outputs = {"method__outputs": "new"} if name == "finetune" else {}
    open_experiment(tiny(name, data__tasks=6, **outputs))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: task 1 has one new class, and {name} tells new classes")
    assert ("config.method.outputs='all'" in line) == (name in ("finetune", "lwf"))
    if name in ("finetune", "lwf"):
        open_experiment(tiny(name, data__tasks=6, method__outputs="all"))
    open_experiment(tiny(name, **outputs))
    assert not capsys.readouterr().err


def test_a_method_may_begin_from_another_methods_t_0(finished, first, tmp_path):
    config = tiny("ridge", run__start_from=str(first))
    found = train.train(config, tmp_path / "run", silent)
    assert found["accuracy_matrix"] == summary(finished, "ridge")["accuracy_matrix"]


@pytest.mark.parametrize(
    ("name", "outputs"), [("finetune", "all"), ("finetune", "new"), ("lwf", "new"), ("lwf", "all")]
)
def test_a_step_has_the_loss_worked_out_in_numpy(first, name, outputs):
    """And moves the head's bias by it: its gradient is the mean of the outputs' errors."""
    config = tiny(name, method__outputs=outputs, method__weight_decay=0.0)
    _, kept = train.restore(first)
    setting = setting_of(config, (4, 3), (640, 640))
    *_, phase = planned(setting)
    state = phase.init(kept)
    images = jax.random.normal(jax.random.key(5), (16, 8, 8, 1))
    labels = jnp.arange(16) % 3 + 4
    batch = Batch(images, labels, jnp.ones(16, bool))
    nets = setting.nets
    teacher = steps.eval_mode(nets.classifier(kept.classifier.params), kept.classifier, images)[1]
    network = state.network
    (_, z), *_ = steps.train_mode(
        nets.classifier(network.params), network.params, network.batch_stats, images
    )
    teacher, z = np.asarray(teacher, np.float64), np.asarray(z, np.float64)
    new, metrics = phase.step(phase.static, nets, state, kept, batch, None, jnp.float32(0.1))

    def softmax(x):
        e = np.exp(x - x.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    first_output = 4 if outputs == "new" else 0
    p, one_hot = softmax(z[:, first_output:]), np.eye(7)[np.asarray(labels)][:, first_output:]
    loss = -np.mean(np.log((p * one_hot).sum(axis=1)))
    error = np.zeros((16, 7))
    error[:, first_output:] = p - one_hot
    assert metrics["classification"] == pytest.approx(loss, rel=1e-4)
    if name == "lwf":
        target, soft = softmax(teacher / 2), softmax(z[:, :4] / 2)
        penalty = 3 * -np.mean(np.sum(target * np.log(soft), axis=1))
        assert metrics["penalty"] == pytest.approx(penalty, rel=1e-4)
        assert metrics["loss"] == pytest.approx(loss + penalty, rel=1e-4)
        error[:, :4] += 3 * (soft - target) / 2
    head, before = (x.network.params["head"]["kernel"][:, :4] for x in (new, state))
    assert (bits(head) == bits(before)) == ((name, outputs) == ("finetune", "new"))
    moved = np.asarray(new.network.params["head"]["bias"] - network.params["head"]["bias"])
    np.testing.assert_allclose(moved, -0.1 * error.mean(axis=0), atol=2e-5)


def test_joint_training_is_the_bases_step_for_step():
    """Of all classes, where T_0's training has all of them and the same settings."""
    config = tiny("joint")
    shared = {n: getattr(config.base, n) for n in vars(config.base)}
    config = dataclasses.replace(config, method=dataclasses.replace(config.method, **shared))
    *_, joint = planned(setting_of(config, (4, 3), (400, 240)))
    base, *_ = planned(setting_of(config, (7,), (640,)))
    assert (joint.steps, joint.batch, joint.reads) == (base.steps, base.batch, base.reads)
    numbers = np.arange(base.steps)
    np.testing.assert_array_equal(joint.rates(numbers), base.rates(numbers))
    shapes_ = [jax.eval_shape(phase.init, None) for phase in (joint, base)]
    assert shapes_[0] == shapes_[1]
    random, states = np.random.default_rng(0), [base.init(None)] * 2
    nets = steps.networks(config.model)
    stepped = jax.jit(base.step, static_argnums=(0, 1))
    assert joint.step is base.step
    for rate in base.rates(numbers)[[0, -1]]:
        images = jnp.float32(random.normal(size=(16, 8, 8, 1)))
        batch = Batch(images, jnp.arange(16) % 7, jnp.ones(16, bool))
        states = [
            stepped(phase.static, nets, state, None, batch, None, rate)[0]
            for phase, state in zip((joint, base), states, strict=True)
        ]
    assert bits(states[0]) == bits(states[1]) != bits(base.init(None))


def test_joint_training_alone_is_given_old_images():
    assert [name for name, m in METHODS.items() if m.reads_old_images] == ["joint"]
    for name in METHODS:
        config = from_config_dict(digits.get_config(f"tasks=2,method={name}"))
        stream = train.open_experiment(config).stream
        stream.open(0)
        first = stream.open(1).labels.min()
        assert first == (0 if name == "joint" else 4)
        assert stream.available(1) == len(stream.open(1).labels)


def test_a_saved_model_classifies_without_any_data_set(finished, tmp_path):
    whole = train.model_of(finished / "ncm")
    config, kept, names = whole.config, whole.kept, whole.class_names
    assert list(names) == [n for task in summary(finished, "ncm")["class_names"] for n in task]
    whole.save(tmp_path / "model.npz")
    gone = dataclasses.replace(config.data, name="gone", data_dir="/nowhere")
    loaded = model.load(tmp_path / "model.npz")
    assert bits(loaded.kept) == bits(kept)
    loaded = dataclasses.replace(loaded, config=dataclasses.replace(config, data=gone))
    experiment = train.open_experiment(config)
    images, _ = experiment.test.task(0)
    expected = evaluate.predictions(experiment, kept, 1)[0]
    assert loaded.classify(images[:50]) == [names[k] for k in expected[:50]]
    with pytest.raises(UserError, match="give uint8"):
        loaded.scores(images.astype(np.float32))
    sound = (tmp_path / "model.npz").read_bytes()
    for harmed in (b"", b"no model", sound[:-100], sound[:300] + sound[400:]):
        (tmp_path / "not.npz").write_bytes(harmed)
        with pytest.raises(UserError, match=r"not\.npz"):
            model.load(tmp_path / "not.npz")


def test_no_two_phases_of_a_task_share_a_random_key():
    for name in METHODS_AND_RECIPES:
        config = from_config_dict(on_digits(name))
        setting = Setting(config, steps.networks(config.model), (4, 2, 2, 2), (500,) * 4)
        keys = {
            str(p.task) + str(jax.random.key_data(setting.keys(p.task, p.number)[1]))
            for p in planned(setting)
        }
        assert len(keys) == len(planned(setting))
        assert PICTURES not in {phase.number for phase in planned(setting)}


def shapes(indices) -> jax.Array:
    """In place of images where only shapes count."""
    return jnp.zeros((len(indices), 8, 8, 1), jnp.uint8)


@pytest.mark.parametrize("name", METHODS_AND_RECIPES)
def test_a_method_says_what_it_keeps(name):
    """Its bytes, of shapes alone, beside its words; and old images that it is given."""
    config = from_config_dict(on_digits(name))
    method = method_of(config)
    setting = setting_of(config, (4, 2, 2), (300,) * 3)
    kept = method.kept()
    for phase in planned(setting):
        kept = jax.eval_shape(lambda k, p=phase: p.finish(p.init(k), k, shapes), kept)
    beside = jax.tree.leaves(dataclasses.replace(kept, classifier=None))
    assert (method.keeps == "nothing") == (not beside and not method.reads_old_images)
    pixels = [x for x in beside if x.dtype == jnp.uint8]
    assert ("images" in method.keeps) == bool(method.reads_old_images or pixels)
    assert (method.family == "exemplars") == bool(pixels)
    assert method.family in get_args(Family)


def test_stage_ones_rates_fall_as_their_schedule_says():
    fields = digits.get_config()
    fields.method.stage_one.update(epochs=4, rounds_per_epoch=10, drop_every=3)
    numbers = np.array([0, 20, 30])
    drops, cosine = np.array([1.0, 1.0, 0.1]), np.array([1.0, 0.5, 0.1464466])
    expected = {
        "drops": (drops, drops),
        "cosine": (cosine, cosine),
        "student_cosine": (cosine, drops),
    }
    for schedule, (of_student, of_delegator) in expected.items():
        fields.method.stage_one.schedule = schedule
        setting = setting_of(from_config_dict(fields), (4, 3), (640, 640))
        [one] = [phase for phase in planned(setting) if phase.name == "delegator"]
        rates = one.rates(numbers)
        np.testing.assert_allclose(rates["student"], 0.1 * of_student, rtol=1e-5)
        np.testing.assert_allclose(rates["delegator"], 1e-3 * of_delegator, rtol=1e-5)
