"""Batch normalisation that can hand out the batch moments of its input."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from skd_jax import parallel
from skd_jax.compiler import platform

MOMENTS = "moments"


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last.

    Collections: params ``scale``, ``bias``; batch_stats ``mean``, ``var`` (float32, the running
    moments, biased variance). If the ``moments`` collection is mutable, the mean and biased
    variance of *this* batch are written there, in train and eval mode alike, and nothing else
    changes: that is mu_l(D(z)), sigma_l(D(z)) of Eq. 7. Differentiable in reverse mode, as often as
    one likes.

    Attributes:
      momentum: share of the old running moment that is kept (0.9 is PyTorch's 0.1).
      epsilon: added to the variance.
      affine: learn a scale and a shift; without, it only normalises.
      axis_name: mapped axis over which the batch is split; moments are those of the whole batch.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    affine: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises ``x`` [..., C]: by its own moments if ``train``, else by the running ones."""
        dtype, channels = x.dtype, x.shape[-1]
        x = x.astype(jnp.float32)  # once: its gradient is summed in float32, then rounded once
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)

        hand_out = self.is_mutable_collection(MOMENTS) and not self.is_initializing()
        mean, var = running_mean.value, running_var.value
        if train or hand_out:
            batch_mean, batch_var = self._moments(x, mean)
            if hand_out:
                self.put_variable(MOMENTS, "mean", batch_mean)
                self.put_variable(MOMENTS, "var", batch_var)
            if train:
                mean, var = batch_mean, batch_var
        if train and self.is_mutable_collection("batch_stats") and not self.is_initializing():
            keep = self.momentum
            running_mean.value = keep * running_mean.value + (1 - keep) * mean
            running_var.value = keep * running_var.value + (1 - keep) * var

        scale = jax.lax.rsqrt(var + self.epsilon)
        shift = jnp.zeros_like(mean)
        if self.affine:
            scale *= self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
            shift = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        # Each device's own, as the gradients that _normalised gives them are.
        mean, scale, shift = parallel.varying((mean, scale, shift), self.axis_name)
        return _normalised(x, mean, scale, shift).astype(dtype)

    def _moments(self, x: jax.Array, running_mean: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = _rows(x)
        if platform() == "cpu":
            return _in_two_passes(rows, x.shape[-1], self.axis_name)
        # On a TPU sums about what is known beforehand are part of the convolution before. They are
        # exact to rounding times (mean - pivot)^2 / var. That of a pixel is less than the number of
        # pixels, and about 1 of most; a running mean's has no bound.
        pivot = running_mean if platform() == "tpu" else jax.lax.stop_gradient(rows[0, 0])
        mean, var = _in_one_pass(rows, pivot)
        return _joined(mean, var, self.axis_name)


def moments_by_layer(tree: Any) -> dict[str, tuple[Any, Any]]:
    """The (mean, variance) pairs of a batch_stats or moments collection, by their layers' names.

    Those of two collections of one network come in the same order.
    """
    layers, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda node: isinstance(node, dict) and "mean" in node
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (layer["mean"], layer["var"])
        for path, layer in layers
    }


def _in_two_passes(
    rows: jax.Array, channels: int, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance [C] of :func:`_rows` [B, rows, k C], of all devices.

    E[x^2] - E[x]^2 cancels catastrophically in float32 where |mean| >> std.
    """
    mean = parallel.mean(_sum(rows, channels) / (rows.size // channels), axis_name)
    return mean, parallel.mean(_variance(rows, mean), axis_name)


@jax.custom_vjp
def _in_one_pass(rows: jax.Array, pivot: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance [C] of pixels [B, P, C], by their distances from ``pivot`` [C].

    They do not depend on the pivot, but for rounding: the closer to the mean, the less cancels.
    """
    channels, count = len(pivot), rows.size // len(pivot)
    centred = rows - pivot[None, None]
    first, second = (total / count for total in _sums(centred, jnp.square(centred), channels))
    return pivot + first, jnp.maximum(second - jnp.square(first), 0)


def _in_one_pass_forward(
    rows: jax.Array, pivot: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    mean, var = _in_one_pass(rows, pivot)
    return (mean, var), (rows, mean)


def _in_one_pass_backward(
    saved: tuple[jax.Array, jax.Array], d_moments: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, None]:
    rows, mean = saved
    d_mean, d_var = (d[None, None] / (rows.size // len(mean)) for d in d_moments)
    return d_mean + 2 * d_var * (rows - mean[None, None]), None  # None: zero


_in_one_pass.defvjp(_in_one_pass_forward, _in_one_pass_backward)


def _joined(mean: jax.Array, var: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """Moments [C] of all devices' pixels, as many on each, by each one's: one collective.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances", 1979.
    """
    if axis_name is None:
        return mean, var
    here = jnp.arange(jax.lax.axis_size(axis_name)) == jax.lax.axis_index(axis_name)
    own = jnp.stack((mean, var))
    means, variances = jax.lax.psum(
        jnp.where(here[None, :, None], own[:, None], 0), axis_name
    )  # [devices, C] each
    mean = means.mean(axis=0)
    return mean, variances.mean(axis=0) + jnp.square(means - mean[None]).mean(axis=0)


def _mean_square(rows: jax.Array, mean: jax.Array) -> jax.Array:
    """Mean square distance [C] of :func:`_rows` [B, rows, k C] from ``mean`` [C]."""
    centred = rows - _tiled(mean, rows)
    return _sum(jnp.square(centred), len(mean)) / (rows.size // len(mean))


@jax.custom_vjp
def _variance(rows: jax.Array, mean: jax.Array) -> jax.Array:
    """Biased variance [C] of :func:`_rows` [B, rows, k C], whose mean [C] has to be ``mean``.

    Its derivative by the mean is zero, over all devices together, and computing it a pass over x:
    it is left out. The mean in the derivative by the rows is not: a second derivative needs it.
    """
    return _mean_square(rows, mean)


def _variance_forward(
    rows: jax.Array, mean: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _mean_square(rows, mean), (rows, mean)


def _variance_backward(
    saved: tuple[jax.Array, jax.Array], d_var: jax.Array
) -> tuple[jax.Array, None]:
    rows, mean = saved
    _, by_rows = jax.vjp(lambda rows: _mean_square(rows, mean), rows)
    return by_rows(d_var)[0], None  # None: zero


_variance.defvjp(_variance_forward, _variance_backward)


@jax.custom_vjp
def _normalised(x: jax.Array, mean: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """(x - mean) * scale + shift for x [B, ..., C] and vectors [C], all float32."""
    rows = _rows(x)
    y = (rows - _tiled(mean, rows)) * _tiled(scale, rows) + _tiled(shift, rows)
    return y.reshape(x.shape)


def _normalised_forward(
    x: jax.Array, mean: jax.Array, scale: jax.Array, shift: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return _normalised(x, mean, scale, shift), (x, mean, scale)


def _normalised_backward(
    saved: tuple[jax.Array, jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    x, mean, scale = saved
    rows, d_rows = _rows(x), _rows(dy)
    scaled = d_rows * (rows - _tiled(mean, rows))
    d_shift, d_scale = _sums(d_rows, scaled, x.shape[-1])
    d_x = (d_rows * _tiled(scale, rows)).reshape(x.shape)
    return d_x, -scale * d_shift, d_scale, d_shift


_normalised.defvjp(_normalised_forward, _normalised_backward)

# On a CPU, sums over pixels are taken in rows of whole pixels, some hundred values wide, and image
# by image: a reduction to a few channels would use one core and a few lanes of its vector unit.
_ROW = 256


def _rows(x: jax.Array) -> jax.Array:
    """``x`` [B, ..., C] as [B, rows, k C]."""
    pixels, channels, together = math.prod(x.shape[1:-1]), x.shape[-1], 1
    if platform() == "cpu":
        together = math.gcd(pixels, 1 << (_ROW // channels or 1).bit_length() - 1)
    return x.reshape(x.shape[0], pixels // together, together * channels)


def _tiled(vector: jax.Array, rows: jax.Array) -> jax.Array:
    """A vector [C] as often as a row holds pixels: [1, 1, k C]."""
    return jnp.tile(vector, rows.shape[-1] // len(vector))[None, None]


def _sum(rows: jax.Array, channels: int) -> jax.Array:
    """Sum over all pixels of :func:`_rows`, [C]."""
    return rows.sum(axis=1).reshape(-1, channels).sum(axis=0)


def _sums(one: jax.Array, other: jax.Array, channels: int) -> tuple[jax.Array, jax.Array]:
    """:func:`_sum` of both."""
    if platform() != "gpu":
        return _sum(one, channels), _sum(other, channels)
    # Both are made by one kernel, image by image, and summed up by one more; not by one each.
    total = jnp.stack((one.sum(axis=1), other.sum(axis=1))).sum(axis=1)
    return total[0], total[1]
