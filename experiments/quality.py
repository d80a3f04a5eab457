"""How good the delegators of a run are, as one page: python -m experiments.quality --workdir=DIR.

Needs no image and no accelerator: a run measures its delegators itself (``run.quality_images``) and
leaves ``delegator_N.json`` in its workdir; this shows them.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from experiments.framework.panels import SMALL, WIDTH, row_by_row, save
from experiments.framework.scripts import exit_code
from experiments.framework.tables import Cell, Table
from skd_jax import page
from skd_jax.errors import UserError
from skd_jax.files import read_json
from skd_jax.paths import given_path
from skd_jax.plots import literal
from skd_jax.writer import say

COLUMNS = {
    "T, %": lambda r: 100 * r["teacher_accuracy"],
    "S, %": lambda r: 100 * r["student_accuracy"],
    "gap, points": lambda r: 100 * (r["teacher_accuracy"] - r["student_accuracy"]),
    "same class, %": lambda r: 100 * r["agreement"],
    "classes drawn": lambda r: np.exp(r["label_entropy"]),
    "largest class, %": lambda r: 100 * max(r["label_shares"]),
    "confidence, %": lambda r: 100 * r["confidence"]["pseudo"],
    "BN divergence": lambda r: 1000 * np.mean([layer["pseudo"]["kl"] for layer in r["layers"]]),
    "diversity": lambda r: 100 * r["nearest"]["pseudo"],
    "fidelity": lambda r: 100 * r["nearest"]["pseudo_to_real"],
    "coverage": lambda r: 100 * r["nearest"]["real_to_pseudo"],
}
BELOW: dict[str, Any] = {"loc": "outside lower center", "ncols": 3, "fontsize": SMALL}
MOST_NAMES = 25  # under an axis
OF_STUDENT = ("S, %", "gap, points", "same class, %")  # which some generators have none of
NOTE = (
    "Same class: test images to which S gives the class that T gives. Classes drawn: exp of the "
    "entropy of Eq. 6's w. BN divergence: KL(N(mu, sigma) || N(mu^, sigma^)) of the images' "
    "moments from the running ones, mean over channels and layers, times 1000. Cosine distances "
    "times 100 in T's feature space, means: diversity is to the nearest other pseudo image, "
    "fidelity from a pseudo to the nearest real test image (less is better), coverage from a real "
    "to the nearest pseudo image (less is better)."
)
REAL = {
    "confidence, %": lambda r: 100 * r["confidence"]["real"],
    "BN divergence": lambda r: 1000 * np.mean([layer["real"]["kl"] for layer in r["layers"]]),
    "diversity": lambda r: 100 * r["nearest"]["real"],
}


def cells(reports: list[dict[str, Any]], real: bool = False) -> tuple[Cell, ...]:
    """A row of numbers, one value a report; with ``real``, those of real test images."""
    functions = REAL if real else COLUMNS
    if any(report["student_accuracy"] is None for report in reports):
        functions = {name: of for name, of in functions.items() if name not in OF_STUDENT}
    return tuple(
        Cell(tuple(float(functions[name](report)) for report in reports))
        if name in functions
        else Cell(applies=False)
        for name in COLUMNS
    )


def terms(workdir: Path, task: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(rounds, values) of everything that was logged of a delegator's training, by name.

    Skipped rounds are among it where there were any.
    """
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rows = [
        row for row in rows if row["phase"] in ("delegator", "generator") and row["task"] == task
    ]
    place = ("time", "task", "phase", "step", "global_step")
    names = sorted({name for row in rows for name in row} - set(place))
    steps = np.array([row["step"] for row in rows])
    values = {name: np.array([row.get(name) for row in rows], np.float64) for name in names}
    return {name: (steps, x) for name, x in values.items() if name != "skipped" or x.any()}


def draw_terms(runs: Mapping[str, dict[str, tuple[np.ndarray, np.ndarray]]], path: Path) -> None:
    """Draws every term over the rounds, one curve a run."""
    names = sorted({name for run in runs.values() for name in run})
    figure, grid = row_by_row(len(names), columns=2, height=2.1)
    for axes, name in zip(grid, names, strict=True):
        for number, run in enumerate(runs.values()):
            if name in run:
                axes.plot(*run[name], color=f"C{number}", linewidth=1.2)
        axes.set_title(name.replace("_", " "), fontsize=10)
        axes.tick_params(labelsize=SMALL)
        axes.grid(alpha=0.3)
    if len(runs) > 1:  # one for all panels, which have the same colours
        lines = [Line2D([], [], color=f"C{number}") for number in range(len(runs))]
        figure.legend(lines, list(runs), loc="outside upper center", ncols=3, fontsize=SMALL)
    figure.supxlabel("round", fontsize=10)
    save(figure, path)


def draw_reports(reports: Mapping[str, dict[str, Any]], path: Path) -> None:
    """Draws each delegator's class shares and the divergence at each BN layer."""
    heights = (1.6 + 0.3 * len(reports), 4.0)
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=heights)
    classes = max((r["classes"] for r in reports.values()), key=len)
    shares = np.full((len(reports), len(classes)), np.nan)
    for row, report in zip(shares, reports.values(), strict=True):
        row[: len(report["label_shares"])] = report["label_shares"]
    image = upper.imshow(shares, aspect="auto", vmin=0, cmap="magma")
    upper.set_yticks(range(len(reports)), list(reports), fontsize=SMALL)
    named = _named(len(classes))
    words = [literal(classes[k]) for k in named]
    upper.set_xticks(named, words, rotation=60, ha="right", rotation_mode="anchor", fontsize=SMALL)
    title = "share of the pseudo images that T gives each class"
    upper.set_title(f"{title}{_of(named, 'class')}", fontsize=10)
    bar = figure.colorbar(image, ax=upper, format=PercentFormatter(xmax=1, decimals=0))
    bar.ax.tick_params(labelsize=SMALL)
    for number, (label, report) in enumerate(reports.items()):
        layers = [layer["pseudo"]["kl"] for layer in report["layers"]]
        lower.plot(layers, "o-", markersize=4, label=label, color=f"C{number}")
    last = list(reports.values())[-1]["layers"]
    lower.plot([layer["real"]["kl"] for layer in last], "k--", label="real test images")
    names = [layer["name"].removeprefix("features.") for layer in last]
    named = _named(len(names))
    words = [names[k] for k in named]
    lower.set_xticks(named, words, rotation=60, ha="right", rotation_mode="anchor", fontsize=SMALL)
    lower.tick_params(axis="y", labelsize=SMALL)
    lower.set_yscale("log")
    title = "divergence of each BN layer from T's running moments (KL)"
    lower.set_title(f"{title}{_of(named, 'layer')}", fontsize=10)
    lower.grid(alpha=0.3)
    figure.legend(*lower.get_legend_handles_labels(), **BELOW)
    save(figure, path)


def _named(count: int) -> range:
    """Those under an axis that have a name there: all of few, else some."""
    return range(0, count, -(-count // MOST_NAMES))


def _of(named: range, one: str) -> str:
    """What a title says of such names."""
    return f"\n(one {one} in {named.step} is named)" if named.step > 1 else ""


def show(workdir: Path, out: Path) -> None:
    """Writes the page of a run.

    Raises:
      UserError: the run has no delegator that was measured.
    """
    summary, reports = read_json(workdir / "summary.json"), {}
    for path in sorted(workdir.glob("delegator_*.json"), key=lambda p: int(p.stem.split("_")[1])):
        reports[int(path.stem.split("_")[1])] = read_json(path)
    if not summary or not reports:
        raise UserError(
            f"--workdir={workdir} holds no finished run with delegator_N.json; give the workdir of "
            "one that was run with config.run.quality_images above 0"
        )
    out.mkdir(parents=True, exist_ok=True)
    named = {f"D_{task}": report for task, report in reports.items()}
    rows = [(name, cells([report])) for name, report in named.items()]
    rows.append((f"real test images, T_{max(reports)}", cells([reports[max(reports)]], real=True)))
    where = f"{summary['dataset']}, seed {summary['seed']}; {summary['device']}; {summary['date']}"
    table = Table("Delegator quality", tuple(COLUMNS), tuple(rows), where, NOTE)
    draw_reports(named, out / "quality.png")
    draw_terms(
        {name: terms(workdir, task) for task, name in zip(reports, named, strict=True)},
        out / "quality_terms.png",
    )
    sections = [
        table.html(),
        page.picture(out / "quality.png", "Classes and BN layers", where),
        page.picture(out / "quality_terms.png", "Training, by term", where),
    ]
    for task in reports:
        path = workdir / f"pseudo_images_by_class_{task}.png"
        if path.exists():
            sections.append(page.picture(path, f"What D_{task} draws, by T_{task}'s class", where))
    page.write(out / "quality.html", f"Delegator quality: {workdir}", sections)
    say(table.markdown())
    say(f"written: {out / 'quality.html'}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="How good the delegators of a run are.")
    parser.add_argument("--workdir", type=given_path, required=True, help="of a finished run")
    parser.add_argument(
        "--out", type=given_path, help="where the page goes; the workdir without it"
    )
    given = parser.parse_args()
    show(given.workdir, given.out or given.workdir)


if __name__ == "__main__":
    sys.exit(exit_code(main))
