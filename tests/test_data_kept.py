"""What is kept between two starts: unchanged images and labels are not read again."""

import os
import pathlib
import pickle

import numpy as np
import pytest
from test_data_faults import LABELS, tinyset
from test_data_sources import colour_image, folder, message, png, write_prepared, write_shard

from skd_jax import data as data_lib
from skd_jax.data import folder as folder_lib
from skd_jax.data import prepared, records


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> pathlib.Path:
    """An empty cache folder, and files that count as settled at once."""
    root = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("XDG_CACHE_HOME", str(root))
    monkeypatch.setattr(records, "SETTLED", 0.0)
    return root / "skd_jax"


@pytest.fixture
def images(tmp_path) -> pathlib.Path:
    """A folder of two classes with three images each."""
    for name, value in (("ant", 10), ("cat", 100)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            colour_image(value + i).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def shards(tmp_path) -> list[pathlib.Path]:
    """The files of a prepared data set's train split, with three records each."""
    place = write_prepared(tmp_path, "tinyset", LABELS, shards=2)
    return sorted(place.glob("*train*"))


@pytest.fixture
def labels_read(monkeypatch) -> list[int]:
    """The records that were read for their labels."""
    seen, read = [], prepared._Split.read

    def spy(self, field, ids):
        seen.extend(ids if field == "label" else ())
        return read(self, field, ids)

    monkeypatch.setattr(prepared._Split, "read", spy)
    return seen


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The files that were decoded, by name within their folder's parent."""
    seen, decode = [], folder_lib.decode

    def spy(content, name, *rest):
        seen.append("/".join(pathlib.Path(name).parts[-2:]))
        return decode(content, name, *rest)

    monkeypatch.setattr(folder_lib, "decode", spy)
    return seen


def labels(tmp_path: pathlib.Path) -> list[list[int]]:
    source = data_lib.open_source(tinyset(tmp_path))
    return [source.labels(split).tolist() for split in ("train", "test")]


def harm_cache(cache: pathlib.Path, harm) -> None:
    kept = [file for file in cache.rglob("*") if file.is_file()]
    assert kept
    for file in kept:
        harm(file)


HARMS = {
    "empty": lambda file: file.write_bytes(b""),
    "short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "flipped": lambda file: file.write_bytes(
        file.read_bytes()[:-40] + bytes([file.read_bytes()[-40] ^ 1]) + file.read_bytes()[-39:]
    ),
    "pickle": lambda file: file.write_bytes(pickle.dumps(np.array([{}]))),
    "folder": lambda file: (file.unlink(), file.mkdir()),
}


# Labels of a prepared data set


def test_labels_are_read_once(tmp_path, cache, shards, labels_read):
    assert labels(tmp_path) == list(LABELS.values())
    assert len(labels_read) == 9
    labels_read.clear()
    assert labels(tmp_path) == list(LABELS.values())
    assert not labels_read
    kept = sorted((cache / "labels").iterdir())
    assert len(kept) == 2 and all(file.suffix == ".npy" for file in kept)
    found = [np.load(file, allow_pickle=False).tolist() for file in kept]
    assert sorted(found) == sorted(LABELS.values())


@pytest.mark.parametrize("restored", [False, True])
def test_a_changed_shard_is_read_again(tmp_path, cache, shards, labels_read, restored):
    labels(tmp_path)
    labels_read.clear()
    before = shards[0].stat()
    write_shard(shards[0], [(png(0), 2), (png(0), 1), (png(0), 0)])
    if restored:
        assert shards[0].stat().st_size == before.st_size
        os.utime(shards[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    assert labels(tmp_path)[0] == [2, 1, 0, 0, 1, 2]
    assert len(labels_read) == 6  # of its split alone
    assert len(list((cache / "labels").iterdir())) == 2
    write_shard(shards[0], [(png(0), 2), (png(0), 9), (png(0), 0)])
    assert "has label 9" in message(tinyset(tmp_path))
    assert "has label 9" in message(tinyset(tmp_path))  # as kept, too


def test_a_shard_that_has_just_changed_is_not_trusted(
    tmp_path,
    shards,
    labels_read,
    monkeypatch,
):
    monkeypatch.setattr(records, "SETTLED", 60.0)
    labels(tmp_path)
    labels(tmp_path)
    assert len(labels_read) == 18


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_labels_are_read_anew(tmp_path, cache, shards, labels_read, harm):
    labels(tmp_path)
    harm_cache(cache, HARMS[harm])
    labels_read.clear()
    assert labels(tmp_path) == list(LABELS.values())
    assert len(labels_read) == 9
    labels_read.clear()
    assert labels(tmp_path) == list(LABELS.values())
    assert bool(labels_read) == (harm == "folder")  # which nothing can replace


def test_without_a_cache_folder_nothing_is_kept(
    tmp_path,
    images,
    cache,
    shards,
    labels_read,
):
    cache.write_text("no folder")
    for _ in range(2):
        assert labels(tmp_path) == list(LABELS.values())
        data_lib.open_source(folder(images))
    assert len(labels_read) == 18
    assert cache.read_text() == "no folder"


# Image folders


def test_images_are_checked_once(images, cache, decoded):
    first = data_lib.open_source(folder(images)).files
    assert len(decoded) == 6
    decoded.clear()
    assert data_lib.open_source(folder(images)).files == first
    assert not decoded
    assert len(list((cache / "images").iterdir())) == 1


@pytest.mark.parametrize("way", ["written", "moved"])
def test_only_changed_images_are_checked_again(images, decoded, way):
    first = data_lib.open_source(folder(images)).files
    decoded.clear()
    file, other = images / "cat" / "1.png", images / "cat" / "2.png"
    before, content = file.stat(), bytearray(other.read_bytes())
    if way == "written":
        file.write_bytes(content)
    else:
        (images / "moving").write_bytes(content)
        (images / "moving").rename(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size  # only the time of the change tells
    now = data_lib.open_source(folder(images)).files
    assert data_lib.changed_files(first, now) == "cat/1.png has changed"
    assert now["cat/1.png"] == now["cat/2.png"]
    assert decoded == ["cat/1.png"]


def test_a_broken_image_is_found_each_time_and_the_sound_ones_are_kept(images, decoded):
    file = images / "cat" / "2.png"  # the last
    file.write_bytes(png(5)[:-30])
    for _ in range(2):
        assert f"{file} cannot be read as an image" in message(folder(images))
    assert decoded.count("cat/2.png") == 2 and decoded.count("ant/0.png") == 1
    colour_image(3).save(file)
    assert len(data_lib.open_source(folder(images)).files) == 6


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_sums_are_made_anew(images, cache, decoded, harm):
    first = data_lib.open_source(folder(images)).files
    harm_cache(cache, HARMS[harm])
    assert data_lib.open_source(folder(images)).files == first
    assert len(decoded) == 12


def test_folders_are_told_apart(images, tmp_path_factory, decoded):
    other = tmp_path_factory.mktemp("other")
    for name in ("ant", "cat"):
        (other / "set" / name).mkdir(parents=True)
        for i in range(3):
            colour_image(7 + i).save(other / "set" / name / f"{i}.png")
    one = data_lib.open_source(folder(images)).files
    assert data_lib.open_source(folder(other / "set")).files != one
    assert len(decoded) == 12
    assert data_lib.open_source(folder(images)).files == one
    (other / "link").symlink_to(images)
    assert data_lib.open_source(folder(other / "link")).files == one
    assert len(decoded) == 12
