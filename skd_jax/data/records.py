"""The records of a data set, as every reader hands them over, and the decoding of one.

Also what is kept of files between two starts, so that they need not be read whole again.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from skd_jax.errors import UserError

Encoded = Image.Image | bytes | pathlib.Path  # an image in whatever form its reader has it
SETTLED = 2.0  # seconds: the times of a file that was changed later may not tell the next change
_DIGEST = hashlib.sha256().digest_size

# Of all that Pillow can open: no format whose reader starts other programs, as that of EPS does.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
_TURNS = {  # EXIF orientation: what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclasses.dataclass(frozen=True)
class Records:
    """All images of a data set, not yet split into train and test.

    Attributes:
      class_names: name of each label.
      labels: int [n], the label of every record.
      parts: the records of each split the data set came with; "train" and "test" if it has both.
      encoded: hands out the images of some records, undecoded.
      place: what to call a record in an error, so that it can be found.
      fix: what to do about a wrong one.
      drop: makes a reader that holds images or names of files let go of some records.
      files: size in bytes and CRC-32 of every file of an image folder, by its path within; of no
        other data set.
    """

    class_names: tuple[str, ...]
    labels: np.ndarray
    parts: dict[str, range]
    encoded: Callable[[list[int]], list[Encoded]]
    place: Callable[[int], str]
    fix: str
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
            f"classes are 0 to {classes - 1}{more}: {records.fix}."
        )


def stamp(file: str | pathlib.Path) -> list[int] | None:
    """What tells whether a file is still the same: its size, inode and times of change.

    Returns:
      None if it cannot be told: the file is not there, or has just been changed.
    """
    try:
        found = os.stat(file)
    except OSError:
        return None
    changed = max(found.st_mtime_ns, found.st_ctime_ns)
    if changed > time.time_ns() - SETTLED * 1e9:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def cache_file(kind: str, of: str) -> pathlib.Path:
    """Where something is kept between two starts, in the user's cache folder.

    Args:
      kind: names the sub-folder.
      of: what it is kept of.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(os.fsencode(of)).hexdigest()[:32]
    return pathlib.Path(caches, "skd_jax", kind, name)


def read_cache(file: pathlib.Path, valid: str = "") -> bytes | None:
    """What :func:`write_cache` wrote with the same ``valid``; None if absent or damaged."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    content, digest = content[:-_DIGEST], content[-_DIGEST:]
    return content if digest == _digest(content, valid) else None


def write_cache(file: pathlib.Path, content: bytes, valid: str = "") -> None:
    """Keeps something, whole or not at all; where that cannot be written, it is not kept.

    Args:
      file: a :func:`cache_file`.
      content: what to keep.
      valid: of what state of the data that is; it is not found for another.
    """
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=file.parent)
        try:
            with open(descriptor, "wb") as opened:
                opened.write(content + _digest(content, valid))
            os.replace(partial, file)
        except BaseException:
            os.unlink(partial)
            raise


def _digest(content: bytes, valid: str) -> bytes:
    return hashlib.sha256(content + valid.encode()).digest()


def check_machine(error: BaseException, name: str) -> None:
    """Checks that what was raised is no limit of this machine, which is no harm of the data.

    Args:
      error: what was raised while something was read.
      name: what was read.

    Raises:
      UserError: it is one; the message says which.
    """
    number, said = getattr(error, "errno", None), str(error)
    if number in (errno.EMFILE, errno.ENFILE) or os.strerror(errno.EMFILE) in said:
        limit = "too many files are open; raise the limit (ulimit -n 65536) and start again"
    elif isinstance(error, MemoryError) or number == errno.ENOMEM:
        limit = "the memory is used up; free some, or take a smaller config.data.load_size"
    else:
        return
    raise UserError(f"{name} cannot be read now, and nothing is wrong with it: {limit}") from error


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
        check_machine(error, str(file))
        raise UserError(
            f"{file} cannot be read ({error.strerror}): restore it; an image folder has to stay as "
            "it is during a run."
        ) from error


def decode(
    encoded: Encoded,
    name: str,
    fix: str,
    size: int,
    channels: int,
    fit: str,
    interpolation: str = "bilinear",
) -> np.ndarray:
    """Decodes one image and makes it a square: in training, in prediction, everywhere.

    The image is turned upright, as its EXIF orientation says. Of an animation or a file of several
    pages the first image is taken. 16 bits are scaled to 8. Transparent parts become white, since
    the colour that lies below them in the file is not meant to be seen.

    Args:
      encoded: the image, its file's bytes, or its path.
      name: what to call it in an error.
      fix: what to do about it then.
      size: height and width of the result.
      channels: 3 for RGB, 1 for grey.
      fit: "squash" resizes to the square, "crop" resizes the short side and cuts out the centre.
      interpolation: of the resizing, the name of one of Pillow's filters in small letters.

    Returns:
      uint8 [size, size, channels].

    Raises:
      UserError: the image cannot be read or decoded, has values whose range is unknown (floats, or
        integers beyond 16 bits), or more pixels than Pillow's limit for decompression bombs.
    """
    if isinstance(encoded, pathlib.Path):
        encoded = read_file(encoded)
    try:
        if isinstance(encoded, bytes):
            encoded = Image.open(io.BytesIO(encoded), formats=FORMATS)
        with encoded:
            encoded.load()  # before the orientation: some formats turn the image in here
            turn = _TURNS.get(_orientation(encoded))
            image = _to_eight_bits(encoded, "RGB" if channels == 3 else "L")
        image = image if turn is None else image.transpose(turn)
    except Exception as error:  # Pillow raises half a dozen types, SyntaxError among them.
        check_machine(error, name)
        raise UserError(f"{name} cannot be read as an image ({_said(error)}): {fix}.") from error
    box = None
    if fit == "crop":
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        box = (left, top, left + side, top + side)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling[interpolation.upper()], box=box)
    return np.asarray(image, np.uint8).reshape(size, size, channels)


def _said(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # Pillow's own words are an address
        return "unknown format"
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"it has more than {limit:,} pixels, too many to be decoded safely; scale it down"
    return reason(error)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image, 1 to 8; 1 where there is none that can be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF raises what it likes, and the image is sound all the same
        return 1


def _to_eight_bits(image: Image.Image, mode: str) -> Image.Image:
    """The image in ``mode``, "RGB" or "L", its transparent parts white."""
    if image.mode == "F":
        raise ValueError("its values are floats, of unknown range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _from_sixteen_bits(image)
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(layer, mask=layer.getchannel("A"))
    return image.convert(mode)


def _from_sixteen_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (modes "I;16" and "I") as grey of 8: what was 65535 is 255."""
    values = np.asarray(image).astype(np.int32)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(
            f"its values go from {values.min()} to {values.max()}; save it with 8 or 16 bits"
        )
    transparent = image.info.get("transparency")
    grey = (values + 128) // 257
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))
