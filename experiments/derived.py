"""Numbers drawn from finished runs' checkpoints; they are kept, as JSON, where those are not."""

import hashlib
import json
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from skd_jax.writer import read_json, write_json


def read(path: Path, made_of: Any) -> Any | None:
    """What was found.

    Args:
      path: of the JSON.
      made_of: what the runs behind it have found, as plain JSON types; None if one is missing.

    Returns:
      None unless there is something, and it was made of the same.
    """
    found = read_json(path) or {}
    if made_of is None or found.get("made_of") != _digest(made_of):
        return None
    return found["found"]


def make(path: Path, made_of: Any, work: Callable[..., Any], *given: Any) -> None:
    """Writes what ``work(*given)`` returns.

    In another process: this one, which starts more runs, must not hold the device.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        write(path, made_of, pool.submit(work, *given).result())


def write(path: Path, made_of: Any, found: Any) -> None:
    """Writes what was found, with a digest of what it was made of."""
    write_json(path, {"made_of": _digest(made_of), "found": found})


def _digest(made_of: Any) -> str:
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
