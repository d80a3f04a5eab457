"""Classifiers: a ResNet feature extractor F and a linear head H that grows.

References:
  He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from skd_jax.models.conv import Conv
from skd_jax.models.norm import BatchNorm

Norm = Callable[[str], BatchNorm]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; a 1x1 convolution where the shape changes.

    Attributes:
      features: output channels.
      stride: step in pixels of the first convolution.
      norm: a batch normalisation of a name.
      precision: of products of float32, see :func:`skd_jax.models.conv.conv`.
      last_relu: end in a ReLU.
    """

    features: int
    stride: int
    norm: Norm
    precision: str = "highest"
    last_relu: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [B, H, W, I] to [B, H / stride, W / stride, features]."""
        conv = partial(Conv, self.features, precision=self.precision)
        y = conv(stride=self.stride, name="conv1")(x)
        y = nn.relu(self.norm("bn1")(y, train))
        y = conv(name="conv2")(y)
        y = self.norm("bn2")(y, train)
        if x.shape != y.shape:
            x = conv(size=1, stride=self.stride, name="conv_shortcut")(x)
            x = self.norm("bn_shortcut")(x, train)
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
    """

    blocks: tuple[int, ...]
    width: int
    large_stem: bool
    bn_momentum: float = 0.9
    dtype: str = "float32"
    axis_name: str | None = None
    precision: str = "highest"
    last_relu: bool = True

    @property
    def num_features(self) -> int:
        """F, the length of a feature vector."""
        return self.width * 2 ** (len(self.blocks) - 1)

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
                relu = self.last_relu or not last
                block = Block(self.width * 2**stage, stride, norm, self.precision, relu, name=name)
                x = block(x, train)
        return jnp.mean(x, axis=(1, 2), dtype=jnp.float32)


class Classifier(nn.Module):
    """T_n and S_n: (F(x), H(F(x))) with a plain linear head.

    Attributes:
      features: the feature extractor F.
      num_classes: K, outputs of the head H.
    """

    features: ResNet
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        """Images [B, H, W, C] to (features float32 [B, F], logits float32 [B, K])."""
        features = self.features(x, train)
        init = nn.initializers.lecun_normal()
        precision = self.features.precision
        head = nn.Dense(self.num_classes, kernel_init=init, precision=precision, name="head")
        return features, head(features)


def resnet(family: str, depth: int, width: int, **kwargs) -> ResNet:
    """The ResNet of a family and depth: "cifar" 8, 14, 20, 32, ... or "imagenet" 10, 18.

    Raises:
      ValueError: no such family or depth.
    """
    if family == "cifar" and depth >= 8 and (depth - 2) % 6 == 0:
        return ResNet(((depth - 2) // 6,) * 3, width, large_stem=False, **kwargs)
    if family == "imagenet" and depth in (10, 18):
        return ResNet(((depth - 2) // 8,) * 4, width, large_stem=True, **kwargs)
    raise ValueError(
        f"no {family!r} ResNet of depth {depth}: use family 'cifar' with depth 6n + 2 "
        "(8, 14, 20, 32, ...) or family 'imagenet' with depth 10 or 18"
    )


def grow_head(params: dict, key: jax.Array, num_new: int) -> dict:
    """Classifier params with ``num_new`` more outputs; the old ones' weights stay to the bit."""
    kernel, bias = params["head"]["kernel"], params["head"]["bias"]
    new = nn.initializers.lecun_normal()(key, (kernel.shape[0], num_new), kernel.dtype)
    head = {
        "kernel": jnp.concatenate([kernel, new], axis=1),
        "bias": jnp.concatenate([bias, jnp.zeros((num_new,), bias.dtype)]),
    }
    return {**params, "head": head}


def align_head(params: dict, num_old: int) -> dict:
    """Classifier params whose new outputs' weights are as long, in the mean, as the old ones'.

    References:
      Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning", CVPR
      2020 (WA); no part of the paper.
    """
    kernel = params["head"]["kernel"]
    length = jnp.linalg.norm(kernel, axis=0)
    ratio = jnp.mean(length[:num_old]) / jnp.mean(length[num_old:])
    scale = jnp.where(jnp.arange(kernel.shape[1]) < num_old, 1.0, ratio)
    return {**params, "head": {**params["head"], "kernel": kernel * scale[None]}}
