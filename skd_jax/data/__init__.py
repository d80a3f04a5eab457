"""Images, classes and tasks: from a data set's name to the batches a step takes."""

from skd_jax.data.augment import (
    augment,
    augment_normalised,
    centre_crop,
    crop_flip,
    normalise,
    prepare,
    resized_crop,
)
from skd_jax.data.check import check, check_batches, check_tests, check_trains
from skd_jax.data.classes import (
    Schedule,
    choose_classes,
    class_order,
    class_schedule,
    split_tasks,
)
from skd_jax.data.folder import changed_files, check_workdir
from skd_jax.data.images import find_images, read_images
from skd_jax.data.sources import Source, open_source
from skd_jax.data.stream import (
    ReplicaImages,
    TaskImages,
    TestImages,
    TrainingStream,
    epoch_batches,
    filled,
    ordered_batches,
)

__all__ = [
    "ReplicaImages",
    "Schedule",
    "Source",
    "TaskImages",
    "TestImages",
    "TrainingStream",
    "augment",
    "augment_normalised",
    "centre_crop",
    "changed_files",
    "check",
    "check_batches",
    "check_tests",
    "check_trains",
    "check_workdir",
    "choose_classes",
    "class_order",
    "class_schedule",
    "crop_flip",
    "epoch_batches",
    "filled",
    "find_images",
    "normalise",
    "open_source",
    "ordered_batches",
    "prepare",
    "read_images",
    "resized_crop",
    "split_tasks",
]
