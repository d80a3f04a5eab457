"""The head H of a classifier: linear, or of cosines; it grows with the classes.

References:
  Hou et al., "Learning a Unified Classifier Incrementally via Rebalancing" (LUCIR), CVPR 2019: the
  cosine head.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from skd_jax import losses


class CosineHead(nn.Module):
    """Logits sigma * cos(f, w_k): features f, one weight vector a class, no bias.

    Params: ``kernel`` [F, K], whose columns are the w_k, of any length; ``sigma`` [], 1 at first.

    Attributes:
      num_classes: K.
      precision: of the product, see :func:`skd_jax.models.conv.conv`.
    """

    num_classes: int
    precision: str = "highest"

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps features [B, F] to logits [B, K]."""
        shape = (features.shape[-1], self.num_classes)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        sigma = self.param("sigma", nn.initializers.ones, (), jnp.float32)
        return _cosine(features, kernel, sigma, self.precision)


def is_cosine(params: dict) -> bool:
    """Whether the head of these classifier params is a :class:`CosineHead`."""
    return "sigma" in params["head"]


def head_logits(params: dict, features: jax.Array, precision: str) -> jax.Array:
    """The head of classifier params on features [B, F]: logits [B, K]."""
    head = params["head"]
    if is_cosine(params):
        return _cosine(features, head["kernel"], head["sigma"], precision)
    return jnp.matmul(features, head["kernel"], precision=precision) + head["bias"][None]


def _cosine(features: jax.Array, kernel: jax.Array, sigma: jax.Array, precision: str) -> jax.Array:
    directions = losses.unit(kernel.T).T
    return sigma * jnp.matmul(losses.unit(features), directions, precision=precision)


def grow_head(params: dict, key: jax.Array, num_new: int) -> dict:
    """Classifier params with ``num_new`` more outputs; the old ones' weights stay to the bit."""
    head = params["head"]
    kernel = head["kernel"]
    new = nn.initializers.lecun_normal()(key, (kernel.shape[0], num_new), kernel.dtype)
    grown = {**head, "kernel": jnp.concatenate([kernel, new], axis=1)}
    if not is_cosine(params):
        bias = head["bias"]
        grown["bias"] = jnp.concatenate([bias, jnp.zeros((num_new,), bias.dtype)])
    return {**params, "head": grown}


def align_head(params: dict, num_old: int) -> dict:
    """Classifier params whose new outputs' weights are as long, in the mean, as the old ones'.

    For a linear head; a cosine head's outputs do not depend on any length.

    References:
      Zhao et al., "Maintaining Discrimination and Fairness in Class Incremental Learning", CVPR
      2020 (WA); no part of the paper.
    """
    kernel = params["head"]["kernel"]
    length = jnp.linalg.norm(kernel, axis=0)
    ratio = jnp.mean(length[:num_old]) / jnp.mean(length[num_old:])
    scale = jnp.where(jnp.arange(kernel.shape[1]) < num_old, 1.0, ratio)
    return {**params, "head": {**params["head"], "kernel": kernel * scale[None]}}
