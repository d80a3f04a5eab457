"""Model inversion: a generator D learns to draw old classes from the frozen T_n and noise alone.

What ABD and R-DFCIL train before a task: SKD's stage one without S_n. With x^ = D(z), T_n's outputs
z', y^ = argmax z', q the batch's mean softmax of z', and n classes seen, D minimises by Adam

    CE(z' / 1000, y^) + (1 + sum_c q_c log q_c / log n)
      + 50 mean_l G_l + 0.001 mean (x^ - blur(x^))^2

G_l = KL(running || batch moments) at BN layer l of T_n, a Gaussian a channel, mean over channels.
T_n is in eval mode. D is that of Table IV of SKD with 1,000 latents, which is theirs.

Paper and released code: the code of ABD carries D and Adam's state on to the next task, 101 MB,
where the paper keeps nothing but T_n; here D begins anew for each task. Two BNs of D have the
epsilon 0.8 there (a second positional argument, surely meant as momentum), and G adds 1e-8 to the
batch's variance; here BN's own 1e-5 is the epsilon of both. Not verified: both papers were read
through their code and notes.

References:
  [ABD] Smith et al., "Always Be Dreaming", ICCV 2021.
  [R-DFCIL] Gao et al., "R-DFCIL: Relation-Guided Representation Learning for Data-Free Class
    Incremental Learning", ECCV 2022.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from skd_jax import losses, parallel, steps
from skd_jax.config import Config, Limits
from skd_jax.methods.phase import Metrics, Phase, Setting
from skd_jax.methods.skd import quality
from skd_jax.methods.skd.phases import DELEGATOR, KeptDelegator, delegator_module
from skd_jax.methods.skd.settings import Delegator as DelegatorSettings
from skd_jax.methods.skd.settings import check_delegator
from skd_jax.methods.skd.steps import Networks, adam, draw, latent, spread, with_delegator
from skd_jax.models import LOW_RESOLUTION, MOMENTS, Delegator
from skd_jax.state import Batch, Trained
from skd_jax.steps import eval_mode, guard, moments, train_mode, update

GENERATOR = DelegatorSettings(z_dim=1000, widths=LOW_RESOLUTION, upsample="resize", helper_bn=True)


@dataclasses.dataclass(frozen=True)
class Inversion:
    """Training of the generator."""

    steps: int  # 10,000 [ABD], 5,000 [R-DFCIL]
    batch: int = 128
    lr: float = 1e-3  # of Adam, to the end
    temperature: float = 1000.0
    balance: float = 1.0
    statistics: float = 50.0
    smoothness: float = 1e-3


_LIMITS = Limits(
    "method.inversion.",
    at_least_one=("steps", "batch"),
    not_negative=("balance", "statistics", "smoothness"),
    positive=("lr", "temperature"),
)


def check(config: Config) -> None:
    """Checks ``config.method.inversion`` and ``config.method.delegator``.

    Raises:
      UserError: a value is out of range; the message names the field.
    """
    _LIMITS.check(config)
    check_delegator(config)


def class_balance_loss(scores: jax.Array, axis_name: str | None = None) -> jax.Array:
    """1 + sum_c q_c log q_c / log n: 0 where a batch falls evenly on n classes, 1 where on one.

    Args:
      scores: softmax scores, [B, n]; q is their mean over the whole batch.
      axis_name: mapped axis the batch is split over.
    """
    classes = scores.shape[-1]
    entropy = losses.diversity_loss(scores, axis_name)
    return 1.0 + entropy / math.log(classes) if classes > 1 else jnp.zeros(())


@dataclasses.dataclass(frozen=True)
class _Inverting:
    """What a step depends on that is no array."""

    config: Inversion
    delegator: Delegator


def step(
    static: _Inverting,
    nets: steps.Networks,
    state: Trained,
    kept: KeptDelegator,
    batch: None,
    key: jax.Array,
    rates: dict[str, Any],
) -> tuple[Trained, Metrics]:
    """One step of D."""
    del batch
    axis, generator = nets.axis_name, with_delegator(nets, static.delegator).delegator
    size = parallel.local_batch(static.config.batch, axis)
    z = latent(key, parallel.example_index(size, axis), generator.z_dim)
    teacher = parallel.varying(kept.classifier, axis)
    running = moments(teacher.batch_stats)

    def loss_fn(params):
        images, stats, _ = train_mode(generator, params, state.network.batch_stats, z)
        (_, logits), seen = nets.classifier(teacher.params).apply(
            teacher.variables(), images, False, mutable=[MOMENTS]
        )
        label = losses.pseudo_label(logits)
        values = {
            "category": losses.category_loss(logits / static.config.temperature, label),
            "balance": class_balance_loss(jax.nn.softmax(logits), axis),
            "statistics": losses.feature_statistics_loss(
                moments(seen[MOMENTS]), running, "kl_of_running"
            ),
            "smoothness": losses.smoothness_loss(images),
        }
        return losses.explore_objective(values, rates["weights"]), (values, logits, stats)

    (total, (values, logits, stats)), grads = parallel.value_and_grad(loss_fn, axis)(
        state.network.params
    )
    new = update(state, grads, stats, adam(), rates["rate"])
    metrics = {"inversion": total, **parallel.mean(values, axis), **spread(logits, axis)}
    return guard(new, state, metrics)


def invert(setting: Setting, task: int) -> Phase:
    """Trains D from T_n alone, from new weights, where n is ``task``."""
    config = setting.config
    settings: Inversion = config.method.inversion
    nets = Networks(setting.nets.features, delegator_module(config))
    init_key, _ = setting.keys(task, DELEGATOR)
    weights = {
        "category": 1.0,
        "balance": settings.balance,
        "statistics": settings.statistics,
        "smoothness": settings.smoothness,
    }

    def init(kept: KeptDelegator) -> Trained:
        del kept
        network = steps.initial(nets.delegator, init_key, (1, nets.delegator.z_dim))
        return Trained(network, adam().init(network.params))

    def rates(numbers: np.ndarray) -> dict[str, Any]:
        def each(value: float) -> np.ndarray:
            return np.full(len(numbers), value, np.float32)

        return {"weights": {n: each(w) for n, w in weights.items()}, "rate": each(settings.lr)}

    def finish(state: Trained, kept: KeptDelegator, take: Any) -> KeptDelegator:
        del take
        return dataclasses.replace(kept, delegator=state.network)

    return Phase(
        name="generator",
        task=task,
        number=DELEGATOR,
        steps=settings.steps,
        batch=settings.batch,
        field="method.inversion.batch",
        reads="nothing",
        static=_Inverting(settings, nets.delegator),
        init=init,
        step=step,
        rates=rates,
        finish=finish,
        report=partial(quality.examine, nets, task),
        watch=partial(quality.watch, config.run.collapse_share, "inversion.balance"),
    )


def beside(
    delegator: Delegator, nets: steps.Networks, kept: KeptDelegator, batch: Batch, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """As many fresh images of D as there are real ones, and what T_n says of them.

    Args:
      delegator: D's architecture.
      nets: the other architectures.
      kept: T_n and D.
      batch: of real images.
      key: of the step.

    Returns:
      (normalised images [B, S, S, C], T_n's outputs z' on them [B, n_O]).
    """
    assert kept.classifier is not None and kept.delegator is not None
    images = draw(with_delegator(nets, delegator), kept.delegator, key, len(batch.labels))
    images = images.astype(batch.images.dtype)
    teacher = nets.classifier(kept.classifier.params)
    return images, eval_mode(teacher, kept.classifier, images)[1]
