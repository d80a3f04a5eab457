"""Image files as people have them: which files are images, and those of a list as one array."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from skd_jax.config import Data
from skd_jax.data.records import FORMATS, decode
from skd_jax.errors import UserError, warn
from skd_jax.paths import given_path

SUFFIXES = frozenset(
    (
        *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".gif", ".webp", ".avif"),
        *(".bmp", ".dib", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    )
)
_USUAL = ".jpg, .png, .gif, .webp, .bmp, .tif or another usual suffix"
# What systems lay beside files; macOS's ._x.jpg and .DS_Store are hidden anyway.
_COMPANIONS = frozenset(
    (
        *("__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin"),
        *("system volume information", "lost+found", "@eadir", "#recycle", "@recycle"),
    )
)


def is_companion(name: str) -> bool:
    """Whether a file or folder of that name is hidden, or what a system lays beside files."""
    return name.startswith(".") or name.lower() in _COMPANIONS


def list_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files in a folder and below it; links are followed, companion files ignored.

    A link back to a folder that it lies in is not followed.

    Args:
      folder: any folder.

    Returns:
      The image files, which their names' endings tell, and the others, both sorted. What would be
      waited for, as a pipe, is among the others.

    Raises:
      UserError: a folder cannot be listed.
    """

    def refuse(error: OSError) -> None:
        raise UserError(
            f"{error.filename} cannot be listed ({error.strerror}): mend that, or move it away."
        ) from error

    images, others = [], []
    top = Path(os.path.realpath(folder))
    seen = set(map(str, top.parents))
    for place, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link back to where we were
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_companion(name))
        for file in (Path(place, name) for name in files if not is_companion(name)):
            found = file.suffix.lower() in SUFFIXES and (file.is_file() or not file.exists())
            (images if found else others).append(file)
    return sorted(images), sorted(others)


def warn_left_out(folder: Path, files: Sequence[Path], loose: Sequence[Path] = ()) -> None:
    """Counts and names, on standard error, the files below a folder that are not read.

    Args:
      folder: what was looked through.
      files: what is no image by its name; what is one by its content is named first.
      loose: images that lie in no class folder.
    """
    if not files and not loose:
        return
    kinds = {file: _kind(file) for file in files}
    words = [f"{file.relative_to(folder)} (in no class folder)" for file in loose]
    words += [f"{file.relative_to(folder)} (a {k} by content)" for file, k in kinds.items() if k]
    words += [f"{file.relative_to(folder)}" for file, kind in kinds.items() if not kind]
    more = f" and {len(words) - 5} more" if len(words) > 5 else ""
    count = f"{len(words)} file{'s' * (len(words) > 1)}"
    warn(
        f"left out of {folder}, {count}: {', '.join(words[:5])}{more}. The names of images end in "
        f"{_USUAL}"
    )


def _kind(file: Path) -> str | None:
    if not file.is_file():  # opening a pipe would wait for ever
        return None
    try:
        with Image.open(file, formats=FORMATS) as image:
            return image.format
    except Exception:  # it is no image, or cannot be read, and is left out either way
        return None


def find_images(path: str | Path) -> list[Path]:
    """The image files that a path means.

    Args:
      path: a file, whatever its name; or a folder, which is searched with all that lies below it,
        as the class folders of an image folder are.

    Returns:
      The files, sorted; at least one. Those of a folder that are no images by their names are named
      by a warning on standard error.

    Raises:
      UserError: there is no such file or folder, or the folder holds no image.
    """
    path = given_path(path)
    if path.is_dir():
        images, others = list_files(path)
        if not images:
            raise UserError(f"{path} {no_images(others)}; name a folder of images")
        warn_left_out(path, others)
        return images
    if not path.exists():
        raise UserError(
            f"{path}: there is no such file or folder; name an image, or a folder of images"
        )
    return [path]


def no_images(others: Sequence[Path]) -> str:
    """Words for an error: a folder holds no images, but may hold other files."""
    has = f"; it has {others[0].name}" if others else ""
    return f"holds no images (their names end in {_USUAL}{has})"


def read_images(paths: Sequence[str | Path], data: Data) -> np.ndarray:
    """Decodes image files as training does, in threads.

    Args:
      paths: of the files.
      data: how an image is decoded: ``load_size``, ``channels``, ``fit`` and ``interpolation``.

    Returns:
      uint8 [n, load_size, load_size, C].

    Raises:
      UserError: a file cannot be read or decoded; it is named.
    """

    def load(path: str | Path) -> np.ndarray:
        fix = "replace it, or leave it out"
        how = (data.load_size, data.channels, data.fit, data.interpolation)
        return decode(given_path(path), str(path), fix, *how)

    images = np.empty((len(paths), data.load_size, data.load_size, data.channels), np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for i, image in enumerate(threads.map(load, paths)):
            images[i] = image
    return images
