"""A run that is made again replaces what was there, whenever that is cut short."""

import shutil
from pathlib import Path

import pytest

from experiments.framework import making, study, workdirs
from skd_jax.files import read_json, write_json


class Killed(BaseException):
    pass


@pytest.fixture
def run(monkeypatch) -> study.Run:
    monkeypatch.setattr(making, "_make", lambda missing, options: pytest.fail(f"made {missing}"))
    return study.base("digits", "paper", 0)


@pytest.fixture
def options(tmp_path) -> study.Options:
    return study.Options("paper", (0,), (), tmp_path, "", 0)


def fill(folder: Path, run: study.Run, found: str) -> None:
    folder.mkdir(parents=True)
    for name in run.leaves():
        (folder / name).write_text("{}")
    write_json(folder / study.SETTINGS, run.settings())
    write_json(folder / "summary.json", {"found": found})


def found(folder: Path) -> str | None:
    return (read_json(folder / "summary.json") or {}).get("found")


def beside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


@pytest.mark.parametrize("kill", range(7))
def test_a_replacement_that_is_cut_short_is_finished(run, options, monkeypatch, kill):
    """Killed before and after each of the renames, and in what is deleted."""
    folder = run.folder(options.results)
    again, before = (folder.with_name(f"{folder.name}.{what}") for what in ("again", "before"))
    fill(folder, run, "old")
    fill(again, run, "new")
    fill(before, run, "older")
    calls = iter(range(100))

    def breaking(work):
        def call(path, *args, **kwargs):
            if next(calls) == kill:
                raise Killed
            work(path, *args, **kwargs)
            if next(calls) == kill:
                raise Killed

        return call

    def half(path, **kwargs):
        (path / "summary.json").unlink()
        if next(calls) == kill:
            raise Killed
        shutil_rmtree(path, **kwargs)

    shutil_rmtree = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", breaking(Path.rename))
        patch.setattr(shutil, "rmtree", half)
        if kill == 6:  # not at all
            workdirs.replace(folder, again)
        else:
            with pytest.raises(Killed):
                workdirs.replace(folder, again)
    assert "new" in (found(again), found(folder))
    assert "old" in (found(folder), found(before)) or found(folder) == "new"

    making.make_runs([run], options)
    old = kill in (0, 1)  # nothing was moved yet: the old one is there, and the new one still is
    assert found(folder) == ("old" if old else "new")
    assert beside(folder) == sorted([folder.name, *([again.name] if old else [])])
    making.make_runs([run], options)
    assert found(folder) == ("old" if old else "new")


def test_a_replacement_by_what_is_not_whole_is_undone(run, options):
    folder = run.folder(options.results)
    again, before = (folder.with_name(f"{folder.name}.{what}") for what in ("again", "before"))
    fill(before, run, "old")
    fill(again, run, "new")
    (again / "metrics.jsonl").unlink()
    making.make_runs([run], options)
    assert found(folder) == "old" and beside(folder) == sorted([folder.name, again.name])


def test_what_was_before_stays_until_there_is_something_whole(run, options, monkeypatch):
    folder = run.folder(options.results)
    before = folder.with_name(f"{folder.name}.before")
    fill(before, run, "old")
    folder.mkdir()
    made = []
    monkeypatch.setattr(making, "_make", lambda missing, options: made.extend(missing))
    making.make_runs([run], options)
    assert made == [run] and found(before) == "old"
