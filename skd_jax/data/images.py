"""Images by path: what lies in a folder, decoded one by one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from skd_jax.config import Data
from skd_jax.data.folder import FIX, SUFFIXES
from skd_jax.data.records import decode
from skd_jax.errors import UserError


def find_images(path: str | Path) -> list[Path]:
    """An image file itself, or the images of a folder and its sub-folders, in order of name.

    Raises:
      UserError: there is no such file or folder, or the folder holds no images.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} is no file and no folder; name an image or a folder of images")
    found = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise UserError(f"{path} holds no images ({', '.join(sorted(SUFFIXES))})")
    return found


def read_images(paths: Sequence[Path], data: Data) -> np.ndarray:
    """Images as they are stored for a model: uint8 [n, load_size, load_size, channels].

    Raises:
      UserError: one cannot be read; it is named.
    """
    return np.stack(
        [decode(path, str(path), FIX, data.load_size, data.channels, data.fit) for path in paths]
    )
