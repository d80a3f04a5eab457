"""Files that are written whole or not at all, and what is no file."""

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.framework import panels
from skd_jax import page, plots
from skd_jax.errors import UserError
from skd_jax.files import read_json, whole, write_json


def test_what_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), whole(path, mode="w") as file:
        file.write("after")
        file.flush()
        raise ZeroDivisionError
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["x.txt"]


def test_a_link_leads_to_what_is_written(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x.txt").write_text("before")
    link = tmp_path / "link.txt"
    link.symlink_to("far/x.txt")
    with whole(link, mode="w") as file:
        file.write("after")
    assert link.is_symlink() and (tmp_path / "far" / "x.txt").read_text() == "after"
    assert os.listdir(tmp_path / "far") == ["x.txt"]


def test_a_runs_files_replace_a_link_and_leave_what_it_leads_to(tmp_path):
    """Which may be another run's, where a workdir is one of links to that."""
    (tmp_path / "other.json").write_text('{"of": "another run"}')
    (tmp_path / "summary.json").symlink_to("other.json")
    write_json(tmp_path / "summary.json", {"of": "this one"})
    assert read_json(tmp_path / "summary.json") == {"of": "this one"}
    assert read_json(tmp_path / "other.json") == {"of": "another run"}
    assert sorted(os.listdir(tmp_path)) == ["other.json", "summary.json"]


def full_disk(descriptor: int) -> None:
    """In place of ``os.fsync``."""
    raise OSError(28, "full")


def test_a_full_disk_leaves_a_runs_file_and_says_that_the_run_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"of": "before"})
    monkeypatch.setattr("os.fsync", full_disk)
    again = r"summary\.json cannot be written \(full\); fix that .* run the same command again"
    with pytest.raises(UserError, match=again):
        write_json(path, {"of": "after"})
    assert read_json(path) == {"of": "before"} and os.listdir(tmp_path) == ["summary.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == {"of": "before"} and os.listdir(tmp_path) == ["summary.json"]


def test_a_full_disk_where_a_person_named_the_file_asks_for_another(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", full_disk)
    another = r"x\.txt cannot be written \(full\); name another place"
    with pytest.raises(UserError, match=another), whole(tmp_path / "x.txt", mode="w"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()), daemon=True)
    reader.start()
    with whole(pipe, mode="w") as file:
        file.write("words")
    reader.join(10)
    assert found == ["words"] and pipe.is_fifo()


def test_what_a_process_has_open_is_written_to(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("before ")
    with path.open("a") as opened, whole(f"/dev/fd/{opened.fileno()}", mode="w") as file:
        file.write("words")
    assert path.read_text() == "before words"


def test_a_reader_that_has_gone_is_no_fault_of_the_disk(tmp_path):
    read, write = os.pipe()
    os.close(read)
    with pytest.raises(BrokenPipeError), whole(f"/dev/fd/{write}", mode="w") as file:
        file.write("words")
    os.close(write)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="it is a folder"), whole(tmp_path, mode="w"):
        pass


@pytest.mark.parametrize("name", ["x.png", "x.PNG", "x.pdf", "x.jpg", "x.svg", "x"])
def test_pictures_are_of_the_format_that_the_name_says(tmp_path, name):
    path = tmp_path / "new" / name
    plots.loss_terms({"loss": [(1, 2.0), (2, 1.0)]}, path)
    begin = {"png": b"\x89PNG", "pdf": b"%PDF", "jpg": b"\xff\xd8", "svg": b"<?xml"}
    assert path.read_bytes().startswith(begin[path.suffix[1:].lower() or "png"])
    assert os.listdir(path.parent) == [name]


@pytest.mark.parametrize("write", ["grid", "figure", "page", "panel"])
def test_a_picture_that_cannot_be_drawn_leaves_the_one_before(tmp_path, monkeypatch, write):
    path = tmp_path / "x.png"

    def draw() -> None:
        if write == "grid":
            plots.image_grid(np.zeros((2, 4, 4, 1)), path, (0.5,), (0.5,))
        elif write == "figure":
            plots.loss_terms({"loss": [(1, 2.0)]}, path)
        elif write == "page":
            page.write(path, "title", ["words"])
        else:
            panels.save(Figure(figsize=(1, 1)), path)

    draw()
    before = path.read_bytes()
    real = os.fsync

    def full(descriptor: int) -> None:
        real(descriptor)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        draw()
    assert path.read_bytes() == before and os.listdir(tmp_path) == [Path(path).name]
