"""ABD, "Always Be Dreaming": local cross-entropy, distillation through the old head, a head apart.

A generator D is trained from T_n (see :mod:`skd_jax.methods.inversion`). Then each step takes B
real images of the n_N new classes and B of D, labelled by T_n, in one forward pass; of s = n_O +
n_N classes seen,

    L = n_N / s  CE of real images over the new outputs
      + CE of H(f), f held fixed, of both over all outputs, weighted n_O / s (old), n_N / s (new)
      + 0.1 mean over both of ||H_n f - H_n f'||^2 / n_O

f are T_{n+1}'s features, f' those of the frozen T_n, H_n its head. So features never learn to tell
real images from drawn ones; the head does learn all classes, on features that it cannot change.
Nothing is kept but T_n. The largest output is the class.

Published: 250 epochs, rate 0.1 / 10 at 100, 150 and 200, decay 2e-4, 10,000 steps of D; here epochs
and rates are those that all methods of a benchmark share. The paper trains on equal tasks from
scratch; with 50 base classes others' runs of it disagree (average of 5 tasks 62.40 in R-DFCIL, 63.8
in FeTrIL's table). Its code takes the head's cross-entropy over all 100 outputs, those of classes
to come included (restricted to those seen, a user got a last accuracy of 42 in place of 45); here
the head has no outputs but those seen, as the paper writes it. Not verified: the paper was read
through its code and notes.

References:
  Smith, Hsu, Balloch, Shen, Jin and Kira, "Always Be Dreaming: A New Approach for Data-Free
  Class-Incremental Learning", ICCV 2021.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from skd_jax import losses, parallel, steps
from skd_jax.config import Config, Supervised, learning
from skd_jax.methods import inversion
from skd_jax.methods.finetune import new_outputs
from skd_jax.methods.inversion import GENERATOR, Inversion, beside, invert
from skd_jax.methods.phase import Method, Metrics, Phase, Setting
from skd_jax.methods.phases import learn
from skd_jax.methods.skd.phases import KeptDelegator, delegator_module
from skd_jax.methods.skd.settings import Delegator as DelegatorSettings
from skd_jax.models import Delegator
from skd_jax.state import Batch, Network, Trained
from skd_jax.steps import eval_mode, guard, head, sgd, train_mode, update

INVERSION = Inversion(steps=10_000)


@dataclasses.dataclass(frozen=True)
class Settings(Supervised):
    """ABD."""

    name: str = "abd"
    distillation: float = 0.1  # weight of the distillation
    delegator: DelegatorSettings = GENERATOR
    inversion: Inversion = INVERSION


def class_weights(old: int, classes: int) -> jax.Array:
    """What classes weigh in the head's loss: n_O / s each of the old, n_N / s of the new, [s]."""
    is_old = jnp.arange(classes) < old
    return jnp.where(is_old, old / classes, 1 - old / classes)


def local_loss(logits: jax.Array, labels: jax.Array, new: jax.Array, share: float) -> jax.Array:
    """Cross-entropy of real images over the new outputs, weighted by the new classes' share.

    Args:
      logits: z of real images, [B, s].
      labels: one-hot [B, s].
      new: which outputs are new, bool [s].
      share: n_N / s.
    """
    return share * losses.classification_loss(logits, labels, new)


def head_loss(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """Cross-entropy over all outputs, each example weighted as its class; not divided by weights.

    Args:
      logits: H(f) with f held fixed, of real images and drawn ones, [B, s].
      labels: one-hot [B, s].
      weights: of the classes, [s].
    """
    of_labels = jnp.matmul(labels, weights, precision="highest")
    return losses.classification_loss(logits, labels, weights=of_labels)


def distillation_loss(old: jax.Array, new: jax.Array) -> jax.Array:
    """Mean over the batch of ||H_n f - H_n f'||^2 / n_O: drift that the old head sees.

    Args:
      old: H_n f', [B, n_O].
      new: H_n f, [B, n_O].
    """
    return jnp.mean(jnp.square(new - old))


@dataclasses.dataclass(frozen=True)
class _Learning:
    """What a step depends on that is no array."""

    settings: Settings
    delegator: Delegator


def step(
    static: _Learning,
    nets: steps.Networks,
    state: Trained,
    kept: KeptDelegator,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Trained, Metrics]:
    """One step on real images and as many of D."""
    teacher, network, real = kept.classifier, state.network, len(batch.labels)
    assert teacher is not None
    classifier = nets.classifier(network.params)
    classes, new = classifier.num_classes, new_outputs(state, kept)
    drawn, old_logits = beside(static.delegator, nets, kept, batch, key)
    old = old_logits.shape[-1]
    images = jnp.concatenate([batch.images, drawn])
    labels = jnp.concatenate([batch.labels, jnp.argmax(old_logits, axis=-1)])
    one_hot, weights = jax.nn.one_hot(labels, classes), class_weights(old, classes)
    target = head(nets, teacher, eval_mode(nets.classifier(teacher.params), teacher, images)[0])

    def loss_fn(params):
        (features, logits), stats, _ = train_mode(classifier, params, network.batch_stats, images)
        held = head(nets, Network(params, {}), jax.lax.stop_gradient(features))
        parts = {
            "local": local_loss(logits[:real], one_hot[:real], new, 1 - old / classes),
            "head": head_loss(held, one_hot, weights),
            "distillation": distillation_loss(target, head(nets, teacher, features)),
        }
        loss = parts["local"] + parts["head"]
        loss += static.settings.distillation * parts["distillation"]
        accuracy = jnp.mean(logits[:real].argmax(-1) == batch.labels)
        return loss, ({"loss": loss, **parts, "train_accuracy": accuracy}, stats)

    (_, (metrics, stats)), grads = parallel.value_and_grad(loss_fn, nets.axis_name)(network.params)
    trained = update(state, grads, stats, sgd(static.settings), rates)
    return guard(trained, state, parallel.mean(metrics, nets.axis_name))


def phases(setting: Setting, task: int) -> list[Phase]:
    """The generator of T_{n-1}, then a learning phase, after which D is gone."""
    if not task:
        return []
    settings = setting.config.method
    static = _Learning(settings, delegator_module(setting.config))

    def finish(state: Trained, kept: KeptDelegator, take: Any) -> KeptDelegator:
        del take
        return dataclasses.replace(kept, classifier=state.network, delegator=None)

    return [
        invert(setting, task - 1),
        learn(setting, task, settings, step, static, finish=finish, draws=True),
    ]


def check(config: Config) -> None:
    """Checks what can be checked without images.

    Raises:
      UserError: a value is out of range; the message names the field.
    """
    learning("method.", not_negative=("distillation",)).check(config)
    inversion.check(config)


METHOD = Method(
    "abd",
    Settings,
    phases,
    kept=KeptDelegator,
    check=check,
    family="generator",
    tricks="old and new classes are balanced",
)
