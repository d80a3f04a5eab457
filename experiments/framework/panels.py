"""Panels of a figure, row by row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from skd_jax.files import replacing

GAP, TITLE = 40, 36  # pixels between pictures, and above each
# Inches. On a page 600 pixels wide a letter of 9 points is 11 pixels high then.
WIDTH = 6.2
DPI = 130
SMALL = 9  # points: the smallest letters of a figure of that width
MOST_CLASSES = 20  # that a run's picture of pseudo images by class has


def row_by_row(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of the page's width, with ``count`` panels, at most ``columns`` in a row.

    Args:
      count: of the panels.
      columns: at most so many.
      height: of a row, in inches.
    """
    columns = max(1, min(count, columns))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, list(grid[:count])


def save(picture: Figure | Image.Image, path: Path) -> None:
    """Writes a picture as PNG, whole or not at all."""
    with replacing(path, mode="wb") as file:
        if isinstance(picture, Figure):
            picture.savefig(file, dpi=DPI)
        else:
            picture.save(file, "PNG", optimize=True)


def of_classes(title: str, summaries: Sequence[Mapping[str, Any]]) -> str:
    """The title of pseudo images of D_0 by class, which says if there are more classes than shown.

    Args:
      title: without that.
      summaries: of the runs that the images are of.
    """
    if max((s["classes_per_task"][0] for s in summaries), default=0) <= MOST_CLASSES:
        return title
    return f"{title} (the {MOST_CLASSES} classes that are drawn most)"


def side_by_side(
    pictures: Mapping[str, Path], columns: int, width: int | None = None
) -> Image.Image:
    """Pictures, each under its title.

    Args:
      pictures: by title.
      columns: at most so many in a row.
      width: of each, in pixels; None: pixel for pixel.
    """
    images = {title: Image.open(path).convert("RGB") for title, path in pictures.items()}
    if width:
        images = {title: _of_width(image, width) for title, image in images.items()}
    columns = min(len(images), columns)
    width = max(image.width for image in images.values()) + GAP
    height = max(image.height for image in images.values()) + TITLE
    rows = -(-len(images) // columns)
    whole = Image.new("RGB", (width * columns - GAP, height * rows), "white")
    for number, (title, image) in enumerate(images.items()):
        left, top = width * (number % columns), height * (number // columns)
        _title(whole, left + image.width // 2, top, title)
        whole.paste(image, (left, top + TITLE))
    return whole


def halves(
    left: Image.Image, right: Image.Image, middle: int, titles: Sequence[str]
) -> Image.Image:
    """The left half of one picture and the right half of another, each under its title.

    Args:
      left: as high as the other.
      right: with the same in the same places.
      middle: where both are cut, in pixels from the left.
      titles: of both.
    """
    width = middle + GAP + right.width - middle
    whole = Image.new("RGB", (width, TITLE + left.height), "white")
    whole.paste(left.convert("RGB").crop((0, 0, middle, left.height)), (0, TITLE))
    whole.paste(right.convert("RGB").crop((middle, 0, *right.size)), (middle + GAP, TITLE))
    quarter = (right.width - middle) // 2
    for title, place in zip(titles, (middle - quarter, middle + GAP + quarter), strict=True):
        _title(whole, place, 0, title)
    return whole


def _of_width(image: Image.Image, width: int) -> Image.Image:
    height = round(image.height * width / image.width)
    return image.resize((width, height), Image.Resampling.BOX)


def _title(whole: Image.Image, middle: int, top: int, title: str) -> None:
    words, font = ImageDraw.Draw(whole), ImageFont.load_default(TITLE // 2)
    words.text((middle, top + TITLE // 2), title, fill="black", font=font, anchor="mm")
