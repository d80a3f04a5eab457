"""The report: what it says first, and what it shows beside what."""

import dataclasses
import json
import re
import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from test_study import Page, options, place, summary

from experiments import beside_real, findings, forgetting, report, table2, table3
from experiments.framework import kept, scripts, study
from experiments.framework.changes import AS_IT_IS, CHANGE
from experiments.framework.tables import Cell, Table
from skd_jax import page, plots


@pytest.fixture(scope="module")
def committed() -> study.Options:
    """The results that are kept in git, at mini scale."""
    return study.with_all_seeds(study.Options("mini", (), (), study.RESULTS, "", 1))


def test_the_committed_report_is_of_the_committed_results(committed):
    written = (study.RESULTS / "report.md").read_text()
    for exhibit in report.EXHIBITS:
        if exhibit.table and (table := exhibit.table(committed)):
            # "Not run" is what a table says of results that it does not recognise any more.
            assert table.markdown() == (committed.out / f"{exhibit.name}.md").read_text()
            assert table.markdown() in written
    sentences = findings.sentences(committed)
    assert len(sentences) == 5
    assert written.index(sentences[0]) < written.index("## Contents") < written.index("### Table I")
    for number, sentence in enumerate(sentences, 1):
        assert f"{number}. {sentence}\n" in written


def test_readme_has_the_numbers_of_the_report(committed, repo):
    text = (repo / "experiments" / "README.md").read_text()
    tables = {table2: 0, table3: 0}
    cells = [cell for t in tables for _, row in t.EXHIBIT.table(committed).rows for cell in row]
    said = {str(cell) for cell in cells if cell.ours}
    here = text[text.index("### Mini scale") : text.index("| seed 0, mini scale")]
    shown = set(re.findall(r"\d+\.\d\d ± \d+\.\d\d", here))
    assert shown <= said
    assert len(shown) > 12
    end = text.index("## The mini scales")
    by_seed = dict(re.findall(r"\| ([\w-]+) \| ([\d. |]+) \|", text[:end]))
    for changes in forgetting.TABLES:
        dataset = changes.dataset
        first = dataclasses.replace(committed, seeds=(0,))
        both = forgetting.HALF_WAY if dataset == "cifar100" else list(changes.changes)[-1]
        delegator = study.summary(study.student(dataset, "mini", 0), first)["delegator"][0]
        learners = [study.learner(dataset, "mini", 0, 5), changes.run("mini", 0, both)]
        learners.append(study.learner(dataset, "mini", 0, 5, "no_skd"))
        numbers = [delegator["teacher_accuracy"], delegator["student_accuracy"]]
        numbers += [study.summary(r, first)["average_incremental_accuracy"] for r in learners]
        numbers = [100 * x for x in numbers] + [table3.nothing_learned(first, dataset, 5).mean]
        assert by_seed[study.TITLES[dataset]] == " | ".join(f"{x:.1f}" for x in numbers)


def test_readme_has_the_numbers_of_the_midi_tables(repo):
    text = (repo / "experiments" / "README.md").read_text()
    here = text[text.index("### Midi scale") : text.index("## The mini scales")]
    folder = study.RESULTS / "midi"
    names = ("table1", "table3", "figure5_cifar100_5", "first_task", "gap", "forgetting")
    every = "".join((folder / f"{name}.md").read_text() for name in names)
    said = {f"{float(number):.1f}" for number in re.findall(r"-?\d+\.\d+", every)}
    rows = [line for line in here.splitlines() if re.match(r"\| .* \d", line)]
    shown = [number for row in rows for number in re.findall(r"-?\d+\.\d\b", row)]
    assert len(shown) > 30 and set(shown) <= said


OF_README = {  # of the table of recipe=ours: its rows, and its columns' rows in those
    "CIFAR-100, midi": "paper/midi/figure5_cifar100_5",
    "CIFAR-100, mini": "methods/mini/figure5_cifar100_5",
    "digits": "methods/mini/figure5_digits_3",
}
COLUMNS = ("skd", "ours", kept.LABEL, "rdfcil", "lda", "lucir")


def test_readme_has_the_numbers_of_the_comparisons(repo):
    text = (repo / "README.md").read_text()
    rows = re.findall(
        r"^\| ([^|]*) \|([^\n]*)\|$", text[text.index("| data | SKD | `recipe") :], re.M
    )
    shown = {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows[2:5]}
    assert len(shown) == len(OF_README)
    for (said, cells), (name, path) in zip(shown.items(), OF_README.items(), strict=True):
        table = json.loads((study.RESULTS.parent / f"{path}.json").read_text())
        average = table["columns"].index("average, %")
        found = {re.sub("; n=.*", "", row["name"]): row["cells"] for row in table["rows"]}
        means = [np.mean(found[column][average]["ours"]) for column in COLUMNS]
        assert said.startswith(name) and cells == [f"{mean:.1f}" for mean in means]


def test_findings_follow_the_results(tmp_path):
    given = options(tmp_path, seeds=(0,))
    assert findings.sentences(given) == []
    row = {"task": 0, "teacher_accuracy": 0.6, "gap": 0.1, "agreement": 0.7}
    right = {"skd": 0.5, "no_category": 0.3, "no_diversity": 0.49}
    for name in study.ABLATIONS:
        found = summary(0, delegator=[{**row, "student_accuracy": right.get(name, 0.45)}])
        place(study.student("cifar100", "mini", 0, name), tmp_path, found)
    first, second = findings.sentences(given)
    assert "lacks 10.0 points of it on CIFAR-100 (50.0 of 60.0 %, n=1; in the paper 0.2" in first
    assert "needs one technique most: without L_cat" in second
    assert re.search(r"L_cat \(.*?\) it loses 20.0 points .* L_div \(.*?\) 1.0 \(n=1\)", second)
    for average, words in ((0.3, "12.3 points below"), (0.5, "7.7 points above")):
        run = study.learner("cifar100", "mini", 0, 5)
        shutil.rmtree(run.folder(tmp_path), ignore_errors=True)
        place(run, tmp_path, summary(0, average_incremental_accuracy=average))
        beside = findings.of_t_0_kept(given)
        assert f"{words} its 42.3 % (n=1) on CIFAR-100" in beside
        note = table3.table(given).note
        assert f"SKD is {words} it over 5 tasks" in note


def test_a_kept_t_0_is_right_on_its_own_classes_alone():
    images = np.array([1.0, 0.5, 0.25, 2.0])  # the base step's being 1
    matrix = np.tril(np.random.default_rng(0).uniform(size=(4, 4)))
    top1 = [row[: n + 1] @ images[: n + 1] / images[: n + 1].sum() for n, row in enumerate(matrix)]
    found = summary(0, accuracy_matrix=matrix, top1_seen=top1, classes_per_task=[4, 2, 2, 2])
    assert kept.test_images(found) == pytest.approx(images)
    assert kept.accuracies(found) == pytest.approx(top1[0] / np.cumsum(images))
    # Where all accuracies are the same, weights are left open: classes have as many images then.
    found = {**found, "accuracy_matrix": np.full((4, 4), 0.5), "top1_seen": [0.5] * 4}
    assert kept.test_images(found) == pytest.approx([1, 0.5, 0.5, 0.5])


def test_the_number_of_seeds_is_said_once():
    def table(*rows: tuple[int, int]) -> str:
        cells = [tuple(Cell((1.0,) * n) for n in row) for row in rows]
        named = tuple((f"row {k}", row) for k, row in enumerate(cells))
        return Table("a title", ("x", "y"), named, "").markdown()

    same, by_row, mixed = table((2, 2), (2, 0)), table((2, 2), (1, 0)), table((2, 1))
    assert same.count("n=2") == 1
    assert "| row 0; n=2 | 1.00 ± 0.00 | 1.00 ± 0.00 |" in by_row
    assert "| row 1; n=1 | 1.00 | not run |" in by_row
    assert "| row 0 | 1.00 ± 0.00; n=2 | 1.00; n=1 |" in mixed


def test_every_change_is_positive_where_it_helps(committed):
    """The column that is compared is one of which more is better."""
    for exhibit in report.EXHIBITS:
        table = exhibit.table and exhibit.table(committed)
        if table and CHANGE in table.columns:
            at = table.columns.index(CHANGE)
            first = dict(table.rows)[AS_IT_IS][at - 1]
            assert "gap" not in table.columns[at - 1]
            for _, cells in table.rows:
                if first.ours and len(cells[at].ours) == len(first.ours):
                    assert cells[at].mean == pytest.approx(cells[at - 1].mean - first.mean)


def test_contents_lead_to_every_part(tmp_path):
    place(study.learner("cifar100", "mini", 0, 5), tmp_path, summary(0))
    report.write(tmp_path, tmp_path)
    text = (tmp_path / "report.html").read_text()
    links = [load[1:] for load in Page(text).loads if load.startswith("#")]
    assert len(links) == len(set(links)) > 15
    assert all(text.count(f"id='{link}'") == 1 for link in links)
    markdown = (tmp_path / "report.md").read_text()
    assert all(markdown.count(f'id="{link}"') == 1 for link in links)
    assert "--data_dir=DIR" in text  # that there could be real images


def test_many_columns_stand_below_each_other_on_a_narrow_page():
    def html(columns: int) -> str:
        names = tuple(f"column {k}" for k in range(columns))
        return Table("a title", names, (("row", (Cell((1.0,)),) * columns),), "").html()

    assert "class=many" not in html(page.COLUMNS)
    assert "class=many" in html(page.COLUMNS + 1)
    assert 'data-column="column 8"' in html(page.COLUMNS + 1)
    turned = Table("a title", ("x", "y"), (("row", (Cell((1.0,)), Cell((2.0,)))),), "").turned()
    assert turned.columns == ("row",)
    assert [(name, str(*cells)) for name, cells in turned.rows] == [("x", "1.00"), ("y", "2.00")]


def test_pseudo_images_stand_beside_real_ones_of_their_class(tmp_path):
    run, given = study.student("digits", "mini", 0), options(tmp_path)
    assert beside_real.by_class(run, given, tmp_path) is None
    folder = place(run, tmp_path, summary(0, dataset="digits"))
    classes, shares = ["4", "2", "7", "6"], np.array([0.4, 0.3, 0.2, 0.1])
    delegator = {**study.read_json(folder / "delegator_0.json"), "classes": classes}
    study.write_json(folder / "delegator_0.json", {**delegator, "label_shares": shares.tolist()})
    path = folder / "pseudo_images_by_class_0.png"
    drawn, labels = np.full((40, 8, 8, 1), 0.2), np.repeat(np.arange(4), 10)
    plots.class_grid(drawn, labels, classes, path, (0,), (1,), shares=shares)
    picture = beside_real.by_class(run, given, tmp_path / "new" / "page")
    assert picture
    with Image.open(picture.path) as image:
        both = np.asarray(image.convert("L"))
    grey = both == 51
    columns = np.flatnonzero(grey.mean(axis=0) > 0.5)
    runs = 1 + np.count_nonzero(np.diff(columns) > 1)
    assert runs == 5  # of ten, and no other is cut
    right = both[60:, columns.max() + 60 :]
    assert np.count_nonzero((right < 100).mean(axis=0) > 0.1) > 100
    assert not grey[:, columns.max() + 60 :].mean(axis=0).max() > 0.3


def test_digits_are_shown_beside_real_ones(tmp_path):
    given = options(tmp_path / "paper")
    assert beside_real.digits(given) is None
    shutil.copytree(study.RESULTS.parent / "digits", tmp_path / "digits")
    given.results.mkdir()
    picture = beside_real.digits(given)
    assert picture
    assert picture.path == tmp_path / "paper" / "beside_real_digits.png"
    assert "seed 1" in picture.source
    with (
        Image.open(picture.path) as image,
        Image.open(study.RESULTS / "beside_real_digits.png") as shown,
        Image.open(tmp_path / "digits" / beside_real.DRAWN) as drawn,
    ):
        assert image.size == shown.size
        assert drawn.width < image.width < 2 * drawn.width
    (tmp_path / "digits" / beside_real.DRAWN).unlink()
    assert beside_real.digits(given) is None


def test_real_images_do_not_come_to_lie_among_the_results(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["report", f"--results={tmp_path}", f"--data_dir={tmp_path}"])
    assert scripts.exit_code(report.main) == 2
    assert "--out" in capsys.readouterr().err


def test_a_field_that_has_its_default_is_in_no_digest():
    run = study.learner("cifar100", "mini", 0, 5)
    found = study.beyond_defaults(run)
    assert "precision" in study.plain(run)["model"]
    assert "precision" not in found["model"]
    assert found["model"]["depth"] == 8
    half = dataclasses.replace(run, fields=(("method.stage_two.balanced", 0.5),))
    assert study.beyond_defaults(half)["method"]["stage_two"]["balanced"] == 0.5
    assert study.beyond_defaults(half) != found
