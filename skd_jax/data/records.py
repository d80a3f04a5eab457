"""The records of a data set, as every reader hands them over, and the decoding of one."""

import dataclasses
import io
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from skd_jax.errors import UserError

Encoded = Image.Image | bytes | pathlib.Path  # an image in whatever form its reader has it


@dataclasses.dataclass(frozen=True)
class Records:
    """All images of a data set, not yet split into train and test.

    Attributes:
      class_names: name of each label.
      labels: int32 [n], the label of every record.
      parts: the records of each split the data set came with; "train" and "test" if it has both.
      encoded: hands out the images of some records, undecoded.
      drop: makes a reader that holds images or names of files let go of some records.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    parts: dict[str, range]
    encoded: Callable[[list[int]], list[Encoded]]
    drop: Callable[[list[int]], None] = lambda ids: None


def concatenate(labels: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, range]]:
    """Numbers the records of several parts one after the other.

    Args:
      labels: int32 [n_part] for each part.

    Returns:
      int32 [n], the labels of all parts, and the range of records of each.
    """
    ends = np.cumsum([len(part) for part in labels.values()]).tolist()
    parts = {
        name: range(end - len(labels[name]), end) for name, end in zip(labels, ends, strict=True)
    }
    return np.concatenate(list(labels.values())).astype(np.int32), parts


def decode(encoded: Encoded, name: str, size: int, channels: int, fit: str) -> np.ndarray:
    """Decodes one image and makes it a square.

    Args:
      encoded: the image, its file's bytes, or its path.
      name: what to call it in an error.
      size: height and width of the result.
      channels: 3 for RGB, 1 for grey.
      fit: "squash" resizes to the square, "crop" resizes the short side and cuts out the centre.

    Returns:
      uint8 [size, size, channels].

    Raises:
      UserError: the image cannot be decoded.
    """
    try:
        if not isinstance(encoded, Image.Image):
            encoded = Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded)
        with encoded:
            image = encoded.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # Pillow raises half a dozen types, SyntaxError among them.
        raise UserError(
            f"{name} cannot be read as an image ({error}): replace or delete it."
        ) from error
    box = None
    if fit == "crop":
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.asarray(image, np.uint8).reshape(size, size, channels)
