"""``python -m skd_jax.main``: arguments, exit codes, help."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl.testing import flagsaver
from test_train import TASKS, TINY, finished_run, snapshot, tiny

from skd_jax import main

OVERRIDES = [f"--config.{name}={value}" for name, value in TINY.items()]
DIGITS = "--config=configs/digits.py"


@contextlib.contextmanager
def arguments(*args: str) -> Iterator[list[str]]:
    """Gives ``args`` as the command line, and leaves no flag changed."""
    with pytest.MonkeyPatch.context() as patch, flagsaver.flagsaver():
        patch.setattr(sys, "argv", ["skd_jax.main", *args])
        yield sys.argv


def parse(*args: str):
    with arguments(*args) as argv:
        return main.parse(argv)


def execute(*args: str) -> int:
    """Runs the command in this process and returns its exit code."""
    with arguments(*args):
        try:
            return main.run()
        except SystemExit as leaving:
            return int(leaving.code or 0)


def python(repo: Path, *args: str) -> subprocess.CompletedProcess:
    """Runs the command as a user does."""
    command = [sys.executable, "-m", "skd_jax.main", *args]
    return subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=300)


@pytest.fixture(autouse=True)
def in_repository(repo, monkeypatch):
    monkeypatch.chdir(repo)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> SimpleNamespace:
    return finished_run(tmp_path_factory)


def test_config_and_workdir_are_parsed():
    config, workdir = parse(DIGITS, "--workdir=some/where")
    assert workdir == "some/where"
    assert (config.data.name, config.data.tasks, config.method.stage_two.beta) == ("digits", 3, 0.6)


def test_config_file_may_lie_anywhere(repo, tmp_path):
    copy = tmp_path / "mine.py"
    copy.write_text((repo / "configs" / "digits.py").read_text().replace("depth = 8", "depth = 14"))
    config, _ = parse(f"--config={copy}:tasks=6", f"--workdir={tmp_path / 'w'}")
    assert (config.model.depth, config.data.tasks) == (14, 6)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("--config.method.stage_two.beta=1.5", lambda c: c.method.stage_two.beta == 1.5),
        ("--config.method.stage_two.beta=2", lambda c: c.method.stage_two.beta == 2.0),
        ("--config.seed=7", lambda c: c.seed == 7),
        ("--config.data.name=folder", lambda c: c.data.name == "folder"),
        (
            "--config.method.stage_two.delegator=False",
            lambda c: c.method.stage_two.delegator is False,
        ),
        ("--noconfig.method.stage_two.adaptive", lambda c: c.method.stage_two.adaptive is False),
        ("--config.base.drop_epochs=(3, 5)", lambda c: c.base.drop_epochs == (3, 5)),
        ("--config.method.delegator.widths=(8, 8)", lambda c: c.method.delegator.widths == (8, 8)),
        (
            "--config.method.stage_one.terms.category=0",
            lambda c: dict(c.method.stage_one.terms)["category"] == 0,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_override_changes_its_field_and_no_other(override, read):
    usual, _ = parse(DIGITS, "--workdir=w")
    config, _ = parse(DIGITS, "--workdir=w", override)
    assert read(config)
    assert not read(usual)
    section = override.split(".")[1].split("=")[0]
    for name in ("seed", "data", "model", "base", "method", "run"):
        assert (getattr(config, name) == getattr(usual, name)) == (name != section)
    if section == "method":
        section = override.split(".")[2]
        for name in ("name", "delegator", "stage_one", "stage_two"):
            here, there = getattr(config.method, name), getattr(usual.method, name)
            assert (here == there) == (name != section)


def test_parsing_leaves_nothing_behind_for_the_next():
    assert parse(f"{DIGITS}:tasks=1", "--workdir=a", "--config.seed=7")[0].seed == 7
    config, workdir = parse(DIGITS, "--workdir=b")
    assert (config.seed, config.data.tasks, workdir) == (1, 3, "b")


@pytest.mark.parametrize("file", ["cifar100", "caltech101", "flowers102", "imagenet_subset"])
@pytest.mark.parametrize("tasks", [1, 2, 5, 10])
def test_benchmark_configs_take_the_paper_s_numbers_of_tasks(file, tasks):
    config, _ = parse(f"--config=configs/{file}.py:tasks={tasks}", "--workdir=w")
    assert config.data.tasks == tasks


def test_every_config_file_is_accepted(repo):
    files = sorted(set((repo / "configs").glob("*.py")) - {repo / "configs" / "common.py"})
    assert len(files) >= 6
    for file in files:
        if "get_config" in file.read_text():
            parse(f"--config=configs/{file.name}", "--workdir=w")
    config, _ = parse("--config=configs/cifar100.py:scale=mini,tasks=5", "--workdir=w")
    assert config.data.max_classes == 20


def test_overrides_give_the_same_configuration_as_the_file_of_the_same_values():
    config, _ = parse(f"{DIGITS}:tasks={TASKS}", "--workdir=w", *OVERRIDES)
    assert config == tiny()


@pytest.mark.parametrize("flag", ["--help", "--helpfull"])
def test_help_names_config_and_workdir_and_does_nothing(capsys, flag):
    code = execute(flag)
    out, err = capsys.readouterr()
    assert "--config" in out
    assert "--workdir" in out
    assert "Traceback" not in err
    assert code == (0 if flag == "--help" else 1)  # absl's own ends with 1
    if flag == "--help":
        assert "configs/folder.py" in out and "config.method.stage_two: epochs batch" in out
        assert max(map(len, out.splitlines())) <= 80


def test_finished_run_through_the_command_line_returns_0(finished, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    assert execute(f"{DIGITS}:tasks={TASKS}", f"--workdir={workdir}", *OVERRIDES) == 0
    out, err = capsys.readouterr()
    assert f"this run is finished; its results are in {workdir}" in out
    assert "error" not in err
    assert snapshot(workdir)["summary.json"] == finished.files["summary.json"]


def test_process_exits_with_0_after_a_run(finished, repo, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    (workdir / "summary.json").unlink()  # as if killed just before
    done = python(repo, f"{DIGITS}:tasks={TASKS}", f"--workdir={workdir}", *OVERRIDES)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert "this run is finished" in done.stdout
    assert json.loads((workdir / "summary.json").read_text()) == finished.summary


@pytest.mark.parametrize("module", ["cli", "main"])
def test_a_process_does_not_collect_garbage_at_its_end(repo, module):
    """Or it takes half a second of a core, and many where others want it too."""
    code = (
        "import atexit, gc, sys; atexit.register(lambda: print('frozen', gc.get_freeze_count()))\n"
        f"from skd_jax import {module}; sys.argv[1:] = ['predict']; {module}.run()"
    )
    env = {**os.environ, "PYTHONPATH": str(repo)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert int(done.stdout.split("frozen")[1]) > 1000, done.stderr


def test_process_exits_with_2_after_wrong_input(repo, tmp_path):
    done = python(repo, f"{DIGITS}:tasks=4", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_ctrl_c_says_how_to_go_on_and_returns_130(capsys):
    def work(config, workdir):
        raise KeyboardInterrupt

    with arguments(DIGITS, "--workdir=w"):
        assert main.command(work) == 130
    err = capsys.readouterr().err
    assert err.startswith("interrupted: ")
    assert len(err.splitlines()) == 1


def test_programming_errors_are_not_hidden():
    def work(config, workdir):
        raise ZeroDivisionError

    with arguments(DIGITS, "--workdir=w"), pytest.raises(ZeroDivisionError):
        main.command(work)


COUNTED = """
import sys
import jax

counts = {"cache_hits": 0, "cache_misses": 0}


def count(event, **_):
    name = event.rpartition("/")[2]
    if name in counts:
        counts[name] += 1


jax.monitoring.register_event_listener(count)
from skd_jax import main

code = main.run()
print(counts["cache_hits"], counts["cache_misses"])
sys.exit(code)
"""


def test_a_second_start_of_the_same_config_compiles_nothing(repo, tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR")
    counts = []
    for number in range(2):
        args = [f"{DIGITS}:tasks=1", *OVERRIDES, f"--workdir={tmp_path / str(number)}"]
        process = subprocess.run(
            [sys.executable, "-c", COUNTED, *args],
            env=environment,
            cwd=repo,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert process.returncode == 0, process.stderr
        counts.append([int(n) for n in process.stdout.split()[-2:]])
    (_, first_misses), (hits, misses) = counts
    assert first_misses > 10
    assert misses == 0 and hits >= first_misses
    assert (tmp_path / "cache" / "skd_jax").is_dir()
    results = [(tmp_path / str(n) / "summary.json").read_text() for n in range(2)]
    rows = [json.loads(text)["accuracy_matrix"] for text in results]
    assert rows[0] == rows[1]
