"""New outputs learned anew: the minimum they are at, what it is of, and the phase that finds it."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax
from test_train import TINY, at_row, bits, rows, silent

from configs import recipes
from skd_jax import steps, train
from skd_jax.data import prepare
from skd_jax.experiment import open_experiment
from skd_jax.methods import from_config_dict, skd
from skd_jax.methods.class_means import Sums
from skd_jax.methods.collecting import Collected
from skd_jax.methods.phase import setting_of
from skd_jax.methods.skd import new_outputs, pseudo_images
from skd_jax.methods.skd.phases import delegator_module
from skd_jax.state import Batch

OLD, NEW, WIDTH, EACH = 3, 2, 5, 8
LENDER = np.array([1, 0, 1])  # the new class whose features stand for an old one


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray], dict]:
    """Features of two new classes, how they are moved, what each weighs, and a head."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(NEW, EACH, WIDTH)) + 2 * np.eye(WIDTH)[OLD:][:, None]
    moves = 2 * np.eye(WIDTH)[:OLD] - 2 * np.eye(WIDTH)[OLD:][LENDER]
    weights = rng.uniform(0.5, 2, (NEW, EACH)), rng.uniform(0.5, 2, (OLD, EACH))
    weights[0][1, 5:], weights[1][1] = 0, 0  # fewer images of a class; a class that is not drawn
    shapes = (WIDTH, OLD + NEW), (OLD + NEW,)
    head = {n: rng.normal(size=s) for n, s in zip(("kernel", "bias"), shapes, strict=True)}
    return rows, moves, weights, head


def by_scipy(rows, moves, weights, head, decay, held=OLD) -> tuple[np.ndarray, np.ndarray]:
    """The same minimum, in float64, of one feature after the other, and by another way there."""
    outputs = OLD + NEW - held
    found = np.concatenate([*rows, *(rows[c] + moves[p] for p, c in enumerate(LENDER))])
    labels = np.repeat([*range(OLD, OLD + NEW), *range(OLD)], EACH)
    share = np.concatenate([w.ravel() for w in weights]) / sum(w.sum() for w in weights)
    square = np.sum(share * np.sum(found**2, axis=1))

    def objective(flat: np.ndarray) -> float:
        weight, bias = flat[:-outputs].reshape(WIDTH, outputs), flat[-outputs:]
        kernel = np.concatenate([head["kernel"][:, :held], weight], axis=1)
        logits = found @ kernel + np.concatenate([head["bias"][:held], bias])
        entropy = -np.sum(share * log_softmax(logits, axis=1)[np.arange(len(labels)), labels])
        return entropy + 0.5 * decay * square * np.sum(weight**2)

    flat = minimize(objective, np.zeros((WIDTH + 1) * outputs), options={"gtol": 1e-8}).x
    return flat[:-outputs].reshape(WIDTH, outputs), flat[-outputs:]


def learn(rows, moves, weights, head, decay, held=OLD) -> dict[str, np.ndarray]:
    """By the program."""
    given = jax.tree.map(jnp.float32, (rows, moves, weights, head))
    minimum = jax.jit(new_outputs.minimum, static_argnames=("decay", "held"))
    found = minimum(given[0], jnp.array(LENDER), *given[1:], decay=decay, held=held)
    return jax.tree.map(np.asarray, found)


@pytest.mark.parametrize("held", [OLD, 2])
@pytest.mark.parametrize("decay", [1e-2, 2e-4])
def test_outputs_are_at_the_minimum_and_those_that_are_held_where_they_were(decay, held):
    *given, head = problem(0)
    weight, bias = by_scipy(*given, head, decay, held)
    learned = learn(*given, head, decay, held)
    np.testing.assert_allclose(learned["kernel"][:, held:], weight, atol=5e-3)
    np.testing.assert_allclose(learned["bias"][held:], bias, atol=5e-3)
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(learned[name][..., :held], np.float32(head[name][..., :held]))


def test_the_scale_of_features_does_not_matter():
    rows, moves, weights, head = problem(1)
    one = learn(rows, moves, weights, head, 1e-2)
    tenth = {**head, "kernel": head["kernel"] / 10}
    ten = learn(10 * rows, 10 * moves, weights, tenth, 1e-2)
    np.testing.assert_allclose(10 * ten["kernel"], one["kernel"], atol=1e-4)
    np.testing.assert_allclose(ten["bias"], one["bias"], atol=1e-4)


def test_old_classes_are_features_of_new_images_moved_by_the_means():
    """Worked by hand: two new classes of 3 images and of 1, three old ones, one never drawn."""
    new = np.float32([[4, 0], [6, 0], [5, 3], [0, 2]])  # their means are (5, 1) and (0, 2)
    valid = jnp.array([True, True, True, True, False])
    collected = Collected(jnp.float32([*new, [9, 9]]), jnp.int32([3, 3, 3, 4, 0]), valid)
    sums = Sums(jnp.float32([[8, 2], [0, 0], [0, 9]]), jnp.float32([2, 0, 3]), jnp.int32(0))
    rng = np.random.default_rng(0)
    head = {"kernel": jnp.float32(rng.normal(size=(2, 5))), "bias": jnp.float32(rng.normal(size=5))}
    seen = new_outputs.Seen(collected, sums)
    found, means = new_outputs.learned(seen, head, (3, 1), 1e-2)
    np.testing.assert_allclose(means, [[5, 1], [0, 2]], atol=1e-6)

    # The first lies as (5, 1) does, at (4, 1); the third as (0, 2) does, at (0, 3).
    rows = jnp.float32([[[4, 0], [6, 0], [5, 3]], [[0, 2], [4, 0], [4, 0]]])
    moves = jnp.float32([[-1, 0], [0, 0], [0, 1]])
    of_new = jnp.float32([[1, 1, 1], [1, 0, 0]])
    of_old = jnp.float32([[2 / 3] * 3, [0, 0, 0], [2, 0, 0]])  # 2 in all, as new ones on average
    given = jnp.int32([0, 0, 1]), moves, (of_new, of_old), head
    close = partial(np.testing.assert_allclose, atol=1e-4)
    jax.tree.map(close, found, new_outputs.minimum(rows, *given, 1e-2, 3))

    # The second has left the mean of its real images, (5, 2), and the third (0, 1): both stand
    # there, whatever was drawn, and their outputs are learned too.
    found, means = new_outputs.learned(seen, head, (3, 1), 1e-2, jnp.float32([[5, 2], [0, 1]]))
    np.testing.assert_allclose(means, [[5, 1], [0, 2]], atol=1e-6)
    moves = jnp.float32([[-1, 0], [0, 1], [0, -1]])
    of_old = jnp.float32([[2 / 3] * 3, [2 / 3] * 3, [2, 0, 0]])
    given = jnp.int32([0, 0, 1]), moves, (of_new, of_old), head
    jax.tree.map(close, found, new_outputs.minimum(rows, *given, 1e-2, 1))


def test_a_step_sees_the_images_and_as_many_pseudo_images_by_old_class(small_model):
    config, kept, batch = small_model.config, small_model.kept, small_model.config.base.batch
    two = dataclasses.replace(config.method.stage_two, new_outputs_decay=1e-3)
    config = dataclasses.replace(config, method=dataclasses.replace(config.method, stage_two=two))
    setting = setting_of(config, (2, 2), (2 * batch, batch + 7))
    phase = new_outputs.phase(setting, 1, delegator_module(config))
    assert (phase.name, phase.steps, phase.ends_task) == ("head", 2, True)
    images = np.random.default_rng(0).integers(0, 256, (2, batch, 8, 8, 1), np.uint8)
    labels = np.resize(np.int32([2, 3]), (2, batch))
    valid = np.arange(2 * batch).reshape(2, batch) < batch + 7
    key = jax.random.key(5)
    state, _ = steps.advance(
        *(phase.step, phase.static, setting.nets, config.data, phase.reads, phase.draws),
        *(phase.init(kept), kept, (images, labels, valid), key),
        *(jnp.arange(2), phase.rates(np.arange(2))),
    )

    def look(some: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """Features and logits, by the module."""
        classifier = setting.nets.classifier(kept.classifier.params)
        found = jax.jit(lambda x: classifier.apply(kept.classifier.variables(), x, False))(some)
        return np.asarray(found[0]), np.asarray(found[1])

    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(state.new.valid, valid.reshape(-1))
    features, _ = look(prepare(config.data, images.reshape(-1, 8, 8, 1)))
    close(state.new.rows, features * valid.reshape(-1, 1))
    keys = [jax.random.split(jax.random.fold_in(key, n))[1] for n in range(2)]
    drawn = [pseudo_images(skd.networks(config), kept.delegator, k, batch) for k in keys]
    features, logits = look(jnp.concatenate(drawn))
    assert (logits.argmax(axis=1) >= 2).any()  # an old class is theirs all the same
    one_hot = np.eye(2)[logits[:, :2].argmax(axis=1)]
    np.testing.assert_array_equal(state.old.count, one_hot.sum(axis=0))
    close(state.old.features / 2 / batch, one_hot.T @ features / 2 / batch)
    learned = phase.finish(state, kept, None).classifier.params
    assert bits(learned["features"]) == bits(kept.classifier.params["features"])
    of = setting.by_class(1)
    head, _ = new_outputs.learned(state, kept.classifier.params["head"], of, 1e-3)
    assert sum(of) == batch + 7 and bits(learned["head"]) == bits(head)


def test_few_images_of_new_classes_have_more_pseudo_images_beside_them(small_model):
    config = small_model.config
    batch = config.base.batch
    for images, times in ((20, -(-50 * 2 // batch)), (20 * batch, 1)):
        phase = new_outputs.phase(
            setting_of(config, (2, 2), (9, images)), 1, delegator_module(config)
        )
        assert phase.static.times == times


def test_a_step_on_shards_is_the_step_on_one_device(small_model):
    config, kept = small_model.config, small_model.kept
    setting = setting_of(config, (2, 2), (8, 8))
    phase = new_outputs.phase(setting, 1, delegator_module(config))
    rng = np.random.default_rng(1)
    images = jnp.float32(rng.normal(size=(8, 8, 8, 1)))
    labels, valid = jnp.int32([2, 3] * 4), jnp.arange(8) < 7

    def step(nets: steps.Networks, *of_batch: jax.Array) -> new_outputs.Seen:
        begun, key = phase.init(kept), jax.random.key(5)
        return phase.step(phase.static, nets, begun, kept, Batch(*of_batch), key, jnp.int32(0))[0]

    one = jax.jit(partial(step, setting.nets))(images, labels, valid)
    split = [x.reshape(4, 2, *x.shape[1:]) for x in (images, labels, valid)]
    mapped = jax.vmap(partial(step, setting.nets.over("shards")), axis_name="shards")
    for shard in range(4):
        mine = jax.tree.map(lambda x, i=shard: x[i], jax.jit(mapped)(*split))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), mine, one)


def tiny(tasks: int, recipe: str = "translated"):
    """Of digits, in seconds: 4 classes, then 6 more."""
    config = recipes.get_config(f"recipe={recipe},dataset=digits,tasks={tasks}")
    config.update_from_flattened_dict({**TINY, "seed": 3})
    return from_config_dict(config)


def test_it_ends_a_task():
    found = [(phase.name, phase.ends_task) for phase in open_experiment(tiny(1)).phases]
    assert found == [("base", True), ("delegator", False), ("learn", False), ("head", True)]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["translated", "kept_means"])
def test_it_goes_on_to_the_same_bits(recipe, tmp_path):
    """In the second task, after one whose end it had to tell the shapes of."""
    config = tiny(2, recipe)
    summary = train.train(config, tmp_path / "whole", silent)
    seen = [len([x for x in row if x is not None]) for row in summary["accuracy_matrix"]]
    assert seen == [1, 2, 3]
    heads = [row for row in rows(tmp_path / "whole") if (row["phase"], row["task"]) == ("head", 2)]
    with at_row(heads[len(heads) // 2]["global_step"]):
        train.train(config, tmp_path / "run", silent)
    train.train(config, tmp_path / "run", silent)
    ends = (train.restore(tmp_path / name)[1] for name in ("run", "whole"))
    assert bits(next(ends)) == bits(next(ends))
    assert rows(tmp_path / "run", ("time",)) == rows(tmp_path / "whole", ("time",))


@pytest.mark.slow
def test_kept_means_are_those_of_each_task_and_base_outputs_stay(tmp_path):
    config = tiny(3, "kept_means")
    train.train(config, tmp_path, silent)
    kept = train.restore(tmp_path)[1]
    assert kept.later_means.shape == (6, kept.classifier.params["head"]["kernel"].shape[0])
