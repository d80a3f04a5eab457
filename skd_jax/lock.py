"""One run a workdir."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from skd_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # any other
    msvcrt = None

LOCK = "lock"  # the file in the workdir; it stays


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, made if need be.

    The kernel holds the lock, on a file that stays, for as long as this process lives: a
    dead run leaves none behind. A file rather than the folder itself, since NFS locks only files,
    and tells other machines. A (file) system without locks is used without one.

    Raises:
      UserError: another run is at work there, or the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--workdir={folder}: {reason}; name another") from error
    try:
        try:
            _lock(descriptor)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"--workdir={folder}: another run is at work there; wait until it ends, stop "
                    "it, or name another workdir"
                ) from error
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Locks an open file until it is closed; an OSError if another process has."""
    if fcntl:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt:  # its first byte, which need not be there
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
