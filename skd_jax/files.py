"""Files that are written whole or not at all, and what people are told where they cannot be."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from skd_jax.errors import UserError
from skd_jax.paths import given_path

ELSEWHERE = "name another place"
GO_ON = (
    "fix that (free some space on the disk) and run the same command again: it goes on from the "
    "newest checkpoint"
)
_OPENED = re.compile(r"/dev/(?:(stdout|stderr)|fd/([0-9]+))")  # what this process has open


@contextlib.contextmanager
def whole(path: str | Path, fix: str = ELSEWHERE, **arguments: Any) -> Iterator[IO]:
    """Opens a file that is there when the block has ended, and is not, or as it was, if it raises.

    Of a link, the file it leads to is replaced. What is no file on a disk, such as a pipe or
    ``/dev/stdout``, is written to as the block goes.

    Args:
      path: of the file.
      fix: see :func:`writing`.
      arguments: those of ``open``, its mode among them.

    Raises:
      UserError: it cannot be written.
      BrokenPipeError: whoever read the pipe has gone.
    """
    path = given_path(path)
    with writing(path, fix):
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if path.exists() and (opened := _OPENED.fullmatch(str(path))):
            number = {"stdout": 1, "stderr": 2}.get(opened[1]) or int(opened[2])
            with open(os.dup(number), **arguments) as file:  # goes on where that one is
                yield file
            return
        if path.exists() and not path.is_file():
            with path.open(**arguments) as file:
                yield file
            return
        path = Path(os.path.realpath(path))
        partial = path.parent / f"{path.name}.partial"
        try:
            with partial.open(**arguments) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | Path, fix: str = ELSEWHERE) -> Iterator[None]:
    """Makes what goes wrong with the disk a UserError that names ``path``.

    Args:
      path: what is written within.
      fix: what people may do then, in words.
    """
    try:
        yield
    except BrokenPipeError:  # whoever read it has gone, which is no fault
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); {fix}") from error


def write_json(path: Path, values: dict[str, Any], fix: str = GO_ON) -> None:
    """Writes a JSON file, whole or not at all.

    Args:
      path: of the file.
      values: without NaN or infinity, for which JSON has no word.
      fix: see :func:`writing`.

    Raises:
      UserError: it cannot be written; the disk is full, for instance.
    """
    with whole(path, fix, mode="w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """What :func:`write_json` wrote, or None if it is absent or damaged."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
