import sys

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import RendererAgg
from PIL import Image

from skd_jax import plots


def summary(method="skd", top1=(0.95, 0.9, 0.84), tasks=3):
    n = len(top1)
    return {
        "method": method,
        "dataset": "digits",
        "classes_per_task": [4] + [2] * (tasks - 1),
        "accuracy_matrix": [[top1[i] if j <= i else None for j in range(tasks)] for i in range(n)],
        "top1_seen": list(top1),
        "average_incremental_accuracy": sum(top1) / n,
    }


def ink(path):
    """Share of pixels that are not white."""
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    assert min(pixels.shape) > 200
    return (pixels < 250).mean()


def test_accuracy_curves(tmp_path):
    path = tmp_path / "new" / "curves.png"
    plots.accuracy_curves({"with": summary(), "without": summary(top1=(0.95, 0.5, 0.3))}, path)
    assert 0.01 < ink(path) < 0.5
    plots.accuracy_curve(summary(top1=(0.95,)), tmp_path / "base.png")
    assert ink(tmp_path / "base.png") > 0.01
    with pytest.raises(ValueError):
        plots.accuracy_curves({}, path)


def test_accuracy_matrix(tmp_path):
    plots.accuracy_matrix(summary(), tmp_path / "full.png")
    plots.accuracy_matrix(summary(top1=(1.0,)), tmp_path / "base.png")
    assert ink(tmp_path / "full.png") > 0.1
    assert ink(tmp_path / "base.png") > 0.01


def test_a_step_that_was_not_measured_is_left_out(tmp_path, monkeypatch):
    lines, written = [], []
    plot, text = Axes.plot, Axes.text
    monkeypatch.setattr(
        Axes, "plot", lambda self, *args, **how: lines.append(args) or plot(self, *args, **how)
    )
    monkeypatch.setattr(
        Axes, "text", lambda self, *args, **how: written.append(args) or text(self, *args, **how)
    )
    found = summary(top1=(0.95, 0.9, 0.84))
    found["top1_seen"][1] = None  # of classes without a test image
    found["accuracy_matrix"][1] = [None] * 3
    plots.accuracy_curve(found, tmp_path / "curve.png")
    plots.accuracy_matrix(found, tmp_path / "matrix.png")
    assert ([4, 8], [0.95, 0.84]) in lines
    assert {row for _, row, _ in written} == {0, 2}
    assert ink(tmp_path / "curve.png") > 0.01 and ink(tmp_path / "matrix.png") > 0.01


def test_image_grid_is_denormalised_and_clipped(tmp_path):
    mean, std = (0.5, 0.25, 0.0), (0.5, 0.25, 1.0)
    images = np.zeros((3, 2, 2, 3), np.float32)
    images[1] = [-1.0, 1.0, 1.0]  # 0, 0.5, 1
    images[2] = 1000.0
    plots.image_grid(images, tmp_path / "grid.png", mean, std, side=8)
    with Image.open(tmp_path / "grid.png") as image:
        grid = np.asarray(image)
    # Two by two cells of 2 * 4 pixels, gaps of 4.
    assert grid.shape == (28, 28, 3)
    assert (grid[4:12, 4:12] == [128, 64, 0]).all()
    assert (grid[4:12, 16:24] == [0, 128, 255]).all()
    assert (grid[16:24, 4:12] == 255).all()
    assert (grid[16:24, 16:24] == 255).all()  # no fourth image


def test_image_grid_in_grey(tmp_path):
    images = np.linspace(-1, 1, 5 * 8 * 8, dtype=np.float32).reshape(5, 8, 8, 1)
    plots.image_grid(images, tmp_path / "grid.png", (0.5,), (0.5,))
    with Image.open(tmp_path / "grid.png") as image:
        assert image.mode == "L"
        assert image.size == (3 * 96 + 4 * 12, 2 * 96 + 3 * 12)
    for bad in (images[0], images[:0], np.zeros((1, 8, 8, 4))):
        with pytest.raises(ValueError, match="images must be"):
            plots.image_grid(bad, tmp_path / "bad.png", (0.5,), (0.5,))


@pytest.mark.parametrize("classes", [1, 2, 30, 60])
def test_a_confusion_matrix_of_any_size(tmp_path, classes):
    names = [f"a $long$ name \x1b[31m of class {k} in 漢字" for k in range(classes)]
    plots.confusion(np.eye(classes, dtype=np.int64) * 3, names, tmp_path / "confusion.png")
    assert 0.01 < ink(tmp_path / "confusion.png") < 0.9


def test_a_confusion_matrix_shows_classes_that_occur_by_share_and_number(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, *args: figures.append(figure))
    matrix = np.array([[3, 0, 1], [0, 0, 0], [0, 0, 2]])
    plots.confusion(matrix, ("a", "unseen", "c"), "confusion.png")
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c"]
    assert [text.get_text() for text in axes.texts] == ["3", "1", "2"]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25], [0, 1]])
    assert axes.get_title() == "83.3 % of 6 images right"


def test_a_grid_by_class_takes_shares_from_elsewhere(monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "_save", lambda figure, *args: figures.append(figure))
    images = np.zeros((3, 8, 8, 1), np.float32)
    labels, shares = np.array([0, 0, 1]), np.array([0.1, 0.9])
    for given in (None, shares):
        plots.class_grid(images, labels, ("a", "b"), "grid.png", (0.5,), (0.5,), shares=given)
    captions = [[t.get_text() for axes in f.axes for t in axes.texts] for f in figures]
    assert captions == [["a\n67%", "b\n33%"], ["a\n10%", "b\n90%"]]


@pytest.mark.parametrize(
    ("name", "shown"), [("$5_to_$10", "$5_to_$10"), (r"\$1 of $2", r"\$1 of $2"), ("a\udcff", "a?")]
)
def test_class_names_are_drawn_as_they_are(tmp_path, monkeypatch, name, shown):
    drawn = []
    monkeypatch.setattr(
        RendererAgg, "draw_text", lambda *args, ismath=False, **_: drawn.append((args[4], ismath))
    )
    images, moments = np.zeros((4, 4, 4, 3)), ((0.5,) * 3, (0.5,) * 3)
    plots.class_grid(images, np.array([0, 0, 0, 1]), [name, "b"], tmp_path / "x.png", *moments)
    assert (shown, False) in drawn


def test_pyplot_is_left_alone():
    assert "matplotlib.pyplot" not in sys.modules
