"""Where images come from: labels without decoding, images decoded when they are read."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol

import numpy as np
from PIL import Image

from skd_jax.config import Data
from skd_jax.data.check import check
from skd_jax.data.folder import read_folder
from skd_jax.data.prepared import read_prepared
from skd_jax.data.records import Encoded, Records, check_labels, decode
from skd_jax.errors import UserError, warn

Split = Literal["train", "test"]
CHUNK = 512  # images whose encoded bytes are held at once
FORGOTTEN = -1


class Source(Protocol):
    """The images of a data set, split into train and test."""

    class_names: tuple[str, ...]

    def labels(self, split: Split) -> np.ndarray:
        """The original label of every record: int32 [n], -1 where it was forgotten."""
        ...

    def read(self, split: Split, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The images of some records: uint8 [k, load_size, load_size, channels]."""
        ...

    def forget(self, indices: Sequence[int] | np.ndarray) -> None:
        """Lets go of some training images for good: reading one raises from now on."""
        ...


class RecordSource:
    """The source every reader's records end in.

    Attributes:
      class_names: see Source.
      files: see Records.
    """

    def __init__(self, records: Records, rows: dict[Split, np.ndarray], data: Data):
        """Joins records and their split.

        Args:
          records: what the reader found.
          rows: int [n] for each split: the record of each of its images.
          data: how an image is decoded.
        """
        self.class_names = records.class_names
        self.files = records.files
        self._records = records
        self._rows = rows
        self._labels = {split: records.labels[rows[split]].astype(np.int32) for split in rows}
        self._data = data

    def labels(self, split: Split) -> np.ndarray:
        """See Source."""
        return self._labels[split].copy()

    def read(self, split: Split, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """See Source.

        Raises:
          RuntimeError: a record was forgotten.
          UserError: an image cannot be read or decoded.
        """
        data = self._data
        ids = self._rows[split][np.asarray(indices, np.int64)].tolist()
        if FORGOTTEN in ids:
            raise RuntimeError("a training image of a finished task was asked for")

        def load(encoded: Encoded, record: int) -> np.ndarray:
            place, fix = self._records.place(record), self._records.fix
            how = (data.load_size, data.channels, data.fit, data.interpolation)
            return decode(encoded, place, fix, *how)

        images = np.empty((len(ids), data.load_size, data.load_size, data.channels), np.uint8)
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            for start in range(0, len(ids), CHUNK):
                chunk = ids[start : start + CHUNK]
                decoded = threads.map(load, self._records.encoded(chunk), chunk)
                for i, image in enumerate(decoded, start):
                    images[i] = image
        return images

    def forget(self, indices: Sequence[int] | np.ndarray) -> None:
        """See Source."""
        indices = np.asarray(indices, np.int64)
        ids = self._rows["train"][indices]
        self._records.drop(ids[ids != FORGOTTEN].tolist())
        self._rows["train"][indices] = FORGOTTEN
        self._labels["train"][indices] = FORGOTTEN


def open_source(data: Data) -> Source:
    """Opens the images that ``data.name`` means: "digits", "folder", or a TFDS name.

    ``data.test_fraction`` pools the splits of a TFDS set, as papers do that split anew; those of
    an image folder stay as they are.

    Raises:
      UserError: the configuration or the data it names is wrong.
    """
    check(data)
    readers = {"digits": read_digits, "folder": read_folder}
    records = readers.get(data.name, read_prepared)(data)
    check_labels(records)
    split = {"train", "test"} <= records.parts.keys()
    anew = bool(data.test_fraction)
    if anew and split and data.name == "folder":
        anew = False
        warn(
            f"{data.data_dir} comes split, and is taken so: nothing of its test images is trained "
            f"on; config.data.test_fraction={data.test_fraction} is for folders without a split"
        )
    if anew:
        train, test = split_records(records, data.test_fraction, data.split_seed)
    elif split:
        train, test = (np.array(records.parts[part]) for part in ("train", "test"))
    else:
        raise UserError(
            f"data set {data.name!r} has no test split of its own: set config.data.test_fraction "
            "to the share of images to test on, such as 0.2."
        )
    if data.held_out:
        train, test = split_records(records, data.held_out, data.split_seed, train, "held_out")
    return RecordSource(records, {"train": train, "test": test}, data)


def split_records(
    records: Records,
    fraction: float,
    seed: int,
    rows: np.ndarray | None = None,
    field: str = "test_fraction",
) -> tuple[np.ndarray, np.ndarray]:
    """Splits records in two, class by class.

    Args:
      records: the records.
      fraction: the share of each class's images to test on, rounded, and at least one image.
      seed: of numpy's legacy generator.
      rows: int [n], the records to split; None: all, whatever their parts.
      field: of ``config.data`` that ``fraction`` is, for an error.

    Returns:
      int64 [n_train] and int64 [n_test], sorted.

    Raises:
      UserError: a class has fewer than two images.
    """
    rng = np.random.RandomState(seed)
    rows = np.arange(len(records.labels)) if rows is None else rows
    labels = np.asarray(records.labels)[rows]
    train, test = [], []
    for label, name in enumerate(records.class_names):
        ids = rng.permutation(rows[labels == label])
        if len(ids) < 2:
            raise UserError(
                f"class {name!r} has {len(ids)} image{'s' * (len(ids) != 1)}, and "
                f"config.data.{field}={fraction} needs at least 2, one to train and one to "
                "test on: add images or remove the class."
            )
        count = min(max(1, round(fraction * len(ids))), len(ids) - 1)
        test.append(ids[:count])
        train.append(ids[count:])
    return np.sort(np.concatenate(train)), np.sort(np.concatenate(test))


def read_digits(data: Data) -> Records:
    """scikit-learn's 1,797 grey 8x8 digits, which need no download."""
    del data  # nothing to choose
    from sklearn.datasets import load_digits  # a second, and only this reader needs it

    values, labels = load_digits(return_X_y=True)
    images = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)

    def encoded(ids: list[int]) -> list[Encoded]:
        return [Image.fromarray(images[i]) for i in ids]

    def drop(ids: list[int]) -> None:
        images[ids] = 0

    names = tuple(str(digit) for digit in range(10))
    return Records(
        class_names=names,
        labels=labels,
        parts={"all": range(len(labels))},
        encoded=encoded,
        place=lambda i: f"record {i} of scikit-learn's digits",
        fix="install scikit-learn anew",
        drop=drop,
    )
