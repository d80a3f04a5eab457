"""Arrays by name in safetensors files. Nothing is unpickled, and a file's sizes are not trusted."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from skd_jax.errors import UserError, first_line
from skd_jax.files import whole

Shape = tuple[int, ...]

FLOATS = ("F16", "BF16", "F32", "F64")
_PICKLED = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".th", ".tar")
_DAMAGED = (  # what the library raises over a file that is none
    *(SafetensorError, OSError, ValueError, TypeError, AttributeError, LookupError),
    *(OverflowError, MemoryError, EOFError),
)


def header(path: Path) -> dict[str, tuple[Shape, str]]:
    """(shape, type) of each tensor by name; a type is "F32", "I64" and so on.

    Raises:
      UserError: it is no sound safetensors file; of PyTorch's own formats it says how to turn them
        into one.
    """
    _check_format(path)
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (tuple(x.get_shape()), x.get_dtype()) for n, x in slices.items()}
    except _DAMAGED as error:
        raise UserError(
            f"{path} is damaged, or no safetensors file ({first_line(error)}); save it anew with "
            "safetensors.torch.save_file"
        ) from error


def load(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Tensors by name: floating-point numbers of 16, 32 or 64 bits as float32, others as they are.

    Raises:
      UserError: they cannot be read, or a number is not finite as float32; the message names the
        tensors.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in names}
    except _DAMAGED as error:
        raise UserError(f"{path} cannot be read ({first_line(error)}); save it anew") from error
    with np.errstate(over="ignore"):  # of float64
        arrays = {
            name: array if array.dtype.kind in "iub" else array.astype(np.float32)
            for name, array in arrays.items()
        }
    if bad := [name for name, array in arrays.items() if not np.all(np.isfinite(array))]:
        raise UserError(
            f"{path}: there are numbers that are not finite in {listed(bad)}; give a sound model"
        )
    return arrays


def write(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays by name, as PyTorch's loader takes them, whole or not at all.

    Raises:
      UserError: the file cannot be written.
    """
    # The library takes memory as it lies; np.ascontiguousarray would give scalars a dimension.
    arrays = {name: np.array(array, order="C") for name, array in arrays.items()}
    with whole(path, mode="wb") as file:
        file.write(save(arrays, metadata={"format": "pt"}))


def listed(names: Iterable[str]) -> str:
    """The first names of some, and how many more there are, on one line."""
    names = sorted(names)
    more = f" and {len(names) - 5} more" if names[5:] else ""
    return (", ".join(map(_shown, names[:5])) or "none") + more


def _shown(name: str) -> str:
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= 80 else f"{name[:77]}..."


def _check_format(path: Path) -> None:
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name a .safetensors file")
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error})") from error
    pickled = start[:2] == b"PK" or re.match(rb"\x80[\x00-\x05]", start)
    if path.suffix.lower() in _PICKLED or (pickled and start[8:] != b"{"):
        old, new = str(path), str(path.with_suffix(".safetensors"))
        new = new if new != old else f"{new}.safetensors"
        raise UserError(
            f"{path} is PyTorch's own format, which can run code, so it is not opened; turn it "
            "into safetensors with these three lines of Python:",
            fix=(
                "import torch, safetensors.torch",
                f"saved = torch.load({old!r}, map_location='cpu', weights_only=True)",
                # The first of itself and its parts that holds tensors alone: the others are a
                # training's epoch, optimizer and so on.
                "safetensors.torch.save_file(next({n: x.clone().contiguous() for n, x in d.items()}"
                " for d in (saved, *saved.values()) if isinstance(d, dict) and d"
                f" and all(map(torch.is_tensor, d.values()))), {new!r})",
            ),
        )
