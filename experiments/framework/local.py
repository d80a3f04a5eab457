"""Runs as processes of this machine, several at a time where that pays."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.framework import cost, workdirs
from experiments.framework.study import Options, Run
from skd_jax.errors import UserError
from skd_jax.writer import say

SECONDS = 60.0  # between two lines about the runs under way


def make(missing: Sequence[Run], options: Options) -> None:
    """Makes runs, each in a process of its own.

    Args:
      missing: each after what it starts from.
      options: of the command line.

    Raises:
      UserError: one cannot be made; the others stop and save where they are.
    """
    cores: list[int | None] = [None] * (options.jobs or 1)
    if options.jobs != 1 and hasattr(os, "sched_getaffinity") and _backend() == "cpu":
        # Two small runs with a core each take less time than one after the other with both.
        free = sorted(os.sched_getaffinity(0))
        cores = [free[n % len(free)] for n in range(options.jobs or len(free))]
    waiting, running, total = list(missing), {}, len(missing)
    say(f"{total} {'run' if total == 1 else 'runs'} to make, {len(cores)} at a time")
    if lines := cost.estimate(missing, len(cores), options):
        say(lines)
    told_at = time.perf_counter()
    try:
        while waiting or running:
            for run in [run for run in waiting if run.start not in (*waiting, *running)]:
                if not cores:
                    break
                core, workdir = cores.pop(), workdirs.workdir(run, options)
                why = workdirs.why(run, options)
                process = _start(run, options, workdir, core)
                running[run] = process, workdir, core, time.perf_counter()
                waiting.remove(run)
                say(f"{run}: started{why}")
            time.sleep(0.5)
            for run, (process, workdir, core, since) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                cores.append(core)
                log = workdir / workdirs.LOG
                if process.returncode:
                    raise UserError(
                        f"{run} ended with exit code {process.returncode}: "
                        f"{workdirs.last_line(log)} ({log})"
                    )
                if lost := run.lacks(workdir):
                    raise UserError(f"{run} ended without {lost[0]}; {log} says why")
                workdirs.replace(run.folder(options.results), workdir)
                minutes = (time.perf_counter() - since) / 60
                left = len(waiting) + len(running)
                say(f"{run}: done in {minutes:.1f} min; {left} of {total} left")
            if time.perf_counter() - told_at > SECONDS:
                told_at = time.perf_counter()
                for run, (_, workdir, *_) in running.items():
                    say(f"  {run}: {workdirs.last_line(workdir / workdirs.LOG)}")
    except KeyboardInterrupt:
        say("stopping: the runs save where they are")
        raise
    finally:
        for process, *_ in running.values():  # they save where they are
            process.terminate()
        for process, *_ in running.values():
            process.wait()


def _start(run: Run, options: Options, workdir: Path, core: int | None) -> subprocess.Popen:
    workdirs.begin(run, workdir)
    command = [sys.executable, *run.command(options.results, options.data_dir, workdir)]
    with _on(core), (workdir / workdirs.LOG).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


@contextlib.contextmanager
def _on(core: int | None) -> Iterator[None]:
    """Processes started meanwhile compute on this core."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _backend() -> str:
    """Asked in another process: this one must not hold the device."""
    ask = "import jax; print(jax.default_backend())"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if found.returncode:
        words = found.stderr.strip().splitlines() or [f"exit code {found.returncode}"]
        raise UserError(f"JAX does not start: {words[-1]}")
    return found.stdout.split()[-1]
