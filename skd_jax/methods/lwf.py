"""Learning without Forgetting: T_n teaches T_{n+1} its outputs on the new images.

Loss = CE(new) + weight * KD_T(z', z over the old outputs), as class-incremental comparisons take it
(PyCIL: weight 3, T = 2, cross-entropy over the new outputs, no factor T^2). The paper's weight of 1
is of heads that are told apart by the task; with one head for all it holds too little: FACIL's
users got 16 in place of 30.2 with it, and its own search begins at 10.

Keeps nothing beside T_n. Classifies by the head over all classes seen. Published at 50 base
classes, ResNet-18, at the end: 24.0 with 5 tasks, 16.5 with 10 (FCS's table, whose form is not
said). The "LwF" in Mnemonics' tables keeps exemplars, and that in PASS's is ``lwf_mc``.

References:
  Li and Hoiem, "Learning without Forgetting", ECCV 2016.
"""

import dataclasses

import jax

from skd_jax import steps
from skd_jax.config import Supervised, learning
from skd_jax.methods import finetune
from skd_jax.methods.distillation import distillation_loss
from skd_jax.methods.finetune import new_outputs
from skd_jax.methods.phase import Method, Metrics, Phase, Setting, logits
from skd_jax.methods.phases import learn
from skd_jax.state import Batch, Kept, Trained


@dataclasses.dataclass(frozen=True)
class Settings(Supervised):
    """LwF."""

    name: str = "lwf"
    temperature: float = 2.0  # T
    weight: float = 3.0  # of the distillation
    outputs: str = "new"  # that the cross-entropy runs over: "new" or "all"


def step(
    static: Settings,
    nets: steps.Networks,
    state: Trained,
    kept: Kept,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Trained, Metrics]:
    """One step on new images."""
    del key
    old = logits(None, nets, kept, batch.images)

    def penalty(features: jax.Array, new: jax.Array) -> jax.Array:
        del features
        distilled = distillation_loss(old, new[:, : old.shape[1]], static.temperature)
        return static.weight * distilled

    outputs = new_outputs(state, kept) if static.outputs == "new" else None
    return steps.supervised(
        nets, static, state, batch.images, batch.labels, rates, penalty, outputs
    )


def phases(setting: Setting, task: int) -> list[Phase]:
    """One learning phase a task."""
    settings = setting.config.method
    return [learn(setting, task, settings, step, settings)] if task else []


METHOD = Method(
    "lwf",
    Settings,
    phases,
    check=learning(
        "method.",
        choices={"outputs": ("all", "new")},
        not_negative=("weight",),
        positive=("temperature",),
    ).check,
    warnings=finetune.warnings,
)
