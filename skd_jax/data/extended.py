"""Images to extend a trained model with: a folder of new classes, and perhaps one of old ones."""

import dataclasses
import difflib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from skd_jax.config import Data
from skd_jax.data.classes import composed
from skd_jax.data.folder import read_folder
from skd_jax.data.records import Encoded, Records
from skd_jax.data.sources import RecordSource, split_records
from skd_jax.errors import UserError
from skd_jax.model_config import is_a_line


def extended_source(
    data: Data, old: Sequence[str], images: Path, check: Path | None
) -> RecordSource:
    """The images of new classes, labelled after the old ones, and test images of old ones.

    Args:
      data: how an image is decoded; ``test_fraction`` of each new class is held out for testing,
        unless ``images`` has splits of its own.
      old: the names of the classes that the model knows.
      images: a folder with one sub-folder a new class.
      check: the same of old classes, or of some; None if there are no such images. Of one that is
        split, only what is to be tested on is taken.

    Raises:
      UserError: a folder is missing, empty or broken; a new class has the name of an old one; a
        class to check is not one of the old; or a colour image for a model of grey ones.
    """
    new = _read(data, images, "--images")
    if wrong := [name for name in new.class_names if not is_a_line(name)]:
        raise UserError(
            f"--images={images}: {wrong[0]!r} is no name of one line in UTF-8; rename the folder"
        )
    known_as = {composed(name): k for k, name in enumerate(old)}
    if twice := sorted(name for name in new.class_names if composed(name) in known_as):
        raise UserError(
            f"--images={images}: the model knows {_listed(twice)} already; take the folder away, "
            "or give the class another name"
        )
    if {"train", "test"} <= set(new.parts):
        train, test = (np.array(new.parts[part]) for part in ("train", "test"))
    else:
        train, test = _split(data, new, images)
    labels, parts = new.labels + len(old), [new]
    if check:
        known = _read(data, check, "--check")
        if strange := [name for name in known.class_names if composed(name) not in known_as]:
            close = difflib.get_close_matches(strange[0], old, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(
                f"--check={check}: {_listed(strange)} is no class of the model, which knows "
                f"{_listed(old)}{hint}"
            )
        positions = np.array([known_as[composed(name)] for name in known.class_names])
        seen = known.parts.get("test", range(len(known.labels)))  # the model may have had the rest
        test = np.concatenate([test, len(labels) + np.array(seen)])
        labels, parts = np.concatenate([labels, positions[known.labels]]), [new, known]
    records = _joined((*old, *new.class_names), labels, parts)
    return RecordSource(records, {"train": train, "test": test}, data)


def _read(data: Data, folder: Path, flag: str) -> Records:
    """A folder's images, of which colour ones are refused where a model takes grey ones."""
    try:
        records = read_folder(dataclasses.replace(data, data_dir=str(folder)))
    except UserError as error:
        said = str(error).replace(f"config.data.data_dir={str(folder)!r}", f"{flag}={folder}")
        raise UserError(said.replace("config.data.data_dir", flag)) from error
    if data.channels == 1:
        with ThreadPoolExecutor() as threads:
            files = [Path(records.place(i)) for i in range(len(records.labels))]
            coloured = [
                f for f, is_so in zip(files, threads.map(_coloured, files), strict=True) if is_so
            ]
        if coloured:
            more = f" (and {len(coloured) - 1} more)" if coloured[1:] else ""
            raise UserError(
                f"{flag}={folder}: {coloured[0]}{more} is in colour, and the model takes images of "
                "one channel; make it grey first, or take it away"
            )
    return records


def _split(data: Data, records: Records, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The records to learn from, and those that are held out."""
    labels, counts = np.unique(records.labels, return_counts=True)
    if one := [records.class_names[k] for k in labels[counts < 2]]:
        raise UserError(
            f"--images={folder}: {_listed(one)} has one image, and a class needs two, one to learn "
            "from and one to test on: add images, or take the folder away"
        )
    return split_records(records, data.test_fraction, data.split_seed)


def _coloured(file: Path) -> bool:
    with Image.open(file) as image:
        if image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;"):
            return False
        red, green, blue = np.moveaxis(np.asarray(image.convert("RGB"), np.int16), -1, 0)
    # A scan that was saved in colour, or a JPEG's rounding, is grey.
    return max(np.abs(red - green).max(), np.abs(green - blue).max()) > 8


def _joined(names: Sequence[str], labels: np.ndarray, parts: Sequence[Records]) -> Records:
    """Records one after the other, under labels of their own."""
    starts = np.cumsum([0, *(len(part.labels) for part in parts)])

    def of(record: int) -> tuple[Records, int]:
        part = int(np.searchsorted(starts, record, side="right")) - 1
        return parts[part], record - int(starts[part])

    def encoded(ids: list[int]) -> list[Encoded]:
        return [part.encoded([i])[0] for part, i in map(of, ids)]

    def place(record: int) -> str:
        part, i = of(record)
        return part.place(i)

    def drop(ids: list[int]) -> None:
        for part, i in map(of, ids):
            part.drop([i])

    files = {f"{n}/{f}": x for n, part in enumerate(parts) for f, x in (part.files or {}).items()}
    return Records(
        class_names=tuple(names),
        labels=labels,
        parts={},
        encoded=encoded,
        place=place,
        fix=parts[0].fix,
        drop=drop,
        files=files,
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:5])
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")
