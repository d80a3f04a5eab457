"""What a model's delegator draws, class by class, as image files."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from skd_jax import plots, steps
from skd_jax.compiler import compiled
from skd_jax.errors import UserError
from skd_jax.files import ELSEWHERE, writing
from skd_jax.methods import method_of
from skd_jax.methods.skd import networks, pseudo_images
from skd_jax.paths import given_path, looking

if TYPE_CHECKING:
    from skd_jax.model import Model

OVERVIEW = "samples.png"
BATCH = 64  # images drawn at a time


@dataclasses.dataclass(frozen=True)
class Samples:
    """Pseudo images, ordered by class.

    Attributes:
      images: float32 [n, S, S, C], normalised.
      labels: int64 [n], the class that the model gives to each.
      drawn: int64 [K], how many images of each class were drawn, more than are here.
    """

    images: np.ndarray
    labels: np.ndarray
    drawn: np.ndarray


def sample(model: "Model", per_class: int = 10, seed: int = 0, most: int | None = None) -> Samples:
    """Draws until there are enough images of each class, or ``most`` have been drawn.

    An image's class is the one that the model gives it.

    Args:
      model: with a delegator.
      per_class: how many images of each class.
      seed: another seed draws other images.
      most: images to draw; None is 10 times as many as are wanted, and 1000 or more.

    Raises:
      UserError: the model has no delegator, or ``per_class`` is below 1.
    """
    if per_class < 1:
        raise UserError(f"per_class is {per_class}; give 1 or more")
    config, kept, classes = model.config, model.kept, len(model.class_names)
    delegator = getattr(kept, "delegator", None)
    if delegator is None:
        raise UserError(
            "the model has no delegator, which draws the images; `skd-jax extend` trains one and "
            "keeps it in the model folder"
        )
    most = max(1000, 10 * per_class * classes) if most is None else most
    nets, key, rule = networks(config), jax.random.key(seed), method_of(config).scores
    found: list[list[np.ndarray]] = [[] for _ in range(classes)]
    drawn = np.zeros(classes, np.int64)
    with tqdm(total=most, desc="drawing", delay=2, leave=False, disable=None) as bar:
        for start in range(0, most, BATCH):
            images = pseudo_images(nets, delegator, key, BATCH, start)
            labels = np.asarray(_classes(rule, config.method, model.nets, kept, images))
            for label, image in list(zip(labels, np.asarray(images), strict=True))[: most - start]:
                drawn[label] += 1
                if len(found[label]) < per_class:
                    found[label].append(image)
            bar.update(min(BATCH, most - start))
            if all(len(some) == per_class for some in found):
                break
    counts = [len(some) for some in found]
    every = [image for some in found for image in some]
    return Samples(np.stack(every), np.repeat(np.arange(classes), counts), drawn)


@compiled(stays=True, static_argnames=("scores", "static", "nets"))
def _classes(
    scores: Any, static: Any, nets: steps.Networks, kept: Any, images: jax.Array
) -> jax.Array:
    return scores(static, nets, kept, images).argmax(axis=-1)


def check_folder(folder: str | Path) -> None:
    """Checks that samples may be written into a folder, which need not exist.

    Raises:
      UserError: it holds something, or is no folder.
    """
    folder = given_path(folder, "--out")
    with looking(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; name a new folder")
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty; name a new folder")


def write_samples(model: "Model", samples: Samples, folder: str | Path) -> None:
    """Writes a PNG file an image, in a sub-folder a class, and ``samples.png`` of them all.

    ``samples.png`` has a row a class, the 20 that are drawn most if there are more.

    Args:
      model: that the samples are of.
      samples: what to write.
      folder: a new or empty one.

    Raises:
      UserError: see :func:`check_folder`; or it cannot be written.
    """
    folder = given_path(folder, "--out")
    check_folder(folder)
    mean, std = model.config.data.mean, model.config.data.std
    names = folder_names(model.class_names)
    pixels = plots.to_pixels(samples.images, mean, std)
    with writing(folder, ELSEWHERE):
        for label in np.unique(samples.labels):
            (folder / names[label]).mkdir(parents=True)
            for number, image in enumerate(pixels[samples.labels == label], 1):
                image = image[..., 0] if image.shape[-1] == 1 else image
                Image.fromarray(image).save(folder / names[label] / f"{number:04d}.png")
        plots.class_grid(
            samples.images,
            samples.labels,
            model.class_names,
            folder / OVERVIEW,
            mean,
            std,
            shares=samples.drawn / samples.drawn.sum(),
        )


def folder_names(class_names: Sequence[str]) -> list[str]:
    """A folder name for each class: its own, made safe where it could not be one.

    A name may come from a stranger's model: none leaves the folder it is put into, none is hidden,
    and no two are the same where upper and lower case are.
    """
    taken: set[str] = {OVERVIEW.lower()}
    names = []
    for number, name in enumerate(class_names):
        safe = re.sub(r'[/\\:*?"<>|]', "_", "".join(c if c.isprintable() else "_" for c in name))
        safe = re.sub(r"^[. ]+|[. ]+$", "_", safe.encode()[:200].decode(errors="ignore"))
        while not safe or safe.lower() in taken:
            safe = f"{number}_{safe}"
        taken.add(safe.lower())
        names.append(safe)
    return names
