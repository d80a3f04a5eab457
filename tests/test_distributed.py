"""Two processes of two virtual devices each do the run that one process of one device does."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_command_line import OVERRIDES
from test_parallel import VIRTUAL
from test_train import assert_logs_agree, at_save, silent, tiny

from skd_jax import train

DIFFERS = "process 1 differs from process 0"


# Process 1 alone finds the first checkpoint it reads damaged, before it has read all of it.
ONE_CANNOT_READ = """
import sys
from skd_jax import checkpoint, main
real = checkpoint._digest_json
def digest(values, seen=[]):
    seen.append(values)
    return "another" if len(seen) == 1 and "--process=1" in sys.argv else real(values)
checkpoint._digest_json = digest
sys.exit(main.run())
"""

# From the second checkpoint on no file may grow: what a full disk looks like.
DISK_FULL = """
import resource, signal, sys
import jax
from skd_jax import checkpoint, main
real = checkpoint.Checkpoints.save
def save(self, step, *arguments):
    if step > 0 and "--process=0" in sys.argv:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # others read it
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    real(self, step, *arguments)
checkpoint.Checkpoints.save = save
sys.exit(main.run())
"""


def start(
    repo, workdir, *flags: str, program: tuple[str, ...] = ("-m", "skd_jax.main")
) -> subprocess.Popen:
    flags_ = VIRTUAL["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    return subprocess.Popen(
        [
            *(sys.executable, *program, "--config=configs/digits.py:tasks=2"),
            *(*OVERRIDES, f"--workdir={workdir}", "--distributed", *flags),
        ],
        env={**os.environ, **VIRTUAL, "XLA_FLAGS": flags_},
        cwd=repo,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pair(
    repo,
    workdir: Path,
    *flags: str,
    second: tuple[str, ...] = (),
    second_dir: Path | None = None,
    meanwhile: Callable[[list[subprocess.Popen]], None] = lambda both: None,
    **options,
) -> list[tuple[int, str]]:
    """(exit code, what was printed) of two processes; the second may have flags of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"--coordinator=localhost:{free.getsockname()[1]}"
    both = [
        start(repo, folder, coordinator, "--processes=2", f"--process={i}", *flags, *own, **options)
        for i, (own, folder) in enumerate([((), workdir), (second, second_dir or workdir)])
    ]
    try:
        meanwhile(both)
        said = [process.communicate(timeout=400)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    return [(process.returncode, text) for process, text in zip(both, said, strict=True)]


def two_processes(repo, workdir, *flags: str) -> list[str]:
    """What each of two processes printed, after both ended well."""
    ended = pair(repo, workdir, *flags)
    assert [code for code, _ in ended] == [0, 0], "\n".join(text for _, text in ended)
    return [text for _, text in ended]


@pytest.mark.parametrize(
    ("in_memory", "phases"),
    [
        (False, 3),  # the first task
        *(pytest.param(in_memory, 0, marks=pytest.mark.slow) for in_memory in (False, True)),
    ],
)
def test_two_processes_give_the_result_of_one(repo, tmp_path, in_memory, phases):
    shared = tmp_path / "shared"
    flags = f"--config.data.in_memory={in_memory}", f"--config.run.phases={phases}"
    said = two_processes(repo, shared, *flags)
    assert "finished" in said[0] and "finished" not in said[1]  # one of them reports
    train.train(tiny(run__phases=phases), tmp_path / "alone", silent)
    assert_logs_agree(shared, tmp_path / "alone")
    here, there = [
        json.loads((folder / "summary.json").read_text()) for folder in (shared, tmp_path / "alone")
    ]
    assert here["top1_seen"] == pytest.approx(there["top1_seen"], abs=0.02)

    said = two_processes(repo, shared, *flags)
    assert "this run is finished" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize(("replicas", "in_memory"), [(2, False), (4, True)])
def test_two_processes_train_several_seeds_as_one_does(repo, tmp_path, replicas, in_memory):
    """A group of devices for each process, and a device for each seed."""
    flags = (f"--config.run.replicas={replicas}", f"--config.data.in_memory={in_memory}")
    said = two_processes(repo, tmp_path / "shared", "--config.run.phases=2", *flags)
    assert "finished" in said[0] and "finished" not in said[1]
    train.train(tiny(run__replicas=replicas, run__phases=2), tmp_path / "alone", silent)
    for seed in range(1, 1 + replicas):
        assert_logs_agree(*(tmp_path / name / f"seed{seed}" for name in ("shared", "alone")))
    said = two_processes(repo, tmp_path / "shared", "--config.run.phases=2", *flags)
    assert "this run is finished" in said[0]


def signalled(workdir: Path, one: int, number: int) -> Callable[[list[subprocess.Popen]], None]:
    """Sends one of the processes a signal in the middle of stage one of task 0."""

    def send(both: list[subprocess.Popen]) -> None:
        path, deadline = workdir / "metrics.jsonl", time.monotonic() + 300
        while not path.exists() or '"global_step": 8,' not in path.read_text():
            assert [process.poll() for process in both] == [None, None]
            assert time.monotonic() < deadline, "too slow"
            time.sleep(0.01)
        both[one].send_signal(number)

    return send


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "number", "codes", "length"),
    [
        (0, signal.SIGTERM, [143, 143], 1),
        (1, signal.SIGTERM, [143, 143], 2),
        (1, signal.SIGINT, [143, 130], 1),
    ],
    ids=["SIGTERM to the first", "SIGTERM to the second, two steps a call", "Ctrl-C to the second"],
)
def test_one_of_two_processes_told_to_stop_stops_both_at_the_same_step(
    repo, tmp_path, one, number, codes, length
):
    workdir = tmp_path / "run"
    flags = ("--config.run.checkpoint_every=1000", f"--config.run.steps_per_call={length}")
    ended = pair(repo, workdir, *flags, meanwhile=signalled(workdir, one, number))
    assert [code for code, _ in ended] == codes, "\n".join(text for _, text in ended)
    places = [
        [line for line in text.splitlines() if line.startswith("stopped at ")] for _, text in ended
    ]
    assert places[0] == places[1] and len(places[0]) == 1
    said = two_processes(repo, workdir, *flags)
    assert f"going on at {places[0][0].removeprefix('stopped at ').split(', which')[0]}" in said[0]
    whole = tmp_path / "whole"
    train.train(tiny(run__checkpoint_every=1000, run__steps_per_call=length), whole, silent)
    assert_logs_agree(workdir, whole)


def assert_told_of_the_other(code: int, said: str) -> None:
    """JAX may abort by itself, with words of its own, before we do."""
    assert code in (3, -signal.SIGABRT), said
    assert "another process of this run has ended" in said or "another task died" in said, said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "number"),
    [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)],
    ids=["the first killed", "the second killed", "the second silent"],
)
def test_where_one_of_two_processes_is_lost_the_other_ends_in_time(repo, tmp_path, one, number):
    workdir, seconds = tmp_path / "run", 0.0
    send = signalled(workdir, one, number)

    def lost(both: list[subprocess.Popen]) -> None:
        nonlocal seconds
        send(both)
        since = time.monotonic()
        both[1 - one].wait(100)
        seconds = time.monotonic() - since
        both[one].kill()

    ended = pair(repo, workdir, "--peer_timeout=20", meanwhile=lost)
    assert seconds < 60 and (number == signal.SIGKILL or seconds > 10)
    assert_told_of_the_other(*ended[1 - one])
    assert two_processes(repo, workdir)[0].count("going on at task 0, delegator") == 1


@pytest.mark.slow
def test_where_one_process_cannot_read_a_checkpoint_all_use_the_one_before(repo, tmp_path):
    workdir = tmp_path / "run"
    with at_save(10):
        train.train(tiny(), workdir, silent)
    ended = pair(repo, workdir, program=("-c", ONE_CANNOT_READ))
    assert [code for code, _ in ended] == [0, 0], "\n".join(text for _, text in ended)
    assert "checkpoint 10 is damaged (another process cannot read it)" in ended[0][1]
    assert "going on at task 0, delegator, round 0" in ended[0][1]
    assert (workdir / "checkpoints_damaged" / "10").is_dir()


@pytest.mark.slow
def test_where_the_disk_is_full_for_two_processes_neither_waits_for_ever(repo, tmp_path):
    ended = pair(repo, tmp_path / "run", program=("-c", DISK_FULL))
    assert ended[0][0] == 2 and "error: cannot save checkpoint" in ended[0][1], ended[0][1]
    assert_told_of_the_other(*ended[1])
    assert "going on at" in two_processes(repo, tmp_path / "run")[0]


def test_processes_that_are_told_too_little_end_with_what_to_add(repo, tmp_path):
    process = start(repo, tmp_path / "run", "--coordinator=localhost:1")
    said = process.communicate(timeout=100)[0].strip().splitlines()
    assert process.returncode == 2
    assert said[-1].startswith("error: --distributed: ") and "--process=I" in said[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("second", "first_says", "second_says"),
    [
        ("--config.seed=2", DIFFERS, DIFFERS),
        ("--config.run.log_every=7", DIFFERS, DIFFERS),
        ("--config.method.stage_one.batch=10", DIFFERS, DIFFERS),
    ],
    ids=["another config", "another interval", "another batch"],
)
def test_processes_that_differ_or_cannot_start_stop_together(
    repo, tmp_path, second, first_says, second_says
):
    ended = pair(repo, tmp_path / "run", second=(second,))
    assert [code for code, _ in ended] == [2, 2]
    for (_, text), wanted in zip(ended, (first_says, second_says), strict=True):
        (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
        assert wanted in line
    assert not (tmp_path / "run").exists()


def test_processes_that_see_another_checkpoint_stop_together(repo, tmp_path):
    """What each looks at before they agree must not itself wait for the others."""
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    ended = pair(repo, tmp_path / "run", second_dir=tmp_path / "not_shared")
    assert [code for code, _ in ended] == [2, 2]
    assert all(DIFFERS in text for _, text in ended)
    ended = pair(repo, tmp_path / "run", second=("--config.method.stage_one.batch=10",))
    assert [code for code, _ in ended] == [2, 2]
