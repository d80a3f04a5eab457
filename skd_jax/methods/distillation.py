"""Distillation by outputs: what T_n says of an image is what T_{n+1} is to say of it.

References:
  Li and Hoiem, "Learning without Forgetting", ECCV 2016: softened outputs.
  Rebuffi et al., "iCaRL", CVPR 2017: outputs one by one, each through a sigmoid.
"""

import jax
import jax.numpy as jnp
import optax


def distillation_loss(teacher: jax.Array, student: jax.Array, temperature: float) -> jax.Array:
    """KD_T: mean over the batch of - sum_c softmax(z' / T)_c log softmax(z / T)_c.

    Args:
      teacher: logits z' [B, K].
      student: logits z [B, K].
      temperature: T; no factor T^2, so the gradient falls with it.
    """
    target = jax.nn.softmax(teacher / temperature)
    return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(student / temperature), axis=-1))


def binary_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Binary cross-entropy: summed over the classes, mean over the batch.

    Args:
      logits: z [B, K].
      targets: in [0, 1], [B, K].
    """
    found = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets)
    return jnp.mean(jnp.sum(found, axis=-1))


def binary_targets(teacher: jax.Array, labels: jax.Array, classes: int) -> jax.Array:
    """Targets of iCaRL: sigmoid(z'_c) of old classes, whatever the label; of new ones the one-hot.

    Args:
      teacher: logits z' of the n_O old classes, [B, n_O].
      labels: int32 [B], positions in the head.
      classes: K, old and new ones.

    Returns:
      float32 [B, K].
    """
    new = jax.nn.one_hot(labels, classes)[:, teacher.shape[-1] :]
    return jnp.concatenate([jax.nn.sigmoid(teacher.astype(jnp.float32)), new], axis=-1)
