"""The command ``skd-jax``: help, exit codes, one line for an error, output that nothing breaks."""

import csv
import dataclasses
import importlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image
from test_command_line import arguments

import skd_jax
from skd_jax import cli, main
from skd_jax.errors import Interrupted, UserError
from skd_jax.model import load

COMMANDS = ("predict", "evaluate", "sample", "export")
EVIL = "evil\x1b[31m\n3.14,x.png"


def execute(capsys, *args: str | Path) -> tuple[int, str, list[str]]:
    """The exit code, standard output and the lines of standard error."""
    code = cli.run([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


# Help


def test_help_is_80_columns_wide_and_has_examples(capsys):
    for args in (["--help"], *([name, "--help"] for name in COMMANDS)):
        code, out, err = execute(capsys, *args)
        assert (code, err) == (0, [])
        assert max(map(len, out.splitlines())) <= 80
        assert out.isascii()
        if len(args) == 2:
            assert f"example:\n  skd-jax {args[0]} --model=new_model/" in out
    out = execute(capsys, "-h")[1]
    assert all(f"\n    {name} " in out for name in ("train", *COMMANDS))
    assert execute(capsys, "--version")[1] == f"skd-jax {skd_jax.__version__}\n"


def test_help_imports_nothing_large():
    code = (
        "import sys; from skd_jax import cli; assert cli.run(['predict', '--help']) == 0; "
        "print([n for n in ('jax', 'numpy', 'matplotlib', 'absl', 'PIL') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_matplotlib_waits_for_the_first_picture():
    code = (
        "import sys; from skd_jax import plots, train; print('matplotlib' in sys.modules); "
        "plots._figure(); print('matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["False", "True"], done.stderr


def test_console_script_points_at_the_entry_point(repo):
    scripts = tomllib.loads((repo / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts["skd-jax"].partition(":")
    assert getattr(importlib.import_module(module), function) is cli.run


# Training


@pytest.mark.parametrize(
    "args", [["train", "--helpshort", "predict"], ["--config=x.py", "--model=y"], ["--helpfull"]]
)
def test_training_gets_the_rest_of_the_command_line_untouched(monkeypatch, args):
    given, before = [], list(sys.argv)
    monkeypatch.setattr(main, "run", lambda: given.extend(sys.argv) or 7)
    assert cli.run(args) == 7
    assert given == ["skd_jax.main", *(args[1:] if args[0] == "train" else args)]
    assert sys.argv == before


@pytest.mark.parametrize("name", [["train"], []])
def test_training_reads_configs_and_flags(capsys, monkeypatch, repo, tmp_path, name):
    monkeypatch.chdir(repo)
    with arguments():
        found = execute(
            capsys, *name, "--config=configs/digits.py:tasks=4", f"--workdir={tmp_path}"
        )
        assert found[:2] == (2, "") and len(found[2]) == 1


def test_help_of_training_is_that_of_a_command(capsys):
    assert cli.run(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: skd-jax train") and "--workdir DIR" in out
    assert "example:\n  skd-jax train --config=configs/digits.py" in out


def test_without_a_command_the_commands_are_told(capsys):
    assert cli.run([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: skd-jax ") and "  evaluate  " in err


# What is given is wrong


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["predikt"], "invalid choice: 'predikt'"),
        (["predict", "a.png"], "required: --model; see skd-jax predict --help"),
        (["predict", "--model=m"], "required: IMAGE"),
        (["predict", "--model=m", "a.png", "--tops=3"], "--tops=3"),
        (["predict", "--model=m", "a.png", "--to=3"], "--to=3"),
        (["predict", "--model=m", "a.png", "--top=0"], "argument --top: '0' is not a whole"),
        (["predict", "--model=m", "a.png", "--top=²"], "'\\xb2' is not a whole"),
        (["predict", "--model=m", "a.png", f"--top={'9' * 5000}"], "is not a whole"),
        (["predict", "--model=m", "a.png", "--format=xml"], "invalid choice: 'xml'"),
        (["predict", "--model=m", "a.png", "--mean=1;2"], "such as 0.49,0.48,0.45"),
        (["predict", "--model=no\x1b\nwhere", "a.png"], "no\\x1b where: there is no such file"),
        (["predict", "--model=nowhere", "."], "nowhere"),
        (["evaluate", "--model=m", "--images=x", "--confusion=x.jpg"], "ends in .png"),
        (["evaluate", "--model=m"], "required: --images"),
        (["sample", "--model=m", "--out=.", "--seed=x"], "--seed: 'x' is not a whole number"),
        (["sample", "--model=m", "--out=.", "--per-class=-1"], "--per-class"),
        (["sample", "--model=m", "--out=."], ". is not empty"),
        (["sample", "--model=m", "--out=a.png"], "a.png is a file"),
        (["export", "--model=m", "--out=a.png"], "a.png exists already"),
        (["export", "--model=m", "--out=x/y"], "x: there is no such folder"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    capsys, monkeypatch, pictures, tmp_path, args, words
):
    shutil.copy(pictures / "a.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.stderr.reconfigure(encoding="ascii")
    code, out, err = execute(capsys, *args)
    assert (code, out, len(err)) == (2, "", 1)
    assert err[0].startswith("error: ") and words in err[0]
    assert len(err[0]) < 600
    assert os.listdir(tmp_path) == ["a.png"]


def test_what_bare_weights_cannot_say_reaches_the_loader(monkeypatch, capsys, pictures):
    given = {}

    def loader(path, **options):
        given.update(options, path=path)
        raise UserError("stop")

    monkeypatch.setattr("skd_jax.model.load", loader)
    flags = ["--classes=l.txt", "--mean=0.5,0.4,0.3", "--std=.1", "--image-size=32"]
    flags += ["--load-size=36", "--fit=crop", "--no-last-relu"]
    assert execute(capsys, "predict", "--model=m", pictures, *flags)[2] == ["error: stop"]
    assert given == {
        "path": "m",
        "classes": "l.txt",
        "mean": (0.5, 0.4, 0.3),
        "std": (0.1,),
        "image_size": 32,
        "load_size": 36,
        "fit": "crop",
        "last_relu": False,
    }
    execute(capsys, "sample", "--model=m", "--out=new")
    assert {value for name, value in given.items() if name != "path"} == {None}


def test_all_that_bare_weights_cannot_say_is_asked_for_at_once(capsys, small_model, tmp_path):
    small_model.save(tmp_path / "model")
    bare = tmp_path / "bare.safetensors"
    shutil.copy(tmp_path / "model" / "model.safetensors", bare)
    code, _, err = execute(capsys, "predict", f"--model={bare}", tmp_path)
    assert code == 2 and len(err) == 1
    assert "and its 4 classes' names: give --mean, --std, --image-size, --classes (for" in err[0]
    code, _, err = execute(capsys, "predict", f"--model={bare}", tmp_path, "--classes=/nope.txt")
    assert code == 2 and "--mean, --std, --image-size (for" in err[0]
    images = ["--mean=0.5", "--std=0.2", "--image-size=8"]
    found = execute(capsys, "predict", f"--model={bare}", tmp_path, "--classes=/nope.txt", *images)
    assert found[2] == ["error: --classes=/nope.txt: there is no such file"]


def test_a_pickle_is_refused_with_three_lines_to_type(capsys, tmp_path):
    (tmp_path / "a.pt").write_bytes(b"PK")
    code, out, err = execute(capsys, "predict", f"--model={tmp_path / 'a.pt'}", tmp_path)
    assert (code, out, len(err)) == (2, "", 4)
    assert err[0].endswith("with these three lines of Python:")
    assert err[1] == "  import torch, safetensors.torch"
    assert err[3].endswith(f"{str(tmp_path / 'a.safetensors')!r})")


# How a command ends


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, ["interrupted"]),
        (Interrupted("saved at step 3", 143), 143, ["saved at step 3"]),
        (BrokenPipeError(), 141, []),
        (UserError("two\nlines"), 2, ["error: two lines"]),
    ],
)
def test_exit_codes(capsys, monkeypatch, model_file, pictures, tmp_path, error, code, words):
    def work(*args):
        raise error

    monkeypatch.setattr("skd_jax.predict.predictions", work)
    args = ["--model", model_file, pictures]
    assert execute(capsys, "predict", *args) == (code, "", words)
    (tmp_path / "out").write_text("before")
    if not isinstance(error, OSError):
        assert execute(capsys, "predict", *args, f"--output={tmp_path / 'out'}")[0] == code
    assert (tmp_path / "out").read_text() == "before"
    assert os.listdir(tmp_path) == ["out"]


def test_programming_errors_are_not_hidden(monkeypatch, model_file, pictures):
    monkeypatch.setattr("skd_jax.predict.predictions", lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        cli.run(["predict", f"--model={model_file}", str(pictures)])


def help_into(out: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "skd_jax", "--help"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.run(
        command, stdout=out, stderr=subprocess.PIPE, env=environment, text=True, timeout=60
    )


@pytest.mark.skipif(sys.platform == "win32", reason="pipes break otherwise there")
def test_a_reader_that_has_gone_ends_it_quietly():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb"):
        done = help_into(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_standard_output_on_a_full_disk_is_one_line():
    with open("/dev/full", "wb") as full:
        done = help_into(full.fileno())
    assert done.returncode == 2
    assert done.stderr.startswith("error: standard output cannot be written (No space left")
    assert len(done.stderr.splitlines()) == 1


# predict


def test_predict_as_json_csv_and_a_table(capsys, model_file, pictures):
    expected = load(model_file).predict([pictures / "c.png", pictures / "below"], top=2)
    args = ["predict", pictures / "c.png", f"--model={model_file}", pictures / "below", "--top=2"]
    code, out, err = execute(capsys, *args, "--format=json")
    assert (code, err) == (0, [])
    assert json.loads(out) == [
        {
            "image": str(p.path),
            "classes": [
                {"label": name, "probability": x}
                for name, x in zip(p.labels, p.probabilities, strict=True)
            ],
        }
        for p in expected
    ]
    rows = list(csv.reader(io.StringIO(execute(capsys, *args, "--format=csv")[1])))
    assert rows == [
        ["image", "rank", "label", "probability"],
        *(
            [str(p.path), str(k + 1), p.labels[k], str(p.probabilities[k])]
            for p in expected
            for k in (0, 1)
        ),
    ]
    header, *lines = execute(capsys, *args)[1].splitlines()
    assert header.split() == ["image", "probability", "class"]
    assert len(lines) == 4
    first = expected[0]
    assert lines[0].startswith(str(first.path)) and lines[0].endswith(first.labels[0])
    assert f" {100 * first.probabilities[0]:.1f} %  " in lines[0]
    assert lines[1].strip().startswith(f"{100 * first.probabilities[1]:.1f} %  {first.labels[1]}")


def test_names_neither_break_nor_forge_the_output(capsys, small_model, pictures, tmp_path):
    names = ("\x1b[2Jcat", 'do,"g\n', "größe\r", "猫")
    model = dataclasses.replace(small_model, class_names=names)
    model.save(tmp_path / "model.npz")
    (tmp_path / "in").mkdir()
    shutil.copy(pictures / "a.png", tmp_path / "in" / EVIL)
    args = ["predict", f"--model={tmp_path / 'model.npz'}", tmp_path / "in", "--top=4"]
    out = execute(capsys, *args)[1]
    assert len(out.splitlines()) == 5 and "\x1b" not in out
    assert "evil\\x1b[31m\\n3.14,x.png" in out and "\\x1b[2Jcat" in out and "größe\\r" in out
    (found,) = json.loads(execute(capsys, *args, "--format=json")[1])
    assert found["image"].endswith(EVIL)
    assert {entry["label"] for entry in found["classes"]} == set(names)
    file = tmp_path / "out.csv"
    assert execute(capsys, *args, "--format=csv", f"--output={file}") == (0, "", [])
    with file.open(encoding="utf-8", newline="") as opened:
        _, *rows = csv.reader(opened)
    assert {row[2] for row in rows} == set(names)
    assert all(row[0].endswith(EVIL) for row in rows) and len(rows) == 4


@pytest.mark.parametrize("style", ["table", "json", "csv"])
def test_an_output_that_takes_ascii_only(monkeypatch, model_file, pictures, style):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    args = ["predict", f"--model={model_file}", str(pictures), f"--format={style}", "--top=4"]
    assert cli.run(args) == 0
    text = out.buffer.getvalue().decode("ascii")
    assert "gr\\u00f6\\u00dfe.png" in text if style == "json" else "gr\\xf6\\xdfe.png" in text


@pytest.mark.parametrize("style", ["table", "json", "csv"])
def test_a_broken_image_is_named_and_the_others_predicted(
    capsys, model_file, pictures, tmp_path, style
):
    shutil.copytree(pictures, tmp_path / "in")
    (tmp_path / "in" / "b\x1broken.png").write_text("no image")
    (tmp_path / "in" / "notes\x07.txt").write_text("of a user")
    args = ["predict", f"--model={model_file}", f"--format={style}"]
    code, out, (warning, error) = execute(capsys, *args, tmp_path / "in")
    assert code == 2
    assert error.startswith("error: ") and "b\\x1broken.png cannot be read as an image" in error
    assert warning.startswith("warning: ") and "notes\\x07.txt" in warning
    expected = execute(capsys, *args, pictures)[1]
    assert (
        out.replace(str(tmp_path / "in"), "X").split()
        == expected.replace(str(pictures), "X").split()
    )
    assert not logging.getLogger("skd_jax").handlers


# evaluate, sample, export


def test_evaluate(capsys, model_file, pictures, tmp_path):
    predicted = load(model_file).predict(pictures)
    for number, prediction in enumerate(predicted):
        name = prediction.labels[0] if number else "dog"
        (tmp_path / "in" / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(prediction.path, tmp_path / "in" / name / f"{number}.png")
    right = sum(p.labels[0] == "dog" or n > 0 for n, p in enumerate(predicted))
    args = ["evaluate", f"--model={model_file}", f"--images={tmp_path / 'in'}"]
    code, out, err = execute(capsys, *args, f"--confusion={tmp_path / 'c.png'}")
    assert (code, err) == (0, [])
    assert f"accuracy {100 * right / 5:.1f} % on 5 images" in out
    assert "classes without images, left out: " in out
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.format == "PNG"
    found = json.loads(execute(capsys, *args, "--format=json")[1])
    assert (found["accuracy"], found["images"]) == (right / 5, 5)
    rows = list(csv.DictReader(io.StringIO(execute(capsys, *args, "--format=csv")[1])))
    assert [row["class"] for row in rows] == [c["class"] for c in found["classes"]]
    assert sum(int(row["images"]) for row in rows) == 5
    (tmp_path / "in" / "dog" / "broken.png").write_text("no image")
    code, out, err = execute(capsys, *args)
    assert (code, len(err)) == (2, 1) and "on 5 images" in out and "broken.png" in err[0]
    (tmp_path / "in" / "dgo").mkdir()
    code, out, err = execute(capsys, *args, f"--output={tmp_path / 'new'}")
    assert (code, len(err)) == (2, 1) and "'dgo' (did you mean 'dog'?)" in err[0]
    assert not (tmp_path / "new").exists()


def test_sample_and_its_warnings(capsys, model_file, tmp_path):
    args = ["sample", f"--model={model_file}"]
    code, out, err = execute(capsys, *args, f"--out={tmp_path / 'one'}", "--per-class=1")
    assert (code, err) == (0, [])
    assert len(list((tmp_path / "one").rglob("0001.png"))) == 4
    code, out, err = execute(capsys, *args, f"--out={tmp_path / 'two'}", "--draws=1")
    assert code == 0 and out.startswith("1 images written (of 1 drawn): ")
    never, rare = err
    assert never.startswith("warning: never drawn in 1 draws: ") and never.count(", ") in (2, 3)
    assert rare.startswith("warning: drawn less often than 10 times: ")


def test_a_model_without_a_delegator_is_told_how_to_get_one(capsys, small_model, tmp_path):
    kept = dataclasses.replace(small_model.kept, delegator=None)
    dataclasses.replace(small_model, kept=kept).save(tmp_path / "model.npz")
    found = execute(capsys, "sample", f"--model={tmp_path / 'model.npz'}", f"--out={tmp_path}/new")
    assert found[:2] == (2, "") and len(found[2]) == 1 and "`skd-jax extend`" in found[2][0]
    assert not (tmp_path / "new").exists()


def test_export(capsys, model_file, tmp_path):
    args = ["export", f"--model={model_file}", f"--out={tmp_path / 'model.stablehlo'}"]
    code, out, err = execute(capsys, *args)
    assert (code, err) == (0, []) and "labels.txt" in out
    assert {file.name for file in tmp_path.iterdir()} == {"model.stablehlo", "labels.txt"}
    assert "exists already" in execute(capsys, *args)[2][0]
