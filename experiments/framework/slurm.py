"""Runs as jobs of a Slurm cluster. Submitit submits them, and requeues those that are stopped."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.framework import cost, study, workdirs
from experiments.framework.study import Options, Run
from skd_jax.errors import UserError
from skd_jax.paths import given_path
from skd_jax.writer import say

EVERY = 10.0  # seconds between two looks at the queue
SECONDS = 60.0  # between two lines about the runs under way
TIMEOUTS = 100  # time limits that one run may reach, going on after each
# How a run ends that was told to: it has saved, or had not begun to listen.
STOPPED = tuple(code for n in (signal.SIGINT, signal.SIGTERM, 1) for code in (128 + n, -n))
GONE = 60.0  # seconds that what a job has written may take to be seen here

# What --slurm may say of each job, by sbatch's names; numbers are whole.
PARAMETERS: dict[str, type] = {
    "time": int,  # minutes
    "partition": str,
    "account": str,
    "qos": str,
    "constraint": str,
    "nodelist": str,
    "exclude": str,
    "cpus_per_task": int,
    "gpus_per_node": int,
    "gres": str,
    "mem": str,  # as "8G"
    "signal_delay_s": int,  # so long before the time limit a run saves and is requeued
}


def parameters(said: str) -> tuple[tuple[str, Any], ...]:
    """What ``--slurm`` says of each job.

    Args:
      said: "time=240,partition=gpu"; or the path of a JSON file that holds such values by name.

    Returns:
      Names among ``PARAMETERS`` with their values; the time is one of them.

    Raises:
      UserError: anything in it is wrong.
    """
    given: Mapping[str, Any] = {}
    if "=" in said:
        parts = (part.partition("=") for part in said.split(","))
        given = {name: value for name, _, value in parts}
    elif said:
        given = _read(given_path(said, "--slurm"))
    found = tuple((name, _value(name, value)) for name, value in given.items())
    limit, delay = dict(found).get("time"), dict(found).get("signal_delay_s", 90)
    if limit is None:
        raise UserError("--slurm: give each job's time limit in minutes, as --slurm=time=240")
    if 60 * limit <= delay:
        raise UserError(
            f"--slurm: time={limit}: that is over before signal_delay_s={delay}, when a run saves"
        )
    return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--slurm={path}: no JSON file that can be read ({error})") from error
    if not isinstance(given, dict):
        raise UserError(f'--slurm={path}: give an object, as {{"time": 240}}')
    return given


def _value(name: str, value: Any) -> Any:
    if name not in PARAMETERS:
        raise UserError(f"--slurm: {name}: give some of {', '.join(PARAMETERS)}")
    if PARAMETERS[name] is str:
        if isinstance(value, str) and re.fullmatch(r"[^\s']+", value):
            return value
        raise UserError(f"--slurm: {name}={value}: give a word")
    if isinstance(value, bool) or not re.fullmatch(r"[1-9]\d{0,6}", str(value)):
        raise UserError(f"--slurm: {name}={value}: give a whole number, 1 or more")
    return int(value)


def submitit() -> Any:
    """The package, and so that there is a Slurm to talk to.

    Raises:
      UserError: one of them is not there.
    """
    try:
        import submitit  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("--launcher=slurm: run pip install 'submitit>=1.5' first") from error
    for program in ("sbatch", "srun", "squeue"):
        if not shutil.which(program):
            raise UserError(f"--launcher=slurm: no {program} here; start it where Slurm is")
    return submitit


class Queued(NamedTuple):
    """A job in the queue.

    Attributes:
      number: of the job.
      state: as Slurm calls it, "RUNNING".
      why: it does not run, "Dependency"; "None" if it does.
    """

    number: str
    state: str
    why: str


def make(missing: Sequence[Run], options: Options) -> None:
    """Makes runs, each as a job, and waits for all of them.

    A job of an earlier command that is still in the queue is waited for and not submitted again;
    Slurm itself is asked, so that nothing is lost where that command was killed.

    Args:
      missing: each after what it starts from.
      options: of the command line.

    Raises:
      UserError: some could not be made; the others have been.
    """
    total = len(missing)
    say(f"{total} {'run' if total == 1 else 'runs'} to make, each a job")
    if lines := cost.estimate(missing, total, options):
        say(f"{lines}, if all of them run at once")
    jobs: dict[Run, str] = {}
    made = {run: workdirs.workdir(run, options) for run in missing}  # where each is
    try:
        queue = _queue(missing, options)
        for run in missing:
            after = jobs.get(run.start) if run.start else None
            if there := queue.get(_name(run, options)):
                jobs[run] = there.number
                say(f"{run}: job {there.number}, as before")
                continue
            why = workdirs.why(run, options)
            jobs[run] = _submit(run, made[run], after, options)
            say(f"{run}: job {jobs[run]}{f', after job {after}' if after else ''}{why}")
        failed = _wait(jobs, made, options)
    except KeyboardInterrupt:
        ids = " ".join(jobs.values())
        say(f"the jobs go on, and the same command waits for them; to end them: scancel {ids}")
        raise
    if failed:
        names = "; ".join(map(str, failed))
        raise UserError(f"{len(failed)} of {total} runs could not be made, see above: {names}")


def _wait(jobs: Mapping[Run, str], made: Mapping[Run, Path], options: Options) -> list[Run]:
    """Waits until no job is left, and returns the runs that were not made."""
    waiting, failed, told_at = dict(jobs), [], time.perf_counter()
    gone: dict[Run, float] = {}  # since when a job is not in the queue
    while waiting:
        time.sleep(EVERY)
        try:
            queue = _queue(list(waiting), options)
        except UserError as error:  # Slurm restarts now and then
            say(str(error))
            continue
        for run, job in list(waiting.items()):
            folder = run.folder(options.results)
            if _name(run, options) in queue:
                gone.pop(run, None)
            elif _is_made(run, made[run], options):
                del waiting[run]
                shutil.rmtree(_of_submitit(folder), ignore_errors=True)
                say(f"{run}: done; {len(waiting)} of {len(jobs)} left")
            elif time.perf_counter() - gone.setdefault(run, time.perf_counter()) >= GONE:
                del waiting[run]
                failed.append(run)
                if run.start and run.start in failed:
                    say(f"{run}: left out, since {run.start.name} failed")
                else:
                    say(f"{run}: failed: {_last_words(folder, made[run], job)}")
        if time.perf_counter() - told_at > SECONDS:
            told_at = time.perf_counter()
            _tell(waiting, made, queue, options)
    return failed


def _tell(
    waiting: Iterable[Run],
    made: Mapping[Run, Path],
    queue: Mapping[str, Queued],
    options: Options,
) -> None:
    """Says how far the runs are that run, and why the others do not."""
    why = collections.Counter()
    for run in waiting:
        there = queue.get(_name(run, options))
        if there and there.state == "RUNNING":
            say(f"  {run}: {workdirs.last_line(made[run] / workdirs.LOG)}")
        elif there:
            why[there.why] += 1
    if why:
        say("  not running: " + ", ".join(f"{count} ({word})" for word, count in why.items()))


def _is_made(run: Run, workdir: Path, options: Options) -> bool:
    is_in_place = workdir == run.folder(options.results) or not workdir.exists()
    return is_in_place and study.summary(run, options) is not None


def _last_words(folder: Path, workdir: Path, job: str) -> str:
    """What a job that failed said last, and where: the run itself, or what started it."""
    logs = (workdir / workdirs.LOG, _of_submitit(folder) / f"{job}_0_log.out")
    for log in logs:
        if words := workdirs.last_line(log):
            return f"{words} ({log})"
    return f"job {job} left no word (it was cancelled, or never started)"


def _of_submitit(folder: Path) -> Path:
    return workdirs.beside(folder, "slurm")


def _name(run: Run, options: Options) -> str:
    """Of a run's job: the same for the same folder, and for no other."""
    folder = str(run.folder(options.results).absolute())
    digest = hashlib.sha256(folder.encode()).hexdigest()[:12]
    said = re.sub(r"[^\w.=-]", "_", f"{run.dataset}-{run.scale}-{run.seed}-{run.name}")
    return f"{said}-{digest}"


def _queue(runs: Sequence[Run], options: Options) -> dict[str, Queued]:
    """Those of these runs that are in the queue, by the names of their jobs.

    Raises:
      UserError: Slurm does not answer.
    """
    names = ",".join(_name(run, options) for run in runs)
    command = ["squeue", "--noheader", f"--name={names}", "--format=%j %i %T %r"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode:
        raise UserError(f"squeue: {' '.join(found.stderr.split())}")
    rows = (line.split(maxsplit=3) for line in found.stdout.splitlines())
    return {name: Queued(*rest) for name, *rest in rows}


def _submit(run: Run, workdir: Path, after: str | None, options: Options) -> str:
    """Submits a run, and returns its job's number."""
    package, folder = submitit(), run.folder(options.results)
    workdirs.begin(run, workdir)
    command = run.command(options.results, options.data_dir, workdir)
    executor = package.SlurmExecutor(_of_submitit(folder), max_num_timeout=TIMEOUTS)
    more = {"requeue": True, "kill-on-invalid-dep": "yes"}  # it ends where what it waits for fails
    try:
        executor.update_parameters(
            **dict(options.slurm),
            job_name=_name(run, options),
            dependency=f"afterok:{after}" if after else None,
            stderr_to_stdout=True,
            additional_parameters=more,
        )
        return executor.submit(Job(run, options, workdir, command)).job_id
    except (package.core.utils.FailedJobError, subprocess.CalledProcessError, OSError) as error:
        words = [line for line in str(error).splitlines() if line.strip()]
        raise UserError(f"--launcher=slurm: sbatch: {words[-1].strip()}") from error


@dataclasses.dataclass
class Job:
    """What a job does: the run as a process of its own, as on one machine.

    Attributes:
      run: the run.
      options: of the command line that submits it.
      workdir: where it is made.
      command: of the run, without Python.
    """

    run: Run
    options: Options
    workdir: Path
    command: list[str]
    _child: subprocess.Popen | None = dataclasses.field(
        default=None, init=False, repr=False, compare=False
    )

    def __call__(self) -> None:
        """Makes the run.

        Raises:
          RuntimeError: it failed.
        """
        workdirs.finish_replacing(self.run, self.options)
        if not self.workdir.exists():  # it was killed after it had put that in its place
            return
        # Slurm signals all processes of a job. What tells submitit that time is nearly over would
        # end the run, which knows only SIGTERM: a signal that is blocked stays so in the child.
        soon = {signal.SIGUSR2}
        with (self.workdir / workdirs.LOG).open("ab") as log:
            signal.pthread_sigmask(signal.SIG_BLOCK, soon)
            child = self._child = subprocess.Popen(
                [sys.executable, *self.command], stdout=log, stderr=subprocess.STDOUT
            )
            signal.pthread_sigmask(signal.SIG_UNBLOCK, soon)
            _wait_for(child)
            code = child.wait()
            if code in STOPPED and _is_running():  # Slurm is about to give the machine to another
                signal.raise_signal(signal.SIGUSR2)
            if code < 0:  # it had no time for a last word
                log.write(f"ended by {signal.Signals(-code).name}\n".encode())
        if code:
            raise RuntimeError(f"the run ended with exit code {code}")
        signal.pthread_sigmask(signal.SIG_BLOCK, soon)  # no time is needed any more
        workdirs.replace(self.run.folder(self.options.results), self.workdir)

    def checkpoint(self) -> Any:
        """Stops the run, which saves where it is; submitit requeues what this returns."""
        if self._child:  # else it has not been started yet
            self._child.terminate()
            _wait_for(self._child)
        return submitit().helpers.DelayedSubmission(dataclasses.replace(self))


def _wait_for(child: subprocess.Popen) -> None:
    """Waits until a process has ended."""
    # Not Popen's wait: the signal that leads to ``checkpoint`` comes in the middle of it.
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)


def _is_running() -> bool:
    """Whether this job goes on, as far as Slurm knows; not if somebody has cancelled it."""
    command = ["squeue", "--noheader", f"--jobs={os.environ['SLURM_JOB_ID']}", "--format=%T"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() == "RUNNING"
