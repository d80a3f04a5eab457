"""Where a run is made, and how what is made again takes the place of what was there."""

import shutil
from pathlib import Path

from experiments.framework import study
from experiments.framework.study import Options, Run
from skd_jax.checkpoint import Checkpoints
from skd_jax.files import GO_ON, write_json, writing

LOG = "log.txt"  # what the run says, in its workdir


def workdir(run: Run, options: Options) -> Path:
    """Where it is made: beside its folder, if that holds what it has found before."""
    folder = run.folder(options.results)
    is_there = (folder / "summary.json").exists()
    return beside(folder, "again") if is_there else folder


def beside(folder: Path, what: str) -> Path:
    """A folder for what belongs to a run's folder and is not in it."""
    return folder.with_name(f"{folder.name}.{what}")


def begin(run: Run, folder: Path) -> None:
    """Makes a run's workdir ready for it, whether it begins or goes on there."""
    with writing(folder, GO_ON):
        folder.mkdir(parents=True, exist_ok=True)
        with Checkpoints(folder / "checkpoints", 1) as checkpoints:
            begun = checkpoints.steps()
        if not begun:
            # What was left of a run that was deleted in part, which begins anew.
            (folder / "config.json").unlink(missing_ok=True)
    write_json(folder / study.SETTINGS, run.settings())


def replace(folder: Path, made: Path) -> None:
    """Puts what was made again where it belongs; at no moment is it, or what was there, lost.

    What a kill leaves undone, :func:`finish_replacing` does at the next start.
    """
    if made == folder:
        return
    before = beside(folder, "before")
    with writing(folder, GO_ON):
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
        made.rename(folder)
        shutil.rmtree(before, ignore_errors=True)  # another command may be at the same


def finish_replacing(run: Run, options: Options) -> None:
    """Does what is left of a replacement that was cut short: the run's folder is there again."""
    folder = run.folder(options.results)
    before, again = beside(folder, "before"), beside(folder, "again")
    if not before.exists():
        return

    with writing(folder, GO_ON):
        if not folder.exists():
            (before if run.lacks(again) else again).rename(folder)
        if not run.lacks(folder):
            shutil.rmtree(before, ignore_errors=True)


def why(run: Run, options: Options) -> str:
    """Why it is made, where it has been made before; ready to follow "started"."""
    folder = run.folder(options.results)
    if not (folder / "summary.json").exists():
        return ""
    lost = run.lacks(folder)
    return f" again, since {lost[0]} is missing" if lost else " again, for its last checkpoint"


def last_line(log: Path) -> str:
    """What a log says last; "" if it says nothing."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 2000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")[:300]
