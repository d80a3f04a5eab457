"""A figure of panels, row by row."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def row_by_row(count: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels of so many inches each, at most ``columns`` in a row."""
    columns = max(1, min(count, columns))
    rows = max(1, -(-count // columns))
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes in grid[count:]:
        axes.set_axis_off()
    return figure, list(grid[:count])
