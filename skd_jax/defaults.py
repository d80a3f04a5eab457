"""Settings for a person's own model: from the model, its images and the device alone.

They are what works best, not what the paper has; the report of an extension says where they differ.
"""

import dataclasses
import math
from typing import Any

from skd_jax import config as schema
from skd_jax.config import Config, Data, Model, Run, Supervised
from skd_jax.errors import UserError
from skd_jax.methods import METHODS, finetune, lwf, pseudo_ncm, skd
from skd_jax.methods.skd.settings import Delegator, StageOne, StageTwo

HELD_OUT = 0.2  # the share of each new class's images that is tested on
LARGE = 64  # pixels: from here on images are cropped and resized at random, as ImageNet's are
MOST_START = 28  # pixels a delegator starts from: its first, dense layer grows with their square
METHOD_NAMES = ("skd", "pseudo_ncm", "finetune", "lwf")  # those that need nothing but the model


@dataclasses.dataclass(frozen=True)
class Lengths:
    """How long training takes, and in which batches.

    Attributes:
      rounds: of D_0's training; a delegator that is there already takes half as many.
      round_batch: pseudo images a step.
      steps: of learning, in batches of ``batch`` new images; at least ``MIN_EPOCHS`` epochs.
      batch: new images a step, and as many pseudo images.
      width: of the delegator, of Tables IV and V.
    """

    rounds: int
    round_batch: int
    steps: int
    batch: int
    width: float


ON_CPU = Lengths(rounds=1500, round_batch=32, steps=1000, batch=32, width=0.25)
ON_ACCELERATOR = Lengths(rounds=10000, round_batch=256, steps=12000, batch=128, width=1.0)
ROUNDS_PER_EPOCH = 50
MIN_EPOCHS, MAX_EPOCHS = 5, 160


def data_settings(
    image_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    load_size: int | None = None,
    fit: str = "crop",
    flip: bool = True,
    **more: Any,
) -> Data:
    """How images become a model's input.

    Args:
      image_size: what the model takes, pixels.
      mean: per channel, of images scaled to [0, 1]; as many as there are channels.
      std: per channel.
      load_size: what images are resized to before their centre is cut out; None: ``image_size``.
      fit: how an image becomes square.
      flip: whether a mirrored image shows the same class.
      more: other fields of :class:`skd_jax.config.Data`.
    """
    load_size = load_size or image_size
    crops = image_size >= LARGE or load_size != image_size
    return Data(
        name="extended",
        data_dir="",
        image_size=image_size,
        channels=len(mean),
        load_size=load_size,
        fit=fit,
        mean=mean,
        std=std,
        augment="resized_crop" if crops else "crop",
        pad=image_size // 8,
        flip=flip,
        in_memory=image_size < LARGE,
        test_fraction=HELD_OUT,
        split_seed=1,
        exclude_classes=(),
        subset=0,
        order_seed=0,
        max_classes=0,
        base_classes=1,
        tasks=1,
        **more,
    )


def settings(
    model: Model,
    data: Data,
    *,
    method: str = "skd",
    delegator: Delegator | None = None,
    images: int = 0,
    on_cpu: bool = True,
    batch: int | None = None,
    effort: float = 1.0,
    seed: int = 0,
) -> Config:
    """The configuration of an extension.

    Args:
      model: the architecture.
      data: how images become its input.
      method: one of ``METHOD_NAMES``.
      delegator: of a delegator that is there already.
      images: training images of the new classes.
      on_cpu: or on an accelerator.
      batch: new images a step; None: as ``Lengths`` has it.
      effort: what lengths are multiplied by.
      seed: of all random numbers.

    Raises:
      UserError: no such method, or an image size that the delegator it needs does not reach.
    """
    if method not in METHOD_NAMES:
        raise UserError(
            f"--method={method}: give one of {', '.join(METHOD_NAMES)}, which need nothing but the "
            "model"
        )
    lengths = ON_CPU if on_cpu else ON_ACCELERATOR
    batch = batch or lengths.batch
    learning = _learning(lengths, batch, images, effort)
    one = _stage_one(lengths, delegator is not None, effort)

    def section() -> Delegator:
        return delegator or delegator_for(data, lengths.width)

    sections: dict[str, Any] = {
        "skd": lambda: skd.Settings("skd", section(), one, _stage_two(model, learning)),
        "pseudo_ncm": lambda: pseudo_ncm.Settings("pseudo_ncm", section(), one),
        "finetune": lambda: finetune.Settings(**vars(learning), name="finetune"),
        "lwf": lambda: lwf.Settings(**vars(learning), name="lwf"),
    }
    config = Config(seed, data, model, learning, sections[method](), _run(on_cpu))
    return schema.checked(config, METHODS)


def delegator_for(data: Data, width: float) -> Delegator:
    """The delegator that draws images of this size: Table IV or V, or something between.

    It doubles two times or more, from 14 pixels or less, if the size can be halved so often; else
    as often as it can be, from ``MOST_START`` pixels or less. Where the model's input is not
    normalised to mean 0 and deviation 1, a last BN that does so would draw what the model never
    saw.

    Raises:
      UserError: the size cannot be halved, or not often enough.
    """
    size = data.image_size
    doublings = _doublings(size)
    if not doublings:
        others = (size + away for n in range(1, size + 1) for away in (n, -n))
        raise UserError(
            f"image size {size}: a delegator doubles images, from {MOST_START} pixels or less, and "
            f"never comes to this size; give --image-size={next(filter(_doublings, others))} if "
            "the model can take that"
        )
    tables = {1: (128, 64), 2: (128, 128, 64), 3: (256, 256, 128, 64)}
    full = tables.get(doublings, (512,) * (doublings - 2) + (256, 128, 64))
    widths = tuple(max(8, round(width * w)) for w in full)
    normalised = all(0.1 <= s <= 0.4 for s in data.std)
    return Delegator(z_dim=256, widths=widths, upsample="resize", helper_bn=normalised)


def _doublings(size: int) -> int:
    """How often a delegator doubles images to come to a size; 0 if it cannot."""
    doublings, start = 0, size
    while start % 2 == 0 and (doublings < 2 or start > 14):
        doublings, start = doublings + 1, start // 2
    return doublings if start <= MOST_START else 0


def _stage_one(lengths: Lengths, begun: bool, effort: float) -> StageOne:
    rounds = lengths.rounds * effort / (2 if begun else 1)
    epochs = max(1, math.ceil(rounds / ROUNDS_PER_EPOCH))
    return StageOne(
        epochs=epochs,
        finetune_epochs=epochs,
        rounds_per_epoch=ROUNDS_PER_EPOCH,
        imitate_steps=5,
        batch=lengths.round_batch,
        student_lr=0.1,
        delegator_lr=1e-3,
        drop_every=max(1, round(0.8 * epochs)),
        finetune_drop_every=max(1, round(0.8 * epochs)),
        momentum=0.9,
        weight_decay=5e-4,
        student_explores=True,
        terms=(
            *(("category", 1.0), ("diversity", 1.0)),
            *(("exploration", 1.0), ("feature_statistics", 1.0)),
        ),
        term_modules=("skd_jax.methods.skd.terms",),
        feature_source="teacher",
        feature_distance="variance",
    )


def _learning(lengths: Lengths, batch: int, images: int, effort: float) -> Supervised:
    steps_per_epoch = max(1, images // batch)
    epochs = math.ceil(effort * lengths.steps / steps_per_epoch)
    epochs = min(max(epochs, MIN_EPOCHS if effort >= 1 else 1), MAX_EPOCHS)
    return Supervised(
        epochs=epochs,
        batch=batch,
        lr=0.1,
        drop_epochs=tuple(e for e in (round(0.5 * epochs), round(0.75 * epochs)) if 0 < e < epochs),
        momentum=0.9,
        weight_decay=5e-4,
    )


def _stage_two(model: Model, learning: Supervised) -> StageTwo:
    return StageTwo(
        **vars(learning),
        delegator=True,
        beta=0.0,
        adaptive=True,
        gamma=1.0,
        classification="local",
        balanced=0.5,
        align_head=model.head == "linear",
    )


def _run(on_cpu: bool) -> Run:
    return Run(
        log_every=20 if on_cpu else 50,
        checkpoint_every=100 if on_cpu else 1000,
        keep_checkpoints=2,
        steps_per_call=0,
        eval_batch=100 if on_cpu else 500,
        devices=0,
        pseudo_images=100,
        max_skipped=10,
        collapse_share=0.9,
        stop_at_collapse=False,
        quality_images=500,
    )
