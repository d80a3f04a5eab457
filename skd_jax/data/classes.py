"""Which classes, in which order, in which task: functions of numpy seeds alone.

The orders are LUCIR's, which the paper follows: ``np.random.seed(seed)`` and then one call of
numpy's legacy generator. ``RandomState(seed)`` gives the same numbers and touches no global state;
numpy keeps its stream fixed for good.
"""

import difflib
import itertools
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from skd_jax.config import Data
from skd_jax.errors import UserError
from skd_jax.paths import given_path

Schedule = tuple[tuple[int, ...], ...]


def composed(name: str) -> str:
    """A class name in the one form that names are compared in: file systems decompose letters."""
    return unicodedata.normalize("NFC", name)


def class_order(num_classes: int, seed: int) -> np.ndarray:
    """The permutation ``np.random.seed(seed); np.random.shuffle(np.arange(num_classes))``.

    Returns:
      int64 [num_classes], a permutation of 0..num_classes-1.
    """
    order = np.arange(num_classes)
    np.random.RandomState(seed).shuffle(order)
    return order


def choose_classes(num_classes: int, subset: int, seed: int) -> np.ndarray:
    """The choice ``np.random.seed(seed); np.random.choice(num_classes, subset, replace=False)``.

    Returns:
      int64 [subset], distinct classes in the order drawn.
    """
    return np.random.RandomState(seed).choice(num_classes, subset, replace=False)


def split_tasks(order: Sequence[int] | np.ndarray, base_classes: int, tasks: int) -> Schedule:
    """Splits a class order into the base task and ``tasks`` equal incremental ones.

    Args:
      order: [n] class ids, in the order they are learned.
      base_classes: classes of task 0.
      tasks: N, the number of incremental tasks.

    Returns:
      N + 1 tuples of class ids; the first is the base task's.

    Raises:
      UserError: there is no such split.
    """
    remaining = len(order) - base_classes
    if base_classes < 1:
        raise UserError(f"config.data.base_classes={base_classes} must be at least 1.")
    if len(order) < 2:
        raise UserError(
            f"there {'is 1 class' if len(order) else 'are no classes'}, and later tasks need "
            "classes of their own: give images of more."
        )
    if remaining < 1:
        raise UserError(
            f"config.data.base_classes={base_classes} leaves none of the {len(order)} classes "
            "for later tasks: make it smaller."
        )
    if tasks < 1:
        raise UserError(f"config.data.tasks={tasks} must be at least 1.")
    if remaining % tasks:
        fitting = [n for n in range(1, remaining + 1) if remaining % n == 0]
        raise UserError(
            f"config.data.tasks={tasks} does not divide the {remaining} classes left after "
            f"config.data.base_classes={base_classes}: choose tasks from {fitting}."
        )
    size = remaining // tasks
    bounds = [0, *range(base_classes, len(order) + 1, size)]
    ids = [int(i) for i in order]
    return tuple(tuple(ids[a:b]) for a, b in itertools.pairwise(bounds))


def class_schedule(data: Data, class_names: Sequence[str]) -> Schedule:
    """The classes of every task: exclude, choose a subset, order, cut, split.

    The seeds act on the classes that are left, re-indexed 0..n-1 in their original order.

    Args:
      data: the data section of the configuration.
      class_names: name of each original label.

    Returns:
      N + 1 tuples of the source's original labels; the first is the base task's.

    Raises:
      UserError: a name is unknown, or there are too few classes.
    """
    unknown = sorted(set(data.exclude_classes) - set(class_names))
    if unknown:
        raise UserError(
            f"config.data.exclude_classes names {unknown}, which {data.name} does not have; "
            f"its {len(class_names)} classes begin {list(class_names[:5])}."
        )
    ids = np.array([i for i, name in enumerate(class_names) if name not in data.exclude_classes])
    for field in ("subset", "max_classes"):
        value = getattr(data, field)
        if not 0 <= value <= len(ids):
            raise UserError(
                f"config.data.{field}={value} must be 0 (all) to {len(ids)}, the classes there are."
            )
    if data.subset:
        ids = ids[choose_classes(len(ids), data.subset, data.order_seed)]
    ids = ids[class_order(len(ids), data.order_seed)]
    if data.class_order:
        ids = _named_first(ids, class_names, data)
    return split_tasks(ids[: data.max_classes or None], data.base_classes, data.tasks)


def _named_first(ids: np.ndarray, class_names: Sequence[str], data: Data) -> np.ndarray:
    """The same ids, those that ``data.class_order`` names first."""
    known = {composed(class_names[int(i)]): i for i in ids}
    names = [composed(name.strip()) for name in data.class_order.split(",")]
    where = f"config.data.class_order={data.class_order}"
    if not all(name in known for name in names) and (file := _file(data.class_order)):
        try:
            lines = file.read_text("utf-8").splitlines()
            names = [composed(line.strip()) for line in lines if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{where} cannot be read ({error}): give a file in UTF-8") from error
    if unknown := [name for name in names if name not in known]:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"they begin {list(known)[:5]}."
        raise UserError(
            f"{where}: {unknown[0]!r} is none of the {len(known)} classes, and there is no such "
            f"file with a name a line; {hint}"
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{where}: {twice[0]!r} is named twice; name each class once.")
    first = [known[name] for name in names]
    return np.array([*first, *(i for i in ids if i not in first)])


def _file(text: str) -> Path | None:
    """The file that is meant, if it is none of several names and there is one."""
    if "," in text:
        return None
    try:
        file = given_path(text, "config.data.class_order")
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # no name of a file, such as one that is too long
            return None
        raise
    return file if file.is_file() else None
