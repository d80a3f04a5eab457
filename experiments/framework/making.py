"""Makes the runs that are missing, several at a time where that pays, and draws what they found."""

import argparse
import contextlib
import functools
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import jax

from experiments.framework import cost, study
from experiments.framework.exhibit import Exhibit
from experiments.framework.study import Options, Run
from experiments.framework.tables import SCALES, Table
from skd_jax.checkpoint import Checkpoints
from skd_jax.data import open_source
from skd_jax.errors import UserError, accept_any_character, on_platform
from skd_jax.methods import METHODS
from skd_jax.paths import given_path
from skd_jax.train import ended
from skd_jax.writer import say, write_json, writing

SECONDS = 60.0  # between two lines about the runs under way


def read_options(description: str, compares: bool = False) -> Options:
    """Reads the command line of a script.

    Args:
      description: of the script.
      compares: whether it compares methods, and so takes --methods and --tasks.

    Raises:
      UserError: a value is not one that can be used.
    """
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--scale", choices=tuple(SCALES), default="mini", help="of the networks and data")
    add("--seeds", default="0,1,2", help="of the runs, with commas between them")
    add("--datasets", default="", help=f"of {','.join(study.BENCHMARKS)}; else all that are there")
    add("--results", type=given_path, default=study.RESULTS, help="where everything is written")
    add(
        "--data_dir",
        type=_path_or_default,
        default="",
        help="TFDS's data directory; its own default without it",
    )
    add("--jobs", type=int, default=0, help="runs at a time; 0: one a core, on a GPU or TPU one")
    if compares:
        add("--methods", default="", help=f"to compare, from one T_0: of {','.join(METHODS)}")
        add("--tasks", default="", help="numbers of tasks of the comparison; else all there are")
    given = parser.parse_args()
    if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", given.seeds):
        raise UserError(f"--seeds={given.seeds}: give numbers with commas between them")
    seeds = tuple(int(seed) for seed in given.seeds.split(","))
    if len(set(seeds)) < len(seeds):
        raise UserError(f"--seeds={given.seeds}: give each once")
    named = tuple(filter(None, given.datasets.split(",")))
    for name in named:
        known = [one for one in study.BENCHMARKS if study.has_scale(one, given.scale)]
        if name not in known:
            raise UserError(
                f"--datasets={name}: give some of {', '.join(known)}, which have "
                f"--scale={given.scale}"
            )
    methods, tasks = _compared(given) if compares else ((), ())
    if given.jobs < 0:
        raise UserError(f"--jobs={given.jobs}: give 1 or more, or 0")
    with writing(given.results):
        given.results.mkdir(parents=True, exist_ok=True)
    return Options(
        given.scale, seeds, named, given.results, given.data_dir, given.jobs, methods, tasks
    )


def _compared(given: argparse.Namespace) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The methods and numbers of tasks that a command line names."""
    methods = tuple(dict.fromkeys(filter(None, given.methods.split(","))))
    for name in methods:
        if name not in METHODS:
            raise UserError(f"--methods={name}: give some of {', '.join(METHODS)}")
    if not re.fullmatch(r"(\d{1,4}(,\d{1,4})*)?", given.tasks):
        raise UserError(f"--tasks={given.tasks}: give numbers with commas between them")
    tasks = tuple(int(number) for number in filter(None, given.tasks.split(",")))
    return methods, tasks


def _path_or_default(text: str) -> str:
    return str(given_path(text)) if text else ""


def make_runs(wanted: Sequence[Run], options: Options, with_checkpoints: bool = False) -> None:
    """Makes those runs that are not finished, and what they start from.

    Args:
      wanted: the runs.
      options: of the command line.
      with_checkpoints: their checkpoints are needed too.

    Raises:
      UserError: one cannot be made; or there are results of other settings in its place.
    """
    missing: dict[Run, None] = {}  # in the order they are to be made in

    def want(run: Run, with_checkpoint: bool) -> None:
        _finish_replacing(run, options)
        study.check_settings(run, options)
        finished = study.summary(run, options) is not None
        if run in missing or (finished and (not with_checkpoint or is_over(run, options))):
            return
        if run.start:
            want(run.start, True)
        missing[run] = None

    for run in wanted:
        named = not options.datasets or run.dataset in options.datasets
        if named and study.has_scale(run.dataset, run.scale):
            want(run, with_checkpoints)
    there = prepared({run.dataset: None for run in missing}, options)
    if to_make := [run for run in missing if run.dataset in there]:
        _make(to_make, options)


def prepared(datasets: Iterable[str], options: Options) -> set[str]:
    """Those whose images are there. Says of the others that they are left out, unless named.

    Raises:
      UserError: one that was named is not there.
    """
    return {name for name in datasets if _is_prepared(name, options)}


@functools.cache
def _is_prepared(name: str, options: Options) -> bool:
    try:
        open_source(
            study.base(name, options.scale, 0).config(options.results, options.data_dir).data
        )
    except UserError as error:
        words = str(error).replace("config.data.data_dir", "--data_dir")
        if options.datasets:
            raise UserError(words) from error
        say(f"{name} is left out: {words}")
        return False
    return True


def is_over(run: Run, options: Options) -> bool:
    """Whether a sound checkpoint of its end is there."""
    folder = run.folder(options.results)
    try:
        return ended(folder, str(folder)).meta["phase"] >= run.phases
    except UserError:
        return False


def _workdir(run: Run, options: Options) -> Path:
    """Where it is made: beside its folder, if that holds what it has found before."""
    folder = run.folder(options.results)
    is_there = (folder / "summary.json").exists()
    return _beside(folder, "again") if is_there else folder


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f"{folder.name}.{what}")


def _replace(folder: Path, workdir: Path) -> None:
    """Puts what was made again where it belongs; at no moment is it, or what was there, lost.

    What a kill leaves undone, ``_finish_replacing`` does at the next start.
    """
    if workdir == folder:
        return
    before = _beside(folder, "before")
    with writing(folder):
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
        workdir.rename(folder)
        shutil.rmtree(before)


def _finish_replacing(run: Run, options: Options) -> None:
    """Does what is left of a replacement that was cut short: the run's folder is there again."""
    folder = run.folder(options.results)
    before, again = _beside(folder, "before"), _beside(folder, "again")
    if not before.exists():
        return

    def is_whole(made: Path) -> bool:
        return all((made / name).exists() for name in run.leaves())

    with writing(folder):
        if not folder.exists():
            (again if is_whole(again) else before).rename(folder)
        if is_whole(folder):
            shutil.rmtree(before, ignore_errors=True)


def _why(run: Run, options: Options) -> str:
    folder = run.folder(options.results)
    if not (folder / "summary.json").exists():
        return ""
    lost = [name for name in run.leaves() if not (folder / name).exists()]
    return f" again, since {lost[0]} is missing" if lost else " again, for its last checkpoint"


def _make(missing: list[Run], options: Options) -> None:
    """Runs them, each in a process of its own."""
    cores: list[int | None] = [None] * (options.jobs or 1)
    if options.jobs != 1 and hasattr(os, "sched_getaffinity") and _backend() == "cpu":
        # Two small runs with a core each take less time than one after the other with both.
        free = sorted(os.sched_getaffinity(0))
        cores = [free[n % len(free)] for n in range(options.jobs or len(free))]
    waiting, running, total = list(missing), {}, len(missing)
    say(f"{total} {'run' if total == 1 else 'runs'} to make, {len(cores)} at a time")
    if lines := estimate(missing, len(cores), options):
        say(lines)
    told_at = time.perf_counter()
    try:
        while waiting or running:
            for run in [run for run in waiting if run.start not in (*waiting, *running)]:
                if not cores:
                    break
                core, workdir, why = cores.pop(), _workdir(run, options), _why(run, options)
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
                if process.returncode:
                    raise UserError(
                        f"{run} ended with exit code {process.returncode}: {_last_line(workdir)} "
                        f"({workdir / 'log.txt'})"
                    )
                _replace(run.folder(options.results), workdir)
                minutes = (time.perf_counter() - since) / 60
                left = len(waiting) + len(running)
                say(f"{run}: done in {minutes:.1f} min; {left} of {total} left")
            if time.perf_counter() - told_at > SECONDS:
                told_at = time.perf_counter()
                for run, (_, workdir, *_) in running.items():
                    say(f"  {run}: {_last_line(workdir)}")
    except KeyboardInterrupt:
        say("stopping: the runs save where they are")
        raise
    finally:
        for process, *_ in running.values():  # they save where they are
            process.terminate()
        for process, *_ in running.values():
            process.wait()


def estimate(missing: Sequence[Run], at_a_time: int, options: Options) -> str:
    """How long these runs will take, in words, by what the same took of other seeds; or "".

    Args:
      missing: each after what it starts from.
      at_a_time: so many.
      options: of the command line.
    """
    seeds = study.with_all_seeds(options).seeds
    ends: dict[Run, float] = {}  # minutes from now, with a core for each
    known = []
    for run in missing:
        others = (cost.minutes(run.with_seed(seed), options) for seed in seeds)
        took = [minutes for minutes in others if minutes is not None]
        known += [statistics.mean(took)] if took else []
        start = ends.get(run.start, 0.0) if run.start else 0.0
        ends[run] = start + (known[-1] if took else 0.0)
    if not known:
        return ""
    minutes = max([*ends.values(), sum(known) / at_a_time])
    words = f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
    unknown = f", and {n} of unknown length" if (n := len(missing) - len(known)) else ""
    return f"about {words}, as the same took of other seeds{unknown}"


def _start(run: Run, options: Options, workdir: Path, core: int | None) -> subprocess.Popen:
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        with Checkpoints(workdir / "checkpoints", 1) as checkpoints:
            begun = checkpoints.steps()
        if not begun:
            # What was left of a run that was deleted in part, which begins anew.
            (workdir / "config.json").unlink(missing_ok=True)
    write_json(workdir / study.SETTINGS, run.settings())
    command = [sys.executable, *run.command(options.results, options.data_dir, workdir)]
    with _on(core), (workdir / "log.txt").open("ab") as log:
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


def _last_line(workdir: Path) -> str:
    log = workdir / "log.txt"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:300]


def _backend() -> str:
    """Asked in another process: this one must not hold the device."""
    ask = "import jax; print(jax.default_backend())"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=False)
    if found.returncode:
        words = found.stderr.strip().splitlines() or [f"exit code {found.returncode}"]
        raise UserError(f"JAX does not start: {words[-1]}")
    return found.stdout.split()[-1]


def draw(exhibit: Exhibit, options: Options) -> Table | None:
    """Draws a table or figure, writes its table, and returns that, if it has one."""
    if exhibit.draw:
        exhibit.draw(options)
    if not exhibit.table:
        return None
    if table := exhibit.table(options):
        study.write_table(options, exhibit.name, table)
    return table


def exit_code(work: Callable[[], object]) -> int:
    """Does ``work`` and returns the exit code; wrong input is one line."""
    accept_any_character()
    try:
        with on_platform():
            work()
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def script(description: str | None, *exhibits: Exhibit, comparisons: Sequence[Exhibit] = ()) -> int:
    """Makes what is missing of tables and figures, draws them, and returns the exit code.

    Args:
      description: of the script; its first line is shown.
      exhibits: its tables and figures; --datasets chooses among them.
      comparisons: those that it shows in their place where --methods names some.
    """

    def work() -> None:
        options = read_options((description or "").splitlines()[0], bool(comparisons))
        if options.tasks and not options.methods:
            numbers = ",".join(map(str, options.tasks))
            raise UserError(f"--tasks={numbers}: only for a comparison; name its --methods")
        of = comparisons if options.methods else exhibits
        has = {run.dataset: None for exhibit in of for run in exhibit.runs(options)}
        if options.tasks and not has:
            raise UserError(f"--tasks={options.tasks}: this script compares none of so many")
        for name in options.datasets:
            if name not in has:
                raise UserError(f"--datasets={name}: this script has runs of {', '.join(has)}")
        chosen = [exhibit for exhibit in of if _is_of(exhibit, options)]
        make_runs([run for one in chosen if not one.make for run in one.runs(options)], options)
        for exhibit in chosen:
            if exhibit.make:
                exhibit.make(options)
        options = study.with_all_seeds(options)
        shown = [one for one in chosen if study.summaries(one.runs(options), options)]
        if not shown:
            names = ", ".join(exhibit.name for exhibit in chosen)
            raise UserError(f"nothing of {names} has been run, so there is nothing to draw")
        for exhibit in shown:
            if table := draw(exhibit, options):
                say(table.markdown())
        say(f"written to {options.out}")

    return command(work)


def command(work: Callable[[], object]) -> int:
    """Does ``work``, which makes runs, and returns the exit code; Ctrl-C stops and saves them."""
    # This process, which starts the others, must not hold the device.
    jax.config.update("jax_platforms", "cpu")
    with _stopped_as_by_ctrl_c():
        try:
            return exit_code(work)
        except KeyboardInterrupt:
            print("interrupted: the same command goes on", file=sys.stderr)
            return 130


def _is_of(exhibit: Exhibit, options: Options) -> bool:
    """Whether it shows some of the data sets that were named, if any was."""
    return not options.datasets or any(
        run.dataset in options.datasets for run in exhibit.runs(options)
    )


@contextlib.contextmanager
def _stopped_as_by_ctrl_c() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP, too, stop the runs, which save where they are."""
    numbers = filter(None, (signal.SIGTERM, getattr(signal, "SIGHUP", None)))  # not on Windows
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as under nohup
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
