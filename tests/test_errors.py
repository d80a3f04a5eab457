"""Each kind of wrong input: one clear line, an exit code, and nothing written."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_command_line import DIGITS, execute
from test_train import snapshot

from configs import digits
from skd_jax.config import to_dict
from skd_jax.errors import UserError
from skd_jax.experiment import check_same_config
from skd_jax.methods import from_config_dict
from skd_jax.train import _tell_others as tell_others

FOLDER = "--config=configs/folder.py:tasks=2"
SMALL_BATCHES = ("--config.base.batch=2", "--config.method.stage_two.batch=2")


@pytest.fixture(autouse=True)
def in_repository(repo, monkeypatch):
    monkeypatch.chdir(repo)


def fails(capsys, *args: str) -> str:
    """Runs the command, which must fail with one line; returns the line."""
    code = execute(*args)
    out, err = capsys.readouterr()
    assert code not in (0, None)
    assert err.startswith("error: "), err
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1, err
    assert "Traceback" not in err, err
    assert " object at 0x" not in err, err
    assert len(err) < 600, err
    assert out == ""
    return err


def fails_without_a_trace(capsys, folder: Path, *args: str, wanted: tuple[str, ...]) -> None:
    """The same with a workdir that does not exist and with one that does."""
    new, old = folder / "new" / "run", folder / "old"
    old.mkdir()
    (old / "notes.txt").write_text("mine")
    before = snapshot(folder)
    for workdir in (new, old):
        line = fails(capsys, f"--workdir={workdir}", *args)
        for part in wanted:
            assert part in line
        assert not new.parent.exists()
        assert snapshot(folder) == before


def config_file(folder: Path, *lines: str) -> str:
    """A config file: the digits' configuration, then ``lines``."""
    file = folder / "mine.py"
    body = "\n".join(f"    {line}" for line in (*lines, "return config"))
    file.write_text(
        "from configs import digits\n\n\ndef get_config(arg=None):\n"
        f"    config = digits.get_config(arg)\n{body}\n"
    )
    return f"--config={file}"


def image_folder(folder: Path, classes: int = 3, images: int = 4) -> Path:
    rng = np.random.default_rng(0)
    for label in range(classes):
        (folder / f"class_{label}").mkdir(parents=True)
        for number in range(images):
            pixels = rng.integers(0, 256, (24, 24, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class_{label}" / f"{number}.png")
    return folder


# The command line

LINES = {
    "another method's field": (
        [DIGITS, "--config.method.temperature=3"],
        ["config.method.temperature: unknown field"],
    ),
    "another method by its name alone": (
        [DIGITS, "--config.method.name=lwf"],
        ["config.method.", "the config's argument method=NAME"],
    ),
    "unknown field": (
        [DIGITS, "--config.method.stage_one.rouns=3"],
        ["config.method.stage_one.rouns"],
    ),
    "misspelt field": (
        [DIGITS, "--config.method.stage_one.rouns_per_epoch=3"],
        ["config.method.stage_one.rouns_per_epoch", "rounds_per_epoch"],
    ),
    "unknown section": ([DIGITS, "--config.stage_tree.lr=3"], ["config.stage_tree"]),
    "misspelt section": ([DIGITS, "--config.stage_tow.beta=3"], ["config.stage_tow"]),
    "unknown flag": ([DIGITS, "--confg.seed=3"], ["confg"]),
    "word for an integer": ([DIGITS, "--config.seed=abc"], ["config.seed", "abc"]),
    "word for a number": ([DIGITS, "--config.base.lr=fast"], ["config.base.lr", "fast"]),
    "fraction for an integer": ([DIGITS, "--config.base.epochs=1.5"], ["config.base.epochs"]),
    "word for a switch": (
        [DIGITS, "--config.method.stage_two.adaptive=perhaps"],
        ["config.method.stage_two.adaptive"],
    ),
    "word in a tuple": ([DIGITS, "--config.base.drop_epochs=('a',)"], ["config.base.drop_epochs"]),
    "not a number": ([DIGITS, "--config.base.lr=nan"], ["config.base.lr"]),
    "no config file": (["--config=configs/nowhere.py"], ["configs/nowhere.py"]),
    "a folder as config": (["--config=configs"], ["configs"]),
    "unknown config argument": ([f"{DIGITS}:taks=2"], ["taks=2", "tasks"]),
    "word as config argument": ([f"{DIGITS}:tasks=two"], ["tasks=two"]),
    "unknown scale": (["--config=configs/cifar100.py:scale=tiny"], ["scale=tiny", "mini"]),
    "no config": ([], ["--config"]),
    "extra argument": ([DIGITS, "now"], ["'now'"]),
    "override without config": (["--config.seed=3"], ["config.seed"]),
    "override before config": (["--config.seed=3", DIGITS], ["config.seed"]),
    "unknown choice": (
        [DIGITS, "--config.method.stage_two.classification=both"],
        ["config.method.stage_two.classification", "both", "old_head_fixed"],
    ),
    "too small": (
        [DIGITS, "--config.method.stage_one.batch=0"],
        ["config.method.stage_one.batch", "0"],
    ),
    "negative": ([DIGITS, "--config.base.batch=-5"], ["config.base.batch: -5 is below 1"]),
    "infinite": ([DIGITS, "--config.method.stage_two.beta=inf"], ["inf is not finite"]),
    "misspelt term": (
        [DIGITS, "--config.method.stage_one.terms.categry=0.0"],
        ["did you mean config.method.stage_one.terms.category?"],
    ),
    "field of another section": (
        [DIGITS, "--config.data_dir=x"],
        ["did you mean config.data.data_dir?"],
    ),
    "field as a flag": ([DIGITS, "--data_dir=x"], ["did you mean --config.data.data_dir?"]),
    "negative rate": (
        [DIGITS, "--config.method.stage_one.delegator_lr=-1"],
        ["config.method.stage_one.delegator_lr"],
    ),
    "impossible depth": ([DIGITS, "--config.model.depth=9"], ["config.model", "9"]),
    "too many doublings": (
        [DIGITS, "--config.method.delegator.widths=(8, 8, 8, 8, 8)"],
        ["config.method.delegator.widths"],
    ),
    "tasks do not divide": ([f"{DIGITS}:tasks=4"], ["config.data.tasks=4", "6"]),
    "no tasks": ([f"{DIGITS}:tasks=0"], ["config.data.tasks=0"]),
    "no base classes": (
        [DIGITS, "--config.data.base_classes=0"],
        ["config.data.base_classes=0"],
    ),
    "negative base classes": (
        [DIGITS, "--config.data.base_classes=-2"],
        ["config.data.base_classes=-2"],
    ),
    "only base classes": (
        [DIGITS, "--config.data.base_classes=10"],
        ["config.data.base_classes=10"],
    ),
    "batch larger than a task": (
        [DIGITS, "--config.method.stage_two.batch=100000"],
        ["config.method.stage_two.batch=100000", "task 1"],
    ),
    "batch larger than the base": (
        [DIGITS, "--config.base.batch=100000"],
        ["config.base.batch=100000", "task 0"],
    ),
    "term module missing": (
        [DIGITS, "--config.method.stage_one.term_modules=('no_such_terms',)"],
        ["config.method.stage_one.term_modules", "no_such_terms"],
    ),
    "unknown data set": ([DIGITS, "--config.data.name=cifar1000"], ["cifar1000", "cifar100"]),
    "sizes differ": ([DIGITS, "--config.data.load_size=12"], ["config.data.load_size"]),
    "unknown augmentation": ([DIGITS, "--config.data.augment=mix"], ["config.data.augment"]),
    "moments of three channels": ([DIGITS, "--config.data.channels=3"], ["config.data.mean"]),
}


@pytest.mark.parametrize("case", LINES)
def test_wrong_command_line(capsys, tmp_path, case):
    args, wanted = LINES[case]
    fails_without_a_trace(capsys, tmp_path, *args, wanted=tuple(wanted))


@pytest.mark.parametrize("workdir", [(), ("--workdir=",)])
def test_workdir_must_be_given(capsys, workdir):
    assert "--workdir" in fails(capsys, DIGITS, *workdir)


def test_suggestion_for_a_misspelt_field(capsys, tmp_path):
    line = fails(capsys, DIGITS, f"--workdir={tmp_path / 'w'}", "--config.method.stage_one.epoch=3")
    assert "epochs" in line


# Config files

FILES = {
    "unknown field": (["config.method.stage_one.rouns = 3"], ["config.method.stage_one.rouns"]),
    "misspelt field": (["config.base.epoch = 3"], ["config.base.epoch", "config.base.epochs"]),
    "unknown section": (["config.stage_three = {}"], ["config.stage_three"]),
    "missing field": (["del config.base.lr"], ["config.base.lr", "missing"]),
    "missing section": (["del config.run"], ["config.run", "missing"]),
    "a number for a section": (["del config.run", "config.run = 3"], ["config.run", "3"]),
    "a list for an integer": (
        ["del config.seed", "config.seed = [1]"],
        ["config.seed", "[1]"],
    ),
    "unknown term": (
        ["config.method.stage_one.terms.beauty = 1.0"],
        ["config.method.stage_one.terms.beauty"],
    ),
    "no terms": (["config.method.stage_one.terms = {}"], ["config.method.stage_one.terms"]),
    "fails by itself": (["config.base.lr = undefined"], ["undefined"]),
    "divides by zero": (["config.base.lr = 1 / 0"], ["division by zero"]),
    "imports what is missing": (["import no_such_module"], ["no_such_module"]),
    "returns nothing": (["return None"], ["config"]),
    "syntax error": (["config.base.lr ="], ["mine.py"]),
}


@pytest.mark.parametrize("case", FILES)
def test_wrong_config_file(capsys, tmp_path, case):
    lines, wanted = FILES[case]
    argument = config_file(tmp_path, *lines)
    fails_without_a_trace(capsys, tmp_path, argument, wanted=tuple(wanted))


def test_config_file_without_get_config(capsys, tmp_path):
    file = tmp_path / "empty.py"
    file.write_text("")
    fails_without_a_trace(capsys, tmp_path, f"--config={file}", wanted=("get_config",))


# Data


def test_data_set_that_is_not_prepared(capsys, tmp_path):
    data_dir = tmp_path / "datasets"
    data_dir.mkdir()
    argument = f"--config.data.data_dir={data_dir}"
    wanted = ("cifar100", "not prepared", str(data_dir), "config.data.data_dir")
    fails_without_a_trace(capsys, tmp_path, "--config=configs/cifar100.py", argument, wanted=wanted)
    assert list(data_dir.iterdir()) == []


def test_image_folder_that_is_missing(capsys, tmp_path):
    argument = f"--config.data.data_dir={tmp_path / 'nowhere'}"
    wanted = ("config.data.data_dir", "nowhere")
    fails_without_a_trace(capsys, tmp_path, FOLDER, argument, *SMALL_BATCHES, wanted=wanted)


def test_image_folder_without_classes(capsys, tmp_path):
    (tmp_path / "images").mkdir()
    argument = f"--config.data.data_dir={tmp_path / 'images'}"
    wanted = (str(tmp_path / "images"),)
    fails_without_a_trace(capsys, tmp_path, FOLDER, argument, *SMALL_BATCHES, wanted=wanted)


@pytest.mark.parametrize("harm", ["truncated", "empty", "text"])
def test_image_that_cannot_be_read_is_named(capsys, tmp_path, harm):
    file = image_folder(tmp_path / "images") / "class_1" / "2.png"
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hi"}[harm])
    argument = f"--config.data.data_dir={tmp_path / 'images'}"
    fails_without_a_trace(capsys, tmp_path, FOLDER, argument, *SMALL_BATCHES, wanted=(str(file),))


def test_workdir_among_the_images(capsys, tmp_path):
    images = image_folder(tmp_path / "images")
    workdir = images / "run"
    line = fails(capsys, FOLDER, f"--config.data.data_dir={images}", f"--workdir={workdir}")
    assert f"--workdir={workdir} lies in the image folder {images}" in line
    assert not workdir.exists()


def test_folder_of_images_with_a_batch_that_is_too_large(capsys, tmp_path):
    argument = f"--config.data.data_dir={image_folder(tmp_path / 'images')}"
    wanted = ("config.base.batch=32", "3 training images of task 0")
    fails_without_a_trace(capsys, tmp_path, FOLDER, argument, wanted=wanted)


# The workdir


def other_run(workdir: Path, **changes) -> Path:
    """What a run with another configuration leaves, as far as it matters here."""
    config = replace(from_config_dict(digits.get_config()), **changes)
    (workdir / "checkpoints" / "100" / "state").mkdir(parents=True)
    (workdir / "checkpoints" / "100" / "state" / "data").write_bytes(b"\0\1")
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    (workdir / "metrics.jsonl").write_text('{"global_step": 100}\n{"global_step": 120}\n')
    return workdir


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("--config.seed=3", ["config.seed=1", "3"]),
        ("--config.method.stage_two.beta=0.7", ["config.method.stage_two.beta=0.6", "0.7"]),
        (
            "--config.method.stage_one.terms.category=2",
            ["config.method.stage_one.terms.category=1.0", "2.0"],
        ),
        ("--config.base.drop_epochs=(1,)", ["config.base.drop_epochs=[20, 30]", "[1]"]),
    ],
)
def test_workdir_of_another_configuration_stays_as_it_is(capsys, tmp_path, override, wanted):
    workdir = other_run(tmp_path / "run")
    before = snapshot(tmp_path)
    line = fails(capsys, DIGITS, f"--workdir={workdir}", override)
    for part in (str(workdir), *wanted):
        assert part in line
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("config", [True, False], ids=["config whole", "config broken"])
def test_workdir_with_a_broken_checkpoint_only_is_no_new_run(capsys, tmp_path, config):
    """Twice: the checkpoint is out of the way the second time."""
    workdir = other_run(tmp_path / "run")
    if not config:
        (workdir / "config.json").write_text('{"seed": 1')
    before = snapshot(tmp_path)
    for told in (True, False):
        assert execute(DIGITS, f"--workdir={workdir}") == 2
        out, err = capsys.readouterr()
        assert ("warning: checkpoint 100 is damaged" in out) == told
        (line,) = err.splitlines()
        assert line.startswith(f"error: --workdir={workdir} holds a run but no checkpoint")
        after = snapshot(tmp_path)
        assert {name.replace("_damaged", ""): after[name] for name in after} == before  # moved
        (workdir / "config.json").unlink(missing_ok=True)  # nor is it one without that file
        before.pop("run/config.json", None)


@pytest.mark.parametrize("below", ["", "/run"])
def test_workdir_that_is_a_file_or_below_one(capsys, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    line = fails(capsys, DIGITS, f"--workdir={tmp_path}/file{below}")
    assert str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "mine"


def test_data_errors_come_before_anything_is_written_beside_a_run(capsys, tmp_path):
    workdir = other_run(tmp_path / "run")
    before = snapshot(tmp_path)
    line = fails(capsys, DIGITS, f"--workdir={workdir}", "--config.data.name=nowhere_to_be_found")
    assert "nowhere_to_be_found" in line
    assert snapshot(tmp_path) == before


def test_a_workdir_with_other_files_is_told(tmp_path, capsys, monkeypatch):
    (tmp_path / "lock").write_text("")
    tell_others(tmp_path)
    tell_others(tmp_path / "new")
    assert capsys.readouterr().err == ""
    for name in ("thesis.tex", "x\ny"):
        (tmp_path / name).write_text("somebody's")
    tell_others(tmp_path)
    [line] = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line and r"thesis.tex, x\ny" in line

    def refused(path: object) -> list[str]:
        raise PermissionError(path)

    monkeypatch.setattr("os.listdir", refused)
    tell_others(tmp_path)  # it may be written to, which is enough
    assert capsys.readouterr().err == ""


def test_an_unfinished_run_of_another_config_may_be_deleted(tmp_path):
    fields = digits.get_config()
    before = to_dict(from_config_dict(fields))
    fields.seed = 77
    words = r"its checkpoints/, config\.json and metrics\.jsonl may be deleted$"
    with pytest.raises(UserError, match=words):
        check_same_config(from_config_dict(fields), before, tmp_path)
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(UserError) as error:
        check_same_config(from_config_dict(fields), before, tmp_path)
    assert "deleted" not in str(error.value)
