"""What D_0 draws beside real images of the same classes.

Real images are not kept with the results, since they are not ours to give on. Where a data set is
at hand (``report --data_dir=DIR``), the report's page shows them; of scikit-learn's digits, which
come with it, always.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from PIL import Image

from experiments.figure9 import TITLE as FIGURE9
from experiments.framework import study
from experiments.framework.making import prepared
from experiments.framework.panels import halves, side_by_side
from experiments.framework.tables import Picture
from skd_jax import plots
from skd_jax.data import open_source, prepare
from skd_jax.experiment import open_experiment
from skd_jax.methods import from_config_dict
from skd_jax.writer import read_json

DIGITS = "digits"
IMAGES = 10  # of a class, of which half are seen


def digits(options: study.Options) -> Picture | None:
    """Draws what D_0 of ``make digits`` draws beside real digits of its base classes.

    None where the results of ``make digits`` do not lie beside these.
    """
    folder = options.results.parent / DIGITS
    summary, drawn = read_json(folder / "summary.json"), folder / "pseudo_images_0.png"
    if not summary or not drawn.exists():
        return None
    data = from_config_dict(study.base(DIGITS, "mini", 0).config_dict()).data
    source = open_source(data)
    labels = source.labels("train")
    classes = summary["class_order"][: summary["classes_per_task"][0]]
    rows = [np.flatnonzero(labels == label)[: 64 // len(classes)] for label in classes]
    images = prepare(data, jnp.asarray(source.read("train", np.concatenate(rows))))
    out = options.results / f"beside_real_{DIGITS}.png"
    with tempfile.TemporaryDirectory() as folder_of_real:
        real = Path(folder_of_real) / "real.png"
        plots.image_grid(np.asarray(images), real, data.mean, data.std)
        side_by_side({"D_0 draws": drawn, "real digits": real}, columns=2, width=440).save(out)
    words = ", ".join(map(str, classes))
    where = (
        f"make digits, seed {summary['seed']}; {summary['device']}. The base classes are {words}; "
        "of the images that D_0 draws, the run did not keep T_0's class."
    )
    return Picture(out, "What D_0 draws, beside real images: digits", where)


def by_class(run: study.Run, options: study.Options, out: Path) -> Picture | None:
    """Draws a run's pseudo images, and real training images of the same class to their right.

    Args:
      run: with a D_0.
      options: with the data directory.
      out: a folder for the picture; it need not be there.

    Returns:
      None where the run has not been made, or its data set is not at hand.
    """
    report = study.report(run, options)
    if not report or not prepared([run.dataset], options):
        return None
    experiment = open_experiment(run.config(options.results, options.data_dir))
    data, labels = experiment.config.data, experiment.source.labels("train")
    rows = [np.flatnonzero(labels == label)[:IMAGES] for label in experiment.schedule[0]]
    stored = experiment.source.read("train", np.concatenate(rows))
    of_rows = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    images = np.asarray(prepare(data, jnp.asarray(stored)))
    # Rows and names of the same shares lie where the run's own picture has them.
    names, shares = report["classes"], np.array(report["label_shares"])
    real = _grid(images, of_rows, names, shares, data.mean, data.std)
    black = _grid(np.zeros_like(images), of_rows, names, shares, (0.0,), (1.0,))
    with Image.open(run.folder(options.results) / "pseudo_images_by_class_0.png") as drawn:
        whole = halves(drawn, real, _middle(black), ("D_0 draws", "real images"))
    out.mkdir(parents=True, exist_ok=True)
    picture = out / f"beside_real_{run.dataset}.png"
    whole.save(picture, optimize=True)
    where = f"{run}. Real images are the data set's, and stay with whoever drew this page."
    return Picture(picture, f"{FIGURE9}, beside real ones: {study.TITLES[run.dataset]}", where)


def _grid(
    images: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    shares: np.ndarray,
    mean: Sequence[float],
    std: Sequence[float],
) -> Image.Image:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "grid.png"
        plots.class_grid(images, labels, names, path, mean, std, columns=IMAGES, shares=shares)
        with Image.open(path) as grid:
            return grid.convert("RGB")


def _middle(black: Image.Image) -> int:
    """Where half of a grid's images lie to the left, by a grid of black ones."""
    is_dark = (np.asarray(black.convert("L")) < 128).mean(axis=0) > 0.5
    starts = np.flatnonzero(np.diff(is_dark.astype(int)) > 0)[-IMAGES // 2]
    ends = np.flatnonzero(np.diff(is_dark.astype(int)) < 0)[-IMAGES // 2 - 1]
    return int(starts + ends) // 2
