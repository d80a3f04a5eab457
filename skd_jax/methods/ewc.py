"""Elastic Weight Consolidation: a quadratic penalty weighed by the Fisher information.

Loss = CE(new) + weight / 2 * sum_i F_i (theta_i - theta'_i)^2 (the paper's Eq. 3), F the diagonal
of the Fisher information at theta': the mean over images of (d log p(y | x) / d theta_i)^2, each
image's gradient squared by itself. Online form (Schwarz et al.): one anchor, F <- gamma F + F_new.

The labels y are drawn from the model ("drawn": the Fisher information), its arg-max (FACIL's
default) or the true ones ("true": the empirical Fisher). p is the softmax over all classes seen.

Libraries differ: FACIL, PyCIL and Avalanche square the gradient of a batch's mean, which at an
optimum is about 1/B of this F. So their weights (FACIL's 5000, PyCIL's 1000 with F clipped at 1e-4)
do not carry over, and the best one here has to be searched over powers of 10; the default, 10, is
the power of 10 below FACIL's over a batch of 128, 5000 / 128 = 39. The gamma of the online form's
paper is not verified; 1 forgets nothing.

Keeps F. Classifies by the head. Published at 50 base classes, ResNet-18: 24.5 with 5 tasks.

References:
  Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017.
  Schwarz et al., "Progress & Compress", ICML 2018: the online form.
"""

import dataclasses

import jax
import jax.numpy as jnp

from skd_jax import parallel, steps
from skd_jax.config import Supervised, learning
from skd_jax.methods import finetune
from skd_jax.methods.penalty import KeptImportance, Measured, importance, measure, penalised
from skd_jax.methods.phase import Method, Metrics, Phase, Setting
from skd_jax.methods.phases import learn
from skd_jax.state import Batch, Trained


@dataclasses.dataclass(frozen=True)
class Settings(Supervised):
    """EWC."""

    name: str = "ewc"
    weight: float = 10.0  # lambda
    gamma: float = 1.0  # of F of earlier tasks, at each new one
    labels: str = "drawn"  # that F is of: "drawn", "argmax" or "true"


def log_likelihood(logits: jax.Array, label: jax.Array) -> jax.Array:
    """The log p(y | x) of logits [K]."""
    return jax.nn.log_softmax(logits)[label]


def fisher(
    static: Settings,
    nets: steps.Networks,
    state: Measured,
    kept: KeptImportance,
    batch: Batch,
    key: jax.Array | None,
    rates: jax.Array,
) -> tuple[Measured, Metrics]:
    """Adds a batch to F."""
    del rates
    assert kept.classifier is not None
    more = batch.labels
    if key is not None:
        index = parallel.example_index(len(batch.labels), nets.axis_name)
        more = jax.vmap(jax.random.fold_in, (None, 0))(key, index)

    def value(logits: jax.Array, label_or_key: jax.Array) -> jax.Array:
        if static.labels == "drawn":
            return log_likelihood(logits, jax.random.categorical(label_or_key, logits))
        if static.labels == "argmax":
            return log_likelihood(logits, jnp.argmax(logits))
        return log_likelihood(logits, label_or_key)

    return measure(value, jnp.square, nets, state, kept.classifier, batch, more)


def step(
    static: Settings,
    nets: steps.Networks,
    state: Trained,
    kept: KeptImportance,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Trained, Metrics]:
    """One step on new images."""
    del key
    new, _, metrics = penalised(nets, static, static.weight / 2, state, kept, batch, rates)
    return new, metrics


def found(setting: Setting, task: int) -> Phase:
    """F of a task's images."""
    settings = setting.config.method
    draws = settings.labels == "drawn"
    return importance(setting, task, fisher, settings, settings.gamma, draws=draws)


def phases(setting: Setting, task: int) -> list[Phase]:
    """One learning phase a task, and F of its images, the base's included."""
    settings = setting.config.method
    first = [learn(setting, task, settings, step, settings)] if task else []
    return [*first, found(setting, task)]


LIMITS = learning(
    "method.",
    choices={"labels": ("drawn", "argmax", "true")},
    not_negative=("weight", "gamma"),
)
METHOD = Method(
    "ewc",
    Settings,
    phases,
    kept=KeptImportance,
    check=LIMITS.check,
    warnings=finetune.warnings,
    keeps="weights' importance",
)
