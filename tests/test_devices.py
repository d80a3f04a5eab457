"""Steps and whole runs over real meshes; skipped where there are fewer than eight devices."""

import dataclasses

import jax
import numpy as np
import pytest
import test_parallel
from test_data_sources import RGB
from test_parallel import SHARED, STEPS, TOLERANCE, difference, reference
from test_steps import (
    BASE,
    DELEGATOR,
    GAMMA,
    KEY,
    NETS,
    OLD,
    ONE,
    TEACHER,
    TWO,
    stage_one_state,
    stage_two_state,
    weights,
)
from test_train import assert_logs_agree, silent, tiny

from skd_jax import evaluate, parallel, quality, steps, terms, train
from skd_jax.errors import UserError
from skd_jax.experiment import open_experiment
from skd_jax.parallel import AXIS, SPLIT, WHOLE, P

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

BATCH = 16
RGB = dataclasses.replace(RGB, augment="crop", pad=1, flip=True)
ONE = dataclasses.replace(ONE, batch=BATCH)
POOL = np.random.default_rng(0).integers(0, 256, (1, BATCH, 8, 8, 3), np.uint8)
LABELS = np.arange(BATCH)[None] % OLD
STEP, RATE = np.arange(1), np.float32([0.1])


def mapped(make, count: int):
    """One step by ``jax.shard_map``."""
    step, arguments = make(NETS.over(AXIS))
    pairs = [(value, WHOLE if split is SHARED else P(AXIS)) for value, split in arguments]
    mesh = parallel.make_mesh(count)
    return jax.jit(
        lambda values: parallel.over_devices(
            step, mesh, *((v, spec) for v, (_, spec) in zip(values, pairs, strict=True))
        )
    )([value for value, _ in pairs])


@pytest.mark.parametrize("count", [*(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4)), 8])
@pytest.mark.parametrize("make", STEPS)
def test_a_step_over_a_mesh_is_the_step_on_one_device(make, count):
    found = mapped(make, count)
    assert all(len(leaf.sharding.device_set) == count for leaf in jax.tree.leaves(found))
    assert difference(jax.device_get(found), reference(make)) < TOLERANCE


@pytest.mark.parametrize("make", STEPS)
def test_pmap_of_a_step_equals_shard_map(make):
    step, arguments = make(NETS.over(AXIS))
    values = [v if s is SHARED else v.reshape(4, -1, *v.shape[1:]) for v, s in arguments]
    axes = tuple(split for _, split in arguments)
    found = jax.pmap(step, AXIS, in_axes=axes, devices=jax.devices()[:4])(*values)
    expected = jax.device_get(mapped(make, 4))
    for device in range(4):
        mine = jax.tree.map(lambda x, i=device: np.asarray(x)[i], found)
        assert difference(mine, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("make", "mutant"),
    [pair for pair in test_parallel.MUTANTS if pair[1] is not test_parallel.scores_of_one_device],
)
def test_a_mean_left_out_does_not_even_trace(monkeypatch, make, mutant):
    mutant(monkeypatch)
    with pytest.raises(ValueError, match=r"replica|manual axis types"):
        mapped(make, 4)


def run_rounds(mesh):
    state, functions = stage_one_state(), terms.lookup(ONE)
    rates = RATE, RATE / 100
    return steps.run_rounds(
        NETS, ONE, functions, state, TEACHER, KEY, STEP, weights(), *rates, mesh=mesh
    )


def run_supervised(mesh):
    state = test_parallel.supervised_state()
    images = [parallel.split(mesh, x, BATCH) for x in (POOL, LABELS)]
    return steps.run_supervised(NETS, BASE, RGB, state, *images, KEY, STEP, RATE, mesh=mesh)


def run_cil(mesh):
    networks = stage_two_state(), TEACHER, DELEGATOR
    images = [parallel.split(mesh, x, BATCH) for x in (POOL, OLD + LABELS % 2)]
    return steps.run_cil(NETS, TWO, RGB, *networks, *images, KEY, STEP, GAMMA, RATE, mesh=mesh)


@pytest.mark.parametrize("run", [run_rounds, run_supervised, run_cil])
def test_random_numbers_are_those_of_one_device(run):
    """Latents and augmentation follow the place in the whole batch."""
    expected = jax.device_get(run(None))
    found = jax.device_get(run(parallel.make_mesh(8)))
    assert difference(found, expected) < 10 * TOLERANCE


def test_random_numbers_of_the_own_share_are_found(monkeypatch):
    expected = jax.device_get(run_rounds(None))
    own = parallel.example_index
    monkeypatch.setattr(parallel, "example_index", lambda batch, name: own(batch, name) % batch)
    steps.run_rounds.jitted.clear_cache()
    found = jax.device_get(run_rounds(parallel.make_mesh(4)))
    steps.run_rounds.jitted.clear_cache()
    assert difference(found, expected) > 100 * TOLERANCE


def test_predict_gives_every_device_all_predictions():
    mesh = parallel.make_mesh(8)
    found = steps.predict(NETS, RGB, TEACHER, parallel.split(mesh, POOL, BATCH), mesh=mesh)
    assert found.is_fully_replicated
    np.testing.assert_array_equal(found, steps.predict(NETS, RGB, TEACHER, POOL))


def test_arrays_lie_where_they_are_said_to():
    mesh = parallel.make_mesh(4)
    assert parallel.local_columns(mesh, 8) == slice(0, 8)
    (array,) = jax.tree.leaves(parallel.split(mesh, POOL, BATCH))
    assert array.sharding.spec == SPLIT and array.addressable_shards[0].data.shape[1] == 4
    key, vector = parallel.replicate(mesh, (KEY, np.arange(3)))
    assert key.is_fully_replicated and vector.is_fully_replicated
    assert jax.random.bits(key) == jax.random.bits(KEY)


@pytest.mark.slow
def test_a_run_on_eight_devices_logs_what_one_logs(tmp_path):
    for count in (1, 8):
        config = tiny(run__devices=count, data__in_memory=False)
        train.train(config, tmp_path / str(count), silent)
    assert_logs_agree(tmp_path / "1", tmp_path / "8")


@pytest.mark.slow
def test_eight_devices_take_up_a_run_of_one_and_measure_what_one_does(tmp_path):
    train.train(tiny(run__phases=1, run__devices=1), tmp_path / "base", silent)
    changes = {"run__phases": 2, "run__quality_images": 50}
    changes["run__start_from"] = str(tmp_path / "base")
    for count in (1, 8):
        train.train(tiny(run__devices=count, **changes), tmp_path / str(count), silent)
    assert_logs_agree(tmp_path / "1", tmp_path / "8")
    # One network and the same images, measured by both.
    experiment, carry = train.restore(tmp_path / "1")
    looks = []
    for count in (1, 8):
        config = dataclasses.replace(
            experiment.config, run=dataclasses.replace(experiment.config.run, devices=count)
        )
        its = open_experiment(config)
        images = evaluate.pseudo_images(its, carry.delegator, 0, 50)
        found = quality.look(its, carry.classifier, images)
        looks.append((images, found.features, found.scores, found.moments))
        looks[-1] += (evaluate.predictions(its, carry.classifier, 1),)
    for one, eight in zip(*map(jax.tree.leaves, looks), strict=True):
        assert np.asarray(eight) == pytest.approx(np.asarray(one), abs=TOLERANCE)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(tmp_path):
    config = tiny()
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Run, "_evaluate", interrupt)
        train.train(
            dataclasses.replace(config, run=dataclasses.replace(config.run, devices=4)),
            tmp_path / "4",
            silent,
        )
    said = []
    train.train(config, tmp_path / "4", said.append)
    assert said[0].startswith("going on at")
    train.train(config, tmp_path / "1", silent)
    assert_logs_agree(tmp_path / "1", tmp_path / "4")


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_batch_that_does_not_divide_stops_the_run_before_it_starts(tmp_path):
    config = tiny(run__devices=8, stage_two__batch=12)
    with pytest.raises(UserError, match=r"config\.stage_two\.batch: 12 .* 8 devices"):
        train.train(config, tmp_path / "run", silent)
    assert not (tmp_path / "run").exists()
