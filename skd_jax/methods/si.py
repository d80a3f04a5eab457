"""Synaptic Intelligence: a quadratic penalty weighed by what each weight did for the loss.

While a task is learned, omega_i += -g_i * (step of theta_i), with g the gradient of the task's loss
without the penalty and the step that was really made, momentum and weight decay included. After it
Omega_i += max(omega_i, 0) / ((theta_end - theta_start)^2 + xi), and the anchor moves. Loss =
CE(new) + weight * sum_i Omega_i (theta_i - theta'_i)^2.

omega may be negative, since momentum and weight decay move a weight without g; it is cut at 0 so
that the penalty has a minimum (FACIL does not cut). Avalanche's gradient has the penalty in it.
Defaults are FACIL's (its grid for the weight starts at 10); xi and c of the paper are not verified.

T_0's training has to be watched too, so SI trains T_0 itself, by the steps of all methods: equal to
rounding, which training amplifies. It cannot begin from another method's T_0.

Keeps Omega. Classifies by the head. No published number with 50 base classes was found.

References:
  Zenke, Poole and Ganguli, "Continual Learning Through Synaptic Intelligence", ICML 2017.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from skd_jax import steps
from skd_jax.config import Supervised, learning
from skd_jax.methods import finetune
from skd_jax.methods import phases as shared
from skd_jax.methods.penalty import KeptImportance, accumulated, penalised
from skd_jax.methods.phase import Method, Metrics, Phase, Setting
from skd_jax.state import Batch, Params, Trained


@dataclasses.dataclass(frozen=True)
class Settings(Supervised):
    """SI."""

    name: str = "si"
    weight: float = 0.1  # c
    xi: float = 0.1  # keeps Omega finite where a weight hardly moved


@struct.dataclass
class Path(Trained):
    """A network in training, its weights at the task's start, and omega, both like its params."""

    start: Params
    omega: Params


def walked(omega: Params, gradient: Params, before: Params, after: Params) -> Params:
    """The omega after one more step: - g_i (theta_i(s + 1) - theta_i(s)) is added."""
    return jax.tree.map(lambda w, g, a, b: w - g * (b - a), omega, gradient, before, after)


def of_path(omega: Params, start: Params, end: Params, xi: float) -> Params:
    """A task's Omega: max(omega, 0) / ((theta_end - theta_start)^2 + xi)."""
    return jax.tree.map(
        lambda w, a, b: jnp.maximum(w, 0) / (jnp.square(b - a) + xi), omega, start, end
    )


def step(
    static: Any,
    nets: steps.Networks,
    state: Path,
    kept: KeptImportance,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Path, Metrics]:
    """One step on the task's images, and of omega; of T_0 too, which has no penalty."""
    del key
    weight = static.weight if kept.classifier is not None else 0.0
    new, gradient, metrics = penalised(nets, static, weight, state, kept, batch, rates)
    omega = walked(state.omega, gradient, state.network.params, new.network.params)
    return Path(new.network, new.optimiser, state.start, omega), metrics


def watched(phase: Phase, xi: float) -> Phase:
    """The same learning phase, with omega beside it."""

    def init(kept: Any) -> Path:
        begun = phase.init(kept)
        params = begun.network.params
        start, omega = jax.tree.map(jnp.copy, params), jax.tree.map(jnp.zeros_like, params)
        return Path(begun.network, begun.optimiser, start, omega)

    def finish(state: Path, kept: KeptImportance, take: Callable) -> KeptImportance:
        found = of_path(state.omega, state.start, state.network.params, xi)
        kept = dataclasses.replace(kept, importance=accumulated(kept.importance, found))
        return phase.finish(state, kept, take)

    return dataclasses.replace(phase, init=init, step=step, finish=finish)


def base(setting: Setting) -> Phase:
    """T_0's training, with omega beside it."""
    return watched(shared.base(setting), setting.config.method.xi)


def phases(setting: Setting, task: int) -> list[Phase]:
    """One learning phase a task."""
    settings = setting.config.method
    learned = [shared.learn(setting, task, settings, step, settings)] if task else []
    return [watched(phase, settings.xi) for phase in learned]


def depends(settings: dict[str, Any], done: frozenset[str]) -> dict[str, Any]:
    """What of the settings the phases of these names depend on: T_0's on xi alone."""
    return settings if "learn" in done else {name: settings[name] for name in ("name", "xi")}


METHOD = Method(
    "si",
    Settings,
    phases,
    kept=KeptImportance,
    base=base,
    depends=depends,
    check=learning("method.", not_negative=("weight",), positive=("xi",)).check,
    warnings=finetune.warnings,
    keeps="weights' importance",
)
