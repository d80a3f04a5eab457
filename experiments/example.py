"""A worked example: a trained model learns five more classes, and its own images are gone.

    python -m experiments.example --workdir=runs/example        # or: make example

1. A small ResNet learns five classes of Fashion-MNIST (Debian's package dataset-fashion-mnist, or
   any folder with the four files; without them, scikit-learn's digits), in PyTorch if that is
   installed, else by this package. It is saved as safetensors, and the training images are deleted.
2. ``skd-jax extend`` teaches it the other five classes, from that file alone.
3. The same by fine-tuning, for comparison.
4. ``skd-jax predict`` and ``evaluate`` with the new model, and PyTorch loads it again.

It ends with one table: what is left of the old classes, and what is known of the new ones. Some
minutes on 2 cores.
"""

import argparse
import dataclasses
import gzip
import importlib.util
import shlex
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from tqdm import tqdm

from experiments.framework.scripts import exit_code
from skd_jax import cli, weights
from skd_jax.config import Model, Supervised
from skd_jax.data.records import Records
from skd_jax.data.sources import RecordSource
from skd_jax.data.stream import TaskImages
from skd_jax.defaults import data_settings, settings
from skd_jax.errors import UserError
from skd_jax.files import read_json
from skd_jax.methods import phases
from skd_jax.methods.phase import setting_of
from skd_jax.model import load
from skd_jax.paths import given_path
from skd_jax.state import Kept
from skd_jax.stepping import Stepping
from skd_jax.writer import say

FASHION = Path("/usr/share/datasets/fashion-mnist")  # where Debian's package puts it
NAMES = (
    *("T-shirt", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
OLD = 5  # classes that the model knows first
DEPTH, WIDTH = 8, 8
PER_CLASS = {"base": 1000, "new/train": 300, "new/test": 200, "check": 200}
Images = tuple[np.ndarray, np.ndarray]  # uint8 [n, side, side] and labels [n]


def read_images(folder: Path) -> tuple[Images, Images, str]:
    """(training images, test images, what they are of)."""
    if (folder / "train-images-idx3-ubyte.gz").exists():
        return _read(folder, "train"), _read(folder, "t10k"), "Fashion-MNIST"
    values, labels = load_digits(return_X_y=True)
    images = np.rint(values.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return (images[::2], labels[::2]), (images[1::2], labels[1::2]), "digits"


def _read(folder: Path, part: str) -> Images:
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        return images, np.frombuffer(file.read(), np.uint8, offset=8)


def write_folder(folder: Path, images: Images, classes: dict[int, str], per_class: int) -> None:
    """Writes the first images of some classes as PNG files, a sub-folder a class."""
    for label, name in classes.items():
        place = folder / name
        place.mkdir(parents=True)
        for number, image in enumerate(images[0][images[1] == label][:per_class]):
            Image.fromarray(image).save(place / f"{number:04}.png")


def run(workdir: Path, data: Path, effort: float) -> None:
    """Does all of it, and prints the table."""
    if workdir.exists():
        raise UserError(f"--workdir={workdir} exists; name a new folder, or delete it")
    since = time.perf_counter()
    train, test, kind = read_images(data)
    names = NAMES if kind == "Fashion-MNIST" else tuple(f"digit {k}" for k in range(10))
    old = dict(enumerate(names[:OLD]))
    new = dict(enumerate(names))
    for label in old:
        del new[label]
    write_folder(workdir / "new" / "train", train, new, PER_CLASS["new/train"])
    write_folder(workdir / "new" / "test", test, new, PER_CLASS["new/test"])
    write_folder(workdir / "check", test, old, PER_CLASS["check"])

    say(f"1. a ResNet-{DEPTH} learns {OLD} classes of {kind}: {', '.join(old.values())}")
    model = workdir / "old.safetensors"
    mean, std, size = train_old(train, model)
    (workdir / "old_labels.txt").write_text("".join(f"{name}\n" for name in old.values()))
    say(f"   saved as {model}; its training images are gone from here on\n")

    given = [
        *(f"--model={model}", f"--classes={workdir / 'old_labels.txt'}", f"--mean={mean:.4f}"),
        *(f"--std={std:.4f}", f"--image-size={size}", "--fit=squash"),
    ]
    images = [f"--images={workdir / 'new'}", f"--check={workdir / 'check'}"]
    say("2. skd-jax extend: it learns the others")
    _skd_jax("extend", *given, *images, f"--out={workdir / 'new_model'}", f"--effort={effort}")
    say("\n3. the same by fine-tuning, for comparison")
    out = f"--out={workdir / 'finetuned'}"
    _skd_jax("extend", *given, *images, out, "--method=finetune", f"--effort={effort}")
    say("\n4. skd-jax predict, of an image of each class")
    some = [sorted((workdir / "check" / name).iterdir())[1] for name in old.values()]
    some += [sorted((workdir / "new" / "test" / name).iterdir())[1] for name in new.values()]
    _skd_jax("predict", f"--model={workdir / 'new_model'}", *map(str, some))
    say("\n   skd-jax evaluate, of the new classes' test images")
    tested = f"--images={workdir / 'new' / 'test'}"
    picture = f"--confusion={workdir / 'confusion.png'}"
    _skd_jax("evaluate", f"--model={workdir / 'new_model'}", tested, picture)
    _load_in_pytorch(workdir, some, mean, std, len(names))
    say(f"\n{_table(workdir)}\n\n{kind}, {time.perf_counter() - since:.0f} s in all")


def train_old(train: Images, path: Path) -> tuple[float, float, int]:
    """Trains the model that is to be extended and saves it; returns mean, deviation and size."""
    rows = np.concatenate([np.flatnonzero(train[1] == k)[: PER_CLASS["base"]] for k in range(OLD)])
    images, labels = train[0][rows], train[1][rows]
    mean, std = float(images.mean() / 255), float(images.std() / 255)
    if importlib.util.find_spec("torch"):
        from experiments import example_pytorch

        say("   in PyTorch")
        sizes = {"depth": DEPTH, "width": WIDTH, "mean": mean, "std": std}
        example_pytorch.train(images, labels, path, epochs=8, **sizes)
    else:
        say("   in JAX, since PyTorch is not installed")
        _train_in_jax(images, labels, path, mean, std)
    return mean, std, images.shape[1]


def _train_in_jax(
    images: np.ndarray, labels: np.ndarray, path: Path, mean: float, std: float
) -> None:
    """The same by this package: T_0's training, stepped by hand."""
    data = data_settings(images.shape[1], (mean,), (std,), fit="squash")
    model = Model("cifar", DEPTH, WIDTH, bn_momentum=0.9, dtype="float32")
    config = settings(model, data, method="finetune")
    base = Supervised(8, 64, lr=0.05, drop_epochs=(4, 6), momentum=0.9, weight_decay=5e-4)
    setting = setting_of(dataclasses.replace(config, base=base), (OLD,), (len(labels),))
    records = Records(
        class_names=NAMES[:OLD],
        labels=labels,
        parts={},
        encoded=lambda ids: [Image.fromarray(images[i]) for i in ids],
        place=lambda i: f"image {i}",
        fix="",
    )
    all_, none = np.arange(len(labels)), np.arange(0)
    source = RecordSource(records, {"train": all_, "test": none}, data)
    of_classes = [np.flatnonzero(labels == k) for k in range(OLD)]
    task = TaskImages(source, tuple(range(OLD)), 0, of_classes, in_memory=True)
    phase, kept = phases.base(setting), Kept()
    stepping, state = Stepping(phase, setting, images=task), phase.init(kept)
    for step in tqdm(range(phase.steps), "   T_0", leave=False):
        state, _ = stepping(state, kept, step, step + 1)
    weights.write(path, state.network, weights.names_of(model))


def _skd_jax(*args: str) -> None:
    """The command line, as a person would type it."""
    say("$ skd-jax " + " ".join(shlex.quote(arg) for arg in args))
    if code := cli.run(args):
        raise UserError(f"skd-jax {args[0]} ended with exit code {code}")


def _load_in_pytorch(workdir: Path, files: list[Path], mean: float, std: float, k: int) -> None:
    if not importlib.util.find_spec("torch"):
        return
    from experiments import example_pytorch

    images = np.stack([np.asarray(Image.open(file)) for file in files])
    sizes = {"depth": DEPTH, "width": WIDTH, "classes": k, "mean": mean, "std": std}
    path = workdir / "new_model" / "model.safetensors"
    there = example_pytorch.classify(path, images, **sizes)
    names = (workdir / "new_model" / "labels.txt").read_text().splitlines()
    here = [p.labels[0] for p in load(workdir / "new_model").predict(files)]
    same = sum(names[a] == b for a, b in zip(there, here, strict=True))
    say(f"\n   the PyTorch class loads it (strict=True): {same} of {len(files)} answers the same")


def _table(workdir: Path) -> str:
    """What each road keeps and learns, in percent."""
    found = {
        name: read_json(workdir / folder / "summary.json")
        for name, folder in (("skd-jax extend", "new_model"), ("fine-tuning", "finetuned"))
    }
    extended = {name: summary["extension"] for name, summary in found.items() if summary}
    before = extended["skd-jax extend"]["before"]
    rows = [("the old model", {"old": before, "new": None, "all": None})]
    rows += [(name, extension["after"]) for name, extension in extended.items()]
    rows.insert(2, ("frozen features, class means", extended["skd-jax extend"]["frozen"]))

    def cell(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    lines = [f"{'accuracy, %':<30}{'old':>8}{'new':>8}{'all':>8}{'kept of old':>14}"]
    for name, row in rows:
        numbers = "".join(f"{cell(row[part]):>8}" for part in ("old", "new", "all"))
        lines.append(f"{name:<30}{numbers}{cell(row['old'] / before):>14}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=given_path, default=Path("runs/example"))
    parser.add_argument(
        "--data", type=given_path, default=FASHION, help="the folder of Fashion-MNIST"
    )
    parser.add_argument("--effort", type=float, default=1.0, help="0.1 trains a tenth as long")
    options = parser.parse_args()
    run(options.workdir, options.data, options.effort)


if __name__ == "__main__":
    sys.exit(exit_code(main))
