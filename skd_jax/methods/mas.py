"""Memory Aware Synapses: a quadratic penalty weighed by how much the outputs move with a weight.

Loss = CE(new) + weight * sum_i Omega_i (theta_i - theta'_i)^2, and Omega_i is the mean over images
of |d ||z(x)||^2 / d theta_i|, z the logits of all classes seen. No label is needed. Omegas of
tasks add up.

Taken as the original has it: the squared norm, the absolute value of each image's own gradient.
FACIL takes the norm, the absolute value after a batch's mean, where opposite signs cancel, halves
old and new, and weighs by 1/2 (its grid starts at weight 400); Avalanche halves too.

Keeps Omega. Classifies by the head. No published number with 50 base classes was found; the paper
was read through code and notes, so what only it says is not verified.

References:
  Aljundi et al., "Memory Aware Synapses: Learning what (not) to forget", ECCV 2018.
"""

import dataclasses

import jax
import jax.numpy as jnp

from skd_jax import steps
from skd_jax.config import Supervised, learning
from skd_jax.methods import finetune
from skd_jax.methods.penalty import KeptImportance, Measured, importance, measure, penalised
from skd_jax.methods.phase import Method, Metrics, Phase, Setting
from skd_jax.methods.phases import learn
from skd_jax.state import Batch, Trained


@dataclasses.dataclass(frozen=True)
class Settings(Supervised):
    """MAS."""

    name: str = "mas"
    weight: float = 1.0  # lambda


def squared_norm(logits: jax.Array, beside: None = None) -> jax.Array:
    """||z||^2 of logits [K]."""
    del beside
    return jnp.sum(jnp.square(logits))


def sensitivity(
    static: None,
    nets: steps.Networks,
    state: Measured,
    kept: KeptImportance,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Measured, Metrics]:
    """Adds a batch to Omega."""
    del static, key, rates
    assert kept.classifier is not None
    return measure(squared_norm, jnp.abs, nets, state, kept.classifier, batch)


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
    new, _, metrics = penalised(nets, static, static.weight, state, kept, batch, rates)
    return new, metrics


def phases(setting: Setting, task: int) -> list[Phase]:
    """One learning phase a task, and Omega of its images, the base's included."""
    settings = setting.config.method
    first = [learn(setting, task, settings, step, settings)] if task else []
    return [*first, importance(setting, task, sensitivity, None)]


METHOD = Method(
    "mas",
    Settings,
    phases,
    kept=KeptImportance,
    check=learning("method.", not_negative=("weight",)).check,
    warnings=finetune.warnings,
    keeps="weights' importance",
)
