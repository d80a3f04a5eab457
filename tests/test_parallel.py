"""Every step on 1, 2, 4 and 8 shards computes what it computes on one device.

The shards are made by ``vmap`` with an axis name here, on one device. The tests of virtual devices
(``shard_map`` and ``pmap``) need several, so they run in a process of their own: see the last test.
"""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_steps import (
    BASE,
    CROPPED,
    DELEGATOR,
    GAMMA,
    KEY,
    NETS,
    OLD,
    ONE,
    TEACHER,
    TWO,
    copy,
    stage_one_state,
    stage_two_state,
    weights,
)
from xla_flags import FAST

from configs.recipes import OURS
from skd_jax import losses, parallel, steps
from skd_jax.data import augment_normalised
from skd_jax.errors import UserError
from skd_jax.methods.skd import steps as skd_steps
from skd_jax.methods.skd import terms
from skd_jax.models import BatchNorm
from skd_jax.state import Trained

BATCH = 16
TOLERANCE = 1e-5
RATE = jnp.float32(0.1)
SHARED, SHARD = None, 0  # vmap's in_axes: the same on every shard, or split over them


def supervised_state() -> Trained:
    return Trained(copy(TEACHER), steps.sgd(BASE).init(TEACHER.params))


# Each step with its arguments: (function, [(argument, how it is split)]).
IMAGES = jnp.float32(np.random.default_rng(5).normal(size=(BATCH, 8, 8, 3)))
Z = skd_steps.latent(KEY, jnp.arange(BATCH), 6)


def sure_teacher():
    """A teacher with a class of its own for each pseudo image: shards differ in w (Eq. 6)."""
    images, _ = NETS.delegator.apply(DELEGATOR.variables(), Z, True, mutable=["batch_stats"])
    features, _ = NETS.classifier(TEACHER.params).apply(TEACHER.variables(), images, False)
    kernel = 100 * TEACHER.params["head"]["kernel"]
    head = {"kernel": kernel, "bias": -jnp.mean(features @ kernel, axis=0)}
    return TEACHER.replace(params={**TEACHER.params, "head": head})


SURE = sure_teacher()


def imitate(nets):
    step = partial(skd_steps.imitate, nets, ONE)
    return step, [(stage_one_state(), SHARED), (TEACHER, SHARED), (Z, SHARD), (RATE, SHARED)]


def imitate_augmented(nets):
    def step(state, z, rate):
        index = parallel.example_index(len(z), nets.axis_name)
        altered = partial(augment_normalised, CROPPED, KEY, index)
        return skd_steps.imitate(nets, ONE, state, TEACHER, z, rate, altered)

    return step, [(stage_one_state(), SHARED), (Z, SHARD), (RATE, SHARED)]


def imitate_length(nets):
    _, arguments = imitate(nets)
    return partial(skd_steps.imitate, nets, dataclasses.replace(ONE, feature_length=0.3)), arguments


def explore(nets):
    step = partial(skd_steps.explore, nets, ONE, terms.lookup(ONE))
    shared = [(x, SHARED) for x in (weights(), RATE, jnp.float32(1e-3))]
    return step, [(stage_one_state(), SHARED), (SURE, SHARED), (Z, SHARD), *shared]


def supervised(nets):
    step = partial(steps.supervised, nets, BASE)
    labels = jnp.arange(BATCH) % OLD
    return step, [(supervised_state(), SHARED), (IMAGES, SHARD), (labels, SHARD), (RATE, SHARED)]


def cil(nets):
    step = partial(skd_steps.cil, nets, dataclasses.replace(TWO, balanced=0.4))
    before = [(x, SHARED) for x in (stage_two_state(), TEACHER, DELEGATOR)]
    labels = OLD + jnp.arange(BATCH) % 2
    return step, [
        *before,
        *((IMAGES, SHARD), (labels, SHARD)),
        *((KEY, SHARED), (GAMMA, SHARED), (RATE, SHARED)),
    ]


def cil_local(nets):
    _, arguments = cil(nets)
    two = dataclasses.replace(TWO, balanced=0.4, classification="local_old_head_fixed")
    return partial(skd_steps.cil, nets, two), arguments


def cil_ours(nets):
    _, arguments = cil(nets)
    return partial(skd_steps.cil, nets, dataclasses.replace(TWO, **OURS)), arguments


STEPS = (imitate, explore, supervised, cil)


def on_one(make):
    step, arguments = make(NETS)
    return jax.jit(step)(*(value for value, _ in arguments))


_one = {}


def reference(make):
    if make not in _one:
        _one[make] = jax.device_get(on_one(make))
    return _one[make]


def on_shards(make, shards: int, nets=None):
    """What each of several shards ends with, stacked."""
    step, arguments = make(nets or NETS.over("shards"))
    values = [
        value if split is SHARED else value.reshape(shards, -1, *value.shape[1:])
        for value, split in arguments
    ]
    axes = [split for _, split in arguments]
    return jax.jit(jax.vmap(step, in_axes=axes, axis_name="shards"))(*values)


def gradients(optimiser):
    """As the optimiser's first step holds them: times a constant."""
    (moments,) = [
        part.mu if hasattr(part, "mu") else part.trace
        for part in jax.tree.leaves(optimiser, is_leaf=lambda x: hasattr(x, "_fields"))
        if hasattr(part, "mu") or hasattr(part, "trace")
    ]
    return moments


def difference(found, expected) -> float:
    """The largest deviation of losses, gradients and batch statistics, relative to their scale.

    Losses and statistics are of the order of 1. The scale of gradients is the largest of a
    network's. The weights are left out, but for a head's: Adam divides by the gradient, and turns
    one that is only rounding, as that of a bias before a BN, into a whole step.
    """
    (state, metrics), (state_, metrics_) = found, expected

    def largest(a, b, scale: float | None = None) -> float:
        a, b = jax.tree.leaves(a), jax.tree.leaves(b)
        scale = scale or max(float(np.max(np.abs(x))) for x in b) or 1.0
        return max(float(np.max(np.abs(x - y))) / scale for x, y in zip(a, b, strict=True))

    def networks(state) -> list:
        return [state.student, state.delegator] if hasattr(state, "student") else [state]

    worst = largest(metrics, metrics_, max(1.0, *(float(abs(v).max()) for v in metrics_.values())))
    for one, other in zip(networks(state), networks(state_), strict=True):
        worst = max(
            worst,
            largest(gradients(one.optimiser), gradients(other.optimiser)),
            largest(one.network.batch_stats, other.network.batch_stats),
        )
        if "head" in one.network.params:
            heads = (x.network.params["head"] for x in (one, other))
            worst = max(worst, largest(*heads))
    return worst


@pytest.mark.parametrize(
    ("make", "shards"),
    [
        *((make, n) for make in STEPS for n in (1, 2, 4, 8)),
        (imitate_augmented, 2),
        (imitate_length, 2),
    ],
)
def test_a_step_on_shards_is_the_step_on_one_device(make, shards):
    found = jax.device_get(on_shards(make, shards))
    for shard in range(shards):
        mine = jax.tree.map(lambda x, i=shard: x[i], found)
        assert difference(mine, reference(make)) < TOLERANCE


@pytest.mark.parametrize("make", STEPS)
def test_a_number_that_is_not_finite_on_one_shard_changes_nothing_on_any(make):
    def harmed(nets):
        step, arguments = make(nets)
        return step, [
            (x.at[-1].set(jnp.nan) if split is SHARD and x.ndim > 1 else x, split)
            for x, split in arguments
        ]

    before = harmed(NETS)[1][0][0]
    after, metrics = jax.device_get(on_shards(harmed, 2))
    assert np.all(metrics["skipped"] == 1)
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(before), strict=True):
        assert all(np.array_equal(shard, old) for shard in new)


# Mutants: a mean over the devices that is left out must not go unnoticed.


def moments_of_one_device(patch):
    whole = BatchNorm._moments

    def own(self, x, running_mean):
        return whole(self.clone(axis_name=None), x, running_mean)

    patch.setattr(BatchNorm, "_moments", own)


def scores_of_one_device(patch):
    whole = losses.diversity_loss
    patch.setattr(losses, "diversity_loss", lambda scores, axis_name=None: whole(scores))


def gradient_of_one_device(patch):
    def own(loss, axis_name):
        differentiated = jax.value_and_grad(loss, has_aux=True)

        def value_and_grad(params):
            (value, aux), grads = differentiated(params)
            return (jax.lax.pmean(value, axis_name), aux), grads

        return value_and_grad

    patch.setattr(parallel, "value_and_grad", own)


def metrics_of_one_device(patch):
    patch.setattr(parallel, "mean", lambda x, axis_name: x)


MUTANTS = [
    *((make, moments_of_one_device) for make in STEPS),
    *((make, gradient_of_one_device) for make in STEPS),
    (explore, scores_of_one_device),
    *((make, metrics_of_one_device) for make in (imitate, explore, cil)),
]


@pytest.mark.parametrize(("make", "mutant"), MUTANTS)
def test_a_mean_left_out_is_found(monkeypatch, make, mutant):
    reference(make)
    mutant(monkeypatch)
    found = jax.device_get(on_shards(make, 2))
    mine = [jax.tree.map(lambda x, i=shard: x[i], found) for shard in range(2)]
    assert max(difference(shard, reference(make)) for shard in mine) > 100 * TOLERANCE


# Placement, on the one device there is


def test_examples_are_counted_over_all_shards():
    index = jax.vmap(lambda _: parallel.example_index(3, "shards"), axis_name="shards")
    np.testing.assert_array_equal(index(jnp.zeros(2)), [[0, 1, 2], [3, 4, 5]])
    assert parallel.local_batch(6, None) == 6


def test_a_batch_that_does_not_divide_is_named_with_sizes_that_do():
    mesh = SimpleNamespace(shape={"batch": 8})
    parallel.check_divisible({"base.batch": 64}, mesh)
    parallel.check_divisible({"base.batch": 63}, None)
    with pytest.raises(
        UserError, match=r"config\.method\.stage_one\.batch: 100 .* 8 devices; give 96 or 104"
    ):
        parallel.check_divisible({"base.batch": 64, "method.stage_one.batch": 100}, mesh)
    with pytest.raises(UserError, match="give 8, or fewer devices"):
        parallel.check_divisible({"method.stage_two.batch": 3}, mesh)
    assert parallel.round_up(500, mesh) == 504 and parallel.round_up(500, None) == 500


def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(UserError, match=r"config\.run\.devices: 99"):
        parallel.make_mesh(99)


def test_one_device_needs_no_mesh():
    assert parallel.make_mesh(1) is None


# Several devices

VIRTUAL = {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {FAST}",
    "NPROC": "16",  # XLA's threads: with fewer than devices, a collective can wait for ever
    "JAX_PLATFORMS": "cpu",
}


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_on_eight_virtual_devices(repo, which):
    arguments = ["-q", "-p", "no:cacheprovider", "-m", which, "tests/test_devices.py"]
    process = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        env={**os.environ, **VIRTUAL},
        cwd=repo,
        capture_output=True,
        text=True,
        timeout=5400 if which == "slow" else 600,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "skipped" not in process.stdout and " passed" in process.stdout
