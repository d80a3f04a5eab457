"""Steps and whole runs over real meshes; skipped where there are fewer than eight devices."""

import dataclasses
import math
from functools import partial

import jax
import numpy as np
import pytest
import test_parallel
from test_comparators import NAMES
from test_comparators import tiny as small
from test_exemplars import NAMES as EXEMPLARS
from test_exemplars import tiny as with_exemplars
from test_methods import GENERATORS, METHODS_AND_RECIPES, on_digits, untraced
from test_methods import tiny as methods_tiny
from test_parallel import SHARED, STEPS, TOLERANCE, difference, reference
from test_steps import (
    CROPPED,
    DELEGATOR,
    GAMMA,
    KEY,
    NETS,
    OLD,
    ONE,
    TEACHER,
    advance,
    batches,
    predict,
    setting,
    stage_one_state,
    stage_two_state,
    weights,
)
from test_train import assert_logs_agree, silent, tiny

from skd_jax import evaluate, groups, parallel, steps, train
from skd_jax.compiler import compiling_for
from skd_jax.errors import UserError
from skd_jax.experiment import open_experiment
from skd_jax.loop import Run
from skd_jax.methods import from_config_dict, skd
from skd_jax.methods.phase import setting_of
from skd_jax.methods.phases import base
from skd_jax.methods.skd import quality
from skd_jax.methods.skd.phases import KeptDelegator, stage_one, stage_two
from skd_jax.parallel import AXIS, SPLIT, WHOLE, P
from skd_jax.state import Kept

pytestmark = pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")

BATCH = 16
SLOW = pytest.mark.slow
OF_OURS = [
    pytest.param(getattr(test_parallel, name), marks=SLOW)
    for name in ("cil_local", "cil_ours", "imitate_augmented", "imitate_length")
]
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
@pytest.mark.parametrize("make", [*STEPS, *OF_OURS])
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


def test_a_loss_that_is_a_mean_over_the_devices_has_its_own_gradient():
    """As Eq. 6, and a term of one's own that averages first, where no other term is weighed."""
    w, x = np.float32([0.5, -1.0]), np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32)

    def loss(w, x, axis):
        return jax.numpy.square(parallel.mean(jax.numpy.mean(x @ w), axis)), None

    def step(w, x):
        return parallel.value_and_grad(partial(loss, x=x, axis=AXIS), AXIS)(w)[1]

    found = jax.jit(
        lambda w, x: parallel.over_devices(step, parallel.make_mesh(4), (w, WHOLE), (x, P(AXIS)))
    )(w, x)
    expected = jax.grad(lambda w: loss(w, x, None)[0])(w)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def rounds():
    each = {name: weight[None] for name, weight in weights().items()}
    rates = {"weights": each, "student": RATE, "delegator": RATE / 100}
    return stage_one(setting(ONE), 0), stage_one_state(), KeptDelegator(TEACHER), None, rates


def supervised():
    return base(setting()), test_parallel.supervised_state(), Kept(), LABELS, RATE


def cil():
    rates, kept = {"gamma": GAMMA[None], "rate": RATE}, KeptDelegator(TEACHER, DELEGATOR)
    return stage_two(setting(), 1), stage_two_state(), kept, OLD + LABELS % 2, rates


def run(make, mesh, key=KEY):
    """The first step of a phase, augmented."""
    phase, state, kept, labels, rates = make()
    found = None if labels is None else on_mesh(mesh, labels)
    return advance(phase, state, kept, found, key, STEP, rates, data=CROPPED, mesh=mesh)


def run_of_two(make, mesh):
    """The same of two replicas that differ in their keys, apart again."""
    phase, *trees, labels, rates = make()
    state, kept = (groups.distribute(mesh, [tree] * 2) for tree in trees)
    found = None
    if labels is not None:
        two = (np.stack([x, x], axis=1) for x in batches(POOL, labels))
        found = tuple(parallel.split(mesh, x, (2, BATCH)) for x in two)
    key = groups.distribute(mesh, list(jax.random.split(KEY)))
    result = advance(phase, state, kept, found, key, STEP, rates, data=CROPPED, mesh=mesh)
    return groups.collect(mesh, result, 2)


def on_mesh(mesh, labels):
    return tuple(parallel.split(mesh, x, (BATCH,)) for x in batches(POOL, labels))


run_rounds, run_supervised, run_cil = (partial(run, make) for make in (rounds, supervised, cil))


@pytest.mark.parametrize("step", [run_rounds, run_supervised, run_cil])
def test_random_numbers_are_those_of_one_device(step):
    """Latents and augmentation follow the place in the whole batch."""
    expected = jax.device_get(step(None))
    found = jax.device_get(step(parallel.make_mesh(8)))
    assert difference(found, expected) < 10 * TOLERANCE


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("make", [rounds, pytest.param(supervised, marks=SLOW), cil])
def test_replicas_in_groups_are_what_they_are_on_one_device(make, count):
    """One device for both, one for each, two for each, by the forms of a GPU."""
    mesh = groups.in_groups(parallel.make_mesh(count), 2)
    with compiling_for("gpu"):
        both = run_of_two(make, mesh)
    for found, key in zip(both, jax.random.split(KEY), strict=True):
        expected = jax.device_get(run(make, None, key))
        assert difference(jax.device_get(found), expected) < 10 * TOLERANCE


def test_devices_lie_in_as_many_groups_as_divide_them_and_the_replicas():
    eight, four = parallel.make_mesh(8), parallel.make_mesh(4)
    assert groups.in_groups(eight, 1) is eight and groups.in_groups(None, 3) is None
    shapes = {
        replicas: dict(groups.in_groups(four, replicas).shape) for replicas in (2, 3, 4, 6, 8)
    }
    two, one_each = {"replicas": 2, "batch": 2}, {"replicas": 4}
    all_ = {"replicas": 1, "batch": 4}
    assert shapes == {2: two, 3: all_, 4: one_each, 6: two, 8: one_each}
    assert [parallel.batch_devices(groups.in_groups(eight, n)) for n in (3, 4, 8)] == [8, 2, 1]


def test_a_call_that_is_filled_up_makes_the_steps_that_count():
    mesh = parallel.make_mesh(8)
    expected = jax.device_get(run_supervised(mesh))
    found = tuple(parallel.split(mesh, np.repeat(x, 2, 0), (BATCH,)) for x in batches(POOL, LABELS))
    arguments = base(setting()), test_parallel.supervised_state(), Kept(), found, KEY
    steps_, rates, one = np.arange(2), np.float32([0.1, 9]), np.int32(1)
    state, metrics = advance(*arguments, steps_, rates, data=CROPPED, mesh=mesh, count=one)
    first = {name: x[:1] for name, x in metrics.items()}
    assert difference(jax.device_get((state, first)), expected) < TOLERANCE
    assert all(x[1] == 0 for x in metrics.values())


def test_random_numbers_of_the_own_share_are_found(monkeypatch):
    expected = jax.device_get(run_rounds(None))
    own = parallel.example_index
    monkeypatch.setattr(parallel, "example_index", lambda batch, name: own(batch, name) % batch)
    steps.advance.jitted.clear_cache()
    found = jax.device_get(run_rounds(parallel.make_mesh(4)))
    steps.advance.jitted.clear_cache()
    assert difference(found, expected) > 100 * TOLERANCE


def test_predict_gives_every_device_all_predictions():
    mesh = parallel.make_mesh(8)
    found = predict(parallel.split(mesh, POOL, (BATCH,)), mesh=mesh)
    assert found.is_fully_replicated
    np.testing.assert_array_equal(found, predict(POOL))


def test_arrays_lie_where_they_are_said_to():
    mesh = parallel.make_mesh(4)
    assert parallel.local_part(mesh, (8,)) == (slice(0, 8),)
    (array,) = jax.tree.leaves(parallel.split(mesh, POOL, (BATCH,)))
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
    restored, kept = train.restore(tmp_path / "1")
    nets = skd.networks(restored)
    looks = []
    for count in (1, 8):
        config = dataclasses.replace(restored, run=dataclasses.replace(restored.run, devices=count))
        its = open_experiment(config)
        images = quality.drawn_images(its, nets, kept.delegator, 0, 50)
        found = quality.look(its, kept.classifier, images)
        looks.append((images, found.features, found.scores, found.moments))
        looks[-1] += (evaluate.predictions(its, kept, 1),)
    for one, eight in zip(*map(jax.tree.leaves, looks), strict=True):
        assert np.asarray(eight) == pytest.approx(np.asarray(one), abs=TOLERANCE)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(tmp_path):
    config = tiny()
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_end", interrupt)
        train.train(
            dataclasses.replace(config, run=dataclasses.replace(config.run, devices=4)),
            tmp_path / "4",
            silent,
        )
    said = []
    train.train(config, tmp_path / "4", said.append)
    assert "devices 4, now 8" in said[0] and said[1].startswith("going on at")
    train.train(config, tmp_path / "1", silent)
    assert_logs_agree(tmp_path / "1", tmp_path / "4")


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_batch_that_does_not_divide_stops_the_run_before_it_starts(tmp_path):
    config = tiny(run__devices=8, method__stage_two__batch=12)
    with pytest.raises(UserError, match=r"config\.method\.stage_two\.batch: 12 .* 8 devices"):
        train.train(config, tmp_path / "run", silent)
    assert not (tmp_path / "run").exists()


@pytest.fixture(autouse=True)
def _programs(request):
    """Drops what a slow test has compiled: Linux lets a process map some 65,000 pieces of memory.

    A method's programs for eight devices take 4,000 of them, and without more XLA ends the process.
    """
    yield
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()


# By their ends rounding has moved up to 4 images of a batch of 64 to another class.
GROWN = ("joint", "abd", "rdfcil", "eeil", "tpcil")
QUICK = (("lwf", 4), ("ridge", 4), ("lucir", 4))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        pytest.param(name, n, marks=[] if (name, n) in QUICK else SLOW)
        for name in ("finetune", "joint", "lwf", "ncm", "ridge", *NAMES, *GENERATORS, *EXEMPLARS)
        for n in (2, 4)
    ],
)
def test_other_methods_give_one_devices_numbers(tmp_path, name, count):
    make = small if name in NAMES else with_exemplars if name in EXEMPLARS else methods_tiny
    phases = {"ncm": 3, "ridge": 3, "abd": 3, "rdfcil": 4}
    change = {"run__phases": phases.get(name, 2)}
    if name in EXEMPLARS or (name in NAMES and (name, count) not in QUICK):
        change = {}
    summaries = [
        train.train(make(name, run__devices=n, **change), tmp_path / str(n), silent)
        for n in (1, count)
    ]
    # An image, of a batch of 64, and a few of some hundred; of longer training, in which rounding
    # has been amplified (a ReLU on the other side of zero), more.
    batch, test = (0.1, 0.04) if name in GROWN else (0.02, 0.02)
    # A step of TPCIL, whose loss is a correlation, amplifies it tenfold.
    until = 6 if name == "tpcil" else math.inf
    assert_logs_agree(tmp_path / "1", tmp_path / str(count), accuracy=batch, until=until)
    one, several = (np.array(s["top1_seen"]) for s in summaries)
    np.testing.assert_allclose(one, several, atol=test)


TRACED: set = set()


@pytest.mark.parametrize("platform", ["gpu", pytest.param("cpu", marks=SLOW)])
@pytest.mark.parametrize("replicas", [1, pytest.param(2, marks=SLOW)])
@pytest.mark.parametrize("name", METHODS_AND_RECIPES)
def test_every_methods_steps_trace_over_a_mesh(name, replicas, platform):
    """A mean that is left out does not."""
    fields = on_digits(name)
    fields.model.width = 4
    setting = setting_of(from_config_dict(fields), (OLD, 2), (640, 640))
    mesh = groups.in_groups(parallel.make_mesh(2 * replicas), replicas)
    before, key = ((), KEY) if replicas == 1 else ((replicas,), jax.random.split(KEY, replicas))

    def of_all(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*before, *x.shape), x.dtype), tree)

    numbers = np.arange(1)
    for phase, state, kept in untraced(setting, TRACED, platform, replicas):
        of = phase.step, phase.static, setting.nets, setting.config.data, phase.reads, phase.draws
        found = None
        if phase.reads != "nothing":
            shape = 1, *before, phase.batch
            found = (
                np.zeros((*shape, 8, 8, 1), np.uint8),
                np.zeros(shape, int),
                np.ones(shape, bool),
            )
        with compiling_for(platform):
            new, metrics = jax.eval_shape(
                partial(steps.advance.__wrapped__, *of, mesh=mesh),
                *(of_all(state), of_all(kept), found, key, numbers, phase.rates(numbers)),
            )
        assert jax.tree.structure(new) == jax.tree.structure(state)
        assert all(value.shape[: len(before) + 1] == (*before, 1) for value in metrics.values())
