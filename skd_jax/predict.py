"""What a model makes of image files: class names and probabilities."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from skd_jax.data.images import find_images, read_images
from skd_jax.errors import UserError

if TYPE_CHECKING:
    from skd_jax.model import Model

BATCH = 64  # images classified at a time


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image.

    Probabilities are the softmax over the scores of all classes. Of a head's logits (SKD,
    fine-tuning, LwF, joint) that is what the network was trained to give. The scores of ``ncm``
    (cosines, or minus squared distances) and ``ridge`` (a regression's outputs) are no logits:
    there the order of the classes is the model's, and the numbers say no more than the order.

    Attributes:
      path: of the image.
      labels: names of classes, the likeliest first.
      probabilities: of these classes, in [0, 1].
    """

    path: Path
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    model: "Model", paths: str | Path | Sequence[str | Path], top: int = 1
) -> list[Prediction]:
    """Classifies image files.

    Args:
      model: the model.
      paths: an image or a folder of images, or several of them.
      top: how many classes to name; at most all there are.

    Raises:
      UserError: a path that is not there, a folder without images, or an image that cannot be read.
    """
    return list(predictions(model, find_all(paths), top))


def find_all(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """The images of several files and folders, in the order given.

    Raises:
      UserError: see :func:`skd_jax.data.images.find_images`.
    """
    paths = [paths] if isinstance(paths, str | Path) else paths
    return [file for path in paths for file in find_images(path)]


def predictions(
    model: "Model",
    files: Sequence[Path],
    top: int = 1,
    broken: Callable[[UserError], None] | None = None,
) -> Iterator[Prediction]:
    """Classifies image files, some at a time.

    Args:
      model: the model.
      files: of images.
      top: how many classes to name.
      broken: is told of an image that cannot be read, which is then left out; None raises.

    Raises:
      UserError: an image cannot be read, or ``top`` is below 1.
    """
    if top < 1:
        raise UserError(f"top is {top}; give 1 or more")
    for file, scores in scored(model, files, broken):
        probabilities = softmax(scores)
        order = np.argsort(-probabilities, kind="stable")[:top]
        names = tuple(model.class_names[k] for k in order)
        yield Prediction(file, names, tuple(float(probabilities[k]) for k in order))


def scored(
    model: "Model", files: Sequence[Path], broken: Callable[[UserError], None] | None = None
) -> Iterator[tuple[Path, np.ndarray]]:
    """Each image file with its scores, float32 [K]; the next images are decoded meanwhile.

    Args:
      model: the model.
      files: of images.
      broken: see :func:`predictions`.

    Raises:
      UserError: an image cannot be read, or its scores are not finite.
    """
    data = model.config.data
    size = min(BATCH, 1 << max(len(files) - 1, 0).bit_length())  # few sizes: few programs
    with ThreadPoolExecutor(os.cpu_count()) as threads:

        def begin(start: int) -> list:
            some = files[start : start + size]
            return [(file, threads.submit(read_images, [file], data)) for file in some]

        coming = begin(0)
        for start in range(0, len(files), size):
            reading, coming = coming, begin(start + size)
            images = np.zeros((size, data.load_size, data.load_size, data.channels), np.uint8)
            sound = []
            for file, image in reading:
                try:
                    images[len(sound)] = image.result()[0]
                    sound.append(file)
                except UserError as error:
                    if broken is None:
                        raise
                    broken(error)
            if not sound:
                continue
            for file, scores in zip(sound, np.asarray(model.scores(images)), strict=False):
                if not np.isfinite(scores).all():
                    raise UserError(
                        f"the model's scores of {file} are not finite; its weights are damaged, "
                        "train or save it anew"
                    )
                yield file, scores


def softmax(scores: np.ndarray) -> np.ndarray:
    """Softmax over the last axis, in float64."""
    exponentials = np.exp(scores.astype(np.float64) - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
