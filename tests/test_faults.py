"""Faults injected for real: signals, kills, flipped bits, full disks, locks, other devices."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_parallel import VIRTUAL
from test_train import (
    LAST,
    PHASES,
    TASKS,
    TINY,
    assert_same_result,
    at_row,
    finished_run,
    rows,
    silent,
    snapshot,
    tiny,
)

from experiments.measure.kills import kill_until_done, outcome, start
from skd_jax import evaluate, parallel, train
from skd_jax.checkpoint import Checkpoints
from skd_jax.errors import Interrupted, UserError
from skd_jax.lock import locked
from skd_jax.stopping import StopSignals

FLAGS = (
    f"--config=configs/digits.py:tasks={TASKS}",
    *(f"--config.{name}={value}" for name, value in TINY.items()),
)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    return finished_run(tmp_path_factory)


@pytest.fixture(autouse=True)
def in_repository(repo, monkeypatch):
    monkeypatch.chdir(repo)


def begun(workdir: Path, *flags: str, **options) -> subprocess.Popen:
    """A run in a process of its own, with what it prints kept."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return start(workdir, (*FLAGS, *flags), **pipes, **options)


def wait_for_row(process: subprocess.Popen, workdir: Path, global_step: int) -> None:
    deadline, path = time.monotonic() + 300, workdir / "metrics.jsonl"
    while not path.exists() or f'"global_step": {global_step},' not in path.read_text():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "too slow"
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
    ids=["SIGTERM", "Ctrl-C", "SIGHUP"],
)
def test_a_signal_saves_that_very_step(finished, tmp_path, number, code):
    workdir = tmp_path / "run"
    process = begun(workdir, "--config.run.checkpoint_every=1000")
    wait_for_row(process, workdir, 8)  # the second round of stage one of task 0
    process.send_signal(number)
    said = process.communicate(timeout=100)[0].strip().splitlines()
    assert process.returncode == code
    assert said[-1].startswith("stopped at task ") and said[-1].endswith("goes on from there")
    place = said[-1].removeprefix("stopped at ").partition(", which is saved")[0]
    with Checkpoints(workdir / "checkpoints", 2) as checkpoints:
        assert checkpoints.steps()[0] > 9  # no interval falls there
    lines: list[str] = []
    train.train(tiny(run__checkpoint_every=1000), workdir, lines.append)
    assert lines[0] == f"going on at {place}"
    train.train(tiny(run__checkpoint_every=1000), tmp_path / "whole", silent)
    assert_same_result(finished.config, workdir, tmp_path / "whole")


def test_a_signal_between_two_logs_leaves_the_log_as_it_would_have_been(tmp_path):
    """The steps since the last log are saved with the state."""
    config = tiny(run__log_every=1000, run__checkpoint_every=1000)
    real, calls = StopSignals.poll, []

    def told_at_the_third(self):
        calls.append(real(self))
        return 143 if len(calls) == 3 else None

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as stopped:
        patch.setattr(StopSignals, "poll", told_at_the_third)
        train.train(config, tmp_path / "run", silent)
    assert "task 0, base, step 3" in str(stopped.value)
    assert rows(tmp_path / "run") == []
    for workdir in ("run", "whole"):
        train.train(config, tmp_path / workdir, silent)
    assert_same_result(config, tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [0, 1, 4], ids=["base", "delegator", "the last"])
def test_a_signal_in_an_evaluation_saves_the_phase_before_it(finished, tmp_path, number):
    """However often: what is there already is not saved again."""
    workdir, phase = tmp_path / "run", PHASES[number]
    before = sum(steps for _, _, steps, _ in PHASES[: number + 1])
    for times in (1, 2):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted) as stopped:
            real = evaluate.predictions

            def told(*args, patch=patch, real=real, **kwargs):
                if len(rows(workdir)) == sum(len(p[3]) for p in PHASES[: number + 1]):
                    patch.setattr(StopSignals, "poll", lambda _: 143)
                return real(*args, **kwargs)

            patch.setattr(evaluate, "predictions", told)
            train.train(finished.config, workdir, silent)
        assert f"stopped at task {phase[0]}, {phase[1]}" in str(stopped.value)
        assert f" {phase[2]}, which is saved" in str(stopped.value), times
        with Checkpoints(workdir / "checkpoints", 2) as checkpoints:
            assert checkpoints.steps()[0] == before + number
    train.train(finished.config, workdir, silent)
    assert_same_result(finished.config, workdir, finished.workdir)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path):
    """During saves too: one after every step."""
    kills = 20
    flags = (*FLAGS, "--config.run.checkpoint_every=1")
    assert start(tmp_path / "whole", flags).wait() == 0
    since = time.monotonic()
    draw, left, number = random.Random(kills), kills, 0
    while left > 0:
        workdir = tmp_path / f"run{number}"
        left -= kill_until_done(workdir, flags, draw, 15.0, left).total()
        assert outcome(workdir) == outcome(tmp_path / "whole")
        number += 1
        assert time.monotonic() - since < 1200


def test_damaged_checkpoints_are_set_aside_and_the_one_before_is_used(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    (workdir / "summary.json").unlink()
    damage(workdir / "checkpoints" / str(LAST))
    lines: list[str] = []
    train.train(finished.config, workdir, lines.append)
    aside = workdir / "checkpoints_damaged" / str(LAST)
    assert lines[0].startswith(f"warning: checkpoint {LAST} is damaged (")
    assert lines[0].endswith(f") and was moved to {aside}")
    assert lines[1] == "going on at task 2, learn, step 3"
    assert_same_result(finished.config, workdir, finished.workdir)


def test_without_any_sound_checkpoint_there_is_no_silent_fresh_start(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    for folder in (workdir / "checkpoints").iterdir():
        damage(folder)
    before = snapshot(workdir)
    for _ in range(2):
        with pytest.raises(UserError, match="no checkpoint of it that can be read"):
            train.train(finished.config, workdir, silent)
        after = snapshot(workdir)
        assert {name.replace("_damaged", ""): after[name] for name in after} == before  # moved
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint of it that can be read"):
        train.train(finished.config, workdir, silent)


def damage(folder: Path) -> None:
    """Flips one bit in the middle of the largest file."""
    files = (path for path in (folder / "state").rglob("*") if path.is_file())
    path = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_second_run_on_a_workdir_is_refused_and_a_dead_run_leaves_no_lock(finished, tmp_path):
    workdir = tmp_path / "run"
    process = begun(workdir)
    try:
        wait_for_row(process, workdir, 2)
        process.send_signal(signal.SIGSTOP)  # still at work, and not to be hurried past
        before = snapshot(workdir)
        with pytest.raises(UserError, match="another run is at work there"):
            train.train(finished.config, workdir, silent)
        assert snapshot(workdir) == before
    finally:
        process.kill()
        process.communicate()
    train.train(finished.config, workdir, silent)
    assert_same_result(finished.config, workdir, finished.workdir)


def test_of_two_that_start_at_once_on_a_new_workdir_one_is_refused(finished, tmp_path):
    """Both have looked and found nothing before either begins."""
    real, both_begin, ended = parallel.in_every_process, threading.Barrier(2), []

    def together(work, fingerprint=lambda _: ""):
        if work.__name__ == "begin":
            both_begin.wait(100)
        return real(work, fingerprint)

    def run() -> None:
        try:
            train.train(finished.config, tmp_path / "run", silent)
            ended.append("finished")
        except UserError as error:
            ended.append(str(error))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "in_every_process", together)
        both = [threading.Thread(target=run) for _ in range(2)]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
    assert sorted(text == "finished" for text in ended) == [False, True], ended
    assert any("another run is at work there" in text for text in ended)
    assert_same_result(finished.config, tmp_path / "run", finished.workdir)


def test_the_lock_is_held_until_the_last_save_has_ended(finished, tmp_path):
    workdir, refused, real = tmp_path / "run", [], Checkpoints.close

    def close(self):
        try:
            with locked(workdir):
                refused.append(False)
        except UserError:
            refused.append(True)
        real(self)

    with pytest.MonkeyPatch.context() as patch, at_row(2):
        patch.setattr(Checkpoints, "close", close)
        train.train(finished.config, workdir, silent)
    assert refused == [True]


@pytest.mark.slow
def test_resumed_on_another_number_of_devices_it_makes_the_same_steps(finished, tmp_path):
    """The same z and the same batches, to rounding."""
    workdir = tmp_path / "run"
    before = [row for row in rows(finished.workdir, ("time",)) if row["global_step"] <= 9]
    with pytest.MonkeyPatch.context() as patch:
        real = Checkpoints.save

        def save(self, step, state, meta):
            real(self, step, state, meta)
            if step == 10:
                raise KeyboardInterrupt

        patch.setattr(Checkpoints, "save", save)
        with pytest.raises(KeyboardInterrupt):
            train.train(finished.config, workdir, silent)
    assert rows(workdir, ("time",)) == before
    process = begun(workdir, env={**os.environ, **VIRTUAL}, cwd=Path.cwd())
    said = process.communicate(timeout=600)[0]
    assert process.returncode == 0, said
    assert "going on at task 0, delegator, round 3" in said
    here, there = rows(workdir, ("time",)), rows(finished.workdir, ("time",))
    assert here[: len(before)] == before
    first, wanted = here[len(before)], there[len(before)]
    assert first.pop("phase") == wanted.pop("phase") == "delegator"
    assert first == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def mount(folder: Path, size: str) -> bool:
    """Mounts a small disk, where that is allowed."""
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return subprocess.run(options, capture_output=True).returncode == 0


@pytest.mark.parametrize("when", [pytest.param("at a start", marks=pytest.mark.slow), "midway"])
def test_full_disk_is_told_and_nothing_is_lost(finished, tmp_path, when):
    disk = tmp_path / "disk"
    if not mount(disk, "8m"):
        pytest.skip("mounting needs root")
    try:
        workdir = disk / "run"
        process = begun(workdir)
        wait_for_row(process, workdir, 8)
        process.send_signal(signal.SIGTERM if when == "at a start" else signal.SIGSTOP)
        if when == "at a start":
            process.communicate(timeout=100)
            assert process.returncode == 143
        with (disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(4096))
        newest = Checkpoints(workdir / "checkpoints", 2).steps()[0]
        sound = snapshot(workdir / "checkpoints" / str(newest))
        if when == "at a start":
            process = begun(workdir)
        process.send_signal(signal.SIGCONT)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 2, said
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert str(workdir) in line and "No space left on device" in line
        assert not re.search("Traceback|Exception", said), said
        assert snapshot(workdir / "checkpoints" / str(newest)) == sound
        (disk / "filler").unlink()
        train.train(finished.config, workdir, silent)
        assert_same_result(finished.config, workdir, finished.workdir)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_workdir_with_spaces_and_unicode_simply_works(finished, tmp_path):
    workdir = tmp_path / "mein Läufchen ☃ 'quoted' %41"
    for _ in range(2):
        train.train(finished.config, workdir, silent)
    assert_same_result(finished.config, workdir, finished.workdir)


def test_a_workdir_that_cannot_be_written_is_told_before_training(tmp_path):
    if not mount(tmp_path / "disk", "1m"):
        pytest.skip("mounting needs root")
    disk = tmp_path / "disk"
    try:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(UserError, match=r"--workdir=.*Read-only file system"):
            train.train(tiny(), disk / "run", silent)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("torn", ["", "{", '{"seed": 1, "acc', "[]", "null", "\0" * 100])
def test_a_summary_or_a_config_half_written_is_written_anew(finished, tmp_path, torn):
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    (workdir / "summary.json").write_text(torn)
    (workdir / "config.json").write_text(torn)
    assert train.train(finished.config, workdir, silent) == finished.summary
    assert json.loads((workdir / "summary.json").read_text()) == finished.summary


@pytest.mark.parametrize("harm", ["torn at the end", "torn in the middle", "empty"])
@pytest.mark.parametrize("over", [True, False], ids=["finished", "not finished"])
def test_rows_of_the_log_that_are_lost_are_told(finished, tmp_path, harm, over):
    """Their steps are over; nobody can write them again."""
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    if not over:
        shutil.rmtree(workdir / "checkpoints" / str(LAST))
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    number = {"torn at the end": -1, "torn in the middle": 3, "empty": 0}[harm]
    whole, lines[number] = list(lines), lines[number][:-20] + b"\n"
    written = b"" if harm == "empty" else b"".join(lines)
    (workdir / "metrics.jsonl").write_bytes(written[:-1] if number == -1 else written)
    said: list[str] = []
    train.train(finished.config, workdir, said.append)
    told = [line for line in said if line.startswith("warning: ")]
    again = 0 if over else 1  # the last row, of the steps made anew
    lost = len(whole) - again if harm == "empty" else 1 - again * (number == -1)
    path = workdir / "metrics.jsonl"
    warning = f"warning: {lost} of the rows in {path} are lost or damaged"
    assert told == ([warning] if lost else [])
    assert len(rows(workdir)) == len(whole) - lost


def test_files_of_an_image_folder_that_changed_between_runs_are_named(tmp_path):
    for number, name in enumerate("abcdefgh"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5):
            pixels = np.random.default_rng((number, i)).integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    config = tiny(
        data__name="folder",
        data__data_dir=str(tmp_path / "images"),
        data__tasks=2,
        base__batch=8,
        stage_two__batch=4,
    )
    with at_row(2):
        train.train(config, tmp_path / "run", silent)
    before = snapshot(tmp_path / "run")
    other = tmp_path / "images" / "c" / "3.png"
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(other)
    with pytest.raises(UserError, match=r"c/3\.png has changed") as caught:
        train.train(config, tmp_path / "run", silent)
    assert "\n" not in str(caught.value)
    other.unlink()
    with pytest.raises(UserError, match=r"c/3\.png is gone"):
        train.train(config, tmp_path / "run", silent)
    assert snapshot(tmp_path / "run") == before
