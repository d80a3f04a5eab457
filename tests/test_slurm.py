"""Studies and training under a real Slurm, which the tests start, on one machine."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from slurm_cluster import asked
from slurm_cluster import slurm as started_slurm
from test_command_line import OVERRIDES
from test_parallel import VIRTUAL
from test_study import FIELDS, options
from test_train import assert_logs_agree, bits, results, rows

from experiments.framework import local, making, scripts, study
from experiments.framework import slurm as launcher
from experiments.framework.exhibit import Exhibit
from skd_jax import restore
from skd_jax.errors import UserError

pytestmark = pytest.mark.slurm

# A run that takes more than a minute until it has been stopped once, and goes on quickly.
SLOW = """
import sys, time
from pathlib import Path
from skd_jax import main, stepping
(workdir,) = (Path(a.partition("=")[2]) for a in sys.argv if a.startswith("--workdir="))
if not any(path.name.isdigit() and int(path.name) for path in workdir.glob("checkpoints/*")):
    real = stepping.Stepping.__call__
    def slow(*args, **kwargs):
        time.sleep(1)
        return real(*args, **kwargs)
    stepping.Stepping.__call__ = slow
sys.exit(main.run())
"""
LONG = {"base.epochs": 40, "run.checkpoint_every": 1000}  # 120 steps


@pytest.fixture(scope="module")
def slurm():
    pytest.importorskip("submitit")
    with started_slurm() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(launcher, "EVERY", 1.0)
        patch.setattr(launcher, "GONE", 5.0)
        yield folder


def test_submitit_knows_all_that_a_flag_may_say(slurm, tmp_path):
    values = {name: kind("7") for name, kind in launcher.PARAMETERS.items()}
    executor = launcher.submitit().SlurmExecutor(tmp_path)
    executor.update_parameters(**values)
    assert values.items() <= executor.parameters.items()
    with pytest.raises(ValueError, match="Unavailable"):
        executor.update_parameters(partion="gpu")


def given(results: Path, **changes) -> study.Options:
    jobs = (("time", 60), ("cpus_per_task", 1))
    return options(results, datasets=(), scale="paper", **{"slurm": jobs, **changes})


def tiny(seed: int, name: str, phases: int, start: study.Run | None = None, **changes) -> study.Run:
    fields = tuple({**dict(FIELDS), **changes}.items())
    return study.Run("digits", "paper", seed, name, "tasks=2", fields, phases, start)


def chain(seed: int) -> list[study.Run]:
    """T_0, D_0, and all tasks."""
    base = tiny(seed, "base", 1)
    student = tiny(seed, "student/skd", 2, base)
    return [base, student, tiny(seed, "tasks2/skd", 0, student)]


SIX = [*chain(3), *chain(4)]


def assert_same_bits(here: Path, there: Path) -> None:
    assert rows(here, ("time",)) == rows(there, ("time",))
    assert results(here) == results(there)
    assert bits(restore(here)[1]) == bits(restore(there)[1])


def when(what: str, run: study.Run, options: study.Options) -> str:
    """StartTime or EndTime of a run's job."""
    jobs = asked("scontrol", "--oneliner", "show", "job").splitlines()
    (job,) = [job for job in jobs if f"JobName={launcher._name(run, options)} " in job]
    return dict(part.partition("=")[::2] for part in job.split())[what]


def test_a_study_whose_command_is_killed_is_made_once_and_drawn(
    slurm, tmp_path, monkeypatch, capsys
):
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "from test_slurm import SIX, given\n"
        "from experiments.framework import making\n"
        f"making.make_runs(SIX, given(Path({str(tmp_path)!r})))\n"
    )
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert first.stdout
    for line in first.stdout:
        if line.startswith(f"{SIX[-1]}: job "):
            break
    first.send_signal(signal.SIGKILL)
    first.communicate()

    drawn, study_of_six = [], given(tmp_path)

    def draw(options: study.Options) -> None:
        drawn.extend(study.summaries(SIX, options))

    exhibit = Exhibit("six", "Six", lambda _: SIX, draw=draw)
    monkeypatch.setattr(scripts, "read_options", lambda *_: study_of_six)
    assert scripts.script("six", exhibit) == 0
    said = capsys.readouterr().out
    assert said.count(", as before") >= 4, said  # T_0 may be there already
    assert len(drawn) == 6
    for run in SIX:
        began = when("StartTime", run, study_of_six)  # there is one job of it alone
        assert not run.start or began >= when("EndTime", run.start, study_of_six)
    assert not list(tmp_path.rglob("*.slurm"))
    making.make_runs(SIX, study_of_six)
    assert capsys.readouterr().out == ""


def test_a_run_that_fails_is_named_and_the_others_go_on(slurm, tmp_path, capsys):
    broken = tiny(3, "base", 1, **{"data.base_classes": 99})
    after = tiny(3, "student/skd", 2, broken, **{"data.base_classes": 99})
    good = tiny(4, "base", 1)
    with pytest.raises(UserError, match=r"2 of 3 runs could not be made.*seed 3 base; .*student"):
        making.make_runs([after, good], given(tmp_path))
    said = capsys.readouterr().out
    log = broken.folder(tmp_path) / "log.txt"
    assert f"seed 3 base: failed: {log.read_text().splitlines()[-1]} ({log})" in said
    assert "error: config.data" in said
    assert "student/skd: left out, since base failed" in said
    assert study.summary(good, given(tmp_path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A long T_0 that nobody stopped, made on this machine."""
    folder = tmp_path_factory.mktemp("whole")
    run = tiny(3, "base", 1, **LONG)
    local.make([run], given(folder, slurm=(), jobs=1))
    return run.folder(folder)


@pytest.fixture
def slow(monkeypatch):
    command = study.Run.command
    monkeypatch.setattr(study.Run, "command", lambda *args: ["-c", SLOW, *command(*args)[2:]])


def test_a_run_that_its_time_limit_stops_goes_on_to_the_same_bits(slurm, slow, whole, tmp_path):
    run = tiny(3, "base", 1, **LONG)
    log = run.folder(tmp_path) / "log.txt"
    lifting = threading.Thread(target=one_time_limit, args=[log], daemon=True)
    lifting.start()
    making.make_runs([run], given(tmp_path, slurm=(("time", 1), ("signal_delay_s", 20))))
    lifting.join()
    assert_was_stopped(log)
    assert_same_bits(run.folder(tmp_path), whole)


def test_a_run_that_another_job_displaces_goes_on_to_the_same_bits(slurm, slow, whole, tmp_path):
    run = tiny(3, "base", 1, **LONG)
    log = run.folder(tmp_path) / "metrics.jsonl"

    def displace() -> None:
        wait_for(log, '"global_step": 8,')
        asked("srun", "--partition=urgent", "--exclusive", "true")

    urgent = threading.Thread(target=displace, daemon=True)
    urgent.start()
    making.make_runs([run], given(tmp_path))
    urgent.join()
    assert_was_stopped(run.folder(tmp_path) / "log.txt")
    assert_same_bits(run.folder(tmp_path), whole)


def wait_for(path: Path, words: str) -> None:
    deadline = time.monotonic() + 600
    while not (path.exists() and words in path.read_text()):
        assert time.monotonic() < deadline, f"no {words} in {path}"
        time.sleep(0.2)


def one_time_limit(log: Path) -> None:
    """Lifts the only job's time limit, the shortest there is, once it has stopped the run."""
    wait_for(log, "stopped at ")
    job = asked("squeue", "--noheader", "--format=%i").strip()
    asked("scontrol", "update", f"JobId={job}", "TimeLimit=60")


def assert_was_stopped(log: Path) -> None:
    said = log.read_text()
    assert said.index("stopped at ") < said.index("going on at "), said


@pytest.fixture(scope="module")
def environment(slurm, tmp_path_factory) -> dict[str, str]:
    """With the command skd-jax, slow until it has been stopped once where SLOW is set."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "skd-jax").write_text(
        "#!/bin/bash\nshift\n"
        f'if [ "$SLOW" ]; then exec {sys.executable} -c {shlex.quote(SLOW)} "$@"; fi\n'
        f'exec {sys.executable} -m skd_jax.main "$@"\n'
    )
    (folder / "skd-jax").chmod(0o755)
    flags = VIRTUAL["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    path = f"{folder}:{os.environ['PATH']}"
    return {**os.environ, **VIRTUAL, "XLA_FLAGS": flags, "PATH": path, "PYTHONPATH": "."}


ARGUMENTS = (
    *("--config=configs/digits.py:tasks=2", *OVERRIDES, "--config.run.phases=1"),
    *(f"--config.{name}={value}" for name, value in LONG.items()),
)


@pytest.fixture(scope="module")
def by_two(environment, repo_root, tmp_path_factory) -> Path:
    """A T_0 trained by two processes that find each other."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    command = ["srun", "-n", "2", "skd-jax", "train", *ARGUMENTS, f"--workdir={workdir}"]
    subprocess.run([*command, "--distributed"], check=True, env=environment, cwd=repo_root)
    return workdir


@pytest.fixture(scope="module")
def repo_root() -> Path:
    return Path(__file__).resolve().parent.parent


def test_two_processes_under_srun_give_the_result_of_one(by_two, tmp_path, environment, repo_root):
    workdir = tmp_path / "run"
    command = ["skd-jax", "train", *ARGUMENTS, f"--workdir={workdir}"]
    subprocess.run(command, check=True, env=environment, cwd=repo_root)
    assert_logs_agree(by_two, workdir)
    here, there = (json.loads((f / "summary.json").read_text()) for f in (by_two, workdir))
    assert here["top1_seen"] == pytest.approx(there["top1_seen"], abs=0.02)


@pytest.mark.parametrize("stopped_by", ["its time limit", "scontrol requeue"])
def test_training_that_is_requeued_goes_on_to_the_same_bits(
    by_two, tmp_path, environment, repo_root, stopped_by
):
    workdir, output = tmp_path / "run", tmp_path / "output.txt"
    minutes, ahead = (1, 20) if stopped_by == "its time limit" else (60, 60)
    flags = ("--nodes=1", "--ntasks=2", "--ntasks-per-node=2", f"--time={minutes}")
    flags += (f"--signal=TERM@{ahead}", f"--output={output}", "--parsable")
    job = subprocess.run(
        ["sbatch", *flags, "experiments/slurm/train.sbatch", *ARGUMENTS, f"--workdir={workdir}"],
        env={**environment, "SLOW": "1"},
        cwd=repo_root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    if stopped_by == "its time limit":
        one_time_limit(output)
    else:
        wait_for(workdir / "metrics.jsonl", '"global_step": 8,')
        asked("scontrol", "requeue", job)
    while asked("squeue", "--noheader"):
        time.sleep(0.5)
    assert_was_stopped(output)
    assert_same_bits(workdir, by_two)
