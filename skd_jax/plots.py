"""Pictures of a run: accuracy curves, the accuracy matrix, and grids of images.

Figures are made as objects, without pyplot: nothing global is changed, no display is needed, and
files are drawn by Agg.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from skd_jax.files import whole
from skd_jax.output import percent, printable
from skd_jax.paths import given_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

_DPI = 150


def accuracy_curve(summary: Mapping[str, Any], path: str | Path) -> None:
    """Draws one run's accuracy; see :func:`accuracy_curves`."""
    accuracy_curves({summary["method"]: summary}, path)


def accuracy_curves(summaries: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """Draws top-1 on all classes seen against the number of classes seen, one curve a run.

    Args:
        summaries: By label; dictionaries as :func:`skd_jax.metrics.summary` makes them. The legend
            adds each run's average incremental accuracy.
        path: Of the picture; its ending names the format.

    Raises:
        ValueError: No summaries.
    """
    if not summaries:
        raise ValueError("no summaries to draw")
    figure = _figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    lowest = 1.0
    ticks: set[int] = set()
    for label, summary in summaries.items():
        steps = zip(accumulate(summary["classes_per_task"]), summary["top1_seen"], strict=False)
        measured = [(classes, top1) for classes, top1 in steps if top1 is not None]
        if not measured:  # no test image at all
            continue
        seen, top1 = ([*values] for values in zip(*measured, strict=True))
        average = summary["average_incremental_accuracy"]
        axes.plot(
            seen, top1, marker="o", markersize=5, linewidth=1.8, label=f"{label}: {average:.1%}"
        )
        lowest = min(lowest, *top1)
        ticks |= set(seen)
    if len(ticks) <= 12:
        axes.set_xticks(sorted(ticks))
    else:
        axes.xaxis.set_major_locator(_whole_numbers())
    # Room below the lowest point, down to a round tenth; the top is always 100 %.
    axes.set_ylim(max(0.0, math.floor(10 * lowest - 0.5) / 10), 1.01)
    axes.yaxis.set_major_formatter(_in_percent())
    datasets = {str(summary["dataset"]) for summary in summaries.values()}
    axes.set_title(literal(f"Accuracy on all classes seen, {', '.join(sorted(datasets))}"))
    axes.set_xlabel("classes seen")
    axes.set_ylabel("top-1 accuracy")
    axes.grid(alpha=0.35)
    axes.spines[["top", "right"]].set_visible(False)
    if ticks:
        axes.legend(title="average incremental accuracy", loc="best", framealpha=0.9)
    _save(figure, path)


def accuracy_matrix(summary: Mapping[str, Any], path: str | Path) -> None:
    """Draws accuracy on each task after each step as a heat map, blank where not yet learned.

    Args:
        summary: As :func:`skd_jax.metrics.summary` makes it.
        path: Of the picture; its ending names the format.
    """
    matrix = np.array(summary["accuracy_matrix"], np.float64)  # None becomes NaN
    steps, tasks = matrix.shape
    figure = _figure(figsize=(2.6 + 0.62 * tasks, 1.7 + 0.5 * steps), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(matrix), vmin=0, vmax=1, cmap="viridis")
    size = 9 if tasks <= 12 else 6
    for (step, task), accuracy in np.ndenumerate(matrix):
        if not np.isnan(accuracy):
            ink = "black" if accuracy > 0.6 else "white"  # readable on either end of the map
            text = f"{100 * accuracy:.1f}" if accuracy < 1 else "100"
            axes.text(task, step, text, ha="center", va="center", color=ink, fontsize=size)
    classes = summary["classes_per_task"]
    axes.set_xticks(range(tasks), [f"{j}\n({classes[j]})" for j in range(tasks)])
    axes.set_yticks(range(steps))
    # White lines between the cells.
    axes.set_xticks(np.arange(1, tasks) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, steps) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    title = f"Accuracy by task, %\n{summary['method']}, {summary['dataset']}"
    axes.set_title(literal(title), fontsize=11)
    axes.set_xlabel("task (classes)")
    axes.set_ylabel("after task")
    bar = figure.colorbar(image, ax=axes, format=_in_percent(), shrink=0.9)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    _save(figure, path)


def image_grid(
    images: np.ndarray,
    path: str | Path,
    mean: Sequence[float],
    std: Sequence[float],
    side: int = 96,
) -> None:
    """Saves images as a near-square grid, pixel for pixel.

    Args:
        images: [n, H, W, C] float, normalised by ``mean`` and ``std``; C is 1 or 3. What falls
            outside the displayable range is clipped.
        path: Of the picture; its ending names the format.
        mean: Per channel, of images scaled to [0, 1].
        std: Per channel.
        side: Smaller images are enlarged by a whole factor, without smoothing, to about this many
            pixels.

    Raises:
        ValueError: ``images`` is not of that shape or holds no image.
    """
    images = np.asarray(images, np.float32)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ValueError(f"images must be [n, H, W, 1 or 3] with n > 0, got {images.shape}")
    pixels = to_pixels(images, mean, std)
    factor = max(1, round(side / max(pixels.shape[1:3])))
    pixels = pixels.repeat(factor, axis=1).repeat(factor, axis=2)

    n, height, width, channels = pixels.shape
    columns = math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    gap = max(2, factor)
    grid = np.full(
        (rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8
    )
    for i, image in enumerate(pixels):
        top, left = (gap + (i // columns) * (height + gap)), (gap + (i % columns) * (width + gap))
        grid[top : top + height, left : left + width] = image
    path = given_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = Image.registered_extensions().get(path.suffix.lower(), "PNG")
    with whole(path, mode="wb") as file:
        Image.fromarray(grid[..., 0] if channels == 1 else grid).save(file, kind)


def to_pixels(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Normalised images [n, H, W, C] as uint8; what cannot be displayed is clipped, NaN is 0."""
    pixels = np.clip(images * np.asarray(std) + np.asarray(mean), 0, 1)
    return np.round(255 * np.nan_to_num(pixels)).astype(np.uint8)


def class_grid(
    images: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    path: str | Path,
    mean: Sequence[float],
    std: Sequence[float],
    columns: int = 10,
    shares: np.ndarray | None = None,
) -> None:
    """Saves images in rows by class, the first ``columns`` of each, with the share of the class.

    Args:
        images: [n, H, W, C] float, normalised by ``mean`` and ``std``; C is 1 or 3.
        labels: Int [n]: each image's class.
        names: Of the classes; more than 20 become the 20 with the most images.
        path: Of the picture; its ending names the format.
        mean: Per channel, of images scaled to [0, 1].
        std: Per channel.
        columns: At most so many images a class.
        shares: Of the classes, where these images are a choice; None counts the images.
    """
    if shares is None:
        shares = np.bincount(labels, minlength=len(names)) / len(labels)
    shown = sorted(int(k) for k in np.argsort(-shares, kind="stable")[:20])
    pixels = np.clip(images * np.asarray(std) + np.asarray(mean), 0, 1)
    figure = _figure(figsize=(1.9 + 0.5 * columns, 0.3 + 0.5 * len(shown)))
    grid = figure.subplots(len(shown), columns, squeeze=False)
    for row, label in zip(grid, shown, strict=True):
        found = pixels[labels == label][:columns]
        for axes in row:
            axes.set_axis_off()
        for axes, image in zip(row, found, strict=False):
            axes.imshow(
                image[..., 0] if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1
            )
        row[0].text(
            *(-0.15, 0.5, f"{literal(names[int(label)])}\n{shares[label]:.0%}"),
            transform=row[0].transAxes,
            ha="right",
            va="center",
            fontsize=8,
        )
    figure.subplots_adjust(left=1.5 / (1.9 + 0.5 * columns), right=1, wspace=0.06, hspace=0.06)
    _save(figure, path)


def confusion(matrix: np.ndarray, names: Sequence[str], file: str | Path | IO[bytes]) -> None:
    """Draws a confusion matrix as PNG: by colour the share of a class's images, and their number.

    Classes that have no image and are predicted for none are left out. Numbers are left out where
    more than 40 classes stay.

    Args:
        matrix: Int [K, K], how many images of class i (row) are taken for class j (column).
        names: Of the K classes; long ones are cut.
        file: A path, or an open binary file.
    """
    shown = np.flatnonzero(matrix.sum(axis=0) + matrix.sum(axis=1))
    total, right = int(matrix.sum()), int(np.trace(matrix))
    matrix = matrix[np.ix_(shown, shown)]
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    captions = [_caption(names[int(k)]) for k in shown]
    count = len(shown)
    cell = 0.45 if count <= 20 else 0.3 if count <= 40 else 0.16  # inches
    side = max(cell * count, 1.2)
    figure = _figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))  # labels are outside, and the picture is as large as that
    image = axes.imshow(
        shares, vmin=0, vmax=1, cmap="Blues", aspect="auto", interpolation="nearest"
    )
    if count <= 40:
        for (i, j), number in np.ndenumerate(matrix):
            if number:
                ink = "white" if shares[i, j] > 0.6 else "black"
                size = 8 if count <= 20 else 6
                axes.text(j, i, str(number), ha="center", va="center", color=ink, fontsize=size)
    axes.set_xticks(range(count), captions, rotation=90, fontsize=8)
    axes.set_yticks(range(count), captions, fontsize=8)
    between = np.arange(1, count) - 0.5
    axes.hlines(between, -0.5, count - 0.5, color="0.85", linewidth=0.6)
    axes.vlines(between, -0.5, count - 0.5, color="0.85", linewidth=0.6)
    axes.tick_params(length=0)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true class")
    accuracy = percent(right / total) if total else "-"
    axes.set_title(f"{accuracy} of {total} images right", fontsize=11)
    bar = figure.colorbar(
        image, cax=figure.add_axes((1 + 0.15 / side, 0, 0.15 / side, 1)), label="share of the class"
    )
    bar.ax.yaxis.set_major_formatter(_in_percent())
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    _save(figure, file, _DPI if count <= 40 else 100)


def loss_terms(
    values: Mapping[str, Sequence[tuple[int, float]]], file: str | Path | IO[bytes]
) -> None:
    """Draws what was logged in training, a small panel for each number.

    Args:
        values: (step, value) pairs by name.
        file: Of the picture, or an open one that takes PNG.
    """
    columns = min(3, len(values))
    rows = math.ceil(len(values) / columns)
    figure = _figure(figsize=(3.2 * columns, 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name in zip(panels, sorted(values), strict=False):
        steps, numbers = zip(*values[name], strict=True)
        axes.plot(steps, numbers, linewidth=1.4)
        axes.set_title(name.replace("_", " "), fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.35)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(values) :]:
        axes.set_axis_off()
    _save(figure, file)


def literal(name: str) -> str:
    """A name as matplotlib is to be given it, so that what is drawn is the name itself.

    Dollar signs are escaped, for two of them would enclose mathematics; bytes of a file's name that
    are no UTF-8 become question marks.
    """
    return name.encode("utf-8", "replace").decode().replace("$", r"\$")


def _caption(name: str) -> str:
    name = printable(name)
    return literal(name if len(name) <= 28 else f"{name[:26]}…")


def _figure(**options: Any) -> "Figure":
    """An empty figure; matplotlib waits for the first, since importing it takes a second."""
    from matplotlib.figure import Figure

    return Figure(**options)


def _whole_numbers() -> "MaxNLocator":
    """Where an axis of many counts has its ticks."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=10, integer=True)


def _in_percent() -> "PercentFormatter":
    """How the ticks of an axis of shares are written."""
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(xmax=1, decimals=0)


def _save(figure: "Figure", file: str | Path | IO[bytes], dpi: int = _DPI) -> None:
    if isinstance(file, str | Path):
        path = given_path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path, mode="wb") as opened:
            _write(figure, opened, dpi, path.suffix[1:] or "png")
    else:
        _write(figure, file, dpi, "png")


def _write(figure: "Figure", file: IO[bytes], dpi: int, kind: str) -> None:
    with warnings.catch_warnings():  # a letter that the font lacks becomes a box
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
        figure.savefig(file, format=kind, dpi=dpi, bbox_inches="tight")
