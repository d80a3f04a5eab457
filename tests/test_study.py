"""The scripts of tables and figures: what they run, what they keep, and what they show."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_train import TINY

from experiments import (
    choose,
    everything,
    figure4,
    figure5,
    figure9,
    first_task,
    forgetting,
    gap,
    heads,
    laboratory,
    quality,
    replay,
    report,
    table1,
    table2,
    table3,
)
from experiments.framework import (
    chosen,
    comparison,
    cost,
    curves,
    derived,
    halts,
    kept,
    making,
    panels,
    scripts,
    study,
)
from experiments.framework.tables import Cell, Table, command, source
from skd_jax.config import to_dict
from skd_jax.errors import UserError
from skd_jax.experiment import what_is_computed
from skd_jax.files import read_json, write_json
from skd_jax.methods import METHODS, from_config_dict

TINIER = {**TINY, "run.quality_images": 50}
FIELDS = tuple((name, value) for name, value in TINIER.items() if name != "method.delegator.widths")


def options(results: Path, **changes) -> study.Options:
    given = study.Options("mini", (0, 1), ("cifar100",), results, "", 0)
    return dataclasses.replace(given, **changes)


def tiny_runs() -> tuple[study.Run, study.Run]:
    """T_0 and D_0 on digits, in seconds."""
    base = study.Run("digits", "paper", 3, "base", "tasks=2", FIELDS, 1)
    return base, study.Run("digits", "paper", 3, "student/skd", "tasks=2", FIELDS, 2, base)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The results of both."""
    results = tmp_path_factory.mktemp("made")
    making.make_runs([tiny_runs()[1]], options(results, datasets=(), scale="paper"))
    return results


@pytest.fixture
def results(made, tmp_path) -> Path:
    """The same, to be damaged."""
    return shutil.copytree(made, tmp_path / "results")


def summary(seed: int, **changes) -> dict:
    row = {"task": 0, "teacher_accuracy": 0.6, "student_accuracy": 0.5 + seed / 100, "gap": 0.1}
    found = {
        "method": "skd",
        "dataset": "cifar100",
        "seed": seed,
        "classes_per_task": [10, 2, 2, 2, 2, 2],
        "class_names": [["cat", "dog"]],
        "top1_seen": [0.6, 0.5, 0.4, 0.3, 0.2, 0.1 + seed / 100],
        "average_incremental_accuracy": 0.35 + seed / 600,
        "average_incremental_accuracy_without_base": 0.3 + seed / 500,
        "delegator": [{**row, "agreement": 0.7}],
        "accuracy_matrix": [[0.6] * 6] * 6,
        "final_accuracy": 0.1,
        "seconds": {"base": 60.0, "delegator": 60.0},
        "device": "a device",
        "date": f"2026-11-0{seed + 1}",
    }
    return {**found, **changes}


def place(run: study.Run, results: Path, found: dict) -> Path:
    """Puts a finished run there."""
    folder = run.folder(results)
    folder.mkdir(parents=True)
    write_json(folder / "settings.json", run.settings())
    write_json(folder / "summary.json", found)
    layers = [
        {"name": f"features.bn{k}", **{kind: {"kl": 0.1 * (k + 1)} for kind in ("pseudo", "real")}}
        for k in range(3)
    ]
    delegator = {
        **found["delegator"][0],
        "classes": [f"class {k}" for k in range(10)],
        "label_entropy": 2.0,
        "label_shares": [0.1] * 10,
        "confidence": {"pseudo": 0.5, "real": 0.6},
        "layers": layers,
        "nearest": {"pseudo": 0.1, "real": 0.2, "pseudo_to_real": 0.3, "real_to_pseudo": 0.4},
    }
    write_json(folder / "delegator_0.json", delegator)
    place = {"time": 0.0, "task": 0, "phase": "delegator", "global_step": 1}
    rows = [{**place, "step": step, "imitation": 1 / step, "category": None} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(folder / "pseudo_images_by_class_0.png")
    return folder


class Page(HTMLParser):
    """What a page loads, its pictures, and its balanced tags."""

    def __init__(self, text: str):
        super().__init__()
        self.loads, self.images, self.open = [], 0, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.images += tag == "img"
        self.loads += [v for k, v in values.items() if k in ("src", "href") and v]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_runs_that_share_a_teacher_share_its_folder(tmp_path):
    every = [
        *table1.runs(options(tmp_path)),
        *table2.runs(options(tmp_path)),
        *table3.runs(options(tmp_path)),
        *laboratory.runs(options(tmp_path)),
    ]
    bases = set()
    for run in every:
        first = run
        while first.start:
            first = first.start
        bases.add(first)
    wanted = {(run.dataset, run.seed) for run in every}
    assert {(base.dataset, base.seed) for base in bases} == wanted
    assert len(bases) == len(wanted)
    # One D_0 teaches Table I, III and the laboratory's "skd".
    students = {run.start for run in table3.runs(options(tmp_path)) if run.name == "tasks5/skd"}
    assert students <= set(table1.runs(options(tmp_path)))
    assert students <= set(laboratory.runs(options(tmp_path)))


@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_every_run_is_a_valid_configuration_and_fits_what_it_starts_from(tmp_path, scale):
    given = options(tmp_path, scale=scale, seeds=(4,))
    for module in (table1, table2, table3, laboratory):
        for run in module.runs(given):
            config = run.config(tmp_path, "somewhere")
            assert config.seed == 4
            assert config.data.data_dir == "somewhere"
            assert run.start
            start = run.start.config(tmp_path, "somewhere")
            assert (config.model, config.base) == (start.model, start.base)
            assert config.run.start_from == str(run.start.folder(tmp_path))
            if start.run.phases == 2:
                assert config.method.stage_one == start.method.stage_one
                assert config.method.delegator == start.method.delegator
            assert (config.model.depth <= 10) == (scale == "mini")


def test_table2_and_table3_turn_off_what_they_say(tmp_path):
    found = {run.name: run.config(tmp_path, "") for run in table2.runs(options(tmp_path))}
    for name in ("category", "diversity", "feature_statistics"):
        weights = dict(found[f"student/no_{name}"].method.stage_one.terms)
        assert [term for term, weight in weights.items() if not weight] == [name]
    assert not found["student/no_helper_bn"].method.delegator.helper_bn
    found = {run.name: run.config(tmp_path, "") for run in table3.runs(options(tmp_path))}
    assert found["tasks10/skd"].data.tasks == 10
    on = {
        name: (c.method.stage_two.delegator, c.method.stage_two.adaptive)
        for name, c in found.items()
    }
    assert on["tasks5/skd"] == (True, True)
    assert on["tasks5/no_alw"] == (True, False)
    assert on["tasks5/no_skd"] == (False, True)
    assert on["tasks5/no_skd_no_alw"] == (False, False)
    assert found["tasks5/no_skd_new_outputs"].method.stage_two.classification == "new"


def test_finished_runs_are_not_made_again_and_lost_ones_are(results, capsys):
    base, student = tiny_runs()
    given = options(results, datasets=(), scale="paper")
    first = study.summary(student, given)
    assert first and first["delegator"]
    making.make_runs([student, base], given)
    assert "to make" not in capsys.readouterr().out

    # Its last checkpoint is there: nothing is trained.
    (student.folder(results) / "summary.json").unlink()
    making.make_runs([student], given)
    assert "1 run to make" in capsys.readouterr().out
    assert study.summary(student, given) == first

    # As on a fresh clone, where no checkpoint is: what starts from T_0 needs it trained again.
    for run in (base, student):
        shutil.rmtree(run.folder(results) / "checkpoints")
    making.make_runs([base, student], given)
    assert "to make" not in capsys.readouterr().out
    (student.folder(results) / "summary.json").unlink()
    making.make_runs([student], given)
    assert "2 runs to make" in capsys.readouterr().out
    assert {**study.summary(student, given), "seconds": 0} == {**first, "seconds": 0}


def test_what_was_deleted_or_damaged_in_part_is_made_anew(results, capsys):
    base, student = tiny_runs()
    given = options(results, datasets=(), scale="paper")
    first = study.report(student, given), study.summary(student, given)
    for name in ("delegator_0.json", "pseudo_images_by_class_0.png", "metrics.jsonl"):
        (student.folder(results) / name).unlink()
        assert study.summary(student, given) is None
    steps = base.folder(results) / "checkpoints"
    newest = max(steps.iterdir(), key=lambda path: int(path.name))
    assert len(list(steps.iterdir())) > 1
    shutil.rmtree(newest)
    assert study.summary(base, given)
    making.make_runs([student], given)
    assert "2 runs to make" in capsys.readouterr().out
    assert newest.exists()
    found = study.report(student, given), study.summary(student, given)
    assert found[0] == first[0]
    assert {**found[1], "seconds": 0} == {**first[1], "seconds": 0}


def test_what_was_found_stays_until_it_is_found_anew(results, monkeypatch):
    base, student = tiny_runs()
    given = options(results, datasets=(), scale="paper")
    found = study.summary(base, given)
    shutil.rmtree(base.folder(results) / "checkpoints")
    (student.folder(results) / "summary.json").unlink()
    (student.folder(results) / "delegator_0.json").unlink()
    monkeypatch.setattr(study.Run, "command", lambda *_: ["-c", "raise SystemExit('no space')"])
    log = (base.folder(results) / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="base ended with exit code 1: no space"):
        making.make_runs([student], given)
    assert study.summary(base, given) == found
    assert (base.folder(results) / "metrics.jsonl").read_bytes() == log
    assert (base.folder(results).with_name("base.again") / "log.txt").exists()


def test_runs_of_several_teachers_are_told(tmp_path):
    given = options(tmp_path, seeds=(0,))
    runs = [study.student("cifar100", "mini", 0, name) for name in ("skd", "no_category")]
    place(runs[0], tmp_path, summary(0))
    assert "same T_0" not in table2.table(given).source
    place(runs[1], tmp_path, summary(0, accuracy_matrix=[[0.59] + [None] * 5] * 6))
    assert (
        "Not all runs of cifar100, seed 0 start from the same T_0 (accuracies 59.00, 60.00 %)"
        in table2.table(given).source
    )


def test_a_run_has_a_page_of_its_delegators_quality(made, tmp_path):
    _, student = tiny_runs()
    quality.show(student.folder(made), tmp_path)
    text = (tmp_path / "quality.html").read_text()
    assert Page(text).images == 3
    found = read_json(student.folder(made) / "summary.json")["delegator"][0]
    assert f"{100 * found['student_accuracy']:.2f}" in text
    with pytest.raises(UserError, match="holds no finished run"):
        quality.show(tmp_path / "nothing", tmp_path)


def test_results_of_other_settings_are_not_taken_for_these(tmp_path):
    base, student = tiny_runs()
    given = options(tmp_path, datasets=(), scale="paper")
    folder = place(base, tmp_path, summary(3))
    assert study.summary(base, given)
    # What T_0 does not depend on may be another.
    rest = dataclasses.replace(base, fields=(*FIELDS, ("method.stage_one.batch", 8)))
    assert study.summary(rest, given)
    other = dataclasses.replace(base, fields=(*FIELDS, ("base.epochs", 9)))
    write_json(folder / "settings.json", other.settings())
    assert study.summary(base, given) is None
    with pytest.raises(UserError, match=r"config\.base\.epochs=9, not 2.*delete that folder"):
        making.make_runs([student], given)
    # A field that was added since, with a default, makes no other settings; another value does.
    student_folder = place(student, tmp_path, summary(3))
    older = student.settings()
    del older["method"]["stage_one"]["discrepancy"]
    write_json(student_folder / "settings.json", older)
    assert study.summary(student, given)
    kl = (*FIELDS, ("method.stage_one.discrepancy", "kl"))
    assert study.summary(dataclasses.replace(student, fields=kl), given) is None
    shutil.rmtree(student_folder)
    for wrong in ("{", "[]", '{"data": 3}'):
        (folder / "settings.json").write_text(wrong)
        assert study.summary(base, given) is None
    (folder / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"no settings\.json that can be read"):
        making.make_runs([student], given)
    assert (folder / "summary.json").exists()


def test_a_run_that_fails_is_told_with_its_last_line(tmp_path):
    base, _ = tiny_runs()
    broken = dataclasses.replace(base, fields=(*FIELDS, ("data.base_classes", 99)))
    with pytest.raises(UserError, match=r"seed 3 base ended with exit code 2: error: .*log\.txt"):
        making.make_runs([broken], options(tmp_path, datasets=(), scale="paper"))


def test_a_data_set_that_is_not_there_is_left_out_unless_it_is_named(tmp_path, capsys):
    given = options(tmp_path, datasets=(), data_dir=str(tmp_path / "nothing"))
    making.make_runs(table1.runs(given), given)
    assert "cifar100 is left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="cifar100"):
        making.make_runs(table1.runs(given), dataclasses.replace(given, datasets=("cifar100",)))


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--seeds=1,x", "--seeds=1,x"),
        ("--seeds=-1", "--seeds=-1"),
        ("--seeds=1,1", "once"),
        ("--datasets=mnist", "mnist"),
        ("--jobs=-2", "--jobs=-2"),
        ("--results=FILE", "(File exists); name another place"),
    ],
)
def test_wrong_arguments_are_one_line(argument, words, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["table1", argument.replace("FILE", str(tmp_path / "file"))])
    before = signal.getsignal(signal.SIGTERM)
    assert scripts.script(table1.__doc__, table1.EXHIBIT) == 2
    assert signal.getsignal(signal.SIGTERM) == before
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_a_script_draws_all_seeds_there_are_and_nothing_of_nothing(monkeypatch, capsys, tmp_path):
    def main(module, *arguments: str) -> int:
        start = ["script", f"--results={tmp_path}", f"--data_dir={tmp_path / 'nowhere'}"]
        monkeypatch.setattr(sys, "argv", [*start, *arguments])
        return scripts.script(module.__doc__, module.EXHIBIT)

    assert main(table1, "--seeds=7") == 2
    assert "nothing of table1 has been run" in capsys.readouterr().err
    assert not (tmp_path / "mini").exists()
    for seed in (0, 1):
        place(study.base("cifar100", "mini", seed), tmp_path, summary(seed))
        place(study.student("cifar100", "mini", seed), tmp_path, summary(seed))
    # No image is needed where nothing is missing.
    assert main(table1, "--seeds=0", "--datasets=cifar100") == 0
    table = (tmp_path / "mini" / "table1.md").read_text()
    assert "2 seeds (0, 1)" in table
    assert main(table1, "--seeds=7") == 0
    assert (tmp_path / "mini" / "table1.md").read_text() == table


def test_a_data_set_that_a_script_does_not_have_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["table3", "--datasets=flowers102", f"--results={tmp_path / 'results'}"]
    )
    assert scripts.script(table3.__doc__, table3.EXHIBIT) == 2
    assert "flowers102: this script has runs of cifar100\n" in capsys.readouterr().err


def test_a_script_of_several_tables_makes_those_of_the_data_sets_named(
    monkeypatch, capsys, tmp_path
):
    def main(*arguments: str) -> tuple[int, set[str]]:
        start = ["gap", f"--results={tmp_path}", f"--data_dir={tmp_path / 'nowhere'}", "--seeds=0"]
        monkeypatch.setattr(sys, "argv", [*start, *arguments])
        code = scripts.script(gap.__doc__, *gap.EXHIBITS)
        found = {path.name for path in tmp_path.glob("mini/*.md")}
        for path in tmp_path.glob("mini/*.md"):
            path.unlink()
        return code, found

    for changes in (gap.CIFAR100, gap.CALTECH101):
        for run in changes.runs(options(tmp_path, seeds=(0,))):
            place(run, tmp_path, summary(0, dataset=run.dataset))
    assert main("--datasets=caltech101") == (0, {"gap_caltech101.md"})
    assert "experiments.gap --scale=mini --seeds=0 --datasets=caltech101" in capsys.readouterr().out
    assert main() == (0, {"gap.md", "gap_caltech101.md"})
    assert "flowers102 is left out" in capsys.readouterr().out
    assert main("--datasets=imagenet_subset") == (2, set())


def test_cells():
    assert str(Cell()) == "not run"
    assert Cell((), 3.0).words() == ["not run", "paper 3.00"]
    assert str(Cell((1.0,))) == "1.00"
    assert Cell((1.0, 2.0, 3.0), 5.0).words() == ["2.00 ± 1.00", "n=3", "paper 5.00", "-3.00"]
    gap = Cell((1.0, 2.0, 3.0), 5.0, less_is_better=True)
    assert gap.words(with_seeds=False) == ["2.00 ± 1.00", "paper 5.00", "+3.00"]
    assert str(Cell(applies=False)) == ""


def test_a_table_shows_every_cell_in_both_forms():
    rows = (("a < b", (Cell((50.0,), 60.0), Cell())),)
    table = Table("T & S", ("first", "second"), rows, "from somewhere", "a note")
    assert "| a < b | 50.00; paper 60.00; -10.00 | not run |" in table.markdown()
    assert "Each number is of one seed (n=1). a note" in table.markdown()
    assert "a &lt; b" in table.html()
    assert "T &amp; S" in table.html()
    assert table.html().count("not run") == 1
    json.dumps(table.json())


def test_source_says_seeds_devices_and_dates(tmp_path):
    given = options(study.RESULTS)
    text = source("table9", given, [summary(0), summary(2)])
    assert "Mini scale (a small task, not the paper's)" in text
    assert "2 seeds (0, 2)" in text
    assert "a device" in text
    assert "2026-11-01 to 2026-11-03" in text
    assert text.endswith("python -m experiments.table9 --scale=mini --seeds=0,2")
    paper = dataclasses.replace(given, scale="paper")
    assert source("c", paper, []) == "Not run: python -m experiments.c --scale=paper --seeds=0,1,2"
    text = source("c", given, [summary(0)], before="Words before it. ")
    assert "2026-11-01. Words before it. python -m experiments.c " in text


def test_a_command_names_results_that_lie_elsewhere(tmp_path):
    folder = study.RESULTS.parent / "methods"
    for results, named in (
        (study.RESULTS, ""),
        (folder, " --results=experiments/results/methods"),
        (tmp_path, " --results=DIR"),
    ):
        given = options(results)
        assert command("c", given, (0,), "digits").endswith(f" --datasets=digits{named}")
        assert source("c", given, [summary(0)], "digits").endswith(f" --datasets=digits{named}")


def test_tables_hold_what_the_runs_found(tmp_path):
    given = options(tmp_path)
    assert not any(cell.ours for _, cells in table1.table(given).rows for cell in cells)
    for seed in (0, 1):
        place(study.student("cifar100", "mini", seed), tmp_path, summary(seed))
    rows = dict(table1.table(given).rows)
    assert [cell.ours for cell in rows["cifar100"]] == [
        pytest.approx((60.0, 60.0)),
        pytest.approx((50.0, 51.0)),
        pytest.approx((10.0, 9.0)),
        pytest.approx((70.0, 70.0)),
    ]
    assert rows["cifar100"][1].paper == 75.86
    assert not rows["caltech101"][0].ours
    rows = dict(table2.table(given).rows)
    assert rows["SKD"][0].ours == pytest.approx((50.0, 51.0))
    assert rows["T_0, upper bound"][0].ours == pytest.approx((60.0, 60.0))
    assert not rows["without L_cat"][0].ours
    place(study.learner("cifar100", "mini", 1, 5, "no_alw"), tmp_path, summary(1))
    rows = dict(table3.table(given).rows)
    assert rows["without ALW"][0].ours == pytest.approx((100 * (0.35 + 1 / 600),))
    assert not rows["SKD"][1].ours
    assert not rows["T_0 kept, nothing learned"][0].ours
    place(study.learner("cifar100", "mini", 1, 5), tmp_path, summary(1))
    rows = dict(table3.table(given).rows)
    seen = np.array([10, 12, 14, 16, 18, 20])
    assert rows["T_0 kept, nothing learned"][0].ours == pytest.approx((np.mean(600 / seen),))


def test_curves_are_drawn_of_what_is_there(tmp_path):
    given, path = options(tmp_path), tmp_path / "curves.png"
    curves.draw(given, figure5.PANELS, path)
    assert not path.exists()
    for seed in (0, 1):
        for name in ("skd", "no_skd"):
            place(study.learner("cifar100", "mini", seed, 5, name), tmp_path, summary(seed))
    curves.draw(given, figure5.PANELS, path)
    with Image.open(path) as image:
        one = image.size
    steps = {"top1_seen": [0.5] * 11, "accuracy_matrix": [[0.5] * 11] * 11}
    ten = summary(0, classes_per_task=[10, *[1] * 10], **steps)
    place(study.learner("cifar100", "mini", 0, 10), tmp_path, ten)
    curves.draw(given, figure5.PANELS, path)
    with Image.open(path) as image:
        assert image.height > 1.5 * one[1]


def test_figure4_embeds_real_images_and_those_of_a_run(made):
    _, student = tiny_runs()
    given = options(made, datasets=(), scale="paper")
    found = figure4.embed([student], given)
    assert list(found) == ["real", "skd"]
    for part in found.values():
        assert np.array(part["points"]).shape == (figure4.COUNT, 2)
        assert set(part["labels"]) <= set(range(4))
    assert len(set(found["real"]["labels"])) == 4


@pytest.mark.slow
def test_figure4_is_of_runs_that_it_had_to_make_again(results, monkeypatch):
    _, student = tiny_runs()
    given = options(results, datasets=(), scale="paper", seeds=(3,))
    monkeypatch.setattr(figure4, "runs", lambda options: [student])
    monkeypatch.setattr(figure4, "DATASETS", ("digits",))
    for run in tiny_runs():  # as on a fresh clone
        shutil.rmtree(run.folder(results) / "checkpoints")
    figure4.make(given)
    figure4.draw(given)
    assert [picture.path.exists() for picture in figure4.pictures(given)] == [True]


def test_the_report_is_one_page_with_all_that_has_results(tmp_path, capsys):
    with pytest.raises(UserError, match="holds no results"):
        report.write(tmp_path, tmp_path)
    given = options(tmp_path)
    for seed in (0, 1):
        for run in (*laboratory.runs(options(tmp_path, seeds=(seed,))),):
            place(run, tmp_path, summary(seed))
        place(study.learner("cifar100", "mini", seed, 5), tmp_path, summary(seed))
    for ablation in ("no_category", "no_diversity"):
        place(study.student("cifar100", "mini", 0, ablation), tmp_path, summary(0))
    points = {"points": [[0.0, 1.0], [1.0, 0.0]], "labels": [0, 1]}
    some = [run for run in figure4.runs(given) if run.seed == 0]
    panels = {name: points for name in ("real", *figure4.PANELS)}
    path = tmp_path / "mini/cifar100/seed0/figure4.json"
    derived.write(path, figure4._made_of(some, given), panels)
    stale = tmp_path / "mini" / "figure9_flowers102.png"
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(stale)
    report.write(tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    assert not page.open
    assert not stale.exists()
    assert all(load.startswith(("data:image/png;base64,", "#")) for load in page.loads)
    assert page.images == 6  # Figures 4, 5 and 9, and three of the laboratory
    for module in (table1, table2, table3, figure5, figure9, laboratory):
        assert module.EXHIBIT.title.partition(":")[0] in text
    assert "50.50 ± 0.71" in text
    assert "not run" in text
    markdown = (tmp_path / "out" / "report.md").read_text()
    for link in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (tmp_path / "out" / link).exists()
    assert "50.50 ± 0.71; paper 75.86; -25.36" in markdown
    assert "python -m experiments.table1 --scale=mini --seeds=0,1" in markdown
    assert str(tmp_path) not in markdown


def test_a_t_sne_of_other_runs_is_not_shown(tmp_path):
    given = options(tmp_path, seeds=(0,))
    runs = figure4.runs(given)
    for run in runs:
        place(run, tmp_path, summary(0))
    path = tmp_path / "mini/cifar100/seed0/figure4.json"
    made_of = figure4._made_of(runs, given)
    write_json(path, {"made_of": derived._digest(made_of), "panels": {}})
    assert figure4._embedding(runs, given) is None  # as an earlier version wrote it
    derived.write(path, made_of, {"real": 1})
    assert figure4._embedding(runs, given) == {"real": 1}
    write_json(runs[1].folder(tmp_path) / "summary.json", summary(0, seconds={}, date="later"))
    assert figure4._embedding(runs, given) == {"real": 1}
    write_json(runs[1].folder(tmp_path) / "summary.json", summary(0, accuracy_matrix=[[0.1]]))
    assert figure4._embedding(runs, given) is None


def test_changes_are_of_the_configuration_they_are_made_to(tmp_path):
    for scale in ("mini", "paper"):
        given = options(tmp_path, scale=scale, seeds=(0,))
        for changes in (*gap.TABLES, *forgetting.TABLES, first_task.TABLE):
            first, *others = (run.config(tmp_path, "") for run in changes.runs(given))
            assert len({str(config) for config in (first, *others)}) == 1 + len(others)
            assert all(config.seed == first.seed for config in others)
            assert all(
                dataclasses.replace(
                    config,
                    method=dataclasses.replace(
                        config.method,
                        stage_one=first.method.stage_one,
                        stage_two=first.method.stage_two,
                    ),
                    run=first.run,
                )
                == first
                for config in others
            )
        runs = gap.CIFAR100.runs(given)
        plain, twice, batch, *_ = (run.config(tmp_path, "").method.stage_one for run in runs)
        assert (twice.epochs, batch.batch) == (2 * plain.epochs, 2 * plain.batch)
        assert batch.epochs * batch.batch == plain.epochs * plain.batch


def test_some_rows_of_a_table_of_changes_are_made_and_all_are_shown(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(making, "prepared", lambda datasets, options: set(datasets))
    monkeypatch.setattr(making, "_make", lambda runs, options: made.extend(runs))
    place(first_task.TABLE.run("mini", 0, first_task.HALF_WAY), tmp_path, summary(0))

    def main(rows: str) -> int:
        monkeypatch.setattr(sys, "argv", ["x", "--seeds=0", f"--results={tmp_path}", rows])
        return scripts.script(first_task.__doc__, first_task.EXHIBIT)

    assert main("--rows=as_it_is,local_cross_entropy") == 0
    start = study.student("cifar100", "mini", 0)
    assert [run.name for run in made] == [
        *(start.start.name, start.name, "tasks5/skd", "first_task/local_cross_entropy")
    ]
    assert [(run.phases, run.start) for run in made[2:]] == [(0, start), (3, start)]
    said = capsys.readouterr().out
    assert f"| {first_task.HALF_WAY} | 50.00 |" in said and "| old head fixed | not run |" in said
    table = first_task.TABLE.table(options(tmp_path, seeds=(0,)))
    assert [len(table.rows), dict(table.rows)[first_task.HALF_WAY][0].ours] == [18, (50.0,)]
    assert main("--rows=as_it_was") == 2
    assert "--rows=as_it_was: give some of as_it_is, " in capsys.readouterr().err
    arguments = ["x", f"--results={tmp_path}", "--rows=beta_x_3", "--datasets=caltech101"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert scripts.script(forgetting.__doc__, *forgetting.EXHIBITS) == 2
    said = capsys.readouterr().err
    assert "--rows=beta_x_3: give some of as_it_is, " in said and "half_the_epochs" not in said


def test_our_recipe_is_a_change_as_others_and_one_run_is_in_all_tables():
    ours = study.method("cifar100", "midi", 3, 5, "ours")
    for table in (first_task.TABLE, forgetting.CIFAR100):
        assert table.run("midi", 3, first_task.OURS) == ours
        of_fields = dataclasses.replace(table, made={}).run("midi", 3, first_task.OURS)
        assert of_fields.start == ours.start == study.student("cifar100", "midi", 3)
        assert study.plain(dataclasses.replace(of_fields, phases=0)) == study.plain(ours)


def test_what_a_first_task_was_made_with_says_how_many_tasks_there_are():
    one, other = (
        dataclasses.replace(study.learner("cifar100", "mini", 0, tasks), phases=3)
        for tasks in (5, 10)
    )
    assert one.settings() != other.settings()
    start, of_other = (dataclasses.replace(run, phases=2) for run in (one, other))
    assert start.settings() == of_other.settings()


def test_cost_counts_what_is_shared_once_and_what_was_taken_over_not_at_all(tmp_path):
    given = options(tmp_path, seeds=(0,))
    base, student = study.base("cifar100", "mini", 0), study.student("cifar100", "mini", 0)
    place(base, tmp_path, summary(0, seconds={"base": 60.0}))
    place(student, tmp_path, summary(0, seconds={"base": 60.0, "delegator": 600.0}))
    assert cost.minutes(student, given) == pytest.approx(10.0)
    rows = dict(cost.table(given, [table2.EXHIBIT, figure9.EXHIBIT]).rows)
    assert str(rows["table2"][0]) == "2"
    assert rows["all of it"][1].mean == pytest.approx(11.0)
    assert rows["figure9"][1].mean == pytest.approx(11.0)


def log(*gaps: float, phase: str = "learn") -> list[dict]:
    """Rows of a log with so many seconds between them."""
    return [{"time": sum(gaps[:n]), "phase": phase} for n in range(len(gaps) + 1)]


def test_time_in_which_a_run_was_halted_is_told_by_its_log(tmp_path):
    usual = (10.0,) * 20
    assert halts.halts([], 5.0) == halts.halts(log(), 5.0) == halts.halts(log(*usual), 230.0) == {}
    once = log(*usual, 3000.0, *usual)
    assert halts.halts(once, 3440.0) == {"learn": 2990.0}
    assert halts.halts(once, 430.0) == {}  # ended and started again: its clock did not run
    assert halts.halts(log(*usual, 199.0, *usual), 650.0) == {}  # a test, or what is compiled
    slow = (60.0,) * 20
    assert halts.halts(log(*slow, 500.0, *slow), 2950.0) == {}  # not ten times the usual
    both = log(*usual, 3000.0, *usual, 900.0, *usual)
    assert halts.halts(both, 1550.0) == {"learn": 890.0}
    assert halts.halts(both, 3650.0) == {"learn": 2990.0}

    given = options(tmp_path, seeds=(0,))
    base, student = study.base("cifar100", "mini", 0), study.student("cifar100", "mini", 0)
    spent = {"base": 3200.0, "evaluate": 5.0}
    for run, rows, found in (
        (base, log(*usual, 3000.0, phase="base"), spent),
        (student, log(*usual, 1000.0, phase="delegator"), {**spent, "delegator": 1210.0}),
    ):
        folder = place(run, tmp_path, summary(0, seconds=found))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert halts.seconds(base, given) == {"base": 210.0, "evaluate": 5.0}
    assert halts.seconds(student, given) == {"base": 210.0, "evaluate": 5.0, "delegator": 220.0}
    assert cost.minutes(student, given) == pytest.approx(220 / 60)
    assert comparison.after_t_0(halts.seconds(student, given) or {}) == 220.0


def test_rows_of_augmented_pseudo_images_start_from_the_delegator_that_was_trained_so():
    start = gap.CIFAR100.run("midi", 1, gap.AUGMENTED)
    assert start.config_dict().method.stage_one.augment
    for table in (first_task.TABLE, forgetting.CIFAR100):
        for name in first_task.WITH_AUGMENTED:
            run = table.run("midi", 1, name)
            first_phases = dataclasses.replace(run, phases=start.phases)
            assert run.start == start and first_phases.settings() == start.settings()


def test_a_table_of_changes_says_which_fields_its_rows_set(tmp_path):
    place(first_task.TABLE.run("mini", 0, first_task.HALF_WAY), tmp_path, summary(0))
    place(gap.CIFAR100.run("mini", 0, "lambda x 10"), tmp_path, summary(0))
    given = options(tmp_path, seeds=(0,))
    note = first_task.TABLE.table(given).note
    assert note.startswith("Rows of augmented pseudo images start from a D_0 that was trained so. ")
    assert "The fields of method that the rows set: " in note
    assert f'"{first_task.HALF_WAY}": stage_two.balanced=0.5; ' in note
    local = (
        '"local cross-entropy, half way": stage_two.classification=local, stage_two.balanced=0.5; '
    )
    assert local in note and '"a third of beta": stage_two.beta=0.333; ' in note
    assert note in first_task.TABLE.table(given).markdown()
    of_gap = gap.CIFAR100.table(given).note
    assert "The fields of method.stage_one that the rows set: " in of_gap
    assert '"lambda x 10": terms.exploration=10' in of_gap
    assert '"beta x 3": stage_two.beta=3' in forgetting.CIFAR100.note("mini")
    assert '"balanced = 0.5, beta x 3": balanced=0.5, beta=3;' in replay.table(given).note


def test_a_t_0_that_is_kept_is_beside_changes_of_any_row(tmp_path):
    given = options(tmp_path)
    ended = {"accuracy_matrix": [[0.6], [0.5, 0.4]], "top1_seen": [0.6, 0.48]}  # after a task
    place(first_task.TABLE.run("mini", 1, first_task.HALF_WAY), tmp_path, summary(1, **ended))
    rows = dict(first_task.TABLE.table(given).rows)
    # 48 % of all are 50 % of the base classes and 40 of the new ones, which are a fifth of all.
    assert rows[kept.LABEL][0].ours == pytest.approx((48.0,))
    assert not rows["as it is"][0].ours
    place(first_task.TABLE.run("mini", 0), tmp_path, summary(0, top1_seen=[0.3, *[0.1] * 5]))
    place(first_task.TABLE.run("mini", 0, first_task.HALF_WAY), tmp_path, summary(0))
    rows = dict(first_task.TABLE.table(given).rows)
    assert rows[kept.LABEL][0].ours == pytest.approx((25.0, 48.0))  # of the run as it is, if any


def test_ticks_are_where_points_are(tmp_path):
    for tasks, ticks in ((1, [50, 100]), (5, [50, 60, 70, 80, 90, 100])):
        axes = Figure().subplots()
        seen = [50 + 50 * n // tasks for n in range(tasks + 1)]
        axes.plot(seen, [0.5] * len(seen), label="x")
        curves.finish(axes, "a title")
        assert axes.get_xticks().tolist() == ticks
    axes = Figure().subplots()
    axes.plot(range(10, 21), [0.5] * 11, label="x")
    curves.finish(axes, "a title")
    assert axes.get_xticks().tolist() == [10, 12, 14, 16, 18, 20]


def test_pictures_say_what_they_leave_out(tmp_path):
    few, many = ([summary(0, classes_per_task=[n, 2])] for n in (20, 50))
    assert panels.of_classes("classes", few) == panels.of_classes("classes", []) == "classes"
    assert panels.of_classes("classes", many) == "classes (the 20 classes that are drawn most)"
    assert quality._of(quality._named(25), "class") == ""
    assert "one class in 2 is named" in quality._of(quality._named(50), "class")


def test_differences_are_from_the_configuration_as_it_is(tmp_path):
    given = options(tmp_path, seeds=(0,))
    found = summary(0)
    for name, right in (("twice the rounds", 0.56), ("lambda x 10", 0.51)):
        row = {**found["delegator"][0], "student_accuracy": right}
        place(gap.CIFAR100.run(given.scale, 0, name), tmp_path, {**found, "delegator": [row]})
    rows = dict(gap.CIFAR100.table(given).rows)
    assert not rows["twice the rounds"][1].ours
    row = {**found["delegator"][0], "student_accuracy": 0.55}
    place(gap.CIFAR100.run(given.scale, 0, "as it is"), tmp_path, {**found, "delegator": [row]})
    row = {**row, "student_accuracy_at_length": 0.57}
    place(gap.CIFAR100.run(given.scale, 0, gap.COSINE), tmp_path, {**found, "delegator": [row]})
    rows = dict(gap.CIFAR100.table(given).rows)
    assert rows["twice the rounds"][1].ours == pytest.approx((1.0,))  # better is positive
    assert rows["lambda x 10"][1].ours == pytest.approx((-4.0,))
    assert rows[gap.COSINE][3].ours == pytest.approx((57.0,))
    assert str(rows["as it is"][3]) == ""  # it did not measure this
    assert str(rows["lambda x 10"][3]) == "" and str(rows[gap.KL][3]) == "not run"


def test_real_images_stand_in_for_a_delegators():
    images = jnp.arange(4.0 * 2 * 3).reshape(4, 2, 3, 1)
    z = jax.random.normal(jax.random.key(0), (400, 5))
    drawn = replay.RealImages(5).apply({"params": {"images": images}}, z, False)
    assert drawn.shape == (400, 2, 3, 1)
    mirrored = z[:, 1] > 0
    straight = np.where(np.asarray(mirrored)[:, None, None, None], drawn[:, :, ::-1], drawn)
    numbers = straight[:, 0, 0, 0] / 6
    assert np.bincount(numbers.astype(int), minlength=4) == pytest.approx(100, abs=30)
    assert np.array_equal(straight, np.asarray(images)[numbers.astype(int)])


@pytest.mark.slow
def test_the_first_task_is_learned_beside_pseudo_or_real_images(made):
    _, student = tiny_runs()
    fields = (
        *student.fields,
        ("method.stage_two.epochs", 12),
        ("method.stage_two.drop_epochs", (10,)),
    )
    learner = dataclasses.replace(student, name="tasks2", fields=fields, phases=0, start=student)
    given = options(made, datasets=(), scale="paper")
    pseudo, real = (replay._learn(learner, given, {}, kind) for kind in replay.KINDS)
    assert pseudo != real
    for found in (pseudo, real):
        both, base, new, taken = (found[name] for name in replay.MEASURES)
        assert min(base, new) <= both <= max(base, new)
        assert 0 <= taken <= 1 - base


def test_what_stands_side_by_side_is_of_the_same_seeds(tmp_path):
    given = options(tmp_path, seeds=(0, 1))
    for seed in given.seeds:
        place(gap.CIFAR100.run(given.scale, seed), tmp_path, summary(seed))
    assert dict(gap.CIFAR100.table(given).rows)["as it is"][0].ours == (50.0, 51.0)
    assert dict(laboratory.table(given).turned().rows)["skd"][1].ours == (50.0, 51.0)
    place(gap.CIFAR100.run(given.scale, 1, "lambda x 10"), tmp_path, summary(1))
    place(study.recipe("cifar100", "mini", 1, "dafl"), tmp_path, summary(1))
    recipes = laboratory.table(given).turned()
    for table, other in ((gap.CIFAR100.table(given), "lambda x 10"), (recipes, "dafl")):
        rows = dict(table.rows)
        assert {len(rows[name][0].ours) for name in (other, *list(rows)[:1])} == {1}
        assert "1 seed (1)" in table.source


def test_everything_is_cifar100_of_all_seeds_and_the_rest_of_the_first(tmp_path, monkeypatch):
    given = options(tmp_path, seeds=(4, 7))
    planned = everything.planned(given)
    for exhibit in report.EXHIBITS:
        if exhibit not in figure5.COMPARISONS:
            assert set(exhibit.runs(dataclasses.replace(given, seeds=(4,)))) <= set(planned)
    for module in (table1, table2, table3, figure4, figure5, figure9):
        runs = [run for run in module.EXHIBIT.runs(given) if run.dataset == "cifar100"]
        assert {run.seed for run in runs} == {4, 7}
        assert set(runs) <= set(planned)
    of_other_data = {run.seed for run in planned if run.dataset != "cifar100"}
    assert of_other_data == {4}
    for module in (laboratory, gap.CIFAR100, forgetting.CIFAR100, replay, heads):
        whole = set(table1.runs(given)) | set(table3.runs(given))
        assert not {run for run in module.runs(given) if run.seed == 7} & set(planned) - whole
    made = []
    monkeypatch.setattr(everything, "make_runs", lambda runs, options: made.append(runs))
    monkeypatch.setattr(figure4, "make", lambda options: made.append(("figure4", options.seeds)))
    monkeypatch.setattr(replay, "make", lambda options: made.append(("replay", options.seeds)))
    monkeypatch.setattr(heads, "make", lambda options: made.append(("heads", options.seeds)))
    everything.make(given)
    assert made == [planned, ("figure4", (4, 7)), ("replay", (4,)), ("heads", (4,))]


def test_the_time_it_takes_is_that_of_other_seeds(tmp_path):
    given = options(tmp_path)
    first, second, third = (study.student("cifar100", "mini", seed) for seed in range(3))
    assert cost.estimate([first], 1, given) == ""
    assert first.start
    place(first.start, tmp_path, summary(0, seconds={"base": 3600.0}))
    place(first, tmp_path, summary(0, seconds={"base": 3600.0, "delegator": 2 * 3600.0}))
    assert cost.estimate([second, third], 1, given).startswith("about 4.0 h")
    assert cost.estimate([second, third], 2, given).startswith("about 2.0 h")
    assert second.start
    chain = [second.start, second]  # one after the other, however many cores there are
    assert cost.estimate(chain, 8, given).startswith("about 3.0 h")
    others = [second, study.learner("cifar100", "mini", 1, 5)]
    assert cost.estimate(others, 1, given).endswith(", and 1 of unknown length")


def code_of_a_script(results: Path, more: str) -> str:
    """One that makes the tiny runs, as Python's -c takes it."""
    return (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "from test_study import tiny_runs, options\n"
        "from experiments.framework import making, scripts\n"
        "from experiments.framework.exhibit import Exhibit\n"
        f"given = options(Path({str(results)!r}), datasets=(), scale='paper')\n"
        "scripts.read_options = lambda *_: given\n"
        f"make = lambda given: making.make_runs(tiny_runs(), given{more})\n"
        "tiny = Exhibit('tiny', 'Tiny', lambda _: list(tiny_runs()), make=make, draw=print)\n"
        "sys.exit(scripts.script('tiny', tiny))\n"
    )


def test_a_script_does_not_hold_the_device_while_it_looks_at_checkpoints(made):
    code = code_of_a_script(made, ", with_checkpoints=True")
    environment = {**os.environ, "JAX_PLATFORMS": "none_such"}
    done = subprocess.run([sys.executable, "-c", code], check=False, env=environment)
    assert done.returncode == 0


@pytest.mark.slow
def test_a_study_that_is_stopped_stops_its_runs_and_goes_on(results):
    _, student = tiny_runs()
    for run in tiny_runs():
        shutil.rmtree(run.folder(results))
    code = code_of_a_script(results, "")
    for number in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        while "started" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(3)
        process.send_signal(number)
        assert process.wait(timeout=60) == 130
        found = subprocess.run(["pgrep", "-f", str(results)], capture_output=True, check=False)
        assert not found.stdout
        process.stdout.close()
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert study.summary(student, options(results, datasets=(), scale="paper"))


OF_METHODS = next(one for one in figure5.COMPARISONS if one.name == "figure5_cifar100_5")


def placed(tmp_path, *names: str, **changes) -> None:
    """Finished runs of two seeds of these methods."""
    for seed in (0, 1):
        for name in names:
            found = summary(seed, method=name, kept_bytes=1024, forgetting=0.25, **changes)
            place(study.method("cifar100", "mini", seed, 5, name), tmp_path, found)


def test_every_method_is_run_from_one_t_0(tmp_path):
    every = OF_METHODS.runs(options(tmp_path, seeds=(4,)))
    names = study.compared()
    assert [*names] == [*METHODS, "ours", "translated", "kept_means"]
    base = study.base("cifar100", "mini", 4)
    for run, (name, method) in zip(every, names.items(), strict=True):
        first = run
        while first.start:
            first = first.start
        config, of_first = (from_config_dict(r.config_dict()) for r in (run, first))
        usual = config.model == from_config_dict(base.config_dict()).model
        assert (first == base) == (usual and not method.base)
        assert (run.start is None) == bool(method.base)
        computed = (what_is_computed(to_dict(c), ("base",)) for c in (config, of_first))
        assert next(computed) == next(computed)
        of_d_0 = name in ("skd", *study.VARIANTS) or name.startswith("pseudo_")
        assert (run.start == study.student("cifar100", "mini", 4)) == of_d_0
        assert (config.method.name, config.data.tasks, config.seed) == (method.name, 5, 4)
        if name in study.VARIANTS:
            two = config.method.stage_two
            assert two.head_at_full_rate and bool(two.new_outputs_decay) == (name != "ours")
            assert two.keep_means == (name == "kept_means")
    assert len({run.name for run in every}) == len(names)
    two = OF_METHODS.runs(options(tmp_path, seeds=(4,), methods=("ncm", "skd")))
    assert [run.name for run in two] == ["tasks5/ncm", "tasks5/skd"]
    assert OF_METHODS.runs(options(tmp_path, tasks=(10,))) == []


def test_the_midi_scale_is_of_cifar100_alone(tmp_path, monkeypatch, capsys):
    given = options(tmp_path, scale="midi", seeds=(0,), datasets=())
    made = []
    monkeypatch.setattr(making, "prepared", lambda datasets, options: set(datasets))
    monkeypatch.setattr(making, "_make", lambda runs, options: made.extend(runs))
    for exhibit in report.EXHIBITS:
        making.make_runs(exhibit.runs(given), given)
        if exhibit.table:
            exhibit.table(given)
    assert {run.dataset for run in made} == {"cifar100"}
    assert all("scale=midi" in run.command(tmp_path, "", tmp_path)[2] for run in made)
    assert source("table1", given, [summary(0)]).startswith("Midi scale (all classes")
    place(study.learner("cifar100", "midi", 0, 5), tmp_path, summary(0))
    report.write(tmp_path, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "#midi-gap)" in text and "| table3 | 1 | " in text and "experiments.figure4" in text
    for name in ("figure6", "figure7", "figure8", "gap_caltech101", "forgetting_flowers102"):
        assert name not in text
    arguments = ["figure5", "--scale=midi", "--datasets=caltech101", f"--results={tmp_path}"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert scripts.script(figure5.__doc__, figure5.EXHIBIT) == 2
    said = capsys.readouterr().err
    assert "--datasets=caltech101" in said and "--scale=midi" in said and said.count("\n") == 1


def test_what_is_published_is_of_methods_that_there_are():
    assert set(figure5.PUBLISHED) <= set(METHODS)
    usual, other = (
        from_config_dict(study.method("digits", "mini", 0, 3, name).config_dict())
        for name in ("skd", "lucir")
    )
    assert "another T_0: last_relu False, not True, head cosine" in comparison.schedule(
        other, usual
    )


def test_many_methods_are_drawn_family_by_family():
    assert comparison.panels(["joint", "skd", "lwf"]) == {"": ["joint", "skd", "lwf"]}
    found = comparison.panels(comparison.by_family())
    assert list(found) == ["regularisation", "exemplars", "generator", "frozen features"]
    assert found["generator"] == ["finetune", "joint", "skd", "abd", "rdfcil", *study.VARIANTS]
    drawn = [name for names in found.values() for name in names]
    assert set(drawn) == set(study.compared()) and drawn.count("lucir") == 1


def test_methods_stand_side_by_side(tmp_path):
    given = options(tmp_path)
    assert OF_METHODS.table(given) is None
    matrix = [[0.6] + [None] * 5] * 5 + [[0.3, 0.1, 0.2, 0.3, 0.4, 0.5]]
    placed(tmp_path, "lwf", "ncm", "joint", "si", accuracy_matrix=matrix)
    table = OF_METHODS.table(given)
    rows = {name: dict(zip(table.columns, cells, strict=True)) for name, cells in table.rows}
    assert list(rows) == [kept.LABEL, "joint", "lwf", "si", "ncm"]  # families together
    assert rows[kept.LABEL]["base classes at the end, %"].ours == (60, 60)
    assert rows[kept.LABEL]["new classes at the end, %"].ours == (0, 0)
    assert rows["si"]["training, where it differs"].said == "trains T_0 itself"
    lwf = rows["lwf"]
    assert lwf["average, %"].ours == pytest.approx((35, 35 + 1 / 6))
    of_t_0 = 10 * (1 + 10 / 12 + 10 / 14 + 10 / 16 + 10 / 18 + 10 / 20)  # 60 % of 10 classes
    assert rows[kept.LABEL]["average, %"].ours == pytest.approx((of_t_0, of_t_0))
    assert rows[kept.LABEL][comparison.ABOVE].ours == (0, 0)
    above = 35 - of_t_0, 35 + 1 / 6 - of_t_0
    assert lwf[comparison.ABOVE].ours == pytest.approx(above)
    assert lwf["average without the base, %"].ours == pytest.approx((30, 30.2))
    assert lwf["forgetting"].ours == (25, 25)
    # 20 epochs of 1000 // 128 batches; joint learns 12 classes, in 6 of 6000 // 128.
    assert lwf["steps x batch, at the first task"].said == "learn 140 x 128"
    assert rows["joint"]["steps x batch, at the first task"].said == "learn 276 x 128"
    assert lwf["base classes at the end, %"].ours == pytest.approx((30, 30))
    assert lwf["new classes at the end, %"].ours == pytest.approx((30, 30))
    assert lwf["seconds"].ours == (60,)  # of two phases of 60, without T_0's
    assert lwf["seeds"].said == "0, 1"
    assert lwf["bytes beside T_n"].said == "1,024"
    assert lwf["published at full scale, %"].said == "last 24.01; ResNet-18, FCS"
    assert lwf["training, where it differs"].said == "-"
    assert "epochs 6, not 20" in rows["joint"]["training, where it differs"].said
    assert "anew" in rows["joint"]["training, where it differs"].said
    assert rows["ncm"]["training, where it differs"].said == "nothing learns by SGD"
    assert rows["ncm"]["what it keeps"].said == "class means"
    assert rows["ncm"]["family"].said == "frozen features"
    assert "| ncm | frozen features | 35.08 ± 0.12 |" in table.markdown()
    assert "(n=2)" in table.markdown()
    assert "--tasks=5 --methods=joint,lwf,si,ncm" in table.source
    assert "Each row is of the seeds" not in table.source
    lacking = study.method("cifar100", "mini", 1, 5, "ncm").folder(tmp_path) / "summary.json"
    lacking.rename(lacking.with_name("away"))
    assert ". Each row is of the seeds in its column. python" in OF_METHODS.table(given).source
    lacking.with_name("away").rename(lacking)
    assert [comparison.style(METHODS[name]) for name in ("joint", "lwf")] == [":", "--"]
    exemplars = dataclasses.replace(METHODS["lwf"], family="exemplars", keeps="20 images a class")
    assert comparison.style(exemplars) == "-"
    OF_METHODS.draw(given)
    (picture,) = OF_METHODS.pictures(given)
    with Image.open(picture.path) as image:
        assert image.width > 700


def test_rows_are_held_against_the_t_0_of_their_own_seeds(tmp_path):
    given = options(tmp_path)
    placed(tmp_path, "ncm")  # classifies by class means, so T_0's accuracy is not in its runs
    (row,) = OF_METHODS.table(dataclasses.replace(given, methods=("ncm",))).rows
    assert [str(cell) for cell in row[1][1:3]] == ["35.08 ± 0.12", "-"]
    per_cent = 1 + 10 / 12 + 10 / 14 + 10 / 16 + 10 / 18 + 10 / 20  # of T_0 kept, over six steps
    above = []
    for seed, t_0 in ((1, 0.9), (0, 0.6)):
        found = summary(seed, method="lwf", top1_seen=[t_0] + [0.5] * 5)
        found |= {"kept_bytes": 0, "forgetting": 0.0}
        place(study.method("cifar100", "mini", seed, 5, "lwf"), tmp_path, found)
        above.insert(0, 35 + seed / 6 - 100 * t_0 * per_cent / 6)
        rows = dict(OF_METHODS.table(given).rows)
        for name in ("ncm", "lwf"):  # ncm's first seed has no T_0 beside it at first
            assert rows[name][2].ours == pytest.approx(tuple(above))


def test_phases_and_schedules_are_read_off_the_methods():
    usual = from_config_dict(study.method("digits", "mini", 0, 3, "skd").config_dict())
    for name, expected in (
        ("skd", "delegator, learn"),
        ("abd", "generator, learn"),
        ("rdfcil", "generator, learn, head"),
        ("ncm", "after T_0 means; then means"),
    ):
        config = from_config_dict(study.method("digits", "mini", 0, 3, name).config_dict())
        assert comparison.phases(METHODS[name], config, (4, 2, 2, 2)) == expected
        assert comparison.schedule(config, usual) == (
            "nothing learns by SGD" if name == "ncm" else ""
        )


def test_frozen_means_are_no_other_t_0(tmp_path):
    """The base step's accuracy is theirs there, not that of T_0's head."""
    given = options(tmp_path)
    other = [[0.5] * 6] * 6
    found = [summary(0, method="lwf"), summary(0, method="ncm", accuracy_matrix=other)]
    assert "the same T_0" not in source("figure5", given, found)
    found = [summary(0, method="lwf"), summary(0, method="finetune", accuracy_matrix=other)]
    assert "Not all runs of cifar100, seed 0 start from the same T_0" in source("c", given, found)
    networks = {"lwf": "one", "finetune": "another"}
    assert "the same T_0" not in source("c", given, found, "", networks)
    found = [summary(0, method="lwf"), summary(0, method="si", accuracy_matrix=other)]
    assert "the same T_0" not in source("c", given, found)  # which SI trains itself


def test_a_comparison_of_what_is_there_makes_nothing(monkeypatch, capsys, tmp_path):
    def main(*arguments: str) -> int:
        start = ["figure5", f"--results={tmp_path}", f"--data_dir={tmp_path / 'no'}", "--seeds=0"]
        monkeypatch.setattr(sys, "argv", [*start, *arguments])
        return scripts.script(figure5.__doc__, figure5.EXHIBIT, comparisons=figure5.COMPARISONS)

    for wrong in (("--methods=lwf,nothing",), ("--tasks=5",), ("--methods=lwf", "--tasks=7")):
        assert main(*wrong) == 2
        said = capsys.readouterr().err
        assert wrong[-1].partition("=")[2].split(",")[-1] in said
        assert said.count("\n") == 1
    placed(tmp_path, "lwf")
    assert main("--methods=lwf", "--tasks=5", "--datasets=cifar100") == 0
    assert "| lwf | regularisation |" in capsys.readouterr().out
    found = {path.name for path in (tmp_path / "mini").glob("figure5*")}
    assert found == {f"figure5_cifar100_5.{ending}" for ending in ("md", "json", "png")}
    # One method alone is no comparison for the report.
    report.write(tmp_path, tmp_path)
    assert OF_METHODS.title not in (tmp_path / "report.md").read_text()
    placed(tmp_path, "ncm")
    report.write(tmp_path, tmp_path)
    assert (tmp_path / "report.md").read_text().count(f"### {OF_METHODS.title}") == 2


def test_settings_are_chosen_on_held_out_images_and_taken(monkeypatch, capsys, tmp_path):
    """Fake runs: the best weight of SDC + EWC is 100, and with that the best sigma 0.4."""
    given = options(tmp_path, seeds=(0, 1), datasets=("digits",), methods=("sdc",), tasks=(3,))
    accuracy = {"method.weight": {100.0: 0.3}, "method.sigma": {0.4: 0.5}}
    made = []

    def make(runs, options):
        for run in runs:
            made.append(run)
            fields = dict(run.fields)
            (last,) = [f for f in ("method.sigma", "method.weight") if f in fields][:1]
            found = accuracy[last].get(fields[last], 0.1) + 0.01 * run.seed
            place(run, tmp_path, summary(run.seed, method="sdc", final_accuracy=found))

    monkeypatch.setattr(choose, "make_runs", make)
    choose.choose(given)
    assert "| sdc: weight | 1: 10.5; 10: 10.5; 100: 30.5; 1000: 10.5; 10000: 10.5 | 100 | 10 |" in (
        capsys.readouterr().out
    )
    fields = chosen.fields("digits", 3, "sdc", given)
    assert fields == (("method.weight", 100.0), ("method.sigma", 0.4))
    assert chosen.words("digits", 3, "sdc", given) == "weight 100, sigma 0.4"
    assert chosen.words("digits", 3, "ewc", given) == "-"
    assert len(made) == 2 * (5 + 4)
    for run in made:
        config = from_config_dict(run.config_dict())
        assert (config.data.held_out, config.data.tasks, config.data.max_classes) == (0.1, 1, 6)
        assert run.start
        start = from_config_dict(run.start.config_dict())
        assert start.data == config.data and start.seed == config.seed
    assert {dict(r.fields)["method.weight"] for r in made if "method.sigma" in dict(r.fields)} == {
        100
    }
    # The comparison runs it so, and says so; what was run otherwise is no result of it.
    of_digits = next(one for one in figure5.COMPARISONS if one.name == "figure5_digits_3")
    for run in of_digits.runs(given):
        assert from_config_dict(run.config_dict()).method.weight == 100
        assert from_config_dict(run.config_dict()).method.sigma == 0.4
        place(run, tmp_path, summary(run.seed, method="sdc", kept_bytes=8, forgetting=0.0))
    table = of_digits.table(given)
    assert (
        table
        and dict(zip(table.columns, table.rows[0][1], strict=True))[
            "chosen on held-out images"
        ].said
        == "weight 100, sigma 0.4"
    )


def test_only_what_has_candidates_is_chosen(tmp_path):
    for changes in ({"methods": ("ncm",), "tasks": (3,)}, {"tasks": ()}, {"datasets": ()}):
        with pytest.raises(UserError):
            choose.choose(options(tmp_path, **{"tasks": (3,), **changes}))
