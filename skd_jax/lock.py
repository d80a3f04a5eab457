"""One run a workdir."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from skd_jax.errors import UserError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder that exists.

    The kernel holds the lock, on the folder itself, for as long as this process lives: a dead run
    leaves none behind. A file system without locks is used without one.

    Raises:
      UserError: another run is at work there, or the folder cannot be opened.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--workdir={folder}: {error.strerror}; name another") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"--workdir={folder}: another run is at work there; wait until it ends, stop "
                    "it, or name another workdir"
                ) from error
        yield
    finally:
        os.close(descriptor)
