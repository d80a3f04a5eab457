"""Batch normalisation that can hand out the batch moments of its input."""

import flax.linen as nn
import jax
import jax.numpy as jnp

MOMENTS = "moments"


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last.

    Collections: params ``scale``, ``bias``; batch_stats ``mean``, ``var`` (float32, the running
    moments, biased variance). If the ``moments`` collection is mutable, the mean and biased
    variance of *this* batch are written there, in train and eval mode alike, and nothing else
    changes: that is mu_l(D(z)), sigma_l(D(z)) of Eq. 7.

    Attributes:
      momentum: share of the old running moment that is kept (0.9 is PyTorch's 0.1).
      epsilon: added to the variance.
      affine: learn a scale and a shift; the delegator's helper BN has none.
      axis_name: mapped axis over which the batch is split; moments are those of the whole batch.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    affine: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises ``x`` [..., C]: by its own moments if ``train``, else by the running ones."""
        channels = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)

        hand_out = self.is_mutable_collection(MOMENTS) and not self.is_initializing()
        mean, var = running_mean.value, running_var.value
        if train or hand_out:
            batch_mean, batch_var = self._moments(x)
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
        shift = -mean * scale
        if self.affine:
            gamma = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
            beta = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
            scale, shift = scale * gamma, shift * gamma + beta
        # One multiply-add a pixel; the channel vectors stay float32.
        y = x.astype(jnp.float32) * _channels(scale, x) + _channels(shift, x)
        return y.astype(x.dtype)

    def _moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Two passes: E[x^2] - E[x]^2 cancels catastrophically in float32 where |mean| >> std.
        x = x.astype(jnp.float32)
        axes = tuple(range(x.ndim - 1))
        mean = jnp.mean(x, axis=axes)
        if self.axis_name is not None:
            mean = jax.lax.pmean(mean, self.axis_name)
        var = jnp.mean(jnp.square(x - _channels(mean, x)), axis=axes)
        if self.axis_name is not None:
            var = jax.lax.pmean(var, self.axis_name)
        return mean, var


def _channels(vector: jax.Array, x: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))
