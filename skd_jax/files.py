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
def whole(path: str | Path, **arguments: Any) -> Iterator[IO]:
    """Opens a file that a person names: :func:`replacing`, but for links and what is no file.

    Of a link, the file it leads to is replaced. What is no file on a disk, such as a pipe or
    ``/dev/stdout``, is written to as the block goes.

    Args:
      path: of the file.
      arguments: those of ``open``, its mode among them.

    Raises:
      UserError: it cannot be written.
      BrokenPipeError: whoever read the pipe has gone.
    """
    path = given_path(path)
    with writing(path, ELSEWHERE):
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        if path.exists() and (opened := _OPENED.fullmatch(str(path))):
            number = {"stdout": 1, "stderr": 2}.get(opened[1]) or int(opened[2])
            with open(os.dup(number), **arguments) as file:  # goes on where that one is
                yield file
        elif path.exists() and not path.is_file():
            with path.open(**arguments) as file:
                yield file
        else:
            with _replacing(Path(os.path.realpath(path)), **arguments) as file:
                yield file


@contextlib.contextmanager
def replacing(path: Path, **arguments: Any) -> Iterator[IO]:
    """Opens a run's file that is there when the block has ended, and is as it was if it raises.

    A link is replaced itself: what it leads to may be another run's.

    Args:
      path: of the file.
      arguments: those of ``open``, its mode among them.

    Raises:
      UserError: it cannot be written.
    """
    with writing(path, GO_ON), _replacing(path, **arguments) as file:
        yield file


@contextlib.contextmanager
def _replacing(path: Path, **arguments: Any) -> Iterator[IO]:
    partial = path.parent / f"{path.name}.partial"
    try:
        with partial.open(**arguments) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(path: str | Path, fix: str) -> Iterator[None]:
    """Makes what goes wrong with the disk a UserError that names ``path``.

    Args:
      path: what is written within.
      fix: what people may do then: ``ELSEWHERE`` where they name the path, ``GO_ON`` in a run.

    Raises:
      UserError: it cannot be written.
      BrokenPipeError: whoever read it has gone, which is no fault.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); {fix}") from error


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file of a run, whole or not at all.

    Args:
      path: of the file.
      values: what is written.

    Raises:
      UserError: it cannot be written; the disk is full, for instance.
      ValueError: a number is not finite, for which JSON has no word.
    """
    with replacing(path, mode="w", encoding="utf-8") as file:
        file.write(json_text(values))


def json_text(values: dict[str, Any]) -> str:
    """As :func:`write_json` writes it."""
    return json.dumps(values, indent=2, allow_nan=False) + "\n"


def read_json(path: Path) -> dict[str, Any] | None:
    """What :func:`write_json` wrote, or None if it is absent or damaged."""
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
