"""LwF.MC: Learning without Forgetting with outputs one by one, each through a sigmoid.

Loss = sum over classes of binary cross-entropy, on the new images: the target of an old class is
sigmoid(z'_c), T_n's output of it; of a new class, the one-hot label. It is summed over the classes
and averaged over the batch (iCaRL's equation, ABD's code); mammoth averages over both, so its
rates are larger by the number of classes. A deviation: the rate and decay here are those of all
methods, 0.1 and 5e-4 at full scale; iCaRL's program, whose baseline this is, has 2.0 and 1e-5 of
the mean over 100 outputs, which is 0.02 and 1e-3 of the sum: a fifth of the rate here.

T_0 is that of all methods, trained by softmax; LwF.MC's own would be trained by sigmoids too.

Keeps nothing. Classifies by the head. Published at 50 base classes, ResNet-18: 45.9 with 5 tasks
(33.4 in a re-run).

References:
  Rebuffi et al., "iCaRL", CVPR 2017, where it is a baseline.
  Li and Hoiem, "Learning without Forgetting", ECCV 2016.
"""

import dataclasses

import jax

from skd_jax import steps
from skd_jax.config import Supervised, learning
from skd_jax.methods.distillation import binary_loss, binary_targets
from skd_jax.methods.phase import Method, Metrics, Phase, Setting, logits
from skd_jax.methods.phases import learn
from skd_jax.state import Batch, Kept, Trained


@dataclasses.dataclass(frozen=True)
class Settings(Supervised):
    """LwF.MC."""

    name: str = "lwf_mc"


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
    teacher = logits(None, nets, kept, batch.images)

    def objective(features: jax.Array, new: jax.Array) -> tuple[jax.Array, Metrics]:
        del features
        loss = binary_loss(new, binary_targets(teacher, batch.labels, new.shape[-1]))
        return loss, {"classification": loss}

    return steps.minimise(nets, static, state, batch.images, batch.labels, rates, objective)


def phases(setting: Setting, task: int) -> list[Phase]:
    """One learning phase a task."""
    settings = setting.config.method
    return [learn(setting, task, settings, step, settings)] if task else []


METHOD = Method("lwf_mc", Settings, phases, check=learning("method.").check)
