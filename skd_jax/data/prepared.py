"""Reads a data set that TensorFlow Datasets has prepared, without TensorFlow."""

import bisect
import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import os
import pathlib
import shlex
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from skd_jax.config import Data
from skd_jax.data.records import (
    Encoded,
    Records,
    cache_file,
    check_machine,
    concatenate,
    read_cache,
    reason,
    stamp,
    write_cache,
)
from skd_jax.errors import UserError
from skd_jax.paths import given_path

try:
    import resource
except ImportError:  # Windows
    resource = None

SPARE_FILES = 256  # that may be open beside the shards
CHUNK = 1024  # records read at once for their labels: bounds the memory that takes
UNLABELLED = -1  # TFDS's label where there is none


def read_prepared(data: Data) -> Records:
    """Opens the TFDS data set ``data.name`` and reads its labels; images stay encoded.

    The labels are kept in the user's cache folder, and read again once a shard has changed.

    With ``data.test_fraction`` all its splits are read, else "train" and "test" ("validation" for
    imagenet2012, whose test split has no labels, and for data sets that have no test split). A
    split without any label is left out, but for "train".

    Raises:
      UserError: the data set is unknown, not prepared, damaged, or not one of labelled images.
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
    anew = f"{_root(data)}_new"
    fix = (
        "restore the shard from a copy, or prepare all anew in another folder, with TensorFlow: "
        f"{_command(data, anew)}, and set config.data.data_dir to it"
    )
    count = sum(len(builder.info.splits[name].file_instructions) for name in wanted.values())
    _allow_open_files(count, builder.name)
    sources = {part: _open_split(builder, name, skip, fix) for part, name in wanted.items()}
    found = {part: _labels(source, label_key) for part, source in sources.items()}
    labels, parts = concatenate(
        {p: ids for p, ids in found.items() if p == "train" or (ids != UNLABELLED).any()}
    )

    def encoded(ids: list[int]) -> list[Encoded]:
        images: dict[int, Encoded] = {}
        for part, records in parts.items():
            mine = [i for i in ids if i in records]
            found = sources[part].read(image_key, [i - records.start for i in mine])
            images.update((i, bytes(image)) for i, image in zip(mine, found, strict=True))
        return [images[i] for i in ids]

    def place(i: int) -> str:
        part = next(part for part, records in parts.items() if i in records)
        return sources[part].place(i - parts[part].start)

    names = label.names or [str(i) for i in range(label.num_classes or 0)]
    return Records(tuple(names), labels, parts, encoded, place, fix)


@dataclasses.dataclass(frozen=True)
class _Split:
    """A split whose records can be read, or are named in an error.

    Attributes:
      name: of the split and its data set.
      records: TFDS's data source.
      shards: path of each of its files, and the number of records up to that file's end.
      fix: what to do about a damaged record.
    """

    name: str
    records: Any
    shards: list[tuple[str, int]]
    fix: str

    def place(self, i: int) -> str:
        """What to call a record in an error."""
        shard = bisect.bisect_right(self.shards, i, key=lambda shard: shard[1])
        return f"record {i} of {self.name}, in {self.shards[shard][0]},"

    def read(self, field: str, ids: Sequence[int]) -> list[Any]:
        """One field of some records."""
        try:
            values = [record[field] for record in self.records.__getitems__(list(ids))]
        except Exception:  # Which record? One after the other will tell.
            values = [None] * len(ids)
        return [
            self._read_one(field, i) if value is None else value
            for i, value in zip(ids, values, strict=True)
        ]

    def _read_one(self, field: str, i: int) -> Any:
        try:
            value = self.records[i][field]
        except Exception as error:  # array_record, protobuf and TFDS have types of their own
            check_machine(error, self.place(i))
            raise UserError(
                f"{self.place(i)} cannot be read ({reason(error)}): {self.fix}."
            ) from error
        if value is None:  # also what is left of a record when its file was cut short meanwhile
            raise UserError(f"{self.place(i)} has no {field}: {self.fix}.")
        return value


def _allow_open_files(shards: int, name: str) -> None:
    """Lets this process have all shards open at once, which the usual limit of 1,024 may forbid.

    Raises:
      UserError: the system does not allow so many.
    """
    if not resource:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = shards + SPARE_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    # The system may allow less than an infinite hard limit; what there is may do.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft < shards:
        raise UserError(
            f"data set {name!r} has {shards} shards, and this process may open {soft} files: raise "
            f"that limit (ulimit -n {wanted}; the hard one, as root, ulimit -Hn) and start again"
        )


def _open_split(builder: Any, split: str, decoders: Any, fix: str) -> _Split:
    """Opens a split, once each of its shards has as many records as it should."""
    from array_record.python.array_record_module import ArrayRecordReader

    files = builder.info.splits[split].file_instructions
    paths = [os.fspath(file.filename) for file in files]
    counts = [file.examples_in_shard for file in files]
    for path, count in zip(paths, counts, strict=True):
        try:
            with open(path, "rb"):  # the reader's own words on a missing file are many
                pass
            reader = ArrayRecordReader(path)
            found = reader.num_records()
            reader.close()
        except Exception as error:
            check_machine(error, f"shard {path}")
            said = error.strerror if isinstance(error, OSError) else reason(error)
            raise UserError(f"shard {path} cannot be read ({said}): {fix}.") from error
        if found != count:
            raise UserError(f"shard {path} has {found} records, but should have {count}: {fix}.")
    source = builder.as_data_source(split=split, decoders=decoders)
    shards = list(zip(paths, itertools.accumulate(counts), strict=True))
    return _Split(f"split {split!r} of {builder.name}", source, shards, fix)


def _labels(source: _Split, key: str) -> np.ndarray:
    """The label of every record: as kept, if no shard has changed since, else read.

    Records hold images too, so that reading them all reads the whole data set.
    """
    shards = [(os.path.realpath(path), end) for path, end in source.shards]
    stamps = [stamp(path) for path, _ in shards]
    file = cache_file("labels", json.dumps([key, shards])).with_suffix(".npy")
    valid = json.dumps(stamps) if all(stamps) else ""
    if valid and (kept := read_cache(file, valid)) is not None:
        return np.load(io.BytesIO(kept), allow_pickle=False)
    ids = range(len(source.records))
    chunks = (ids[start : start + CHUNK] for start in range(0, len(ids), CHUNK))
    labels = np.array([label for chunk in chunks for label in source.read(key, chunk)], np.int64)
    if valid:
        content = io.BytesIO()
        np.save(content, labels, allow_pickle=False)
        write_cache(file, content.getvalue(), valid)
    return labels


def _root(data: Data) -> pathlib.Path:
    if data.data_dir:
        return given_path(data.data_dir, "config.data.data_dir")
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")  # as TFDS has it
    return given_path(default, "TFDS_DATA_DIR")


def _command(data: Data, root: str | pathlib.Path) -> str:
    """What prepares a data set in a folder."""
    flags = ("--file_format=array_record", f"--data_dir={root}")
    return shlex.join(("tfds", "build", data.name, *flags))


def _conversion(builder: Any, root: pathlib.Path) -> str:
    """What turns files of another format into array_record; TFDS does not build them again."""
    there, new = pathlib.Path(builder.data_dir), f"{root}_array_record"
    flags = (
        f"--dataset_version_dir={there}",
        "--out_file_format=array_record",
        f"--out_dir={pathlib.Path(new, there.relative_to(root))}",
    )
    command = shlex.join(("python", "-m", "tensorflow_datasets.scripts.convert_format", *flags))
    return f"{command}, and set config.data.data_dir to {new}"


def _open_builder(data: Data) -> Any:
    import tensorflow_datasets as tfds

    root = _root(data)
    prepared = sorted(
        ":".join(info.parent.relative_to(root).as_posix().rsplit("/", 1))
        for depth in ("*/*", "*/*/*")  # name/version or name/config/version
        for info in root.glob(f"{depth}/dataset_info.json")
    )
    builder: Any = None
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # it warns of each folder it does not find
    try:
        builder = tfds.builder(data.name, data_dir=root)
        if builder.info.splits:
            builder.as_data_source(split="train")
            return builder
        lack = "is not prepared"
    except tfds.core.DatasetNotFoundError as error:
        known = ["digits", "folder", *(name.split(":")[0] for name in prepared)]
        known += tfds.list_builders(with_community_datasets=False)
        close = difflib.get_close_matches(data.name, dict.fromkeys(known), 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "see tfds.list_builders()."
        raise UserError(f"config.data.name={data.name!r} is unknown: {hint}") from error
    except NotImplementedError:
        raise UserError(
            f"data set {data.name!r} is prepared in {root}, but not as array_record: convert it, "
            f"which needs TensorFlow: pip install tensorflow, then {_conversion(builder, root)}"
        ) from None
    except Exception as error:  # bad names, configs, versions; damaged .json files
        said = reason(error)
        raise UserError(
            f"config.data.name={data.name!r} cannot be opened in {root}: {said}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    have = f"it has {', '.join(prepared)}" if prepared else "it has no prepared data set"
    if not root.is_dir():
        have = "there is no such folder"
    raise UserError(
        f"data set {data.name!r} {lack} in {root} ({have}): set config.data.data_dir to where it "
        "is, or prepare it from its downloads, which needs TensorFlow: pip install tensorflow, "
        f"then {_command(data, root)}"
    )
