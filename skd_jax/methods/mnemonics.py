"""Mnemonics: LUCIR, whose new exemplars' pixels are then learned.

After herding, the images of the new exemplars are moved so that the means of their features tell
the task's images apart: by SGD on the cross-entropy of the cosines between a new image's feature
and each new class's mean of exemplar features, the network held. Then they are clipped to the range
of images and rounded to uint8.

This is what the released program does. Left out is what the paper describes and the program has
not: the inner loop (a copy of the network takes steps on the exemplars, and the loss on the real
images is differentiated through them), and the adjustment of old exemplars, one half by the other.
The paper's network also shares weights with the old one by scale and shift; that is left out, and
its numbers of inner steps and rates are not verified. So no published number is claimed to be
reproduced; those of the program's README are from checkpoints that came with it.

The defaults are the program's: one pass over the new images at a rate of 1e-5. At that rate few
pixels move by half a grey level, which rounding undoes: what is left is LUCIR. ``pixel_lr`` has to
be far larger, 1 or more, for exemplars that look different. (The program halves the rate now and
then, and its images are normalised; here pixels are in [0, 1].)

Kept: 20 exemplars a class, as uint8. An image is of the class with the largest output.

References:
  Liu, Su, Liu, Schiele, Sun, "Mnemonics Training: Multi-Class Incremental Learning without
  Forgetting", CVPR 2020. Not verified: the paper itself was read through its abstract and code.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from skd_jax import parallel, steps
from skd_jax.config import Data
from skd_jax.data import prepare
from skd_jax.methods import exemplars, lucir
from skd_jax.methods.class_means import nearness
from skd_jax.methods.collecting import features
from skd_jax.methods.exemplars import Exemplars, means_of_units, select
from skd_jax.methods.lucir import WEIGHTS, KeptImprint, cosine_head
from skd_jax.methods.phase import Method, Metrics, Phase, Setting, Take
from skd_jax.state import Batch, Kept

PIXELS = 9  # the phase's number in random keys


@dataclasses.dataclass(frozen=True)
class Settings(lucir.Settings):
    """Mnemonics: LUCIR's, and of the pixels' SGD with its momentum and decay."""

    name: str = "mnemonics"
    pixel_epochs: int = 1
    pixel_lr: float = 1e-5


@struct.dataclass
class Pixels:
    """A task's exemplars in training.

    Attributes:
      images: in [0, 1], float32 [m, S, S, C].
      classes: of each, from 0, int32 [m].
      first: the label of class 0, int32.
      optimiser: SGD's state.
    """

    images: jax.Array
    classes: jax.Array
    first: jax.Array
    optimiser: optax.OptState


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a step depends on that is no array; ``classes`` is how many are new."""

    settings: Settings
    data: Data
    classes: int


def outer_loss(
    queries: jax.Array, labels: jax.Array, found: jax.Array, of: jax.Array, classes: int
) -> jax.Array:
    """Mean cross-entropy of the cosines with the means of exemplars.

    Args:
      queries: features of images, [B, F].
      labels: their classes, int32 [B].
      found: features of exemplars, [m, F].
      of: their classes, int32 [m].
      classes: k.
    """
    cosines = nearness(queries, means_of_units(found, of, classes), "cosine")
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(cosines, labels))


def step(
    static: _Static,
    nets: steps.Networks,
    state: Pixels,
    kept: KeptImprint,
    batch: Batch,
    key: jax.Array,
    rates: jax.Array,
) -> tuple[Pixels, Metrics]:
    """One step of the pixels."""
    del key
    queries = features(nets, kept, batch.images)
    network = Kept(parallel.varying(kept.classifier, nets.axis_name))

    def loss_fn(images: jax.Array) -> tuple[jax.Array, None]:
        found = features(nets, network, prepare(static.data, images * 255))
        labels = batch.labels - state.first
        return outer_loss(queries, labels, found, state.classes, static.classes), None

    (loss, _), grads = parallel.value_and_grad(loss_fn, nets.axis_name)(state.images)
    sgd = steps.sgd(static.settings)
    moves: Any
    moves, optimiser = sgd.update(grads, state.optimiser, state.images)
    images = jnp.clip(state.images - rates * moves, 0.0, 1.0)
    return Pixels(images, state.classes, state.first, optimiser), {"outer": loss}


def pixels(setting: Setting, task: int) -> Phase:
    """Learns the images of a task's exemplars."""
    settings: Settings = setting.config.method
    old, first = exemplars.count(setting, task), setting.seen(task) - setting.classes[task]

    def init(kept: KeptImprint) -> Pixels:
        assert kept.exemplars is not None
        images = kept.exemplars.images[old:].astype(jnp.float32) / 255
        labels = kept.exemplars.labels[old:] - first
        return Pixels(images, labels, jnp.int32(first), steps.sgd(settings).init(images))

    def finish(state: Pixels, kept: KeptImprint, take: Take) -> KeptImprint:
        del take
        assert kept.exemplars is not None
        new = jnp.round(state.images * 255).astype(jnp.uint8)
        images = jnp.concatenate([kept.exemplars.images[:old], new])
        return dataclasses.replace(kept, exemplars=Exemplars(images, kept.exemplars.labels))

    def rates(numbers: np.ndarray) -> np.ndarray:
        return np.full(len(numbers), settings.pixel_lr, np.float32)

    return Phase(
        name="pixels",
        task=task,
        number=PIXELS,
        steps=settings.pixel_epochs * (setting.images[task] // settings.batch),
        batch=settings.batch,
        field="method.batch",
        reads="shuffled",
        static=_Static(settings, setting.config.data, setting.classes[task]),
        init=init,
        step=step,
        rates=rates,
        finish=finish,
        ends_task=True,
    )


def phases(setting: Setting, task: int) -> list[Phase]:
    """LUCIR's phases, then the pixels'."""
    *learning, _ = lucir.phases(setting, task)
    return [*learning, select(setting, task, ends_task=False), pixels(setting, task)]


METHOD = Method(
    "mnemonics",
    Settings,
    phases,
    kept=KeptImprint,
    check=cosine_head(
        exemplars.limits(("nearest",), not_negative=(*WEIGHTS, "pixel_epochs", "pixel_lr"))
    ),
    family="exemplars",
    keeps="images, as good as LUCIR's",
    tricks="pixels are learned, and at pixel_lr 1e-5 hardly move",
)
