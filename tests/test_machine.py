"""What a machine has or lacks: platforms, open files, memory, cores."""

import ast
import dataclasses
import errno
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from test_command_line import arguments
from test_data_sources import RGB, message, write_folder, write_prepared
from test_train import tiny

from skd_jax import cli, loop, machine, main
from skd_jax.data import open_source, prepared, records
from skd_jax.errors import UserError, on_platform
from skd_jax.train import train


def raising(error: Exception):
    def call(*args, **keywords):
        raise error

    return call


# Platforms that are not there


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (AssertionError(), " there is no such platform here; "),
        (RuntimeError("Unable to initialize backend 'tpu'\nmore"), "backend 'tpu'); install JAX"),
    ],
)
def test_a_platform_that_is_not_there_is_one_line(monkeypatch, error, words):
    monkeypatch.setattr(jax, "devices", raising(error))
    with pytest.raises(UserError) as found, on_platform():
        jax.devices()
    assert words in str(found.value) and "\n" not in str(found.value)
    assert str(found.value).startswith(f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: ")


def test_one_of_several_platforms_that_is_not_there_is_one_line():
    """JAX raises when it is first asked; from then on it has what is there."""
    words = r"no such platform here \(Unable to initialize backend 'tpu': no lib\); "
    with pytest.raises(UserError, match=words), on_platform():
        raise RuntimeError("Unable to initialize backend 'tpu': no lib\nmore")


def test_other_errors_are_not_taken_for_it():
    for error in (RuntimeError("a bug"), AssertionError("a bug"), ValueError("a bug")):
        with pytest.raises(type(error), match="a bug"), on_platform():
            raise error


@pytest.mark.parametrize(
    "command",
    [
        ("skd_jax.main", "--config=configs/digits.py", "--workdir={new}"),
        ("skd_jax", "predict", "--model={model}", "{pictures}"),
        ("experiments.measure.overhead", "--out={new}"),
    ],
)
def test_every_command_says_so_and_exits_with_2(repo, tmp_path, model_file, pictures, command):
    given = {"new": tmp_path / "new", "model": model_file, "pictures": pictures}
    args = [part.format(**given) for part in command]
    env = {**os.environ, "PYTHONPATH": str(repo), "JAX_PLATFORMS": "nowhere"}
    done = subprocess.run(
        [sys.executable, "-m", *args],
        env=env,
        cwd=repo,
        capture_output=True,
        text=True,
        timeout=300,
    )
    [line] = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: JAX_PLATFORMS=nowhere: there is no")
    assert not (tmp_path / "new").exists()


# Limits of a machine are not told as damaged data


LABELS = {"train": [0, 1, 2] * 14, "test": [0, 1, 2]}


@pytest.fixture
def limit():
    """Sets the soft limit on open files, as far above those that are open as is asked."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)

    def lower(spare: int) -> None:
        soft = max(map(int, os.listdir("/proc/self/fd"))) + spare
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))

    yield lower
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="open files are counted in /proc")
def test_more_shards_than_open_files(tmp_path, monkeypatch, limit):
    resource = pytest.importorskip("resource")
    write_prepared(tmp_path, "tinyset", LABELS, shards=42)
    data = dataclasses.replace(RGB, name="tinyset", data_dir=str(tmp_path), test_fraction=0.0)
    monkeypatch.setattr(prepared, "SPARE_FILES", max(map(int, os.listdir("/proc/self/fd"))) + 200)
    limit(20)
    source = open_source(data)
    assert source.read("train", np.arange(42)).shape == (42, 8, 8, 3)
    raised = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert raised == 42 + 3 + prepared.SPARE_FILES  # empty shards are left out
    open_source(data)
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == raised


def test_shards_beyond_the_hard_limit_are_refused(monkeypatch):
    resource = pytest.importorskip("resource")
    limits, infinite = [100, 400], resource.RLIM_INFINITY

    def set_to(_, new: tuple[int, int]) -> None:
        if new[0] > 300:
            raise ValueError("exceeds maximum limit")
        limits[:] = new

    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", set_to)
    monkeypatch.setattr(prepared, "SPARE_FILES", 50)
    prepared._allow_open_files(50, "tinyset")  # nothing to raise
    assert limits == [100, 400]
    prepared._allow_open_files(90, "tinyset")
    assert limits == [140, 400]
    limits[:] = 100, 200
    prepared._allow_open_files(199, "tinyset")  # the shards fit, if not all that may be asked for
    assert limits == [200, 200]
    with pytest.raises(UserError, match=r"201 shards, .* may open 200 files: raise that limit"):
        prepared._allow_open_files(201, "tinyset")
    limits[:] = 100, infinite
    prepared._allow_open_files(200, "tinyset")
    assert limits == [250, infinite]
    with pytest.raises(UserError, match=r"299 shards, .* may open 250 files"):
        prepared._allow_open_files(299, "tinyset")  # the system has a limit of its own


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EMFILE, "Too many open files"), OSError(errno.ENOMEM, "x"), MemoryError()],
)
def test_a_limit_is_no_damage_of_an_image(tmp_path, monkeypatch, error):
    write_folder(tmp_path, {"cat": 1})
    file = tmp_path / "cat" / "00.png"
    monkeypatch.setattr(records.Image, "open", raising(error))
    with pytest.raises(
        UserError, match=f"^{file} cannot be read now, and nothing is wrong"
    ) as said:
        records.decode(file, str(file), "move it away", 8, 3, "squash")
    assert "move it away" not in str(said.value)
    if isinstance(error, OSError):
        monkeypatch.setattr(pathlib.Path, "read_bytes", raising(error))
        with pytest.raises(UserError, match="nothing is wrong with it"):
            records.read_file(file)


# What an error tells people to type


def command_in(said: str) -> list[str]:
    """The command that an error ends in, up to what else is to be done."""
    return shlex.split(said.rsplit("TensorFlow: ", 1)[1].split(", and set ")[0].split("then ")[-1])


def there(words: list[str], file: str) -> bool:
    """Whether a script of TFDS has all the flags of a command; it runs with TensorFlow only."""
    scripts = importlib.util.find_spec("tensorflow_datasets").submodule_search_locations[0]
    source = pathlib.Path(scripts, "scripts", file).read_text()
    names = [word[2:].partition("=")[0] for word in words if word.startswith("--")]
    return all(re.search(rf"\b{name}\b", source) for name in names) and len(names) > 1


def test_commands_that_prepare_and_convert_can_be_typed(tmp_path):
    root = tmp_path / "a folder"
    data = dataclasses.replace(RGB, name="cifar100", data_dir=str(root))
    build = command_in(message(data))
    assert build[:3] == ["tfds", "build", "cifar100"] and there(build, "cli/build.py")
    assert build[-1] == f"--data_dir={root}"

    place = write_prepared(root, "tinyset", LABELS)
    info = place / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    data = dataclasses.replace(data, name="tinyset", test_fraction=0.0)
    said = message(data)
    convert = command_in(said)
    assert convert[:3] == ["python", "-m", "tensorflow_datasets.scripts.convert_format"]
    assert there(convert, "convert_format.py") and said.endswith(f"{root}_array_record")
    assert f"--dataset_version_dir={place}" in convert
    out = dict(word.split("=") for word in convert[3:])["--out_dir"]
    info.write_text(info.read_text().replace('"tfrecord"', '"array_record"'))
    shutil.copytree(place, out)  # what a conversion gives; and the folder that is to be named
    open_source(dataclasses.replace(data, data_dir=f"{root}_array_record"))


def test_no_advice_destroys_what_is_there(tmp_path):
    place = write_prepared(tmp_path, "tinyset", LABELS)
    data = dataclasses.replace(RGB, name="tinyset", data_dir=str(tmp_path), test_fraction=0.0)
    next(place.glob("*train*")).write_bytes(b"")
    said = message(data)
    assert "overwrite" not in said and "delete" not in said
    build = command_in(said)
    assert there(build, "cli/build.py") and build[-1] == f"--data_dir={tmp_path}_new"


def test_every_command_of_the_help_is_understood(capsys, repo):
    def examples(text: str) -> list[list[str]]:
        joined = text.replace("\\\n", " ")
        lines = [line.strip() for line in joined.splitlines()]
        return [shlex.split(line, comments=True) for line in lines if line.startswith("skd-jax ")]

    found = examples((repo / "README.md").read_text())
    for name in ("train", "extend", "predict", "evaluate", "sample", "export"):
        assert cli.run([name, "--help"]) == 0
        found += examples(capsys.readouterr().out)
    assert len(found) > 10
    for _, name, *flags in found:
        if name == "train":
            with arguments(*(flag for flag in flags if "DIR" not in flag), "--workdir=x") as argv:
                main.parse(argv)
        elif not name.startswith("COMMAND"):
            assert cli._parse([name, *flags]).work


def test_every_command_in_a_message_is_tested():
    words = re.compile(r"tfds |pip install|python -[mc]|skd-jax \w|ulimit|convert_format")
    told = set()
    for file in pathlib.Path(cli.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text())
        nodes = {id(node): node for node in ast.walk(tree)}
        for node in list(nodes.values()):
            body = getattr(node, "body", None)
            if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
                nodes.pop(id(body[0].value), None)  # a docstring
        strings = (n.value for n in nodes.values() if isinstance(n, ast.Constant))
        told |= {file.name for s in strings if isinstance(s, str) and words.search(s)}
    # The help, prepared and records: above; the others have tests of their own.
    of_help = {"cli.py", "commands.py"}
    assert told <= {*of_help, "prepared.py", "records.py", "sample.py", "model_folder.py"}, told


# What results depend on


def test_a_machine_is_plain_and_says_what_differs():
    here = machine.machine(devices=2, steps_per_call=25)
    assert json.loads(json.dumps(here)) == here and here["jax"] == jax.__version__
    assert here["CPU cores"] == len(os.sched_getaffinity(0))
    assert here["XLA_FLAGS"] == os.environ["XLA_FLAGS"]
    assert machine.changes(here, here) is None
    for name, value in here.items():
        there = {**here, name: "other"}
        assert machine.changes(there, here) == f"{name} other, now {machine._short(value)}"
    fewer = {name: value for name, value in here.items() if name != "XLA_FLAGS"}
    assert machine.changes(fewer, here).startswith("XLA_FLAGS none, now ")
    for nothing in (None, 7, [], "x"):  # of a version that saved none
        assert machine.changes(nothing, here) is None
    odd = machine.changes({**here, "CPU": "\x1b[2J\n" * 99}, here)
    assert odd.isprintable() and len(odd) < 250
    odd = machine.changes({**here, **{"\x1b[2J\n" * 99 + str(n): n for n in range(9)}}, here)
    assert odd.isprintable() and len(odd) < 700 and odd.endswith("; 4 more differ")
    assert {"flax", "optax", "skd_jax"} <= here.keys()


def test_flags_that_change_numbers_are_kept_and_others_are_not(monkeypatch):
    flags = ("JAX_ENABLE_X64", "JAX_DEFAULT_PRNG_IMPL", "JAX_THREEFRY_PARTITIONABLE", "NPROC")
    flags += ("JAX_RANDOM_SEED_OFFSET", "NVIDIA_TF32_OVERRIDE", "LIBTPU_INIT_ARGS")
    before = machine.machine(1, 1)
    for name in flags:
        monkeypatch.setenv(name, "1")
        assert machine.changes(before, machine.machine(1, 1)) == f"{name} none, now 1"
        monkeypatch.undo()
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_LOGGING_LEVEL", "JAX_PLATFORMS", "HOME"):
        monkeypatch.setenv(name, "1")
    assert machine.changes(before, machine.machine(1, 1)) is None


def test_the_cores_that_a_process_may_use_are_counted(repo):
    code = "from skd_jax import machine; print(machine.machine(1, 1)['CPU cores'])"
    first = str(min(os.sched_getaffinity(0)))
    command = ["taskset", "-c", first, sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "1", done.stderr


def test_a_run_that_goes_on_elsewhere_says_so_and_goes_on(tmp_path, monkeypatch):
    said: list[str] = []
    with_t0 = tiny(run__phases=1)
    train(with_t0, tmp_path / "run", said.append)
    assert not any("same bits" in line for line in said)
    here = machine.machine(1, 1)
    monkeypatch.setattr(loop, "machine", lambda *_: {**here, "CPU cores": 96})
    train(with_t0, tmp_path / "run", said.append)  # it is over: nothing depends on it
    assert not any("same bits" in line for line in said)
    monkeypatch.setattr(loop.Run, "go", lambda run: {})  # what it says comes first
    train(tiny(), tmp_path / "run", said.append)
    train(tiny(run__start_from=str(tmp_path / "run")), tmp_path / "next", said.append)
    told = [line for line in said if "same bits" in line]
    words = f"(CPU cores {here['CPU cores']}, now 96)"
    assert "that this run was at work on" in told[0]
    assert "that config.run.start_from was made on" in told[1]
    assert len(told) == 2 and all(words in line and "\n" not in line for line in told)
