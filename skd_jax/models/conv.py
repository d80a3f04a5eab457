"""Convolutions of the networks: He-initialised, NHWC, and one that upsamples at no cost."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

_DIMENSIONS = ("NHWC", "HWIO", "NHWC")
he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(
    x: jax.Array, kernel: jax.Array, stride: int = 1, padding: str | Sequence[tuple[int, int]] = ()
) -> jax.Array:
    """Convolves ``x`` [B, H, W, I] with ``kernel`` [h, w, I, O].

    The default padding is h // 2 and w // 2 on each side, PyTorch's, which at stride 2 differs from
    XLA's "SAME".
    """
    if not padding:
        padding = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return jax.lax.conv_general_dilated(
        x, kernel.astype(x.dtype), (stride, stride), padding, dimension_numbers=_DIMENSIONS
    )


def upsample_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution after nearest x2 upsampling, computed on the small image.

    Each output pixel sees a 3x3 window of the doubled image, which covers only 2x2 distinct pixels
    of the small one. So each of the four output phases is a 2x2 convolution of ``x`` with summed
    taps: the same numbers to float32 rounding for 4/9 of the multiplications.

    Args:
      x: [B, H, W, I].
      kernel: [3, 3, I, O].

    Returns:
      [B, 2H, 2W, O].
    """
    batch, height, width, _ = x.shape
    first, second, third = kernel[0], kernel[1], kernel[2]
    rows = (jnp.stack([first, second + third]), jnp.stack([first + second, third]))
    phases = []
    for row, top in zip(rows, (1, 0), strict=True):
        first, second, third = row[:, 0], row[:, 1], row[:, 2]
        columns = (jnp.stack([first, second + third], 1), jnp.stack([first + second, third], 1))
        for column, left in zip(columns, (1, 0), strict=True):
            phases.append(conv(x, column, padding=[(top, 1 - top), (left, 1 - left)]))
    out = jnp.stack(phases, axis=3).reshape(batch, height, width, 2, 2, -1)
    return out.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * height, 2 * width, -1)


class Conv(nn.Module):
    """A convolution with a [size, size, I, features] kernel, He (fan-out) initialised.

    Attributes:
      features: output channels.
      size: height and width of the kernel, pixels.
      stride: step in pixels.
      bias: add a bias, zero at first.
      upsample: double the image (nearest) first; needs size 3 and stride 1.
    """

    features: int
    size: int = 3
    stride: int = 1
    bias: bool = False
    upsample: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, I] to [B, H / stride, W / stride, features], or twice the size."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", he_normal, shape, jnp.float32)
        y = upsample_conv(x, kernel) if self.upsample else conv(x, kernel, self.stride)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            y = y + bias.astype(y.dtype)[None, None, None]
        return y
