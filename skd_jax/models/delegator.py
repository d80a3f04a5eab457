"""The delegator D: a generator from latent vectors to pseudo images, and the helper BN.

References:
  Tables IV and V of the paper; the backbone is that of Fang et al., "Data-free adversarial
  distillation", 2019.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from skd_jax.models.conv import Conv
from skd_jax.models.norm import BatchNorm

LOW_RESOLUTION = (128, 128, 64)  # Table IV
HIGH_RESOLUTION = (512, 512, 256, 128, 64)  # Table V


class Delegator(nn.Module):
    """D: z [B, z_dim] to pseudo images [B, S, S, C] in the normalised space that T_n takes.

    Attributes:
      image_size: S, pixels; divisible by 2 ** (len(widths) - 1).
      channels: C, of the images.
      z_dim: length of a latent vector.
      widths: channels after the FC layer, then after each block, which doubles the image:
        ``LOW_RESOLUTION`` is Table IV, ``HIGH_RESOLUTION`` Table V.
      upsample: "transposed", Table V's 3x3 transposed convolution of stride 2, or "resize", nearest
        x2 and a 3x3 convolution, which is faster and draws no checkerboards.
      helper_bn: end in a BN over the image channels without scale or shift.
      bn_momentum: see :class:`BatchNorm`.
      dtype: of activations, "float32" or "bfloat16"; params, statistics and images are float32.
      axis_name: see :class:`BatchNorm`.
      precision: of products of float32, see :func:`skd_jax.models.conv.conv`.
    """

    image_size: int
    channels: int
    z_dim: int
    widths: tuple[int, ...]
    upsample: str = "resize"
    helper_bn: bool = True
    bn_momentum: float = 0.9
    dtype: str = "float32"
    axis_name: str | None = None
    precision: str = "highest"

    @nn.compact
    def __call__(self, z: jax.Array, train: bool) -> jax.Array:
        """Maps latent vectors [B, z_dim] to images, float32 [B, S, S, C]."""

        def conv(width: int, name: str, double: str = "") -> Conv:
            return Conv(width, bias=True, double=double, precision=self.precision, name=name)

        def norm(name: str, affine: bool = True) -> BatchNorm:
            return BatchNorm(self.bn_momentum, affine=affine, axis_name=self.axis_name, name=name)

        base, *blocks = self.widths
        start = self.image_size // 2 ** len(blocks)
        dtype = jnp.dtype(self.dtype)
        x = nn.Dense(start * start * base, dtype=dtype, precision=self.precision, name="fc")(z)
        x = norm("bn_fc")(x.reshape(-1, start, start, base), train)
        for index, width in enumerate(blocks, 1):
            x = conv(width, f"conv{index}", self.upsample)(x)
            x = nn.leaky_relu(norm(f"bn{index}")(x, train), 0.2)
        x = conv(self.channels, "conv_image")(x)
        x = jnp.tanh(x.astype(jnp.float32))
        return norm("bn_helper", affine=False)(x, train) if self.helper_bn else x
