"""Reads a data set that TensorFlow Datasets has prepared, without TensorFlow."""

import difflib
import os
import pathlib
from typing import Any

import numpy as np
from absl import logging

from skd_jax.config import Data
from skd_jax.data.records import Encoded, Records, concatenate
from skd_jax.errors import UserError

CHUNK = 1024  # records read at once for their labels: bounds the memory that takes


def read_prepared(data: Data) -> Records:
    """Opens the TFDS data set ``data.name`` and reads its labels; images stay encoded.

    With ``data.test_fraction`` all its splits are read, else "train" and "test" ("validation" for
    imagenet2012, whose test split has no labels, and for data sets that have no test split).

    Raises:
      UserError: the data set is unknown, not prepared, or not one of labelled images.
    """
    import tensorflow_datasets as tfds  # half a second, and only this reader needs it

    builder = _open_builder(data)
    image_key, label_key = builder.info.supervised_keys or ("image", "label")
    features = dict(builder.info.features.items())
    image, label = features.get(image_key), features.get(label_key)
    if not isinstance(image, tfds.features.Image) or not isinstance(
        label, tfds.features.ClassLabel
    ):
        raise UserError(
            f"config.data.name={data.name!r} is not a data set of images with one class each."
        )
    splits = set(builder.info.splits)
    if builder.name == "imagenet2012":
        splits.discard("test")
    wanted = {name: name for name in sorted(splits)}
    if not data.test_fraction:
        test = "test" if "test" in splits else "validation"
        wanted = {p: name for p, name in (("train", "train"), ("test", test)) if name in splits}
    skip = {image_key: tfds.decode.SkipDecoding()}
    sources: dict[str, Any] = {
        part: builder.as_data_source(split=name, decoders=skip) for part, name in wanted.items()
    }
    labels, parts = concatenate(
        {part: _labels(source, label_key) for part, source in sources.items()}
    )

    def encoded(ids: list[int]) -> list[Encoded]:
        images: dict[int, Encoded] = {}
        for part, records in parts.items():
            mine = [i for i in ids if i in records]
            found = sources[part].__getitems__([i - records.start for i in mine])
            images.update(
                (i, bytes(record[image_key])) for i, record in zip(mine, found, strict=True)
            )
        return [images[i] for i in ids]

    names = label.names or [str(i) for i in range(label.num_classes or 0)]
    return Records(tuple(names), labels, parts, encoded)


def _labels(source: Any, key: str) -> np.ndarray:
    starts = range(0, len(source), CHUNK)
    chunks = (range(start, min(start + CHUNK, len(source))) for start in starts)
    labels = [record[key] for chunk in chunks for record in source.__getitems__(list(chunk))]
    return np.array(labels, np.int32)


def _open_builder(data: Data) -> Any:
    import tensorflow_datasets as tfds

    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")  # as TFDS has it
    root = pathlib.Path(data.data_dir or default).expanduser()
    prepared = sorted(
        ":".join(info.parent.relative_to(root).as_posix().rsplit("/", 1))
        for depth in ("*/*", "*/*/*")  # name/version or name/config/version
        for info in root.glob(f"{depth}/dataset_info.json")
    )
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it warns of each folder it does not find
    try:
        builder: Any = tfds.builder(data.name, data_dir=root)
        if builder.info.splits:
            builder.as_data_source(split="train")
            return builder
        reason = "is not prepared"
    except tfds.core.DatasetNotFoundError as error:
        known = ["digits", "folder", *(name.split(":")[0] for name in prepared)]
        known += tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(data.name, dict.fromkeys(known), 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see tfds.list_builders()."
        raise UserError(f"config.data.name={data.name!r} is unknown: {hint}") from error
    except (ValueError, AssertionError, ImportError) as error:  # bad names, configs, versions
        line = " ".join(str(error).split())[:200]
        raise UserError(f"config.data.name={data.name!r} cannot be opened: {line}") from error
    except NotImplementedError:
        reason = "is not prepared as array_record (tfds build --file_format=array_record)"
    finally:
        logging.set_verbosity(verbosity)
    have = f"it has {', '.join(prepared)}" if prepared else "it has no prepared data set"
    if not root.is_dir():
        have = "there is no such folder"
    raise UserError(
        f"data set {data.name!r} {reason} in {root} ({have}): set config.data.data_dir to where it "
        "is, or prepare it from its downloads, which needs TensorFlow: pip install tensorflow, "
        f"then tfds build {data.name} --file_format=array_record --data_dir={root}"
    )
