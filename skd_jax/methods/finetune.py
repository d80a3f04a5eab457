"""Fine-tuning: T_n learns the new images and nothing holds the old classes. A lower bound.

No paper: the "FT" of all of them. ``outputs="all"`` takes the cross-entropy over all classes, so
that the old outputs only ever lose; ``"new"`` over the new ones, which leaves the old rows of the
head alone but for weight decay (as PyCIL; FACIL leaves them out of its optimiser).

Keeps nothing. Classifies by the head over all classes seen. Published at 50 base classes,
ResNet-18, at the end: 9.0 with 5 tasks, 4.8 with 10 (FCS's table).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from skd_jax import steps
from skd_jax.config import Supervised, learning
from skd_jax.methods.phase import Method, Metrics, Phase, Setting
from skd_jax.methods.phases import learn
from skd_jax.state import Batch, Kept, Trained


@dataclasses.dataclass(frozen=True)
class Settings(Supervised):
    """Fine-tuning."""

    name: str = "finetune"
    outputs: str = "all"  # that the softmax runs over: "all" or "new"


def step(
    static: Settings,
    nets: steps.Networks,
    state: Trained,
    kept: Kept,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Trained, Metrics]:
    """One step of cross-entropy on new images."""
    del key
    outputs = new_outputs(state, kept) if static.outputs == "new" else None
    return steps.supervised(nets, static, state, batch.images, batch.labels, rates, outputs=outputs)


def new_outputs(state: Trained, kept: Any) -> jax.Array:
    """Which outputs of the head are of this task: bool [K]."""
    old, all_ = (x.params["head"]["kernel"].shape[-1] for x in (kept.classifier, state.network))
    return jnp.arange(all_) >= old


def warnings(setting: Setting) -> list[str]:
    """One of a task of one class, where the softmax runs over the new outputs: it is constant."""
    settings, one = setting.config.method, [n == 1 for n in setting.classes[1:]]
    outputs = getattr(settings, "outputs", None)
    if outputs == "all" or not any(one):
        return []
    fix = "; or set config.method.outputs='all'" if outputs else ""
    return [
        f"task {one.index(True) + 1} has one new class, and {settings.name} tells new classes from "
        "each other alone (a softmax over the new outputs), so nothing is learned of it: give it "
        f"more classes{fix}"
    ]


def phases(setting: Setting, task: int) -> list[Phase]:
    """One learning phase a task."""
    settings = setting.config.method
    return [learn(setting, task, settings, step, settings)] if task else []


METHOD = Method(
    "finetune",
    Settings,
    phases,
    check=learning("method.", choices={"outputs": ("all", "new")}).check,
    warnings=warnings,
    family="bound",
)
