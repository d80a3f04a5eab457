"""What makes a study's runs: the flags that say it, what is submitted, and what a job does."""

import json
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from test_study import options, place, summary

from experiments import choose, everything, table1, table3
from experiments.framework import making, scripts, slurm, study, workdirs
from skd_jax.errors import UserError

JOBS = (("time", 240), ("partition", "gpu"), ("gpus_per_node", 1))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("", "give each job's time limit"),
        ("partition=gpu", "give each job's time limit"),
        ("time=1", "signal_delay_s=90"),
        ("time=0", "time=0: give a whole number"),
        ("time=4h", "time=4h: give a whole number"),
        ("time=5,partion=gpu", "partion: give some of time, partition"),
        ("time=5,partition=", "partition=: give a word"),
        ("time=5,partition=a b", "give a word"),
        ("nowhere.json", "no JSON file that can be read"),
        ("FILE[1]", "give an object"),
        ('FILE{"time": true}', "give a whole number"),
        ('FILE{"time": 5, "partition": 3}', "give a word"),
        ("FILE{", "no JSON file that can be read"),
    ],
)
def test_wrong_words_for_jobs_are_refused(said, words, tmp_path):
    if said.startswith("FILE"):
        (tmp_path / "jobs.json").write_text(said.removeprefix("FILE"))
        said = str(tmp_path / "jobs.json")
    with pytest.raises(UserError) as error:
        slurm.parameters(said)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_jobs_are_said_by_a_flag_or_a_file(tmp_path):
    said = slurm.parameters("time=240,partition=gpu,gpus_per_node=1")
    (tmp_path / "jobs.json").write_text(json.dumps(dict(JOBS)))
    assert said == slurm.parameters(str(tmp_path / "jobs.json")) == JOBS


def run_script(monkeypatch, module, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    return scripts.script(module.__doc__, module.EXHIBIT)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--slurm=time=5",), "only with --launcher=slurm"),
        (("--launcher=slurm",), "time limit"),
        (("--launcher=slurm", "--slurm=time=5", "--jobs=2"), "Slurm says how many"),
        (("--launcher=slurm", "--slurm=time=5"), "run pip install 'submitit>=1.5' first"),
    ],
)
def test_wrong_flags_are_one_line_before_anything_is_made(
    arguments, words, monkeypatch, capsys, tmp_path
):
    monkeypatch.setitem(sys.modules, "submitit", None)
    results = tmp_path / "results"
    assert run_script(monkeypatch, table1, f"--results={results}", *arguments) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not results.exists()


def test_where_there_is_no_slurm_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", types.ModuleType("submitit"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no sbatch here"):
        slurm.submitit()


class Executor:
    """As submitit's: notes what it is given; the n-th job submitted is number n."""

    submitted: list["Executor"]

    def __init__(self, folder, max_num_timeout):
        self.folder, self.timeouts = folder, max_num_timeout

    def update_parameters(self, **parameters):
        self.parameters = parameters

    def submit(self, job):
        self.job = job
        self.submitted.append(self)
        return types.SimpleNamespace(job_id=str(len(self.submitted)))


@pytest.fixture
def submitted(monkeypatch) -> list[Executor]:
    """What is submitted to a Slurm that is not there; its queue is empty."""
    Executor.submitted = []
    utils = types.SimpleNamespace(FailedJobError=type("FailedJobError", (Exception,), {}))
    package = types.SimpleNamespace(
        SlurmExecutor=Executor,
        core=types.SimpleNamespace(utils=utils),
        helpers=types.SimpleNamespace(DelayedSubmission=lambda job: ("again", job)),
    )
    monkeypatch.setattr(slurm, "submitit", lambda: package)
    monkeypatch.setattr(slurm, "EVERY", 0.0)
    monkeypatch.setattr(slurm, "GONE", 0.0)
    monkeypatch.setattr(slurm, "_queue", lambda runs, options: {})
    return Executor.submitted


def chain() -> list[study.Run]:
    """T_0, D_0, and all tasks."""
    found = [study.learner("digits", "paper", 0, 3)]
    while found[0].start:
        found.insert(0, found[0].start)
    return found


def test_each_run_is_a_job_after_the_one_it_starts_from(submitted, monkeypatch, tmp_path, capsys):
    base, student, learner = chain()
    given = options(tmp_path, datasets=(), scale="paper", slurm=JOBS, data_dir="somewhere")
    finished = {base}
    monkeypatch.setattr(study, "summary", lambda run, options: {} if run in finished else None)
    with pytest.raises(UserError, match="2 of 3 runs could not be made"):
        slurm.make([base, student, learner], given)
    after = [one.parameters["dependency"] for one in submitted]
    assert after == [None, "afterok:1", "afterok:2"]
    for run, one in zip(chain(), submitted, strict=True):
        folder = run.folder(tmp_path)
        assert one.folder == folder.with_name(f"{folder.name}.slurm")
        command = run.command(tmp_path, "somewhere", folder)
        assert one.job == slurm.Job(run, given, folder, command)
        assert {**one.parameters, **dict(JOBS)} == one.parameters
        assert one.parameters["additional_parameters"]["kill-on-invalid-dep"] == "yes"
        assert study.read_settings(run, given) == study.plain(run)
    assert len({one.parameters["job_name"] for one in submitted}) == 3
    said = capsys.readouterr().out
    assert f"{base}: done; 2 of 3 left" in said
    assert f"{student}: failed: job 2 left no word" in said
    assert f"{learner}: left out, since student/skd failed" in said


def test_what_is_in_the_queue_is_not_submitted_again(submitted, monkeypatch, tmp_path, capsys):
    base, student, _ = chain()
    given = options(tmp_path, datasets=(), scale="paper", slurm=JOBS)
    queue = {slurm._name(base, given): slurm.Queued("77", "RUNNING", "None")}
    answers = iter([queue, queue, UserError("squeue: no answer"), {}])

    def answer(runs, options):
        found = next(answers, {})
        if isinstance(found, UserError):
            raise found
        return found

    monkeypatch.setattr(slurm, "_queue", answer)
    monkeypatch.setattr(study, "summary", lambda run, options: {})
    slurm.make([base, student], given)
    assert [one.parameters["dependency"] for one in submitted] == ["afterok:77"]
    said = capsys.readouterr().out
    assert f"{base}: job 77, as before" in said and "squeue: no answer" in said
    assert not base.folder(tmp_path).exists()


def test_where_slurm_does_not_answer_nothing_is_submitted(monkeypatch, tmp_path):
    command = tmp_path / "squeue"
    command.write_text("#!/bin/sh\necho 'slurm_load_jobs error: no\ncontroller' >&2; exit 1\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    given = options(tmp_path, datasets=(), scale="paper", slurm=JOBS)
    with pytest.raises(UserError, match="squeue: slurm_load_jobs error: no controller"):
        slurm.make(chain(), given)
    assert list(tmp_path.iterdir()) == [command]


def test_the_queue_is_read_as_slurm_prints_it(monkeypatch, tmp_path):
    """A reason may have spaces."""
    base, student, learner = chain()
    given = options(tmp_path, datasets=(), scale="paper", slurm=JOBS)
    names = [slurm._name(run, given) for run in (base, student)]
    printed = f"{names[0]} 7 RUNNING None\n{names[1]} 8 PENDING launch failed requeued held\n"
    command = tmp_path / "squeue"
    command.write_text(f"#!/bin/sh\nprintf '{printed}'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = slurm._queue([base, student, learner], given)
    assert list(found.values()) == [
        ("7", "RUNNING", "None"),
        ("8", "PENDING", "launch failed requeued held"),
    ]


def test_how_far_jobs_are_is_told(tmp_path, capsys):
    base, student, learner = chain()
    given = options(tmp_path, datasets=(), scale="paper", slurm=JOBS)
    made = {run: run.folder(tmp_path) for run in (base, student, learner)}
    made[base].mkdir(parents=True)
    (made[base] / "log.txt").write_text("step 7\n")
    states = [("7", "RUNNING", "None"), ("8", "PENDING", "Dependency")]
    names = [slurm._name(run, given) for run in (base, student)]
    queue = {name: slurm.Queued(*state) for name, state in zip(names, states, strict=True)}
    slurm._tell(made, made, queue, given)
    assert capsys.readouterr().out == f"  {base}: step 7\n  not running: 1 (Dependency)\n"


def test_a_command_that_is_stopped_leaves_its_jobs_and_says_so(
    submitted, monkeypatch, tmp_path, capsys
):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(slurm, "_wait", interrupt)
    given = options(tmp_path, datasets=(), scale="paper", slurm=JOBS)
    with pytest.raises(KeyboardInterrupt):
        slurm.make(chain(), given)
    assert "scancel 1 2 3" in capsys.readouterr().out


def job(tmp_path: Path, code: str) -> slurm.Job:
    """One that makes T_0 again, by another program."""
    run, given = chain()[0], options(tmp_path, datasets=(), scale="paper", slurm=JOBS)
    folder = place(run, tmp_path, summary(0))
    again = folder.with_name("base.again")
    shutil.copytree(folder, again)
    (again / "new").touch()
    return slurm.Job(run, given, again, ["-c", code])


def test_a_job_puts_what_it_has_made_in_its_place_once(tmp_path):
    one = job(tmp_path, "print('finished')")
    folder = one.workdir.with_name("base")
    one()
    assert (folder / "log.txt").read_text() == "finished\n"
    assert (folder / "new").exists() and not one.workdir.exists()
    one()  # as where it is killed just before its end, and started again
    assert (folder / "log.txt").read_text() == "finished\n"
    folder.rename(one.workdir)  # or in the middle of its moves
    folder.with_name("base.before").mkdir()
    one()
    assert (folder / "new").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("code", "error", "last"),
    [
        ("raise SystemExit('no space')", "exit code 1", "no space"),
        ("import os; os.kill(os.getpid(), 9)", "exit code -9", "ended by SIGKILL"),
    ],
)
def test_a_job_whose_run_fails_fails_and_replaces_nothing(tmp_path, code, error, last):
    one = job(tmp_path, code)
    with pytest.raises(RuntimeError, match=error):
        one()
    assert workdirs.last_line(one.workdir / "log.txt") == last
    assert not (one.workdir.with_name("base") / "new").exists()


RUN = """
import os, signal, sys, time
def stop(*_):
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
os.kill(os.getpid(), signal.SIGUSR2)  # as Slurm does, which signals all processes of a job
print("begun", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("told", ["submitit", "the run"])
def test_a_job_that_is_told_to_stop_saves_and_is_requeued(submitted, monkeypatch, tmp_path, told):
    """The time is nearly over, which submitit hears; or Slurm sends SIGTERM to all processes."""
    one, requeued = job(tmp_path, RUN), []
    log = one.workdir / "log.txt"

    def checkpoint(number, frame):
        requeued.append(one.checkpoint())
        raise SystemExit(-1)

    def tell():
        while not (log.exists() and "begun" in log.read_text()):
            time.sleep(0.01)
        if told == "submitit":
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR2)
        else:
            one._child.terminate()

    monkeypatch.setattr(slurm, "_is_running", lambda: True)
    before = signal.signal(signal.SIGUSR2, checkpoint)
    thread = threading.Thread(target=tell)
    thread.start()
    try:
        with pytest.raises(SystemExit):
            one()
    finally:
        signal.signal(signal.SIGUSR2, before)
        thread.join()
        one._child.wait()
    assert log.read_text() == "begun\nsaved\n"
    assert requeued == [("again", one)] and requeued[0][1]._child is None


def test_a_job_that_was_cancelled_is_not_requeued(monkeypatch, tmp_path):
    monkeypatch.setattr(slurm, "_is_running", lambda: False)
    with pytest.raises(RuntimeError, match="exit code 143"):
        job(tmp_path, "raise SystemExit(143)")()


def told(said: str) -> dict[str, dict[str, str]]:
    """What a dry run says, by run."""
    found, run = {}, ""
    for line in said.splitlines():
        if line.startswith("  "):
            name, _, value = line.strip().partition(": ")
            found[run][name] = value
        else:
            run = line
            assert run not in found
            found[run] = {}
    return found


def test_a_dry_run_tells_each_run_that_is_missing_and_makes_nothing(tmp_path, monkeypatch, capsys):
    base, student, learner = (
        study.base("cifar100", "mini", 1),
        study.student("cifar100", "mini", 1),
        study.learner("cifar100", "mini", 1, 5),
    )
    took = {"base": 3600.0, "delegator": 1800.0}
    place(study.base("cifar100", "mini", 0), tmp_path, summary(0, seconds={"base": 3600.0}))
    place(study.student("cifar100", "mini", 0), tmp_path, summary(0, seconds=took))
    place(base, tmp_path, summary(1, seconds={"base": 3600.0}))  # of which no checkpoint is left
    before = sorted(tmp_path.rglob("*"))
    # No images are needed.
    data_dir = f"--data_dir={tmp_path / 'nowhere'}"
    arguments = ["--seeds=1", "--datasets=cifar100", f"--results={tmp_path}", data_dir]
    assert run_script(monkeypatch, table3, *arguments, "--dry_run") == 0
    said = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    found = told(said)
    assert list(found)[:3] == [str(base), str(student), str(learner)]
    assert found[str(base)]["waits for"] == "nothing"
    assert found[str(base)]["hours"] == "1.00"
    assert found[str(student)]["waits for"] == str(base)
    assert found[str(student)]["hours"] == "0.50"
    assert found[str(learner)]["hours"] == "unknown"
    where = str(tmp_path / "nowhere")
    for run in (student, learner):
        command = shlex.split(found[str(run)]["command"])
        assert command == [sys.executable, *run.command(tmp_path, where, run.folder(tmp_path))]
    # What is made again is made beside what is there, and then takes its place.
    command, *moves = found[str(base)]["command"].split(" && ")
    again = tmp_path / "mini/cifar100/seed1/base.again"
    assert shlex.split(command)[1:] == base.command(tmp_path, where, again)
    again.mkdir()
    (again / "new").touch()
    subprocess.run(" && ".join(moves), shell=True, check=True)
    assert {path.name for path in again.parent.iterdir()} == {"base"}
    assert (again.parent / "base" / "new").exists()
    # And for Slurm, which is not there.
    monkeypatch.setitem(sys.modules, "submitit", None)
    slurm_too = ("--launcher=slurm", "--slurm=time=60", "--dry_run")
    assert run_script(monkeypatch, table3, *arguments, *slurm_too) == 0
    assert list(told(capsys.readouterr().out)) == list(found)


def test_a_dry_run_of_everything_tells_each_run_once(tmp_path, monkeypatch, capsys):
    assert run_script(monkeypatch, everything, f"--results={tmp_path}", "--dry_run") == 0
    found = told(capsys.readouterr().out)
    given = options(tmp_path, seeds=(0, 1, 2))
    assert {str(run) for run in everything.planned(given)} <= set(found)
    for run, words in found.items():
        assert words["waits for"] in ("nothing", *list(found)[: list(found).index(run)])
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_choices_tells_what_waits_for_none(tmp_path, capsys):
    given = options(
        tmp_path, seeds=(0,), datasets=("digits",), methods=("sdc",), tasks=(3,), dry_run=True
    )
    choose.choose(given)
    found = list(told(capsys.readouterr().out))
    assert len(found) == 1 + 5 and all("held_out" in run for run in found)


def test_a_run_that_its_command_alone_has_made_is_taken(tmp_path, capsys):
    run = study.base("digits", "paper", 0)
    folder = place(run, tmp_path, summary(0))
    given = options(tmp_path, datasets=(), scale="paper")
    settings = (folder / study.SETTINGS).read_bytes()
    (folder / study.SETTINGS).rename(folder / "config.json")
    making.make_runs([run], given)
    assert "to make" not in capsys.readouterr().out
    assert (folder / study.SETTINGS).read_bytes() == settings
