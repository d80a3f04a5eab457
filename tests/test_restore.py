"""What is read back from a run: by anyone, without its data set, without running what it names."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict
from test_train import bits, silent, tiny

from skd_jax import experiment, train
from skd_jax.checkpoint import _digest_json
from skd_jax.errors import UserError
from skd_jax.experiment import what_is_computed
from skd_jax.methods.skd import terms


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A run that ended with T_0 and D_0."""
    workdir = tmp_path_factory.mktemp("restore") / "run"
    train.train(tiny(run__phases=2), workdir, silent)
    return workdir


def rewritten(teacher: Path, workdir: Path, **changes) -> Path:
    """The same with other fields in its checkpoint, by path, sound by its digest."""
    import shutil

    shutil.copytree(teacher, workdir)
    for file in (workdir / "checkpoints").glob("*/meta/metadata"):
        meta = json.loads(file.read_text())
        config = ConfigDict(meta["meta"]["config"])
        with config.ignore_type():
            config.update_from_flattened_dict(
                {name.replace("__", "."): value for name, value in changes.items()}
            )
        meta["meta"]["config"] = json.loads(config.to_json_best_effort())
        meta["sha256"]["meta"] = _digest_json(meta["meta"])
        file.write_text(json.dumps(meta))
    return workdir


def test_no_module_that_a_strangers_checkpoint_names_is_imported(teacher, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('harm').write_text('done')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    workdir = rewritten(
        teacher, tmp_path / "run", method__stage_one__term_modules=["evil", "skd_jax.terms"]
    )
    config, kept = train.restore(workdir)
    assert config.method.stage_one.term_modules == ("evil", "skd_jax.terms")
    assert bits(kept) == bits(train.restore(teacher)[1])
    assert "evil" not in sys.modules and not (tmp_path / "harm").exists()


def test_weights_come_back_without_the_data_set_and_on_any_devices(teacher, tmp_path, monkeypatch):
    workdir = rewritten(
        teacher, tmp_path / "run", data__name="gone", data__data_dir="/nowhere", run__devices=64
    )
    monkeypatch.setattr(experiment, "open_source", lambda data: pytest.fail("data were opened"))
    config, kept = train.restore(workdir)
    assert config.run.devices == 64
    assert bits(kept) == bits(train.restore(teacher)[1])
    assert kept.delegator is not None


def test_another_methods_checkpoint_is_refused_in_one_line(teacher, tmp_path):
    workdir = rewritten(teacher, tmp_path / "run", method={"name": "ncm", "rule": "cosine"})
    with pytest.raises(UserError, match="was not saved by this version"):
        train.restore(workdir)


def test_files_are_digested_once_however_often_a_run_saves(monkeypatch):
    opened, calls = train.open_experiment(tiny()), []
    opened = dataclasses.replace(opened)
    monkeypatch.setattr(type(opened), "files", lambda self: calls.append(1))
    assert opened.data() == opened.data() == train.open_experiment(tiny()).data()
    assert len(calls) == 2  # one an experiment


@pytest.mark.parametrize("name", ["lookup", "Explored", "importlib", "Term", "no_such"])
def test_only_a_function_declared_as_a_term_is_one(name):
    config = tiny().method.stage_one
    with pytest.raises(UserError, match=rf"config\.method\.stage_one\.terms\.{name}: no "):
        terms.lookup(dataclasses.replace(config, terms=((name, 1.0),)))


def test_a_task_without_test_images_is_named_before_training(monkeypatch):
    counts = experiment.TestImages.counts
    monkeypatch.setattr(experiment.TestImages, "counts", lambda self: [*counts(self)[:-1], 0])
    with pytest.raises(UserError, match="task 2 cannot be tested"):
        train.open_experiment(tiny())


def test_a_class_without_training_images_is_named_before_training(monkeypatch):
    counts = experiment.TrainingStream.class_counts
    monkeypatch.setattr(
        experiment.TrainingStream, "class_counts", lambda self: {**counts(self), 3: 0}
    )
    with pytest.raises(UserError, match="class '3' cannot be learned"):
        train.open_experiment(tiny())


def test_what_t_0_depends_on_is_no_methods_business():
    one, other = (
        what_is_computed({"seed": 1, "method": {"name": name}, "data": {"tasks": n}}, ("base",))
        for name, n in (("ncm", 1), ("lwf", 5))
    )
    # A field that is not there has its default.
    added = {"interpolation": "bilinear", "class_order": "", "held_out": 0.0}
    assert one == other == {"seed": 1, "data": added}
