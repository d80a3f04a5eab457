"""The command line of the scripts of tables and figures: read it, make what is missing, draw."""

import argparse
import contextlib
import dataclasses
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from experiments.framework import slurm, study
from experiments.framework.exhibit import Exhibit
from experiments.framework.making import make_runs
from experiments.framework.study import Options
from experiments.framework.tables import SCALES, Table
from skd_jax.errors import UserError, accept_any_character, on_platform
from skd_jax.files import ELSEWHERE, writing
from skd_jax.paths import given_path
from skd_jax.writer import say


def read_options(description: str, compares: bool = False, rows: Sequence[str] = ()) -> Options:
    """Reads the command line of a script.

    Args:
      description: of the script.
      compares: whether it compares methods, and so takes --methods and --tasks.
      rows: of its tables of changes, if it has such, which --rows chooses from.

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
    add("--launcher", choices=("local", "slurm"), default="local", help="what makes the runs")
    add("--slurm", default="", help="time=MINUTES,partition=NAME,... of each job; or a JSON file")
    add("--dry_run", action="store_true", help="only say which runs are missing, and how to make")
    if compares:
        add(
            "--methods",
            default="",
            help=f"to compare, from one T_0: of {','.join(study.compared())}",
        )
        add("--tasks", default="", help="numbers of tasks of the comparison; else all there are")
    if rows:
        add("--rows", default="", help=f"of the table; else all: {', '.join(rows)}")
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
    some = tuple(filter(None, given.rows.split(","))) if rows else ()
    if given.jobs < 0:
        raise UserError(f"--jobs={given.jobs}: give 1 or more, or 0")
    jobs = _launched(given)
    if not given.dry_run:
        with writing(given.results, ELSEWHERE):
            given.results.mkdir(parents=True, exist_ok=True)
    found = Options(
        given.scale, seeds, named, given.results, given.data_dir, given.jobs, methods, tasks, some
    )
    return dataclasses.replace(found, slurm=jobs, dry_run=given.dry_run)


def _launched(given: argparse.Namespace) -> tuple[tuple[str, Any], ...]:
    """What a command line says of Slurm's jobs; nothing if this machine makes the runs."""
    if given.launcher == "local":
        if given.slurm:
            raise UserError(f"--slurm={given.slurm}: only with --launcher=slurm")
        return ()
    if given.jobs:
        raise UserError(f"--jobs={given.jobs}: Slurm says how many; leave it out")
    found = slurm.parameters(given.slurm)
    if not given.dry_run:
        slurm.submitit()
    return found


def _compared(given: argparse.Namespace) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The methods and numbers of tasks that a command line names."""
    methods = tuple(dict.fromkeys(filter(None, given.methods.split(","))))
    for name in methods:
        if name not in study.compared():
            raise UserError(f"--methods={name}: give some of {', '.join(study.compared())}")
    if not re.fullmatch(r"(\d{1,4}(,\d{1,4})*)?", given.tasks):
        raise UserError(f"--tasks={given.tasks}: give numbers with commas between them")
    tasks = tuple(int(number) for number in filter(None, given.tasks.split(",")))
    return methods, tasks


def _path_or_default(text: str) -> str:
    return str(given_path(text)) if text else ""


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
        rows = tuple(dict.fromkeys(row for exhibit in exhibits for row in exhibit.rows))
        options = read_options((description or "").splitlines()[0], bool(comparisons), rows)
        if options.tasks and not options.methods:
            numbers = ",".join(map(str, options.tasks))
            raise UserError(f"--tasks={numbers}: only for a comparison; name its --methods")
        of = comparisons if options.methods else exhibits
        whole = dataclasses.replace(options, rows=())
        has = {run.dataset: None for exhibit in of for run in exhibit.runs(whole)}
        if options.tasks and not has:
            raise UserError(f"--tasks={options.tasks}: this script compares none of so many")
        for name in options.datasets:
            if name not in has:
                raise UserError(f"--datasets={name}: this script has runs of {', '.join(has)}")
        chosen = [exhibit for exhibit in of if _is_of(exhibit, whole)]
        rows = list(dict.fromkeys(row for exhibit in chosen for row in exhibit.rows))
        for name in options.rows:
            if name not in rows:
                raise UserError(f"--rows={name}: give some of {', '.join(rows)}")
        make_runs([run for one in chosen if not one.make for run in one.runs(options)], options)
        for exhibit in chosen:
            if exhibit.make:
                exhibit.make(options)
        if options.dry_run:
            return
        options = study.with_all_seeds(whole)
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
