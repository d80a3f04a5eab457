"""LUCIR: a cosine head, features that keep their directions, and margins between old and new.

z_c = sigma <f / |f|, w_c / |w_c|>, sigma learned, F without its last ReLU. The loss is

    CE(z) + lambda mean over all images of (1 - cos(f, f'))
          + mean over exemplars of sum_k max(0, m - cos_y + cos_k),

lambda = 5 sqrt(n_O / n_N), m = 0.5; f' is T_n's feature; k runs over the K = 2 new classes of the
highest cosines, and margins are of cosines, before sigma. Weights of new outputs are imprinted: the
mean of the class's unit features by T_n, to unit length, times the mean length of the old weights.
Old weights are not learned. (The official code averages the last term over K too, half of what is
above: ``ranking_weight`` 0.5 is that. The paper does not mention imprinting, which its code always
does. PODNet's port has other numbers, and its published row used the official code; FACIL's does
not imprint.)

An image is of the class with the largest output. Class-balanced fine-tuning, of the ImageNet script
alone, is left out. Kept: 20 exemplars a class.

References:
  Hou, Pan, Loy, Wang, Lin, "Learning a Unified Classifier Incrementally via Rebalancing", CVPR
  2019. Not verified: the paper itself was read through its released code.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from skd_jax import losses, parallel, steps
from skd_jax.config import Config, Limits, Supervised
from skd_jax.errors import UserError
from skd_jax.methods import exemplars
from skd_jax.methods.collecting import Collected, collected, features
from skd_jax.methods.exemplars import KeptExemplars, learn, means_of_units, select
from skd_jax.methods.phase import Method, Metrics, Phase, Setting, Take
from skd_jax.state import Batch, Network, Params, Trained

IMPRINT = 8  # the number of the pass before learning in random keys


@dataclasses.dataclass(frozen=True)
class Settings(exemplars.Settings):
    """LUCIR."""

    name: str = "lucir"
    weight: float = 5.0  # lambda is this times sqrt(n_O / n_N)
    ranking_weight: float = 1.0
    nearest: int = 2  # K, new classes that an exemplar is held apart from
    margin: float = 0.5  # m


@struct.dataclass
class KeptImprint(KeptExemplars):
    """T_n, exemplars, and a task's new weights until it is learned, float32 [F, n_N]; or None."""

    imprint: jax.Array | None = None


def imprinted(found: jax.Array, labels: jax.Array, kernel: jax.Array, new: int) -> jax.Array:
    """Weights of new outputs, [F, n_N].

    Args:
      found: features by T_n of new images, [n, F].
      labels: int32 [n], in n_O .. n_O + n_N - 1; others do not count.
      kernel: weights of the old outputs, [F, n_O].
      new: n_N.
    """
    means = means_of_units(found, labels - kernel.shape[1], new)
    return means.T * jnp.mean(jnp.linalg.norm(kernel, axis=0))


def forget_weight(static: Settings, num_old: int, num_new: int) -> float:
    """The weight lambda of the features' directions."""
    return static.weight * math.sqrt(num_old / num_new)


def ranking_loss(
    cosines: jax.Array,
    labels: jax.Array,
    num_old: int,
    nearest: int,
    margin: float,
    axis_name: str | None = None,
) -> jax.Array:
    """The mean over exemplars of the sum of margins that new classes come too close by.

    Args:
      cosines: [B, K].
      labels: int32 [B]; below ``num_old`` they are of exemplars.
      num_old: n_O.
      nearest: how many of the new classes count, those of the highest cosines.
      margin: m.
      axis_name: mapped axis the batch is split over; the mean is over the whole batch's exemplars
        once this device's loss has been averaged over it.

    Returns:
      A scalar; 0 where there is no exemplar.
    """
    own = jnp.take_along_axis(cosines, labels[:, None], axis=1)
    new = cosines[:, num_old:]
    highest, _ = jax.lax.top_k(new, min(nearest, new.shape[1]))
    close = jnp.sum(jnp.maximum(0.0, margin - own + highest), axis=1)
    exemplar = labels < num_old
    count = parallel.mean(jnp.sum(exemplar).astype(jnp.float32), axis_name)  # of a device
    found = jnp.sum(jnp.where(exemplar, close, 0.0))
    return jnp.where(count > 0, found / jnp.where(count > 0, count, 1.0), 0.0)


def step(
    static: Settings,
    nets: steps.Networks,
    state: Trained,
    kept: KeptImprint,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Trained, Metrics]:
    """One step on new images and exemplars."""
    del key
    assert kept.classifier is not None
    num_old = kept.classifier.params["head"]["kernel"].shape[1]
    before = features(nets, kept, batch.images)

    def terms(params: Params, found: jax.Array, z: jax.Array) -> dict[str, jax.Array]:
        cosines = z / params["head"]["sigma"]
        ranks = static.nearest, static.margin, nets.axis_name
        weight = forget_weight(static, num_old, z.shape[1] - num_old)
        ranking = ranking_loss(cosines, batch.labels, num_old, *ranks)
        return {
            "less_forget": weight * losses.feature_cosine_discrepancy(before, found),
            "ranking": static.ranking_weight * ranking,
        }

    return descend(static, nets, state, kept, batch, rates, terms)


def descend(
    sgd: Supervised,
    nets: steps.Networks,
    state: Trained,
    kept: KeptExemplars,
    batch: Batch,
    rate: jax.Array,
    terms: Callable[[Params, jax.Array, jax.Array], dict[str, jax.Array]],
) -> tuple[Trained, Metrics]:
    """A step by cross-entropy over all outputs and other terms; old weights are not learned.

    Args:
      sgd: its momentum and decay.
      nets: the architecture.
      state: in training.
      kept: T_n.
      batch: new images and exemplars.
      rate: of SGD.
      terms: (params, features [B, F], logits [B, K]) to scalars that are added to the loss.
    """
    assert kept.classifier is not None
    network, classifier = state.network, nets.classifier(state.network.params)

    def loss_fn(params: Params):
        (found, z), stats, _ = steps.train_mode(
            classifier, params, network.batch_stats, batch.images
        )
        one_hot = jax.nn.one_hot(batch.labels, classifier.num_classes)
        parts = {"classification": losses.classification_loss(z, one_hot)}
        parts |= terms(params, found, z)
        loss = sum(parts.values(), start=jnp.float32(0.0))
        accuracy = jnp.mean(z.argmax(-1) == batch.labels)
        return loss, ({"loss": loss, **parts, "train_accuracy": accuracy}, stats)

    (_, (metrics, stats)), grads = parallel.value_and_grad(loss_fn, nets.axis_name)(network.params)
    new = steps.update(state, grads, stats, steps.sgd(sgd), rate)
    # Weight decay would shrink them even where their gradient is 0.
    params = with_columns(new.network.params, 0, kept.classifier.params["head"]["kernel"])
    new = Trained(Network(params, new.network.batch_stats), new.optimiser)
    return new, parallel.mean(metrics, nets.axis_name)


def with_columns(params: Params, first: int, kernel: jax.Array) -> Params:
    """Classifier params whose outputs from ``first`` on have the weights [F, k]."""
    head = params["head"]
    columns = head["kernel"].at[:, first : first + kernel.shape[1]].set(kernel)
    return {**params, "head": {**head, "kernel": columns}}


def grown(kept: KeptImprint, params: Params) -> Params:
    """The params that learning begins with."""
    assert kept.classifier is not None and kept.imprint is not None
    num_old = kept.classifier.params["head"]["kernel"].shape[1]
    return with_columns(params, num_old, kept.imprint)


def imprint(setting: Setting, task: int) -> Phase:
    """A pass over the new images, for the weights of their outputs."""
    images, width = setting.images[task], setting.nets.features.num_features

    def finish(state: Collected, kept: KeptImprint, take: Take) -> KeptImprint:
        del take
        assert kept.classifier is not None
        kernel = kept.classifier.params["head"]["kernel"]
        labels = jnp.where(state.valid, state.labels, -1)  # of no class
        new = imprinted(state.rows, labels, kernel, setting.classes[task])
        return dataclasses.replace(kept, imprint=new)

    return collected(
        setting, task, "imprint", features, width, images, finish=finish, number=IMPRINT
    )


def learned(state: Trained, kept: KeptImprint, take: Take) -> KeptImprint:
    """What learning leaves: a phase's ``finish``."""
    del take
    return dataclasses.replace(kept, classifier=state.network, imprint=None)


def phases(setting: Setting, task: int) -> list[Phase]:
    """Imprinting and learning, but for the base, and the choice of exemplars."""
    if not task:
        return [select(setting, task)]
    more = {"grown": grown, "finish": learned, "ends_task": False}
    train = learn(setting, task, step, setting.config.method, **more)
    return [imprint(setting, task), train, select(setting, task)]


def cosine_head(limits: Limits) -> Callable[[Config], None]:
    """Checks settings and the head: raises UserError if the configuration cannot be used."""

    def check(config: Config) -> None:
        limits.check(config)
        if config.model.head != "cosine":
            raise UserError(
                f"config.model.head: {config.method.name} needs cosine, and it is "
                f"{config.model.head}; give --config.model.head=cosine"
            )

    return check


WEIGHTS = ("weight", "ranking_weight", "margin")  # settings that are 0 or more
METHOD = Method(
    "lucir",
    Settings,
    phases,
    kept=KeptImprint,
    check=cosine_head(exemplars.limits(("nearest",), not_negative=WEIGHTS)),
    family="exemplars",
    keeps="images",
)
