"""The one place that takes a path from a person; and which folder is what of a run."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from skd_jax.errors import UserError, one_line

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # no drive: those have one letter


def replica_folder(workdir: Path, seed: int) -> Path:
    """Where a run of several seeds writes what belongs to one of them."""
    return workdir / f"seed{seed}"


def run_of(folder: Path) -> tuple[Path, int | None]:
    """The workdir that a folder belongs to, and the seed, if it is one's of several."""
    there = folder.resolve()
    named = re.fullmatch("seed([0-9]+)", there.name)
    if not named or (there / "checkpoints").is_dir() or not (there / "config.json").exists():
        return folder, None
    whole = there.parent
    if not (whole / "checkpoints").is_dir() or not _has_several(whole / "config.json"):
        return folder, None
    return whole, int(named.group(1))


def _has_several(config: Path) -> bool:
    """Whether a run's configuration is one of several seeds."""
    try:
        return json.loads(config.read_bytes())["run"]["replicas"] > 1
    except (OSError, ValueError, LookupError, TypeError):
        return False


def given_path(path: str | Path, said: str = "") -> Path:
    """The path that a person means, on the command line, in a config or in Python.

    A shell leaves the tilde of ``--workdir=~/runs`` as it is; here it is the home folder. A path
    that has been through here may go through again.

    Args:
      path: as it was given.
      said: the field or flag that it was given by, which messages name.

    Raises:
      UserError: it is the address of something elsewhere, such as a bucket, names the home of an
        unknown user, or may not be looked at.
    """
    text = os.fspath(path)
    shown = f"{said}={text}" if said else text
    if _ADDRESS.match(text):
        raise UserError(
            f"{shown} is an address; give the path of a folder or file that this machine has "
            "(mount a bucket as a folder, or copy what is needed)"
        )
    if "\0" in text:
        raise UserError(f"{shown!r} is no path: it has a character of number 0")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = expanded.partition("/")[0]
        raise UserError(f"{shown}: no home of {user} is known; a folder of that name is ./{user}")
    found = Path(expanded)
    found = Path.cwd() / found if str(found).startswith("~") else found  # it was "./~"
    with looking(shown), contextlib.suppress(FileNotFoundError, NotADirectoryError):
        found.stat()  # of those two, whoever opens it tells
    return found


@contextlib.contextmanager
def looking(shown: str | Path) -> Iterator[None]:
    """Makes it a UserError where a path, or what is in it, may not be looked at.

    A folder that is locked, or one above it, is such a path, and a name that is too long.

    Args:
      shown: the path, as messages name it.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{one_line(str(shown))} cannot be looked at ({error.strerror or error}); give another "
            "path, or mend this one's permissions"
        ) from error
