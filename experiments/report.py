"""The report: every table and figure that has results, on one page, and the same as Markdown.

python -m experiments.report

Reads what the other scripts have written under the results folder, trains nothing, and writes
``report.html``, which needs no other file, and ``report.md`` beside it.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from experiments import (
    figure4,
    figure5,
    figure6,
    figure7,
    figure8,
    figure9,
    forgetting,
    gap,
    laboratory,
    replay,
    table1,
    table2,
    table3,
)
from experiments.framework import cost, making, study
from experiments.framework.exhibit import Exhibit
from experiments.framework.tables import command
from skd_jax import page
from skd_jax.errors import UserError
from skd_jax.paths import given_path
from skd_jax.writer import writing

EXHIBITS = (
    *(table1.EXHIBIT, table2.EXHIBIT, table3.EXHIBIT, figure4.EXHIBIT),
    *(
        figure5.EXHIBIT,
        *figure5.COMPARISONS,
        figure6.EXHIBIT,
        figure7.EXHIBIT,
        figure8.EXHIBIT,
        figure9.EXHIBIT,
    ),
    laboratory.EXHIBIT,
    *gap.EXHIBITS,
    *forgetting.EXHIBITS,
    replay.EXHIBIT,
)
TITLE = "Self-distilled Knowledge Delegator: the paper's tables and figures again"
INTRODUCTION = (
    "Ours are means over seeds, with the sample standard deviation; beside them stand the paper's "
    "numbers and the difference. The mini scale is a small task of the same kind for a CPU (fewer "
    "classes, smaller images and networks, fewer steps), so its differences from the paper say how "
    "far a small task goes, not how well the paper reproduces."
)


def _has_been_made(exhibit: Exhibit, options: study.Options) -> bool:
    """Whether it is a table or figure of the paper, or a comparison of methods that were run."""
    of_methods = exhibit.table if exhibit in figure5.COMPARISONS else None
    return of_methods is None or of_methods(options) is not None


def scales(results: Path) -> Iterator[study.Options]:
    """The scales and seeds there are results of."""
    for scale in ("paper", "mini"):
        options = study.with_all_seeds(study.Options(scale, (), (), results, "", 1))
        if options.seeds:
            yield options


def write(results: Path, out: Path) -> None:
    """Writes both files.

    Raises:
      UserError: there are no results.
    """
    sections, lines = [f"<p>{INTRODUCTION}</p>"], [f"# {TITLE}", "", INTRODUCTION, ""]
    for options in scales(results):
        sections.append(f"<h1>{options.scale.capitalize()} scale</h1>")
        lines += [f"## {options.scale.capitalize()} scale", ""]
        exhibits = [one for one in EXHIBITS if _has_been_made(one, options)]
        for exhibit in exhibits:
            if found := making.draw(exhibit, options):
                sections.append(found.html())
                lines.append(found.markdown())
            if not exhibit.pictures:
                continue
            shown = [picture for picture in exhibit.pictures(options) if picture.path.exists()]
            for picture in shown:
                sections.append(page.picture(picture.path, picture.title, picture.source))
                link = os.path.relpath(picture.path, out)
                lines += [f"### {picture.title}", "", f"![{picture.title}]({link})", ""]
                lines += [picture.source, ""]
            if not shown:
                how = command(exhibit.name, options.scale, (0, 1, 2))
                sections.append(page.missing(exhibit.title, how))
                lines += [f"### {exhibit.title}", "", f"not run: {how}", ""]
        spent = cost.table(options, exhibits)
        sections.append(spent.html())
        lines.append(spent.markdown())
    if not lines[4:]:
        raise UserError(f"--results={results} holds no results; run experiments.table1 first")
    with writing(out):
        page.write(out / "report.html", TITLE, sections)
        (out / "report.md").write_text("\n".join(lines).rstrip() + "\n")
    print(f"written: {out / 'report.html'} and report.md")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Writes the report of all results.")
    parser.add_argument("--results", type=given_path, default=study.RESULTS)
    parser.add_argument(
        "--out",
        type=given_path,
        help="where the report goes, not the tables; the results without it",
    )
    given = parser.parse_args()
    write(given.results, given.out or given.results)


if __name__ == "__main__":
    sys.exit(making.exit_code(main))
