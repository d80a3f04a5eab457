"""Panels of a figure, row by row."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

GAP, TITLE = 40, 36  # pixels between pictures, and above each


def row_by_row(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels of so many inches each, at most ``columns`` in a row."""
    columns = max(1, min(count, columns))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, list(grid[:count])


def side_by_side(pictures: Mapping[str, Path], columns: int) -> Image.Image:
    """Pictures pixel for pixel, each under its title, at most ``columns`` in a row."""
    images = {title: Image.open(path).convert("RGB") for title, path in pictures.items()}
    columns = min(len(images), columns)
    width = max(image.width for image in images.values()) + GAP
    height = max(image.height for image in images.values()) + TITLE
    rows = -(-len(images) // columns)
    whole = Image.new("RGB", (width * columns - GAP, height * rows), "white")
    words, font = ImageDraw.Draw(whole), ImageFont.load_default(TITLE // 2)
    for number, (title, image) in enumerate(images.items()):
        left, top = width * (number % columns), height * (number // columns)
        middle = (left + image.width // 2, top + TITLE // 2)
        words.text(middle, title, fill="black", font=font, anchor="mm")
        whole.paste(image, (left, top + TITLE))
    return whole
