"""What D_0 draws beside real images of the same classes.

Real images are not kept with the results, since they are not ours to give on. Where a data set is
at hand (``report --data_dir=DIR``), the report's page shows them; of scikit-learn's digits, which
come with it, always.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from experiments.figure9 import TITLE as FIGURE9
from experiments.framework import study
from experiments.framework.making import prepared
from experiments.framework.panels import halves, save
from experiments.framework.tables import Picture
from skd_jax import plots
from skd_jax.config import Config
from skd_jax.data import prepare
from skd_jax.experiment import open_experiment
from skd_jax.files import read_json

DIGITS = "digits"
DRAWN = "pseudo_images_by_class_0.png"
IMAGES = 10  # of a class, of which half are seen


def digits(options: study.Options) -> Picture | None:
    """Draws what D_0 of ``make digits`` draws beside real digits of the same class.

    None where the results of ``make digits`` do not lie beside these.
    """
    folder = options.results.parent / DIGITS
    summary, report = read_json(folder / "summary.json"), read_json(folder / "delegator_0.json")
    if not summary or not report or not (folder / DRAWN).exists():
        return None
    config = study.Run(DIGITS, "mini", summary["seed"], "").config(options.results, "")
    where = f"make digits, seed {summary['seed']}; {summary['device']}."
    title = "What D_0 draws by the class that T_0 gives it, beside real images: digits"
    path = options.results / f"beside_real_{DIGITS}.png"
    return Picture(_beside(folder, report, config, path), title, where)


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
    config = run.config(options.results, options.data_dir)
    where = f"{run}. Real images are the data set's, and stay with whoever drew this page."
    title = f"{FIGURE9}, beside real ones: {study.TITLES[run.dataset]}"
    path = out / f"beside_real_{run.dataset}.png"
    return Picture(_beside(run.folder(options.results), report, config, path), title, where)


def _beside(folder: Path, report: dict[str, Any], config: Config, path: Path) -> Path:
    """Puts what the D_0 of a run draws, in its folder, beside real training images."""
    experiment = open_experiment(config)
    data, labels = experiment.config.data, experiment.source.labels("train")
    rows = [np.flatnonzero(labels == label)[:IMAGES] for label in experiment.schedule[0]]
    stored = experiment.source.read("train", np.concatenate(rows))
    of_rows = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    images = np.asarray(prepare(data, jnp.asarray(stored)))
    # Rows and names of the same shares lie where the run's own picture has them.
    names, shares = report["classes"], np.array(report["label_shares"])
    real = _grid(images, of_rows, names, shares, data.mean, data.std)
    black = _grid(np.zeros_like(images), of_rows, names, shares, (0.0,), (1.0,))
    with Image.open(folder / DRAWN) as drawn:
        whole = halves(drawn, real, _middle(black), ("D_0 draws", "real images"))
    path.parent.mkdir(parents=True, exist_ok=True)
    save(whole, path)
    return path


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
