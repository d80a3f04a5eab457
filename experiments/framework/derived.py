"""Numbers drawn from finished runs' checkpoints; they are kept, as JSON, where those are not."""

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from experiments.framework.making import is_over, make_runs
from experiments.framework.study import Options, Run
from skd_jax.errors import UserError
from skd_jax.files import read_json, write_json
from skd_jax.writer import say


def read(path: Path, made_of: Any) -> Any | None:
    """What was found.

    Args:
      path: of the JSON.
      made_of: what the runs behind it have found, as plain JSON types; None if one is missing.

    Returns:
      None unless there is something, and it was made of the same.
    """
    found = read_json(path) or {}
    same = made_of is not None and found.get("made_of") == _digest(made_of)
    return found.get("found") if same else None


def make(
    path: Path,
    made_of: Callable[[], Any],
    runs: Sequence[Run],
    options: Options,
    what: str,
    work: Callable[..., Any],
    *given: Any,
) -> None:
    """Writes what ``work(*given)`` returns, unless it is there, or the runs are not to be had.

    A dry run tells which of the runs are missing, and writes nothing.

    Args:
      path: of the JSON.
      made_of: see :func:`read`; asked again once the runs' checkpoints are there.
      runs: whose checkpoints it needs.
      options: of the command line.
      what: is being done, for people.
      work: a function of a module.
      given: its arguments.

    Raises:
      UserError: a run, or the work, cannot be done.
    """
    if made_of() is None or read(path, made_of()) is not None:
        return
    make_runs(runs, options, with_checkpoints=True)
    if not options.dry_run and all(is_over(run, options) for run in runs):
        say(what)
        write(path, made_of(), _elsewhere(work, given))


def write(path: Path, made_of: Any, found: Any) -> None:
    """Writes what was found, with a digest of what it was made of."""
    write_json(path, {"made_of": _digest(made_of), "found": found})


def _digest(made_of: Any) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def _elsewhere(work: Callable[..., Any], given: Sequence[Any]) -> Any:
    """In another process: this one, which starts more runs, must not hold the device."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, given))
    process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"{work.__name__} ended with exit code {process.exitcode}; see above"
        ) from None
    finally:  # a study that is stopped stops it too
        process.terminate()
        process.join()
    if isinstance(found, UserError):
        raise found
    return found


def _send(sender: Connection, work: Callable[..., Any], given: Sequence[Any]) -> None:
    try:
        sender.send(work(*given))
    except UserError as error:
        sender.send(error)
