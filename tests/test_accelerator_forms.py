"""What accelerators run in place of a CPU's forms: the same numbers, from programs of less work."""

import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from test_data_augment import KEY, make_images
from test_models import norm_variables, normal, same_bits
from test_second_order import (
    VARIABLES,
    X,
    assert_close,
    doubled,
    ours,
    penalty,
    penalty_in_float64,
    plain,
    spread,
)

from skd_jax import data as data_lib
from skd_jax import steps
from skd_jax.compiler import compiling_for
from skd_jax.models import MOMENTS, BatchNorm
from skd_jax.models.conv import transposed_conv, upsample_conv

ACCELERATORS = ("gpu", "tpu")
MUTABLE = ["batch_stats", MOMENTS]


def under(platform, f, *args):
    """What the form for a platform gives, run here."""
    with compiling_for(platform):
        return jax.jit(f)(*args)


def lowered(platform, f, *args) -> str:
    """The program for a platform, as XLA is given it."""
    with compiling_for(platform):
        return jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()


def normalised(variables, x, axis_name=None):
    return BatchNorm(affine=False, axis_name=axis_name).apply(variables, x, True, mutable=MUTABLE)


def statistics(mean: float, channels: int = 2):
    return {"batch_stats": {"mean": jnp.full(channels, mean), "var": jnp.ones(channels)}}


# Batch normalisation


@pytest.mark.parametrize("platform", ACCELERATORS)
@pytest.mark.parametrize("shape", [(3, 8, 8, 16), (5, 6)])
def test_batch_norm_and_its_gradients_are_the_cpus(platform, shape):
    x, weight = 2 * normal(0, *shape) + 1, normal(1, *shape)
    variables = norm_variables(shape[-1])

    def loss(params, x):
        out, new = BatchNorm().apply({**variables, "params": params}, x, True, mutable=MUTABLE)
        moments = new[MOMENTS]
        handed = jnp.sum(jnp.sin(moments["mean"])) + jnp.sum(jnp.square(moments["var"]))
        return jnp.sum(out * weight) + handed, (out, new)

    both = jax.value_and_grad(loss, (0, 1), has_aux=True)
    found = under(platform, both, variables["params"], x)
    expected = under("cpu", both, variables["params"], x)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), found, expected
    )


@pytest.mark.parametrize("platform", ACCELERATORS)
@pytest.mark.parametrize("taken", ["output", "moments", "output and moments"])
def test_batch_norms_second_derivatives_are_those_of_the_formulas(platform, taken):
    params = VARIABLES["params"]
    expected = penalty_in_float64(functools.partial(plain, taken=taken), params, X)
    with compiling_for(platform):
        found = penalty(functools.partial(ours, taken=taken), params, X)
    assert_close(found, expected)


# A TPU's is about the running mean, which has to be within a hundred deviations.
@pytest.mark.parametrize(("platform", "running"), [("gpu", 0.0), ("tpu", 100.5), ("cpu", 0.0)])
@pytest.mark.parametrize("shards", [1, 4])
def test_moments_are_exact_where_the_mean_dwarfs_the_deviation(platform, running, shards):
    x = np.float32(100 + 1e-2 * np.random.default_rng(0).normal(size=(64, 4, 4, 2)))
    x[:16] += 0.02  # unlike shards
    split = jax.vmap(lambda x: normalised(statistics(running), x, "devices"), axis_name="devices")
    out, seen = under(platform, split, x.reshape(shards, -1, 4, 4, 2))
    flat = np.float64(x).reshape(-1, 2)
    for mean, var in zip(seen[MOMENTS]["mean"], seen[MOMENTS]["var"], strict=True):
        np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-6)
        np.testing.assert_allclose(var, flat.var(0), rtol=5e-3)
    expected = (np.float64(x) - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5)
    np.testing.assert_allclose(np.reshape(out, x.shape), expected, atol=1e-2)


def test_a_tpus_moments_far_from_the_running_mean_stay_finite_and_come_right():
    """The variance is off by a rounding error of (mean - running mean)^2 at most."""
    x = np.float32(100 + 1e-2 * np.random.default_rng(0).normal(size=(64, 4, 4, 2)))

    def step(variables, _):
        out, seen = normalised(variables, x)
        return {"batch_stats": seen["batch_stats"]}, (jnp.abs(out).max(), seen[MOMENTS]["var"])

    _, (largest, var) = under("tpu", lambda: jax.lax.scan(step, statistics(0.0), length=100))
    assert np.all(np.isfinite(largest)) and np.all(var >= 0)
    assert np.abs(var[0] - 1e-4).max() < 100**2 * 1e-6
    np.testing.assert_allclose(var[-1], np.float64(x).reshape(-1, 2).var(0), rtol=1e-3)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_batch_norm_takes_one_collective(platform):
    x = jax.ShapeDtypeStruct((8, 4, 4, 2), jnp.float32)
    mesh = AbstractMesh((4,), ("devices",), axis_types=(AxisType.Auto,))

    def count(platform):
        one = functools.partial(normalised, statistics(0.0), axis_name="devices")
        mapped = jax.shard_map(one, mesh=mesh, in_specs=P("devices"), out_specs=(P("devices"), P()))
        with compiling_for(platform):
            exported = jax.export.export(jax.jit(mapped), platforms=[platform])(x)
        return exported.mlir_module().count('all_reduce"')

    assert (count(platform), count("cpu")) == (1, 2)


# The doubling convolution


@pytest.mark.parametrize("platform", ACCELERATORS)
@pytest.mark.parametrize("double", [upsample_conv, transposed_conv])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_the_doubling_convolution_and_its_gradients_are_the_cpus(
    platform, double, dtype, tolerance
):
    x, kernel, weight = normal(0, 2, 4, 3, 5), normal(1, 3, 3, 5, 2), normal(2, 2, 8, 6, 2)

    def loss(x, kernel):
        out = double(x.astype(dtype), kernel)
        assert out.dtype == dtype
        return jnp.sum(out.astype(jnp.float32) * weight), out

    both = jax.value_and_grad(loss, (0, 1), has_aux=True)
    found, expected = under(platform, both, x, kernel), under("cpu", both, x, kernel)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.float32(a), np.float32(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    ("double", "reference"), [(upsample_conv, doubled), (transposed_conv, spread)]
)
def test_its_second_derivatives_are_those_of_the_plain_form(double, reference):
    x, kernel = normal(0, 3, 5, 4, 3), normal(1, 3, 3, 3, 2)

    def loss(x, kernel, f):
        return jnp.sum(jnp.sin(f(x, kernel)))

    expected = penalty_in_float64(functools.partial(loss, f=reference), x, kernel)
    with compiling_for("gpu"):
        found = penalty(functools.partial(loss, f=double), x, kernel)
    assert_close(found, expected)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("double", [upsample_conv, transposed_conv])
def test_it_is_one_convolution_and_its_gradients_two_that_dilate_no_image(platform, double):
    """Multiplying the zeros of a dilated image would be four times the work."""
    x, kernel = normal(0, 2, 4, 4, 5), normal(1, 3, 3, 5, 2)
    forward = convolutions(lowered(platform, double, x, kernel))
    assert len(forward) == 1 and "lhs_dilate = [2, 2]" in forward[0]

    def loss(x, kernel):
        return jnp.sum(jnp.square(double(x, kernel)))

    whole = convolutions(lowered(platform, jax.grad(loss, (0, 1)), x, kernel))
    assert len(whole) == 3
    assert sum("lhs_dilate = [2, 2]" in line for line in whole) == 1
    assert sum("rhs_dilate = [2, 2]" in line for line in whole) == 1  # cuDNN's gradient of weights


def convolutions(text: str) -> list[str]:
    return [line for line in text.splitlines() if "stablehlo.convolution" in line]


# Crops


@pytest.mark.parametrize("platform", ACCELERATORS)
@pytest.mark.parametrize("pad", [0, 1, 4])
def test_crops_are_the_cpus_to_the_bit(platform, pad):
    images = make_images(64)

    def crop(images):
        return data_lib.crop_flip(KEY, jnp.arange(64), images, pad, True)

    assert same_bits(under(platform, crop, images), under("cpu", crop, images))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_crops_gather_nothing(platform):
    def crop(images):
        return data_lib.crop_flip(KEY, jnp.arange(4), images, 2, False)

    sliced = re.compile(r"stablehlo\.(dynamic_)?(gather|slice)")
    found = {match[0] for match in sliced.finditer(lowered(platform, crop, make_images(4)))}
    assert found <= {"stablehlo.slice"}
    assert "stablehlo.gather" in lowered("cpu", crop, make_images(4))


# The guard


@pytest.mark.parametrize("platform", ["cpu", *ACCELERATORS])
@pytest.mark.parametrize("bad", [None, "a", "b", "c", "loss"])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_the_guard_keeps_all_or_nothing(platform, bad, number):
    # Of these a GPU makes a vector, and leaves the others as they are.
    floats = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 3)), "c": jnp.zeros(())}
    old = floats, {"n": jnp.arange(2), "x": jnp.ones(3)}
    new = tuple({name: x + 1 for name, x in some.items()} for some in old)
    metrics = {"loss": jnp.float32(1), "shares": jnp.ones(4)}
    where = metrics if bad in metrics else new[0]
    if bad:
        where[bad] = where[bad].at[(0,) * where[bad].ndim].set(number)
    with compiling_for(platform):
        kept, seen = jax.jit(steps.guard)(new, old, metrics)
    assert float(seen["skipped"]) == (bad is not None)
    assert same_bits(kept, old if bad else new)


@pytest.mark.parametrize("platform", ["cpu", *ACCELERATORS])
def test_the_guard_leaves_alone_what_a_step_did_not_change(platform):
    def step(old):
        changed = jax.tree.map(lambda x: x + 1, old[0])
        return steps.guard((changed, old[1]), old, {"loss": old[0]["a"][0]})

    old = {"a": jnp.ones(3), "b": jnp.ones(2)}, {"c": jnp.ones((5, 7)), "d": jnp.ones((4, 7))}
    with compiling_for(platform):
        program = jax.make_jaxpr(step)(old).jaxpr
    untouched = [v for v in program.invars if v.aval.shape[1:] == (7,)]
    assert len(untouched) == 2
    for v in untouched:
        assert v in program.outvars
        assert not any(v in equation.invars for equation in program.eqns)
