"""EEIL: cross-entropy, distillation head by head, then fine-tuning on as many images a class.

One output head a task, trained as one softmax. Stage 1 learns new images and exemplars by

    CE over all outputs + sum over old heads h of KD_2(z', z over h),

weight 1, a softmax a head, no factor T^2. Stage 2 chooses exemplars of the new classes. Stage 3
fine-tunes on exemplars alone, the same number of each class, at a lower rate; distillation now
covers every head, the new one too, and its teacher is the network at the end of stage 1. Stage 4
chooses the exemplars of the new classes anew. (FACIL's stage 1 leaves out the last of the old
heads, and its balanced set is not balanced by class; PODNet's distillation is binary.)

Rates, epochs and augmentation of stage 1 are those of all methods here. The paper's are 40 epochs
at 0.1, / 10 every 10, weight decay 1e-4, on images that were augmented to 12 times as many
beforehand, and Gaussian noise is added to gradients; that is ``noise``, and 0 unless it is set, as
ports found it harmful. A class with fewer images than ``exemplars`` is in the balanced set with all
it has.

Kept: 20 exemplars a class, where the paper has 2,000 in all.

References:
  Castro, Marin-Jimenez, Guil, Schmid, Alahari, "End-to-End Incremental Learning", ECCV 2018. Not
  verified: the paper itself was read through its released code.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skd_jax import losses, steps
from skd_jax.config import Supervised
from skd_jax.methods import exemplars
from skd_jax.methods.distillation import distillation_loss
from skd_jax.methods.exemplars import KeptExemplars, learn, of_first, select
from skd_jax.methods.phase import Method, Metrics, Phase, Setting, logits
from skd_jax.methods.phases import by_sgd
from skd_jax.state import Batch, Trained

TEMPERATURE = 2.0
BALANCE, ANEW = 8, 9  # the numbers of stages 3 and 4 in random keys


@dataclasses.dataclass(frozen=True)
class Settings(exemplars.Settings):
    """EEIL."""

    name: str = "eeil"
    balance_epochs: int = 30
    balance_lr: float = 0.01
    balance_drop_epochs: tuple[int, ...] = (10, 20)
    noise: float = 0.0  # variance of the gradient noise in the first epoch; the paper's is 0.3


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a step depends on that is no array: ``heads`` are the sizes of those that are held."""

    sgd: Supervised
    heads: tuple[int, ...]
    noise: bool


def distillation(
    teacher: jax.Array, student: jax.Array, heads: tuple[int, ...], temperature: float = TEMPERATURE
) -> jax.Array:
    """The sum of KD_T over heads, a softmax each.

    Args:
      teacher: logits z', [B, K'], of these heads or more.
      student: logits z, [B, K], likewise.
      heads: how many outputs each has.
      temperature: T.
    """
    ends = np.cumsum(heads)
    parts = [
        distillation_loss(teacher[:, end - size : end], student[:, end - size : end], temperature)
        for size, end in zip(heads, ends, strict=True)
    ]
    return jnp.sum(jnp.stack(parts))


def noise_deviation(variance: float, epochs: np.ndarray) -> np.ndarray:
    """The standard deviation of the gradient noise in each epoch t: variance / (1 + t)^0.55."""
    return np.sqrt(variance / (1.0 + epochs) ** 0.55).astype(np.float32)


def step(
    static: _Static,
    nets: steps.Networks,
    state: Trained,
    kept: KeptExemplars,
    batch: Batch,
    key: jax.Array,
    rates: dict[str, jax.Array],
) -> tuple[Trained, Metrics]:
    """One step of stage 1 or 3."""
    teacher = logits(None, nets, kept, batch.images)

    def objective(features: jax.Array, z: jax.Array) -> tuple[jax.Array, Metrics]:
        del features
        one_hot = jax.nn.one_hot(batch.labels, z.shape[1])
        classification = losses.classification_loss(z, one_hot)
        distilled = distillation(teacher, z, static.heads)
        loss = classification + distilled
        return loss, {"loss": loss, "classification": classification, "distillation": distilled}

    grads, stats, metrics = steps.gradients(
        nets, state.network, batch.images, batch.labels, objective
    )
    if static.noise:
        leaves, structure = jax.tree.flatten(grads)
        keys = jax.random.split(key, len(leaves))
        leaves = [
            g + rates["noise"] * jax.random.normal(k, g.shape)
            for g, k in zip(leaves, keys, strict=True)
        ]
        grads = jax.tree.unflatten(structure, leaves)
    return steps.update(state, grads, stats, steps.sgd(static.sgd), rates["lr"]), metrics


def phases(setting: Setting, task: int) -> list[Phase]:
    """Stages 1 to 4; of the base only its exemplars."""
    if not task:
        return [select(setting, task)]
    settings: Settings = setting.config.method
    heads, draws = setting.classes[: task + 1], settings.noise > 0

    def rates(config: Supervised, images: int) -> Any:
        def of(numbers: np.ndarray) -> dict[str, np.ndarray]:
            epochs = numbers // (images // config.batch)
            lr = steps.dropped(config.lr, epochs, config.drop_epochs)
            return {"lr": lr, "noise": noise_deviation(settings.noise, epochs)}

        return of

    images = setting.images[task] + exemplars.count(setting, task)
    static = _Static(settings, heads[:-1], draws)
    train = learn(
        setting, task, step, static, rates=rates(settings, images), draws=draws, ends_task=False
    )
    balance = dataclasses.replace(
        settings,
        epochs=settings.balance_epochs,
        lr=settings.balance_lr,
        drop_epochs=settings.balance_drop_epochs,
    )

    def init(kept: KeptExemplars) -> Trained:
        assert kept.classifier is not None
        network = jax.tree.map(jnp.copy, kept.classifier)
        return Trained(network, steps.sgd(balance).init(network.params))

    replay = of_first(setting, task + 1)
    static = _Static(balance, heads, draws)
    tuned = by_sgd(
        *(balance, step, static, init, replay.count, "balance", task, BALANCE, "method.batch"),
        rates=rates(balance, replay.count),
        draws=draws,
        own=(),
        replay=replay,
        ends_task=False,
    )
    chosen = select(setting, task, ends_task=False)
    return [train, chosen, tuned, select(setting, task, "select_anew", ANEW)]


METHOD = Method(
    "eeil",
    Settings,
    phases,
    kept=KeptExemplars,
    check=exemplars.limits(
        not_negative=("balance_epochs", "balance_drop_epochs", "noise"),
        positive=("balance_lr",),
    ).check,
    family="exemplars",
    keeps="images",
    tricks="fine-tuning on as many images a class",
)
