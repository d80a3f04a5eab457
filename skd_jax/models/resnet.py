"""Classifiers: a ResNet feature extractor F and a head H that grows.

References:
  He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from skd_jax.models.conv import Conv
from skd_jax.models.head import CosineHead
from skd_jax.models.norm import BatchNorm

Norm = Callable[[str], BatchNorm]

# Blocks a stage, by depth. From 50 on they are bottlenecks.
IMAGENET = {
    **{10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)},
    **{50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)},
}
_EXPANSION = 4  # of a bottleneck's channels


class Block(nn.Module):
    """Two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1, and a shortcut.

    Attributes:
      features: channels of the 3x3 convolutions.
      stride: step in pixels of the first 3x3 convolution.
      norm: a batch normalisation of a name.
      precision: of products of float32, see :func:`skd_jax.models.conv.conv`.
      last_relu: end in a ReLU.
      shortcut: see :class:`ResNet`.
      bottleneck: whether it is one; its output has 4 times the channels.
    """

    features: int
    stride: int
    norm: Norm
    precision: str = "highest"
    last_relu: bool = True
    shortcut: str = "conv"
    bottleneck: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [B, H, W, I] to [B, H / stride, W / stride, features], or 4 x features."""
        conv = partial(Conv, precision=self.precision)
        if self.bottleneck:
            y = conv(self.features, size=1, name="conv1")(x)
            y = nn.relu(self.norm("bn1")(y, train))
            y = conv(self.features, stride=self.stride, name="conv2")(y)
            y = nn.relu(self.norm("bn2")(y, train))
            y = conv(_EXPANSION * self.features, size=1, name="conv3")(y)
            y = self.norm("bn3")(y, train)
        else:
            y = conv(self.features, stride=self.stride, name="conv1")(x)
            y = nn.relu(self.norm("bn1")(y, train))
            y = conv(self.features, name="conv2")(y)
            y = self.norm("bn2")(y, train)
        if x.shape != y.shape and self.shortcut == "conv":
            x = conv(y.shape[-1], size=1, stride=self.stride, name="conv_shortcut")(x)
            x = self.norm("bn_shortcut")(x, train)
        elif x.shape != y.shape:
            x = x[:, :: self.stride, :: self.stride]
            new = y.shape[-1] - x.shape[-1]
            before = new // 2 if self.shortcut == "pad" else 0
            x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, new - before)))
        return nn.relu(x + y) if self.last_relu else x + y


class ResNet(nn.Module):
    """F: images [B, H, W, C] to one feature vector an image, float32 [B, F].

    Attributes:
      blocks: residual blocks a stage; each stage after the first halves the image and doubles the
        channels.
      width: channels of the first stage.
      large_stem: a 7x7 stride-2 convolution and a 3x3 stride-2 max pool instead of one 3x3.
      bn_momentum: see :class:`BatchNorm`.
      dtype: of activations, "float32" or "bfloat16"; params and statistics are float32.
      axis_name: see :class:`BatchNorm`.
      precision: of products of float32, the head's too, see :func:`skd_jax.models.conv.conv`.
      last_relu: the last block ends in a ReLU, as all others do. Without it features may be
        negative, which heads that compare directions (cosines) need.
      shortcut: of a block that changes the shape: "conv", a 1x1 convolution and BN; or no
        parameters: every second pixel, and new channels of zeros, half of them before the old ones
        and half after ("pad", option A of the paper), or all after ("pad_end").
      bottleneck: of which blocks it is made, see :class:`Block`.
    """

    blocks: tuple[int, ...]
    width: int
    large_stem: bool
    bn_momentum: float = 0.9
    dtype: str = "float32"
    axis_name: str | None = None
    precision: str = "highest"
    last_relu: bool = True
    shortcut: str = "conv"
    bottleneck: bool = False

    @property
    def num_features(self) -> int:
        """F, the length of a feature vector."""
        last = self.width * 2 ** (len(self.blocks) - 1)
        return _EXPANSION * last if self.bottleneck else last

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps images [B, H, W, C] to features, float32 [B, F]."""
        x = x.astype(self.dtype)

        def norm(name: str) -> BatchNorm:
            return BatchNorm(self.bn_momentum, axis_name=self.axis_name, name=name)

        stem = partial(Conv, self.width, precision=self.precision, name="conv_stem")
        if self.large_stem:
            x = stem(size=7, stride=2)(x)
            x = nn.relu(norm("bn_stem")(x, train))
            # PyTorch's padding, not "SAME"; flax takes pairs but is annotated with str.
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        else:
            x = stem()(x)
            x = nn.relu(norm("bn_stem")(x, train))
        for stage, count in enumerate(self.blocks):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"stage{stage + 1}_block{index + 1}"
                last = (stage, index) == (len(self.blocks) - 1, count - 1)
                block = Block(
                    self.width * 2**stage,
                    stride,
                    norm,
                    self.precision,
                    self.last_relu or not last,
                    self.shortcut,
                    self.bottleneck,
                    name=name,
                )
                x = block(x, train)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


class Classifier(nn.Module):
    """T_n and S_n: (F(x), H(F(x))).

    Attributes:
      features: the feature extractor F.
      num_classes: K, outputs of the head H.
      head: "linear", or "cosine", see :class:`CosineHead`.
    """

    features: ResNet
    num_classes: int
    head: str = "linear"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Images [B, H, W, C] to (features float32 [B, F], logits float32 [B, K])."""
        features = self.features(x, train)
        precision = self.features.precision
        if self.head == "cosine":
            return features, CosineHead(self.num_classes, precision, name="head")(features)
        init = nn.initializers.lecun_normal()
        head = nn.Dense(self.num_classes, kernel_init=init, precision=precision, name="head")
        return features, head(features)


def resnet(family: str, depth: int, width: int, **kwargs) -> ResNet:
    """The ResNet of a family and depth.

    Args:
      family: "cifar", three stages; or "imagenet", torchvision's, four.
      depth: 8, 14, 20, 32, ...; or 10, 18, 34, and of bottlenecks 50, 101, 152, with the stride in
        the 3x3 convolution.
      width: channels of the first stage.
      kwargs: other attributes of :class:`ResNet`.

    Raises:
      ValueError: no such family or depth.
    """
    if family == "cifar" and depth >= 8 and (depth - 2) % 6 == 0:
        return ResNet(((depth - 2) // 6,) * 3, width, large_stem=False, **kwargs)
    if family == "imagenet" and depth in IMAGENET:
        bottleneck = depth >= 50
        return ResNet(IMAGENET[depth], width, large_stem=True, bottleneck=bottleneck, **kwargs)
    raise ValueError(
        f"no {family!r} ResNet of depth {depth}: use family 'cifar' with depth 6n + 2 "
        f"(8, 14, 20, 32, ...) or family 'imagenet' with depth {', '.join(map(str, IMAGENET))}"
    )
