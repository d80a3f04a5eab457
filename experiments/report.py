"""The report: every table and figure that has results, on one page, and the same as Markdown.

python -m experiments.report

Reads what the other scripts have written under the results folder, trains nothing, and writes
``report.html``, which needs no other file, and ``report.md`` beside it.
"""

import argparse
import dataclasses
import html
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments import (
    beside_real,
    figure4,
    figure5,
    figure6,
    figure7,
    figure8,
    figure9,
    findings,
    first_task,
    forgetting,
    gap,
    heads,
    laboratory,
    replay,
    table1,
    table2,
    table3,
)
from experiments.framework import cost, scripts, study
from experiments.framework.exhibit import Exhibit
from experiments.framework.tables import Picture, Table, command
from skd_jax import page
from skd_jax.errors import UserError
from skd_jax.files import ELSEWHERE, whole, writing
from skd_jax.paths import given_path

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
    first_task.EXHIBIT,
    *forgetting.EXHIBITS,
    replay.EXHIBIT,
    heads.EXHIBIT,
)
TITLE = "Self-distilled Knowledge Delegator (SKD): the paper's tables and figures again"
READING = (
    "T_n is the classifier after n tasks of new classes, T_0 the one of the base classes; D_n is "
    "the delegator that draws pseudo images of the classes that T_n knows, S_n the student that is "
    "trained on them. Our numbers are means over n seeds, with the sample standard deviation. "
    "Where the paper has a number, it stands beside ours, and after it the difference: positive "
    "where ours is better. A column of changes says how far a row is from the run as it is, on the "
    "same seeds: positive where the change helps."
)
MINI = (
    "The mini scale is a small task of the same kind for a CPU (fewer classes, smaller images and "
    "networks, fewer steps), so its differences from the paper say how far a small task goes, not "
    "how well the paper reproduces."
)
NO_REAL_IMAGES = (
    "Real images are not kept with the results. python -m experiments.report --data_dir=DIR "
    "--out=DIR draws the page with real ones of the same class beside the pseudo images."
)


def _is_shown(exhibit: Exhibit, options: study.Options) -> bool:
    """Whether the scale has a benchmark of it; of comparisons of methods, those that were made."""
    if not any(study.has_scale(run.dataset, run.scale) for run in exhibit.runs(options)):
        return False
    of_methods = exhibit.table if exhibit in figure5.COMPARISONS else None
    return of_methods is None or of_methods(options) is not None


def scales(results: Path) -> Iterator[study.Options]:
    """The scales and seeds there are results of."""
    for scale in ("paper", "midi", "mini"):
        options = study.with_all_seeds(study.Options(scale, (), (), results, "", 1))
        if options.seeds:
            yield options


@dataclasses.dataclass
class Page:
    """What is written of it so far, as HTML and as Markdown.

    Attributes:
      out: the folder it will lie in.
      html: section by section.
      markdown: line by line.
      contents: titles of its parts, by their names.
    """

    out: Path
    html: list[str] = dataclasses.field(default_factory=list)
    markdown: list[str] = dataclasses.field(default_factory=list)
    contents: dict[str, str] = dataclasses.field(default_factory=dict)

    def heading(self, words: str) -> None:
        """Of a scale."""
        self.html.append(f"<h1>{html.escape(words)}</h1>")
        self.markdown += [f"## {words}", ""]

    def paragraph(self, words: str) -> None:
        """Some sentences."""
        self.html.append(f"<p>{html.escape(words)}</p>")
        self.markdown += [words, ""]

    def points(self, sentences: Sequence[str]) -> None:
        """Sentences, numbered."""
        items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
        self.html.append(f"<ol>{items}</ol>")
        self.markdown += [*(f"{n}. {words}" for n, words in enumerate(sentences, 1)), ""]

    def part(self, name: str, title: str) -> None:
        """A part that the contents lead to begins here."""
        self.contents[name] = title
        self.html.append(page.part(name))
        self.markdown += [f'<a id="{name}"></a>', ""]

    def table(self, table: Table) -> None:
        """A table."""
        self.html.append(table.html())
        self.markdown.append(table.markdown())

    def picture(self, picture: Picture) -> None:
        """A picture that there is."""
        self.html.append(page.picture(picture.path, picture.title, picture.source))
        link = os.path.relpath(picture.path, self.out)
        self.markdown += [f"### {picture.title}", "", f"![{picture.title}]({link})", ""]
        self.markdown += [picture.source, ""]

    def missing(self, title: str, how: str) -> None:
        """What has not been run."""
        self.html.append(page.missing(title, how))
        self.markdown += [f"### {title}", "", f"not run: {how}", ""]

    def write(self, first: "Page") -> None:
        """Writes both files: what stands first, the contents, and this."""
        links = [f"- [{title}](#{name})" for name, title in self.contents.items()]
        with writing(self.out, ELSEWHERE):
            sections = [*first.html, page.contents(self.contents), *self.html]
            page.write(self.out / "report.html", TITLE, sections)
            lines = [f"# {TITLE}", "", *first.markdown, "## Contents", "", *links, ""]
            text = "\n".join([*lines, *self.markdown]).rstrip()
            with whole(self.out / "report.md", mode="w", encoding="utf-8") as file:
                file.write(f"{text}\n")


def write(results: Path, out: Path, data_dir: str = "") -> None:
    """Writes both files.

    Args:
      results: what they show.
      out: their folder.
      data_dir: TFDS's data directory, for real images beside pseudo images; "": none are shown.

    Raises:
      UserError: there are no results.
    """
    first, whole = Page(out), Page(out)
    for options in scales(results):
        opening(first, options)
        whole.heading(f"{options.scale.capitalize()} scale")
        show(whole, dataclasses.replace(options, data_dir=data_dir))
    if not whole.contents:
        raise UserError(f"--results={results} holds no results; run experiments.table1 first")
    first.paragraph(READING)
    whole.write(first)
    print(f"written: {out / 'report.html'} and report.md")


def opening(first: Page, options: study.Options) -> None:
    """What was found at a scale, before anything else."""
    first.html.append(page.part(f"{options.scale}-found"))
    first.markdown += [f"## What was found, at {options.scale} scale", ""]
    first.html.append(f"<h2>What was found, at {options.scale} scale</h2>")
    first.points(findings.sentences(options))
    if options.scale == "mini":
        first.paragraph(MINI)


def show(whole: Page, options: study.Options) -> None:
    """Every table and figure of a scale."""
    exhibits = [one for one in EXHIBITS if _is_shown(one, options)]
    for exhibit in exhibits:
        whole.part(f"{options.scale}-{exhibit.name}", exhibit.title)
        if found := scripts.draw(exhibit, options):
            whole.table(found)
        if not exhibit.pictures:
            continue
        shown = [picture for picture in exhibit.pictures(options) if picture.path.exists()]
        for picture in shown:
            whole.picture(picture)
        if not shown:
            whole.missing(exhibit.title, command(exhibit.name, options, (0, 1, 2)))
        if exhibit is figure9.EXHIBIT:
            show_real(whole, options)
    whole.part(f"{options.scale}-cost", cost.TITLE)
    whole.table(cost.table(options, exhibits))


def show_real(whole: Page, options: study.Options) -> None:
    """Pseudo images beside real ones of the same class, as far as those are at hand."""
    if options.data_dir:
        runs = [run for run in figure9.runs(options) if run.seed == options.seeds[0]]
        for run in runs:
            if picture := beside_real.by_class(run, options, whole.out):
                whole.picture(picture)
    else:
        whole.paragraph(NO_REAL_IMAGES)
    if picture := beside_real.digits(options):
        whole.picture(picture)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Writes the report of all results.")
    parser.add_argument("--results", type=given_path, default=study.RESULTS)
    parser.add_argument(
        "--out",
        type=given_path,
        help="where the report goes, not the tables; the results without it",
    )
    parser.add_argument(
        "--data_dir",
        type=given_path,
        help="TFDS's data directory, for real images beside pseudo images; with --out",
    )
    given = parser.parse_args()
    if given.data_dir and not given.out:
        raise UserError("--data_dir: give --out=DIR too, for real images are not kept with results")
    write(given.results, given.out or given.results, str(given.data_dir or ""))


if __name__ == "__main__":
    sys.exit(scripts.exit_code(main))
