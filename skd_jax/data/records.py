"""The records of a data set, as every reader hands them over, and the decoding of one."""

import dataclasses
import io
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

from skd_jax.errors import UserError

Encoded = Image.Image | bytes | pathlib.Path  # an image in whatever form its reader has it


@dataclasses.dataclass(frozen=True)
class Records:
    """All images of a data set, not yet split into train and test.

    Attributes:
      class_names: name of each label.
      labels: int [n], the label of every record.
      parts: the records of each split the data set came with; "train" and "test" if it has both.
      encoded: hands out the images of some records, undecoded.
      place: what to call a record in an error, so that it can be found.
      mend: what to do about a wrong one.
      drop: makes a reader that holds images or names of files let go of some records.
      files: size in bytes and CRC-32 of every file of an image folder, by its path within; of no
        other data set.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    parts: dict[str, range]
    encoded: Callable[[list[int]], list[Encoded]]
    place: Callable[[int], str]
    mend: str
    drop: Callable[[list[int]], None] = lambda ids: None
    files: dict[str, list[int]] | None = None


def concatenate(labels: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, range]]:
    """Numbers the records of several parts one after the other.

    Args:
      labels: int [n_part] for each part.

    Returns:
      int [n], the labels of all parts, and the range of records of each.
    """
    ends = np.cumsum([len(part) for part in labels.values()]).tolist()
    parts = {
        name: range(end - len(labels[name]), end) for name, end in zip(labels, ends, strict=True)
    }
    return np.concatenate(list(labels.values())), parts


def check_labels(records: Records) -> None:
    """Checks that every record's label is one of the classes.

    Raises:
      UserError: one is not; the first is named.
    """
    classes = len(records.class_names)
    wrong = np.flatnonzero((records.labels < 0) | (records.labels >= classes))
    if len(wrong):
        first = int(wrong[0])
        more = f" ({len(wrong)} records have such labels)" if len(wrong) > 1 else ""
        raise UserError(
            f"{records.place(first)} has label {records.labels[first]}, but labels of {classes} "
            f"classes are 0 to {classes - 1}{more}: {records.mend}."
        )


def reason(error: Exception) -> str:
    """What an exception says, on one line that is not too long."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def read_file(file: pathlib.Path) -> bytes:
    """The content of an image file.

    Raises:
      UserError: it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror}): restore it; an image folder has to stay as "
            "it is during a run."
        ) from error


def decode(
    encoded: Encoded, name: str, mend: str, size: int, channels: int, fit: str
) -> np.ndarray:
    """Decodes one image and makes it a square.

    Args:
      encoded: the image, its file's bytes, or its path.
      name: what to call it in an error.
      mend: what to do about it then.
      size: height and width of the result.
      channels: 3 for RGB, 1 for grey.
      fit: "squash" resizes to the square, "crop" resizes the short side and cuts out the centre.

    Returns:
      uint8 [size, size, channels].

    Raises:
      UserError: the image cannot be read or decoded.
    """
    if isinstance(encoded, pathlib.Path):
        encoded = read_file(encoded)
    try:
        if isinstance(encoded, bytes):
            encoded = Image.open(io.BytesIO(encoded))
        with encoded:
            image = encoded.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # Pillow raises half a dozen types, SyntaxError among them.
        # Of bytes that begin like no image, Pillow's message has an address only.
        said = "unknown format" if isinstance(error, UnidentifiedImageError) else reason(error)
        raise UserError(f"{name} cannot be read as an image ({said}): {mend}.") from error
    box = None
    if fit == "crop":
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image, np.uint8).reshape(size, size, channels)
