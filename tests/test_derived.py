"""Numbers drawn from runs' checkpoints: kept, made anew, left out, and stopped."""

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from experiments import figure4, replay
from experiments.framework import derived, study
from skd_jax.errors import UserError
from skd_jax.files import write_json

SUMMARY = {"accuracy_matrix": [[0.5]], "delegator": [], "seconds": {}}


def options(results: Path, datasets: tuple[str, ...] = ()) -> study.Options:
    return study.Options("mini", (0,), datasets, results, "", 1)


def add(a: int, b: int) -> int:
    return a + b


def refuse(a: int) -> None:
    raise UserError(f"{a} is wrong")


def die() -> None:
    os._exit(7)


def take_a_minute(path: Path) -> None:
    path.touch()
    time.sleep(60)


def make(path: Path, made_of, work, *given) -> None:
    derived.make(path, lambda: made_of, [], options(path.parent), "working", work, *given)


def test_what_is_there_is_not_made_again_unless_it_is_of_something_else(tmp_path, capsys):
    path = tmp_path / "found.json"
    make(path, [1], add, 2, 3)
    assert derived.read(path, [1]) == 5
    assert derived.read(path, [2]) is None
    assert derived.read(path, None) is None
    make(path, [1], die)
    make(path, None, die)
    assert capsys.readouterr().out.count("working") == 1
    make(path, [2], add, 3, 4)
    assert derived.read(path, [2]) == 7


def test_what_goes_wrong_there_is_told_here(tmp_path):
    path = tmp_path / "found.json"
    with pytest.raises(UserError, match="3 is wrong"):
        make(path, [1], refuse, 3)
    with pytest.raises(UserError, match="die ended with exit code 7"):
        make(path, [1], die)
    assert not path.exists()


@pytest.fixture
def interruptible():
    """A process that was started in the background may ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_study_that_is_stopped_stops_it(tmp_path):
    begun = tmp_path / "begun"

    def stop() -> None:
        while not begun.exists():
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    since = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "found.json", [1], take_a_minute, begun)
    assert time.monotonic() - since < 50
    thread.join()


@pytest.mark.parametrize("module", [figure4, replay])
@pytest.mark.parametrize("datasets", [("caltech101",), ()])
def test_runs_that_are_not_to_be_had_are_left_out(tmp_path, capsys, module, datasets):
    # On a fresh clone, and without images.
    given = dataclasses.replace(options(tmp_path, datasets), data_dir=str(tmp_path / "none"))
    for run in module.runs(given):
        folder = run.folder(tmp_path)
        folder.mkdir(parents=True)
        write_json(folder / "settings.json", run.settings())
        write_json(folder / "summary.json", {**SUMMARY, "seed": 0})
        for name in run.leaves()[1:]:
            (folder / name).touch()
    module.make(given)
    said = capsys.readouterr().out
    assert "embedding" not in said
    assert "learning" not in said
    assert ("cifar100 is left out" in said) == (not datasets)
    assert not list(tmp_path.glob(f"**/{module.NAME}*.json"))
