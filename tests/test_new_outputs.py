"""New outputs learned anew: the minimum they are at, what it is of, and the phase that finds it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax
from test_comparators import recorded
from test_train import TINY, at_row, bits, rows, silent

from configs import recipes
from skd_jax import steps, train
from skd_jax.data import prepare
from skd_jax.experiment import open_experiment
from skd_jax.methods import fetril, from_config_dict, skd
from skd_jax.methods.class_means import Sums
from skd_jax.methods.phase import setting_of
from skd_jax.methods.skd import new_outputs, pseudo_images
from skd_jax.methods.skd.phases import delegator_module
from skd_jax.state import Batch

OLD, NEW, WIDTH = 3, 2, 5


def problem(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    """Features [40, 5] of five classes, which of them count, and a head."""
    rng = np.random.default_rng(seed)
    labels = np.arange(40) % (OLD + NEW)
    found = rng.normal(size=(40, WIDTH)) + 2 * np.eye(WIDTH)[labels]
    shapes = (WIDTH, OLD + NEW), (OLD + NEW,)
    head = {n: rng.normal(size=s) for n, s in zip(("kernel", "bias"), shapes, strict=True)}
    return found, labels, np.arange(40) % 7 != 6, head


def by_scipy(found, labels, valid, head, decay) -> tuple[np.ndarray, np.ndarray]:
    """The same minimum, in float64 and by another way there."""
    found, labels = found[valid], labels[valid]
    square = np.mean(np.sum(found**2, axis=1))

    def objective(flat: np.ndarray) -> float:
        weights, bias = flat[:-NEW].reshape(WIDTH, NEW), flat[-NEW:]
        kernel = np.concatenate([head["kernel"][:, :OLD], weights], axis=1)
        logits = found @ kernel + np.concatenate([head["bias"][:OLD], bias])
        entropy = -np.mean(log_softmax(logits, axis=1)[np.arange(len(labels)), labels])
        return entropy + 0.5 * decay * square * np.sum(weights**2)

    flat = minimize(objective, np.zeros((WIDTH + 1) * NEW), options={"gtol": 1e-8}).x
    return flat[:-NEW].reshape(WIDTH, NEW), flat[-NEW:]


def learn(found, labels, valid, head, decay) -> dict[str, np.ndarray]:
    """By the program."""
    arrays = (
        jnp.float32(found),
        jnp.int32(labels),
        jnp.array(valid),
        jax.tree.map(jnp.float32, head),
    )
    minimum = jax.jit(new_outputs.minimum, static_argnames=("old", "decay"))
    return jax.tree.map(np.asarray, minimum(*arrays, old=OLD, decay=decay))


@pytest.mark.parametrize("decay", [1e-2, 1e-3])
def test_new_outputs_are_at_the_minimum_and_old_ones_where_they_were(decay):
    found, labels, valid, head = problem(0)
    weights, bias = by_scipy(found, labels, valid, head, decay)
    learned = learn(found, labels, valid, head, decay)
    np.testing.assert_allclose(learned["kernel"][:, OLD:], weights, atol=2e-3)
    np.testing.assert_allclose(learned["bias"][OLD:], bias, atol=2e-3)
    for name in ("kernel", "bias"):
        np.testing.assert_array_equal(learned[name][..., :OLD], np.float32(head[name][..., :OLD]))


def test_the_scale_of_features_does_not_matter():
    found, labels, valid, head = problem(1)
    of_one = learn(found, labels, valid, head, 1e-2)
    tenth = {**head, "kernel": head["kernel"] / 10}
    of_ten = learn(10 * found, labels, valid, tenth, 1e-2)
    logits, others = (
        f @ h["kernel"] + h["bias"] for f, h in ((found, of_one), (10 * found, of_ten))
    )
    np.testing.assert_allclose(logits, others, atol=1e-3)


def test_old_classes_are_features_of_new_images_moved_to_the_pseudo_images_means():
    state, means, _ = recorded(0)  # of classes 2, 3 and 4, and means of 0 and 1
    count = jnp.float32([7, 2])
    rng = np.random.default_rng(0)
    head = {"kernel": jnp.float32(rng.normal(size=(5, 5))), "bias": jnp.float32(rng.normal(size=5))}

    def expected(valid: list[bool]) -> dict[str, jax.Array]:
        rows = np.asarray(state.rows)[:12]
        labels = np.asarray(state.labels)[:12]
        own = jnp.float32(np.array([rows[labels == c].mean(axis=0) for c in (2, 3, 4)]))
        moved, of = fetril.pseudo_features(state, means, own, 4)
        every = jnp.concatenate([rows, moved]), jnp.concatenate([state.labels[:12], of])
        counts = jnp.concatenate([jnp.ones(12, bool), jnp.array(valid)[of]])
        return new_outputs.minimum(*every, counts, head, 2, 1e-2)

    close = partial(np.testing.assert_allclose, atol=1e-4)
    seen = new_outputs.Seen(state, Sums(means * count[:, None], count, jnp.int32(0)))
    both = new_outputs.learned(seen, head, 4, 1e-2)
    jax.tree.map(close, both, expected([True, True]))
    # A class of which nothing was drawn stands nowhere.
    drawn = Sums(jnp.stack([means[0] * 7, jnp.zeros(5)]), jnp.float32([7, 0]), jnp.int32(0))
    one = new_outputs.learned(new_outputs.Seen(state, drawn), head, 4, 1e-2)
    jax.tree.map(close, one, expected([True, False]))
    assert np.abs(np.asarray(one["kernel"] - both["kernel"])).max() > 0.01


def test_a_step_sees_the_images_and_as_many_pseudo_images_by_old_class(small_model):
    config, kept, batch = small_model.config, small_model.kept, small_model.config.base.batch
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


def tiny():
    """Of digits, in seconds: 4 classes, then 6."""
    config = recipes.get_config("recipe=translated,dataset=digits,tasks=1")
    config.update_from_flattened_dict({**TINY, "seed": 3})
    return from_config_dict(config)


def test_it_ends_a_task():
    found = [(phase.name, phase.ends_task) for phase in open_experiment(tiny()).phases]
    assert found == [("base", True), ("delegator", False), ("learn", False), ("head", True)]


@pytest.mark.slow
def test_it_goes_on_to_the_same_bits(tmp_path):
    summary = train.train(tiny(), tmp_path / "whole", silent)
    assert [len([x for x in row if x is not None]) for row in summary["accuracy_matrix"]] == [1, 2]
    in_it = [row["global_step"] for row in rows(tmp_path / "whole") if row["phase"] == "head"]
    with at_row(in_it[len(in_it) // 2]):
        train.train(tiny(), tmp_path / "run", silent)
    train.train(tiny(), tmp_path / "run", silent)
    ends = (train.restore(tmp_path / name)[1] for name in ("run", "whole"))
    assert bits(next(ends)) == bits(next(ends))
    assert rows(tmp_path / "run", ("time",)) == rows(tmp_path / "whole", ("time",))
