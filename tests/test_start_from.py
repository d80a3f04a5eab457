"""Runs that end after some phases, begin where another ended, and are looked at afterwards."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from test_train import bits, newest, results, rows, silent, tiny

from skd_jax import evaluate, train
from skd_jax.errors import UserError
from skd_jax.methods import skd
from skd_jax.methods.skd import quality


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A whole run; T_0 alone; D_0 from there; all tasks from there."""
    folder = tmp_path_factory.mktemp("runs")
    train.train(tiny(), folder / "whole", silent)
    train.train(tiny(run__phases=1), folder / "base", silent)
    start = str(folder / "base")
    # Another number of tasks, and what only later phases depend on, may differ.
    first = {"data__tasks": 3, "stage_two__beta": 3.0, "stage_two__batch": 64}
    first["stage_one__finetune_epochs"] = 4
    train.train(tiny(run__phases=2, run__start_from=start, **first), folder / "student", silent)
    start = str(folder / "student")
    train.train(tiny(run__start_from=start), folder / "rest", silent)
    return folder


def test_a_run_that_takes_up_anothers_phases_ends_with_the_same_bits(folder):
    config = tiny()
    (step, kept, meta), (step_, kept_, meta_) = (
        newest(config, folder / name) for name in ("whole", "rest")
    )
    assert step == step_
    assert bits(kept) == bits(kept_)
    assert results(folder / "whole") == results(folder / "rest")
    assert meta["measured"]["rows"] == meta_["measured"]["rows"]


def test_its_log_has_its_own_phases_and_goes_on_counting(folder):
    whole, rest = rows(folder / "whole", ("time",)), rows(folder / "rest", ("time",))
    assert rest == [row for row in whole if (row["task"], row["phase"]) > (0, "delegator")]
    assert {row["phase"] for row in rows(folder / "base")} == {"base"}
    assert {row["phase"] for row in rows(folder / "student")} == {"delegator"}


def test_a_run_of_some_phases_reports_them(folder):
    base = json.loads((folder / "base" / "summary.json").read_text())
    student = json.loads((folder / "student" / "summary.json").read_text())
    whole = json.loads((folder / "whole" / "summary.json").read_text())
    assert base["top1_seen"] == student["top1_seen"] == whole["top1_seen"][:1]
    assert base["delegator"] == []
    assert student["delegator"] == whole["delegator"][:1]


def test_it_may_go_on_later(folder, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(folder / "base", workdir)
    train.train(tiny(), workdir, silent)
    assert results(workdir) == results(folder / "whole")
    assert rows(workdir, ("time",)) == rows(folder / "whole", ("time",))


def test_a_finished_run_of_some_phases_is_not_trained_again(folder, monkeypatch):
    monkeypatch.setattr(train.Run, "_train", lambda *_: pytest.fail("a phase was run"))
    said = []
    train.train(tiny(run__phases=1), folder / "base", said.append)
    assert "finished" in said[0]


def test_more_phases_than_there_are_is_all(folder, tmp_path):
    train.train(tiny(run__phases=99), tmp_path / "run", silent)
    assert results(tmp_path / "run") == results(folder / "whole")


def test_its_log_is_not_called_lost_when_it_goes_on(folder, tmp_path):
    said = []
    start = str(folder / "base")
    train.train(tiny(run__phases=2, run__start_from=start), tmp_path / "run", silent)
    train.train(tiny(run__start_from=start), tmp_path / "run", said.append)
    assert not [line for line in said if "lost" in line]
    assert results(tmp_path / "run") == results(folder / "whole")


@pytest.mark.parametrize(
    ("start", "changes", "words"),
    [
        ("base", {"seed": 5}, "config.seed=1, not 5"),
        ("base", {"model__width": 8}, "config.model.width=4, not 8"),
        ("base", {"base__epochs": 3}, "config.base.epochs=2, not 3"),
        ("base", {"data__base_classes": 6}, "config.data.base_classes=4, not 6"),
        ("student", {"stage_one__batch": 8}, "config.method.stage_one.batch=16, not 8"),
        (
            "student",
            {"stage_two__delegator": False},
            "config.method.stage_two.delegator=True, not False",
        ),
        ("rest", {"stage_two__batch": 64}, "config.method.stage_two.batch=128, not 64"),
        ("student", {"run__phases": 2}, "has trained 2 phases already"),
        ("rest", {}, "has trained 5 phases already"),
        ("nothing", {}, "holds no checkpoint"),
    ],
)
def test_a_start_that_does_not_fit_is_refused_before_anything_is_written(
    folder, tmp_path, start, changes, words
):
    config = tiny(run__start_from=str(folder / start), **changes)
    with pytest.raises(UserError, match=r"config\.run\.start_from=") as refused:
        train.train(config, tmp_path / "run", silent)
    assert words in str(refused.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", ["in the middle", "damaged"])
def test_a_start_that_is_not_whole_is_refused(folder, tmp_path, fault):
    start = tmp_path / "start"
    shutil.copytree(folder / "base", start)
    newest_step = max(int(path.name) for path in (start / "checkpoints").iterdir())
    if fault == "damaged":
        for path in (start / "checkpoints" / str(newest_step)).rglob("*"):
            if path.is_file():
                path.write_bytes(b"no")
        words = f"checkpoint {newest_step} is damaged"
    else:
        shutil.rmtree(start / "checkpoints" / str(newest_step))
        words = "has not ended"
    with pytest.raises(UserError, match=words):
        train.train(tiny(run__start_from=str(start)), tmp_path / "run", silent)


def test_restore_gives_what_the_last_phase_left(folder):
    config, kept = train.restore(folder / "student")
    assert config.run.phases == 2
    experiment = train.open_experiment(config)
    predicted = evaluate.predictions(experiment, kept, 1)
    summary = json.loads((folder / "student" / "summary.json").read_text())
    assert evaluate.accuracy(experiment, predicted).top1 == summary["top1_seen"][0]
    nets = skd.networks(config)
    images = quality.drawn_images(experiment, nets, kept.delegator, 0, 7)
    assert images.shape == (7, 8, 8, 1)
    assert np.isfinite(images).all()
    with pytest.raises(UserError, match="holds no checkpoint"):
        train.restore(folder / "nothing")
