"""Opening a run: what is there already is looked at, checked and gone on with."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from skd_jax import parallel
from skd_jax.checkpoint import Checkpoint, Checkpoints, Damaged
from skd_jax.config import Config, to_dict
from skd_jax.data import check_workdir
from skd_jax.errors import UserError, warn
from skd_jax.experiment import (
    Experiment,
    Given,
    check_same_config,
    check_same_data,
    check_same_start,
    open_experiment,
)
from skd_jax.files import read_json
from skd_jax.lock import LOCK, locked
from skd_jax.loop import Run, of_this_version
from skd_jax.machine import changes
from skd_jax.methods import from_config_dict, method_of
from skd_jax.model import Model, kept_from
from skd_jax.output import listed
from skd_jax.paths import given_path, replica_folder, run_of
from skd_jax.writer import say


def train(
    config: Config,
    workdir: str | Path,
    say: Callable[[str], None] = say,
    given: Given | None = None,
) -> dict:
    """Runs, or goes on with, a whole experiment.

    Args:
      config: the configuration.
      workdir: everything the run writes goes here; a run already there is gone on with.
      say: prints a line for people.
      given: a model to go on from instead of training T_0, and the images of its new classes.

    Returns:
      The summary, as written to ``workdir/summary.json``.

    Raises:
      UserError: wrong input, before anything is written; a run that cannot be gone on with; too
        many steps with numbers that are not finite; or a checkpoint that cannot be saved.
      Interrupted: Ctrl-C or SIGTERM; the state it came at is saved.
    """
    workdir = given_path(workdir, "--workdir")
    if os.path.exists(workdir) and not os.path.isdir(workdir):
        raise UserError(f"--workdir={workdir} is a file; name a folder")
    whole, seed = run_of(workdir)
    if seed is not None:
        raise UserError(f"--workdir={workdir} holds one seed of the run in {whole}; name that")
    try:
        os.path.abspath(workdir).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"--workdir={workdir}: a checkpoint's path has to be UTF-8, and this is not; name "
            "another folder, or set PYTHONUTF8=1 if it is and Python takes it for something else"
        ) from error
    check_workdir(workdir, config.data)
    say = say if parallel.is_first_process() else _silent
    folder = workdir / "checkpoints"
    # A save under way ends before the lock is given back.
    with (
        contextlib.ExitStack() as stack,
        Checkpoints(folder, config.run.keep_checkpoints) as checkpoints,
    ):
        # A disk that cannot be written to needs no lock: a finished run is only read.
        held = parallel.is_first_process() and os.access(workdir / LOCK, os.W_OK)

        def look() -> list[int]:
            if held:
                stack.enter_context(locked(workdir))
            if started := read_json(workdir / "config.json"):  # the checkpoints hold it too
                check_same_config(config, started, workdir)
            return checkpoints.steps()

        found = parallel.in_every_process(look, lambda steps: _fingerprint(config, steps))
        saved = _newest_sound(checkpoints, found, say)

        def open_all() -> Experiment:
            if saved:
                with of_this_version(saved):
                    check_same_config(config, saved.meta["config"], workdir)
            elif found or checkpoints.damaged.exists() or (workdir / "config.json").exists():
                raise UserError(
                    f"--workdir={workdir} holds a run but no checkpoint of it that can be read "
                    f"(damaged ones are in {checkpoints.damaged}); bring one back from a backup, "
                    "or start anew in another workdir"
                )
            try:
                experiment = open_experiment(config, given=given)
            except UserError as error:
                if not saved:
                    raise
                raise UserError(f"{error} (This run needs the data it began with.)") from error
            if saved:
                files = read_json(workdir / "files.json")
                with of_this_version(saved):
                    check_same_data(experiment, saved.meta["data"], files, workdir)
            return experiment

        experiment = parallel.in_every_process(
            open_all, lambda found: _fingerprint(config, found.data())
        )
        origin = None
        if config.run.start_from and not saved:
            origin = parallel.in_every_process(
                lambda: _origin(experiment), lambda found: json.dumps([found.step, found.meta])
            )
        run = Run(experiment, workdir, checkpoints, say, saved, origin)
        if run.is_finished():
            return _with_remarks(run.results(), say)
        if found := saved or origin:
            where = "this run was at work on" if saved else "config.run.start_from was made on"
            _tell_changes(found, run, where, say)

        def begin() -> None:
            if parallel.is_first_process() and not held:
                stack.enter_context(locked(workdir))
                if checkpoints.steps()[:1] != ([saved.step] if saved else []):
                    raise UserError(
                        f"--workdir={workdir}: another run has begun there; name another"
                    )
            if parallel.is_first_process() and not saved:
                _tell_others(workdir)

        parallel.in_every_process(begin)
        return _with_remarks(run.go(), say)


def _with_remarks(summary: dict, say: Callable[[str], None]) -> dict:
    """The summary, whose remarks are said: what somebody should know who looks no further."""
    for line in summary.get("remarks", ()):
        say(f"note: {line}")
    return summary


def _tell_others(workdir: Path) -> None:
    """Warns of files that are not a run's where a new one begins."""
    names: list[str] = []
    with contextlib.suppress(OSError):  # a folder that may be written to, but not listed
        names = sorted(os.listdir(workdir))
    if others := [name for name in names if name not in (LOCK, "checkpoints")]:
        warn(
            f"--workdir={workdir} has other files, beside which the run writes: {listed(others, 5)}"
        )


def _tell_changes(found: Checkpoint, run: Run, where: str, say: Callable[[str], None]) -> None:
    """Says what bits depend on that is other than when a checkpoint was saved."""
    if change := changes(found.meta.get("machine"), run.machine()):
        say(
            f"warning: not the machine that {where} ({change}): it goes on, to the "
            "same results but for rounding, not to the same bits"
        )


def _origin(experiment: Experiment) -> Checkpoint:
    """Where ``config.run.start_from`` ended."""
    start_from = experiment.config.run.start_from
    where = "config.run.start_from"
    origin = ended(given_path(start_from, where), f"{where}={start_from}")
    with of_this_version(origin):
        check_same_start(experiment, origin.meta)
    return origin


def ended(workdir: Path, where: str) -> Checkpoint:
    """The newest checkpoint of a run that has ended, whole or after some of its phases.

    Args:
      workdir: of the run; or of one seed of several, whose part of the checkpoint it is then.
      where: names it in messages.

    Raises:
      UserError: there is none, it is damaged, or it is in the middle of a phase.
    """
    workdir, seed = run_of(workdir)
    with Checkpoints(workdir / "checkpoints", 1) as checkpoints:
        steps = checkpoints.steps()
        if not steps:
            raise UserError(f"{where} holds no checkpoint; name that of a run that has ended")
        try:
            newest = checkpoints.read(steps[0])
        except Damaged as error:
            raise UserError(
                f"{where}: checkpoint {steps[0]} is damaged ({error}); give the command of that "
                "run again, or name another"
            ) from error
    with of_this_version(newest):
        if newest.meta["step"] or not newest.meta["phase"]:
            raise UserError(
                f"{where} has not ended: its newest checkpoint is in the middle of a phase; give "
                "the command of that run again first"
            )
        return newest if seed is None else _of_seed(newest, seed, where)


def _of_seed(saved: Checkpoint, seed: int, where: str) -> Checkpoint:
    """One replica's part of a checkpoint between two phases: what its run alone would have saved.

    Raises:
      UserError: it has no such seed.
    """
    config, measured = saved.meta["config"], saved.meta["measured"]
    count, place = config["run"].get("replicas", 1), seed - config["seed"]
    if not 0 <= place < count:
        raise UserError(f"{where} holds {_seeds(saved)}, not {seed}; name another")
    if count == 1:
        return saved
    config = {**config, "seed": seed, "run": {**config["run"], "replicas": 1}}
    meta = {**saved.meta, "config": config, "measured": measured[place]}
    arrays = {path: array[place] for path, array in saved.arrays.items()}
    return dataclasses.replace(saved, meta=meta, arrays=arrays)


def _seeds(saved: Checkpoint) -> str:
    config = saved.meta["config"]
    first, count = config["seed"], config["run"].get("replicas", 1)
    return f"seeds {first} to {first + count - 1}" if count > 1 else f"seed {first}"


def _fingerprint(config: Config, found: Any) -> str:
    """What has to be the same in all processes."""
    fields = to_dict(config)
    fields["data"].pop("data_dir")
    return json.dumps([fields, found])


def _newest_sound(
    checkpoints: Checkpoints, steps: Sequence[int], say: Callable[[str], None]
) -> Checkpoint | None:
    """The newest of these steps that agrees with its digests; newer ones are set aside."""
    for step in steps:
        found, reason = None, "another process cannot read it"
        try:
            found = checkpoints.read(step)
        except Damaged as error:
            reason = str(error)
        if parallel.all_agree(found is not None):
            return found

        def moved(step: int = step, reason: str = reason) -> None:
            if parallel.is_first_process():
                aside = checkpoints.set_aside(step)
                say(f"warning: checkpoint {step} is damaged ({reason}) and was moved to {aside}")

        parallel.in_every_process(moved)  # no one goes on before it has gone
    return None


def _silent(line: str) -> None:
    """Instead of ``say`` in processes that do not report."""


def _ended_alone(workdir: str | Path, seed: int | None) -> Checkpoint:
    """That of one run: the only one in a workdir, or that of a seed."""
    folder = given_path(workdir)
    where = f"workdir {workdir}"
    saved = ended(folder, where)
    with of_this_version(saved):
        if seed is not None:
            return _of_seed(saved, seed, where)
        config = saved.meta["config"]
        if config["run"].get("replicas", 1) > 1:
            raise UserError(
                f"{where} holds {_seeds(saved)}; name the folder of one, such as "
                f"{replica_folder(folder, config['seed'])}"
            )
    return saved


def restore(workdir: str | Path, seed: int | None = None) -> tuple[Config, Any]:
    """What the newest checkpoint of a run holds between two phases: for analyses.

    No data set is opened, no module is imported that the checkpoint names, and the devices need not
    be those of the run.

    Args:
      workdir: of the run; nothing there is changed.
      seed: which one's, of a run of several; or ``workdir`` is the folder of that seed.

    Returns:
      The configuration, and what the last finished phase has left: the method's ``kept``, with T_n
      as ``classifier``.

    Raises:
      UserError: there is no sound checkpoint, it is in the middle of a phase, or it is of several
        seeds and none is named.
    """
    saved = _ended_alone(workdir, seed)
    with of_this_version(saved):
        config = from_config_dict(ConfigDict(saved.meta["config"]))
        return config, kept_from(saved.arrays, method_of(config).kept)


def model_of(workdir: str | Path, seed: int | None = None) -> Model:
    """The trained model of a run that has ended, whole or after some of its phases.

    Args:
      workdir: of the run.
      seed: see :func:`restore`.

    Raises:
      UserError: see :func:`restore`.
    """
    saved = _ended_alone(workdir, seed)
    with of_this_version(saved):
        config = from_config_dict(ConfigDict(saved.meta["config"]))
        learned = len(saved.meta["measured"]["rows"])
        names = [str(n) for task in saved.meta["data"]["classes"][:learned] for n in task]
        return Model(config, kept_from(saved.arrays, method_of(config).kept), tuple(names))


if __name__ == "__main__":
    from skd_jax.main import run  # the command line is built on this module

    raise SystemExit(run())
