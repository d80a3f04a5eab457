"""How good a model is on a labelled folder: accuracy, each class, and the confusion matrix."""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from skd_jax.data.classes import composed
from skd_jax.data.images import list_files, warn_left_out
from skd_jax.errors import UserError
from skd_jax.paths import given_path, looking
from skd_jax.predict import scored

if TYPE_CHECKING:
    from skd_jax.model import Model


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a model makes of labelled images.

    Attributes:
      class_names: of the model's K classes.
      confusion: int64 [K, K], how many images of class i (row) it takes for class j (column).
      unreadable: how many images could not be read; they count nowhere.
    """

    class_names: tuple[str, ...]
    confusion: np.ndarray
    unreadable: int = 0

    @property
    def images(self) -> np.ndarray:
        """Images of each class, int64 [K]."""
        return self.confusion.sum(axis=1)

    @property
    def accuracy(self) -> float:
        """The share of all images that are classified rightly; NaN without images."""
        return float(_share(np.trace(self.confusion), self.confusion.sum()))

    @property
    def recall(self) -> np.ndarray:
        """The share of each class's images that are taken for it, [K]; NaN without images."""
        return _share(np.diag(self.confusion), self.images)

    @property
    def precision(self) -> np.ndarray:
        """The share of the images taken for a class that are of it, [K]; NaN if none is."""
        return _share(np.diag(self.confusion), self.confusion.sum(axis=0))

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the classes without images."""
        return tuple(n for n, k in zip(self.class_names, self.images, strict=True) if not k)


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return np.true_divide(part, whole)


def confusion_matrix(
    labels: Sequence[int] | np.ndarray, predicted: Sequence[int] | np.ndarray, classes: int
) -> np.ndarray:
    """Counts each pair of a true class (row) and a predicted one (column): int64 [K, K].

    Args:
      labels: int [n], true classes.
      predicted: int [n], predicted classes.
      classes: K.
    """
    pairs = np.asarray(labels, np.int64) * classes + np.asarray(predicted, np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def evaluate(
    model: "Model",
    folder: str | Path,
    broken: Callable[[UserError], None] | None = None,
) -> Evaluation:
    """Classifies the images of a labelled folder.

    Args:
      model: the model.
      folder: has one sub-folder of images a class, which is named like the class.
      broken: is told of an image that cannot be read, which is then left out; None raises.

    Raises:
      UserError: no such folder, a sub-folder that is no class of the model's, no images at all, an
        image that cannot be read, or none that can be.
    """
    labelled = labelled_images(folder, model.class_names)
    names = {file: label for file, label in labelled}
    labels, predicted = [], []
    bar = {"desc": "evaluating", "total": len(names), "delay": 2, "leave": False, "disable": None}
    files = tqdm(scored(model, list(names), broken), **bar)
    for file, scores in files:
        labels.append(names[file])
        predicted.append(int(scores.argmax()))
    if not labels:
        raise UserError(f"none of the {len(names)} images in {folder} can be read; replace them")
    matrix = confusion_matrix(labels, predicted, len(model.class_names))
    return Evaluation(tuple(model.class_names), matrix, len(names) - len(labels))


def labelled_images(folder: str | Path, class_names: Sequence[str]) -> list[tuple[Path, int]]:
    """The images of a labelled folder, each with its class's position in ``class_names``.

    Raises:
      UserError: see :func:`evaluate`.
    """
    folder = given_path(folder, "--images")
    if not folder.is_dir():
        raise UserError(
            f"{folder}: there is no such folder; name one with a sub-folder of images a class"
        )
    positions = {composed(name): k for k, name in enumerate(class_names)}
    with looking(folder):
        folders = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not folders:
        raise UserError(f"{folder} has no sub-folders; it needs one of images a class")
    names = [composed(child.name) for child in folders]
    if unknown := [name for name in names if name not in positions]:
        raise UserError(_unknown(folder, unknown, class_names))
    images: list[tuple[Path, int]] = []
    for child, label in zip(folders, map(positions.__getitem__, names), strict=True):
        found, others = list_files(child)  # a class without images counts as absent
        if found:
            warn_left_out(child, others)
        images += [(file, label) for file in found]
    if not images:
        raise UserError(f"the class folders of {folder} are empty; put images into them")
    return images


def _unknown(folder: Path, unknown: Sequence[str], class_names: Sequence[str]) -> str:
    """Says which sub-folders are no classes, and which classes may be meant."""
    words = []
    for name in unknown[:5]:
        close = difflib.get_close_matches(name, class_names, n=1)
        words.append(f"{name!r} (did you mean {close[0]!r}?)" if close else repr(name))
    more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
    known = ", ".join(map(repr, class_names[:5])) + (", ..." if len(class_names) > 5 else "")
    return (
        f"{folder} has sub-folders that are no classes of the model: {', '.join(words)}{more}; "
        f"rename or move them (the model has {len(class_names)} classes: {known})"
    )
