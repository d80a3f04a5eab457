"""Paths as people give them, and any character in them, through every command."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_command_line import arguments

from skd_jax import cli, config_files, extending, main, model, sample, train
from skd_jax.data import check, check_workdir, open_source
from skd_jax.errors import UserError, accept_any_character
from skd_jax.methods import from_config_dict
from skd_jax.paths import given_path, run_of
from skd_jax.writer import say

ADDRESSES = ("gs://bucket/x", "s3://bucket/x", "https://host/x", "file:///x", "hdfs+ssl:/x")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder; the current one is another."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def digits():
    return from_config_dict(config_files.read("configs/digits.py"))


def test_a_tilde_is_the_home_folder(home):
    assert given_path("~") == home and given_path("~/a/b") == home / "a" / "b"
    assert given_path(Path("~", "a")) == home / "a"
    assert given_path("a~/~") == Path("a~/~") and given_path("") == Path()
    literal = given_path("./~/a")
    assert literal == Path.cwd() / "~" / "a" == given_path(literal)
    with pytest.raises(UserError, match=r"^--out=~nobody\.here/x: no home"):
        given_path("~nobody.here/x", "--out")
    with pytest.raises(UserError, match=r"^~nobody\.here/x: .* is \./~nobody\.here$"):
        given_path("~nobody.here/x")


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_no_path(address):
    for given in (address, Path(address)):  # which makes one slash of two
        with pytest.raises(UserError, match="is an address; give the path"):
            given_path(given)


def test_what_looks_like_an_address_may_be_a_path():
    for path in ("c:/x", "a:b", "a/b://c", "12:/x", "/x://y"):
        assert given_path(path) == Path(path)
    with pytest.raises(UserError, match="no path"):
        given_path("a\0b")


def test_only_one_place_expands_paths(repo):
    files = [f for folder in ("skd_jax", "experiments") for f in (repo / folder).rglob("*.py")]
    found = {f.name for f in files if re.search(r"expanduser\((?!\"~)", f.read_text())}
    assert found == {"paths.py"}


def test_every_path_of_a_run_may_begin_with_a_tilde(home, repo):
    shutil.copy(repo / "configs" / "digits.py", home / "mine.py")
    flags = ["--config=~/mine.py", "--workdir=~/runs", "--config.run.start_from=~/before"]
    with arguments(*flags) as argv:
        config, workdir = main.parse(argv)
    assert workdir == str(home / "runs")
    data = dataclasses.replace(config.data, name="folder", data_dir="~/images")
    (home / "images" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match=re.escape(f"{home}/images/cat holds no images")):
        open_source(data)
    with pytest.raises(UserError, match="lies in the image folder"):
        check_workdir("~/images/run", data)
    with pytest.raises(UserError, match="~/before holds no checkpoint"):
        train.ended(given_path(config.run.start_from), config.run.start_from)
    with pytest.raises(UserError, match=re.escape(f"in {home}/tfds")):
        open_source(dataclasses.replace(data, name="cifar100", data_dir="~/tfds"))
    assert not list(Path().iterdir())  # nothing called "~"


@pytest.mark.parametrize("address", ADDRESSES)
def test_every_path_of_a_run_may_not_be_an_address(home, address, digits, capsys):
    for flags in (
        ("--config=configs/digits.py", f"--workdir={address}"),
        (f"--config={address}.py", "--workdir=runs"),
    ):
        with arguments(*flags):
            assert main.run() == 2
        [line] = capsys.readouterr().err.splitlines()
        assert address in line and ("is an address" in line or "there is no such file" in line)
    for name in ("folder", "cifar100"):
        with pytest.raises(UserError, match=r"^config\.data\.data_dir=.* is an address"):
            check(dataclasses.replace(digits.data, name=name, data_dir=address))
    assert not list(Path().iterdir())


def test_a_path_that_may_not_be_looked_at_is_one_line(home, model_file, capsys):
    name = "x" * 300  # as a locked folder, which root can look into
    for command in (
        ("predict", f"--model={model_file}", name),
        ("predict", f"--model={name}", "x.png"),
        ("sample", f"--model={model_file}", f"--out={name}"),
        ("export", f"--model={model_file}", f"--out={name}"),
    ):
        assert cli.run(command) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "cannot be looked at (File name too long)" in line


@pytest.mark.parametrize("method", ["iterdir", "is_file", "is_dir"])
def test_a_folder_that_is_locked_is_one_line(home, model_file, monkeypatch, method):
    """As root, who may look into everything, it is played."""
    (home / "locked").mkdir()
    real = getattr(Path, method)

    def refused(path):
        if home / "locked" in (path, *path.parents):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, method, refused)
    look = {
        "iterdir": sample.check_folder,
        "is_file": extending.check_free,
        "is_dir": model.load,
    }[method]
    with pytest.raises(UserError, match=r"locked cannot be looked at \(Permission denied\)"):
        look(home / "locked")


def test_a_data_directory_from_the_environment_is_a_path_too(digits, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://tfds-data/datasets")
    with pytest.raises(UserError, match="TFDS_DATA_DIR=gs://tfds-data/datasets is an address"):
        open_source(dataclasses.replace(digits.data, name="cifar100"))


def test_every_path_of_the_command_may_begin_with_a_tilde(home, model_file, pictures, capsys):
    shutil.copy(model_file, home / "m.npz")
    (home / "labelled").mkdir()
    shutil.copytree(pictures, home / "labelled" / "cat")
    model = "--model=~/m.npz"
    evaluate = ("--images=~/labelled", "--output=~/e.txt", "--confusion=~/c.png")
    for command in (
        ("predict", model, "~/labelled", "--output=~/p.txt"),
        ("evaluate", model, *evaluate),
        ("sample", model, "--out=~/samples", "--per-class=1", "--draws=64"),
        ("export", model, "--out=~/m.stablehlo"),
    ):
        assert cli.run(command) == 0, capsys.readouterr().err
    made = {"p.txt", "e.txt", "c.png", "samples", "m.stablehlo"}
    assert made <= set(os.listdir(home)) and not list(Path().iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ("predict", "--model=gs://b/m", "x.png"),
        ("predict", "--model={model}", "gs://b/x.png"),
        ("predict", "--model={model}", "{pictures}", "--output=gs://b/x"),
        ("evaluate", "--model={model}", "--images=gs://b/x"),
        ("evaluate", "--model={model}", "--images={pictures}", "--confusion=gs://b/x.png"),
        ("sample", "--model={model}", "--out=gs://b/x"),
        ("export", "--model={model}", "--out=gs://b/x"),
        ("extend", "--model={model}", "--images=gs://b/x", "--out=out"),
        ("extend", "--model={model}", "--images={pictures}", "--out=gs://b/x"),
        ("extend", "--model={model}", "--images={pictures}", "--out=out", "--check=gs://b/x"),
    ],
)
def test_no_path_of_the_command_may_be_an_address(home, model_file, pictures, capsys, command):
    assert cli.run([part.format(model=model_file, pictures=pictures) for part in command]) == 2
    [line] = capsys.readouterr().err.splitlines()
    flags = {arg.partition("=")[0] for arg in command if "=gs://" in arg} - {"--output"}
    flags -= {"--confusion"}  # any function's file
    said = rf"error: {flags.pop()}=gs://b/\w+" if flags else r"error: gs://b/[\w.]+"
    assert re.match(f"{said} is an address", line)
    assert not list(Path().iterdir())


def test_scripts_of_experiments_take_paths_the_same_way(repo, home):
    flags = ("example --workdir", "quality --workdir", "report --out", "measure.overhead --out")
    flags = [flag.split() for flag in (*flags, "table1 --results", "table1 --data_dir")]
    code = (
        "import contextlib, runpy, sys\n"
        f"for name, flag in {flags}:\n"
        "    sys.argv = [name, f'{flag}=s3://b/x']\n"
        "    try:\n"
        "        runpy.run_module(f'experiments.{name}', run_name='__main__')\n"
        "    except SystemExit as leaving:\n"
        "        assert leaving.code == 2\n"
    )
    env = {**os.environ, "PYTHONPATH": str(repo)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(flags) and not list(Path().iterdir())
    assert all(line.startswith("error: s3://b/x is an address") for line in lines)


# Folders of several seeds


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_folder_is_one_seeds_only_in_a_run_of_several(tmp_path, monkeypatch, replicas):
    """A model that was saved below a run of one seed may be called as one likes."""
    whole, folder = tmp_path / "run", tmp_path / "run" / "seed1"
    folder.mkdir(parents=True)
    (whole / "checkpoints").mkdir()
    (whole / "config.json").write_text(json.dumps({"run": {"replicas": replicas}}))
    (folder / "config.json").write_text("{}")
    several = replicas > 1
    assert run_of(folder) == ((whole, 1) if several else (folder, None))
    assert run_of(whole) == (whole, None)
    monkeypatch.chdir(folder)
    here = Path()
    assert run_of(here) == ((whole, 1) if several else (here, None))
    (whole / "config.json").write_text("[not a config")
    assert run_of(folder) == (folder, None)


# Printable anywhere


def test_a_workdir_that_checkpoints_cannot_name_is_refused_first(digits, tmp_path):
    with pytest.raises(UserError, match="has to be UTF-8, and this is not"):
        train.train(digits, tmp_path / "gr\udcf6\udcdfe", print)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_an_output_cannot_hold_is_printed_as_an_escape(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, write_through=True))
    say("größe 猫 \udcff")  # as a notebook does it
    accept_any_character()  # as every command does first
    print("größe 猫 \udcff")
    for line in raw.getvalue().decode(encoding).splitlines():
        assert line.isascii() or "größe" in line
        assert r"\u732b" in line and r"\udcff" in line


def test_a_run_prints_any_workdir_on_an_output_of_ascii(repo, home):
    (home / "größe 猫").write_text("a file, so that the run ends at once")
    command = [sys.executable, "-m", "skd_jax.main", "--config=configs/digits.py"]
    env = {**os.environ, "PYTHONPATH": str(repo), "PYTHONIOENCODING": "ascii"}
    command.append(f"--workdir={home / 'größe 猫'}")
    done = subprocess.run(command, env=env, capture_output=True, timeout=300)
    assert done.returncode == 2
    assert rb"gr\xf6\xdfe \u732b is a file" in done.stderr and b"Traceback" not in done.stderr
