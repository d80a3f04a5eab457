"""Finds the runs that are missing, and has them made: here, or by Slurm."""

import dataclasses
import functools
import shlex
import sys
from collections.abc import Iterable, Sequence

from experiments.framework import cost, local, slurm, study, workdirs
from experiments.framework.study import Options, Run
from skd_jax.data import open_source
from skd_jax.errors import UserError
from skd_jax.train import ended
from skd_jax.writer import say


def make_runs(wanted: Sequence[Run], options: Options, with_checkpoints: bool = False) -> None:
    """Makes those runs that are not finished, and what they start from.

    Args:
      wanted: the runs.
      options: of the command line; with ``dry_run`` they are only told.
      with_checkpoints: their checkpoints are needed too.

    Raises:
      UserError: one cannot be made; or there are results of other settings in its place.
    """
    missing: dict[Run, None] = {}  # in the order they are to be made in

    def want(run: Run, with_checkpoint: bool) -> None:
        if not options.dry_run:
            workdirs.finish_replacing(run, options)
        study.check_settings(run, options)
        finished = study.summary(run, options) is not None
        if finished and not options.dry_run:
            study.keep_settings(run, options)
        if run in missing or (finished and (not with_checkpoint or is_over(run, options))):
            return
        if run.start:
            want(run.start, True)
        missing[run] = None

    for run in wanted:
        named = not options.datasets or run.dataset in options.datasets
        if named and study.has_scale(run.dataset, run.scale):
            want(run, with_checkpoints)
    if options.dry_run:
        for run in missing:
            _tell(run, run.start in missing, dataclasses.replace(options, seeds=()))
        return
    there = prepared({run.dataset: None for run in missing}, options)
    if to_make := [run for run in missing if run.dataset in there]:
        _make(to_make, options)


def _make(missing: Sequence[Run], options: Options) -> None:
    (slurm if options.slurm else local).make(missing, options)


@functools.cache  # several tables, of some seeds or all, share it
def _tell(run: Run, waits: bool, options: Options) -> None:
    """Says how a run is made by hand, or by any scheduler, in the repository's root."""
    folder, workdir = run.folder(options.results), workdirs.workdir(run, options)
    minutes = cost.expected(run, options)
    command = [sys.executable, *run.command(options.results, options.data_dir, workdir)]
    words = shlex.join(command)
    if workdir != folder:  # what workdirs.replace does
        paths = (folder, workdir, workdirs.beside(folder, "before"))
        there, made, before = (shlex.quote(str(path)) for path in paths)
        words += f" && mv {there} {before} && mv {made} {there} && rm -r {before}"
    say(
        f"{run}\n  waits for: {run.start if waits else 'nothing'}\n"
        f"  hours: {'unknown' if minutes is None else f'{minutes / 60:.2f}'}\n  command: {words}"
    )


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
