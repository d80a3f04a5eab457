"""Checks of the data section of the configuration, before anything is read."""

import math
from collections.abc import Mapping, Sequence

from skd_jax.config import Data
from skd_jax.errors import UserError
from skd_jax.paths import given_path

FITS = ("squash", "crop")
INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos")
AUGMENTS = ("none", "crop", "resized_crop")


def check(data: Data) -> None:
    """Checks every field of ``data`` that can be checked without reading images.

    Raises:
      UserError: a mode is unknown, or two fields contradict each other.
    """
    known_modes = {"fit": FITS, "interpolation": INTERPOLATIONS, "augment": AUGMENTS}
    for field, known in known_modes.items():
        value = getattr(data, field)
        if value not in known:
            raise UserError(f"config.data.{field}={value!r} is unknown: choose from {known}.")
    given_path(data.data_dir, "config.data.data_dir")
    if data.channels not in (1, 3):
        raise UserError(f"config.data.channels={data.channels} must be 1 (grey) or 3 (RGB).")
    for field in ("mean", "std"):
        length = len(getattr(data, field))
        if length != data.channels:
            raise UserError(
                f"config.data.{field} has {length} values for {data.channels} channels: "
                "give one value a channel (config.data.channels)."
            )
    if not all(0 < value < math.inf for value in data.std):
        raise UserError(f"config.data.std={data.std} must be positive.")
    if not all(map(math.isfinite, data.mean)):
        raise UserError(f"config.data.mean={data.mean} must be finite.")
    if data.image_size < 1:
        raise UserError(f"config.data.image_size={data.image_size} must be at least 1.")
    if data.load_size < data.image_size:
        raise UserError(
            f"config.data.load_size={data.load_size} is smaller than "
            f"config.data.image_size={data.image_size}: make it at least as large."
        )
    if data.augment != "resized_crop" and data.load_size != data.image_size:
        raise UserError(
            f"config.data.augment={data.augment!r} needs config.data.load_size={data.load_size} "
            f"to equal config.data.image_size={data.image_size}; 'resized_crop' does not."
        )
    if data.pad < 0:
        raise UserError(f"config.data.pad={data.pad} must not be negative.")
    for field in ("split_seed", "order_seed"):
        if not 0 <= getattr(data, field) < 2**32:
            raise UserError(f"config.data.{field}={getattr(data, field)} must be in [0, 2**32).")
    if not 0 <= data.test_fraction < 1:
        raise UserError(
            f"config.data.test_fraction={data.test_fraction} must be in [0, 1): "
            "0 takes the data set's own test split."
        )
    if not 0 <= data.held_out < 1:
        raise UserError(
            f"config.data.held_out={data.held_out} must be in [0, 1): 0 tests on the test images."
        )


def check_batches(field: str, batch: int, task: int, count: int) -> None:
    """Checks that a task has at least one batch of training images.

    Args:
      field: the config field of the batch's size.
      batch: that size.
      task: the task.
      count: its training images.

    Raises:
      UserError: the batch is smaller than 1, or larger than the images of the task.
    """
    if batch < 1:
        raise UserError(f"config.{field}={batch} must be at least 1.")
    if batch > count:
        raise UserError(
            f"config.{field}={batch} is larger than the {count} training images of task {task}; "
            f"set it to at most {count}, or put more classes into the task."
        )


def check_tests(counts: Sequence[int], class_names: Sequence[Sequence[str]]) -> None:
    """Checks that every task has images to be tested on, before any is trained.

    Args:
      counts: test images a task.
      class_names: of the classes of each task.

    Raises:
      UserError: a task has none.
    """
    empty = [task for task, count in enumerate(counts) if count == 0]
    if not empty:
        return
    names = [name for task in empty for name in class_names[task]]
    shown = ", ".join(repr(name) for name in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    tasks = ", ".join(str(task) for task in empty)
    raise UserError(
        f"task{'s' * (len(empty) > 1)} {tasks} cannot be tested, since the test split has no image "
        f"of {'class' if len(names) == 1 else 'the classes'} {shown}{more}: add some to it, leave "
        "these classes out (config.data.exclude_classes), or set config.data.test_fraction to the "
        "share of all images to test on, such as 0.2."
    )


def check_trains(counts: Mapping[int, int], class_names: Sequence[str]) -> None:
    """Checks that every class has images to learn from, before any is trained.

    Args:
      counts: training images of each class, by its label.
      class_names: name of each label.

    Raises:
      UserError: a class has none.
    """
    empty = [class_names[label] for label, count in counts.items() if not count]
    if empty:
        shown = ", ".join(repr(name) for name in empty[:5])
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        raise UserError(
            f"{'class' if len(empty) == 1 else 'the classes'} {shown}{more} cannot be learned: "
            "the training split has no image. Add some, or leave them out "
            "(config.data.exclude_classes)."
        )
