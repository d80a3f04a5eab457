"""How results are printed: tables for people, JSON and CSV for programs.

Names come from files and from models, so any character may be in them. A table has control
characters as escapes; JSON and CSV have their own ways to hold them.
"""

import contextlib
import csv
import io
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from skd_jax.errors import UserError, printable
from skd_jax.files import whole

if TYPE_CHECKING:
    from skd_jax.confusion import Evaluation
    from skd_jax.predict import Prediction

FORMATS = ("table", "json", "csv")
_WIDEST = 60  # characters of a column; what is longer juts out


@contextlib.contextmanager
def destination(path: str | Path | None) -> Iterator[IO[str]]:
    """A file in UTF-8, see :func:`skd_jax.files.whole`, or standard output if there is no path.

    Raises:
      UserError: it cannot be written.
      BrokenPipeError: whoever read the output has gone.
    """
    if path is None:
        with _standard_output() as out:
            yield out
        return
    # Names of files that are not UTF-8 keep their bytes.
    how = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with whole(path, mode="w", **how) as file:
        yield file


@contextlib.contextmanager
def _standard_output() -> Iterator[IO[str]]:
    if sys.stdout is None:  # it was closed
        yield io.StringIO()
        return
    try:
        yield sys.stdout
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # Python tries to write the rest at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(
            f"standard output cannot be written ({error.strerror or error}); give --output=FILE"
        ) from error


def write_predictions(
    style: str, predictions: Iterable["Prediction"], files: Sequence[Path], out: IO[str]
) -> None:
    """Writes each prediction as it comes.

    Args:
      style: "table", "json" (a list, an image a line) or "csv" (a row a class).
      predictions: of images.
      files: those images, for the width of the table's first column.
      out: where to.
    """
    if style == "json":
        before = "[\n"
        for found in predictions:
            classes = [{"label": n, "probability": p} for n, p in _classes(found)]
            out.write(before + json.dumps({"image": str(found.path), "classes": classes}))
            before = ",\n"
        out.write("\n]\n" if before == ",\n" else "[]\n")
    elif style == "csv":
        rows = csv_writer(out)
        rows.writerow(("image", "rank", "label", "probability"))
        for found in predictions:
            for rank, (name, probability) in enumerate(_classes(found), 1):
                rows.writerow((str(found.path), rank, name, probability))
    else:
        longest = max((len(printable(str(file))) for file in files), default=0)
        width = min(_WIDEST, max(longest, len("image")))
        out.write(f"{'image':<{width}}  probability  class\n")
        for found in predictions:
            shown = printable(str(found.path))
            for name, probability in _classes(found):
                out.write(f"{shown:<{width}}  {percent(probability):>11}  {printable(name)}\n")
                shown = ""


def _classes(found: "Prediction") -> Iterator[tuple[str, float]]:
    return zip(found.labels, found.probabilities, strict=True)


def write_evaluation(style: str, found: "Evaluation", out: IO[str]) -> None:
    """Writes an evaluation.

    Args:
      style: "table", "json", or "csv" (a row a class that has images).
      found: what to write.
      out: where to.
    """
    rows = [
        row
        for row in zip(
            found.class_names,
            found.images.tolist(),
            found.recall.tolist(),
            found.precision.tolist(),
            strict=True,
        )
        if row[1]
    ]
    names = ("class", "images", "recall", "precision")
    total = int(found.images.sum())
    if style == "json":
        classes = [dict(zip(names, map(_null, row), strict=True)) for row in rows]
        values = {
            "accuracy": _null(found.accuracy),
            "images": total,
            "unreadable": found.unreadable,
            "classes": classes,
            "without_images": list(found.absent),
            "class_names": list(found.class_names),
            "confusion": found.confusion.tolist(),
        }
        lines = (
            f'"{name}": {json.dumps(value, allow_nan=False)}' for name, value in values.items()
        )
        out.write("{\n" + ",\n".join(lines) + "\n}\n")
    elif style == "csv":
        writer = csv_writer(out)
        writer.writerow(names)
        writer.writerows(("" if x is None else x for x in map(_null, row)) for row in rows)
    else:
        width = min(_WIDEST, max(len(printable(name)) for name in ("class", *(r[0] for r in rows))))
        out.write(f"{'class':<{width}}  images   recall  precision\n")
        for name, images, recall, precision in rows:
            numbers = f"{images:>6}  {percent(recall):>7}  {percent(precision):>9}"
            out.write(f"{printable(name):<{width}}  {numbers}\n")
        out.write(f"\naccuracy {percent(found.accuracy)} on {total} images\n")
        if found.absent:
            out.write(
                f"classes without images, left out: {listed(found.absent)}; precision counts "
                "only the images that were given\n"
            )


def listed(names: Sequence[str], most: int = 20) -> str:
    """Names in one line, printable; of many, the first."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more


def percent(share: float) -> str:
    """A share with one decimal; a dash for NaN."""
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def _null(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


def csv_writer(out: IO[str]) -> Any:
    """A CSV writer that quotes every text, so that no character in it can begin another field."""
    return csv.writer(out, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
