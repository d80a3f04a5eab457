"""Gradients of gradients, as a gradient penalty takes them: those of the plain formulas."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from test_models import norm_variables, normal, same_bits

from skd_jax.models import MOMENTS, BatchNorm
from skd_jax.models import norm as norm_module
from skd_jax.models.conv import conv, transposed_conv, upsample_conv

AXES = (0, 1, 2)
WEIGHT = normal(7, 4, 3, 4, 6)
X = 2 * normal(0, 4, 3, 4, 6) + 1
VARIABLES = norm_variables(6)


def penalty(loss, *args):
    """The loss's squared gradient, weighted, and the gradient of that by all arguments.

    Unweighted, the error of a mean that is taken for a constant can cancel.
    """
    every = tuple(range(len(args)))

    def square(*args):
        grads = jax.grad(loss, every)(*args)
        return sum(jnp.sum(jnp.square(g) * normal(8, *g.shape)) for g in jax.tree.leaves(grads))

    return jax.jit(jax.value_and_grad(square, every))(*args)


def penalty_in_float64(loss, *args):
    with jax.enable_x64(True):
        whole = jax.tree.map(lambda a: np.asarray(a, np.float64), args)
        return jax.tree.map(np.asarray, penalty(loss, *whole))


def assert_close(found, expected, tolerance=1e-4):
    """Every array to a share of its own largest value."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert b.dtype == np.float64
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def of_output(out):
    return jnp.sum(jnp.sin(out) * WEIGHT)


def of_moments(mean, var):
    slopes = jnp.arange(1.0, 7.0)
    return jnp.sum(jnp.sin(mean) * slopes) + jnp.sum(jnp.square(var) / slopes)


def plain_moments(x):
    mean = x.mean(AXES)
    return mean, jnp.square(x - mean[None, None, None]).mean(AXES)


def plain(params, x, taken):
    mean, var = plain_moments(x)
    normalised = (x - mean[None, None, None]) / jnp.sqrt(var + 1e-5)[None, None, None]
    out = normalised * params["scale"][None, None, None] + params["bias"][None, None, None]
    return ("output" in taken) * of_output(out) + ("moments" in taken) * of_moments(mean, var)


def ours(params, x, taken, axis_name=None):
    mutable = ["batch_stats", MOMENTS]
    variables = {**VARIABLES, "params": params}
    out, seen = BatchNorm(axis_name=axis_name).apply(variables, x, True, mutable=mutable)
    moments = seen[MOMENTS]
    of_handed = of_moments(moments["mean"], moments["var"])
    return ("output" in taken) * of_output(out) + ("moments" in taken) * of_handed


@pytest.mark.parametrize("taken", ["output", "moments", "output and moments"])
def test_those_of_batch_norm_in_train_mode(taken):
    params = VARIABLES["params"]
    expected = penalty_in_float64(partial(plain, taken=taken), params, X)
    assert_close(penalty(partial(ours, taken=taken), params, X), expected)


def test_those_of_moments_handed_out_in_eval_mode():
    def handed(x):
        _, seen = BatchNorm().apply(VARIABLES, x, False, mutable=[MOMENTS])
        return of_moments(seen[MOMENTS]["mean"], seen[MOMENTS]["var"])

    expected = penalty_in_float64(lambda x: of_moments(*plain_moments(x)), X)
    assert_close(penalty(handed, X), expected)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_those_of_batch_norm_over_shards(shards):
    """Mapped over a mesh where there are devices enough, else by ``jax.vmap``."""
    params, weight = VARIABLES["params"], jnp.asarray(WEIGHT)

    def local(x, weight):
        variables = {**VARIABLES, "params": params}
        module = BatchNorm(axis_name="batch")
        out, seen = module.apply(variables, x, True, mutable=["batch_stats", MOMENTS])
        handed = of_moments(seen[MOMENTS]["mean"], seen[MOMENTS]["var"])
        return jax.lax.psum(jnp.sum(jnp.sin(out) * weight), "batch") + handed

    def over_shards(x):
        if shards <= jax.device_count():
            mesh = Mesh(np.array(jax.devices()[:shards]), ("batch",))
            mapped = jax.shard_map(local, mesh=mesh, in_specs=(P("batch"),) * 2, out_specs=P())
            return mapped(x, weight)
        split = (a.reshape(shards, -1, *a.shape[1:]) for a in (x, weight))
        return jax.vmap(local, axis_name="batch")(*split)[0]

    expected = penalty_in_float64(lambda x: plain(params, x, "output and moments"), X)
    assert_close(penalty(over_shards, X), expected)


def test_first_derivatives_are_to_the_bit_those_without_the_means_part(monkeypatch):
    def first():
        loss = partial(ours, taken="output and moments")
        return jax.jit(jax.value_and_grad(loss, (0, 1)))(VARIABLES["params"], X)

    def constant_mean(rows, mean):
        return norm_module._mean_square(rows, jax.lax.stop_gradient(mean))

    found = first()
    monkeypatch.setattr(norm_module, "_variance", constant_mean)
    assert same_bits(found, first())


def jaxs(x, kernel, stride=1):
    edges = [(size // 2, size // 2) for size in kernel.shape[:2]]
    order = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, edges, dimension_numbers=order)


def doubled(x, kernel):
    return jaxs(x.repeat(2, axis=1).repeat(2, axis=2), kernel)


def spread(x, kernel):
    order = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_transpose(x, kernel, (2, 2), "SAME", dimension_numbers=order)


@pytest.mark.parametrize("batch", [3, 18])  # in one part, and in two of the weight gradient
@pytest.mark.parametrize(
    ("convolve", "reference"),
    [
        (conv, jaxs),
        (partial(conv, stride=2), partial(jaxs, stride=2)),
        (upsample_conv, doubled),
        (transposed_conv, spread),
    ],
)
def test_those_of_a_convolution(convolve, reference, batch):
    x, kernel = normal(0, batch, 5, 4, 3), normal(1, 3, 3, 3, 2)

    def loss(x, kernel, f):
        return jnp.sum(jnp.sin(f(x, kernel)))

    expected = penalty_in_float64(partial(loss, f=reference), x, kernel)
    assert_close(penalty(partial(loss, f=convolve), x, kernel), expected)


@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (3, 5)])
def test_those_of_a_convolution_from_or_to_few_channels(inputs, outputs):
    x, kernel = normal(0, 2, 9, 8, inputs), normal(1, 3, 3, inputs, outputs)

    def loss(x, kernel, f):
        return jnp.sum(jnp.sin(f(x, kernel)))

    expected = penalty_in_float64(partial(loss, f=jaxs), x, kernel)
    assert_close(penalty(partial(loss, f=conv), x, kernel), expected)


def test_those_of_a_convolution_of_bfloat16():
    x, kernel = normal(0, 3, 5, 4, 3), normal(1, 3, 3, 3, 2)

    def loss(x, kernel):
        return jnp.sum(jnp.sin(conv(x.astype(jnp.bfloat16), kernel).astype(jnp.float32)))

    expected = penalty_in_float64(lambda x, k: jnp.sum(jnp.sin(jaxs(x, k))), x, kernel)
    assert_close(penalty(loss, x, kernel), expected, 0.1)
