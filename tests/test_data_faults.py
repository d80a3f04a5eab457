"""Broken images, missing and damaged shards, wrong labels, changed folders: the place is named."""

import dataclasses
import pathlib

import numpy as np
import pytest
from test_data_sources import RGB, colour_image, folder, message, png, write_prepared, write_shard

from skd_jax import data as data_lib
from skd_jax.config import Data
from skd_jax.errors import UserError

LABELS = {"train": [0, 1, 2, 0, 1, 2], "test": [2, 1, 0]}
HARMS = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1000]),
    "cut to a block": lambda file: file.write_bytes(file.read_bytes()[: 1 << 16]),
    "flipped in a record": lambda file: flip(file, file.read_bytes().index(b"IHDR")),
    "flipped in the footer": lambda file: flip(file, (1 << 16) + 64),
    "of fewer records": lambda file: write_shard(file, [(png(0), 0)] * 2),
    "of more records": lambda file: write_shard(file, [(png(0), 0)] * 4),
    "text": lambda file: file.write_text("not an array_record\n" * 10_000),
}


def flip(file: pathlib.Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


@pytest.fixture
def images(tmp_path) -> pathlib.Path:
    """A folder of two classes with three images each."""
    for name, value in (("ant", 10), ("cat", 100)):
        (tmp_path / name).mkdir()
        for i in range(3):
            colour_image(value + i).save(tmp_path / name / f"{i}.png")
    return tmp_path


@pytest.fixture
def shards(tmp_path) -> list[pathlib.Path]:
    """The files of a prepared data set's train split, with three records each."""
    place = write_prepared(tmp_path, "tinyset", LABELS, shards=2)
    return sorted(place.glob("*train*"))


def tinyset(tmp_path: pathlib.Path) -> Data:
    return dataclasses.replace(RGB, name="tinyset", data_dir=str(tmp_path), test_fraction=0.0)


def read_fails(source: data_lib.Source, *words: str) -> None:
    """Reading the training images fails with one line that has ``words``."""
    with pytest.raises(UserError) as error:
        source.read("train", np.arange(len(source.labels("train"))))
    said = str(error.value)
    assert "\n" not in said and " object at 0x" not in said
    assert all(word in said for word in words), said


# Image folders


@pytest.mark.parametrize("content", [b"", b"hello", png(5)[:-30]])
def test_broken_image_is_named_at_open(images, content):
    (images / "cat" / "1.png").write_bytes(content)
    said = message(folder(images))
    assert f"{images / 'cat' / '1.png'} cannot be read as an image" in said
    assert " object at 0x" not in said and "or move it away" in said


def test_image_that_cannot_be_opened_is_named(images):
    (images / "cat" / "3.png").symlink_to("nowhere")
    words = f"{images / 'cat' / '3.png'} cannot be read (No such file or directory)"
    assert words in message(folder(images))


@pytest.mark.parametrize("content", [None, b"", b"hello", png(5)[:-30]])
def test_image_that_breaks_after_opening_is_named(images, content):
    source = data_lib.open_source(folder(images))
    for file in images.rglob("*.png"):  # one of them at least is a training image
        file.unlink() if content is None else file.write_bytes(content)
    gone = ("No such file or directory", "restore it")
    read_fails(source, str(images), ".png cannot be read", *(gone if content is None else ()))


def test_files_of_a_folder_are_sized_and_summed(images):
    (images / "cat" / "2.png").rename(images / "cat" / "2.ppm")
    (images / "cat" / "2.ppm").write_bytes(b"P6 1 1 255\n\1\2\3")
    (images / "cat" / "notes.txt").write_text("no image")
    source = data_lib.open_source(folder(images))
    names = [f"{name}/{i}.png" for name in ("ant", "cat") for i in range(3)]
    assert sorted(source.files) == [*names[:5], "cat/2.ppm"]
    assert source.files["cat/2.ppm"] == [14, 0xE852D663]  # as gzip sums them
    assert data_lib.open_source(folder(images)).files == source.files
    source.forget([0])
    assert len(source.files) == 6


def test_splits_of_a_folder_share_its_files(images, tmp_path_factory):
    root = tmp_path_factory.mktemp("split")
    for split in ("train", "val"):
        (root / split).symlink_to(images)
    source = data_lib.open_source(folder(root, test_fraction=0.0))
    assert len(source.files) == 12 and "val/cat/2.png" in source.files


def test_other_data_sets_have_no_files(tmp_path, shards):
    assert data_lib.open_source(tinyset(tmp_path)).files is None
    assert data_lib.open_source(dataclasses.replace(RGB, name="digits")).files is None


def test_changed_folder_is_noticed(images):
    before = data_lib.open_source(folder(images)).files
    assert data_lib.changed_files(before, dict(reversed(before.items()))) is None

    def changed() -> str | None:
        return data_lib.changed_files(before, data_lib.open_source(folder(images)).files)

    assert changed() is None
    file = images / "cat" / "2.png"
    file.write_bytes(file.read_bytes() + b"\0")  # decodes to the same image
    assert changed() == "cat/2.png has changed"
    (images / "cat" / "1.png").unlink()
    assert changed() == "cat/1.png is gone (and 1 more file differs)"
    colour_image(1).save(images / "ant" / "9.png")
    assert changed() == "ant/9.png is new (and 2 more files differ)"


def test_change_that_keeps_the_size_is_noticed():
    before, now = {"a/0.png": [100, 1], "a/1.png": [100, 2]}, {"a/0.png": [100, 1]}
    assert data_lib.changed_files(before, now | {"a/1.png": [100, 3]}) == "a/1.png has changed"
    assert data_lib.changed_files({}, {}) is None


# Prepared data sets


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_shard_is_named_at_open(tmp_path, shards, harm):
    data_lib.open_source(tinyset(tmp_path))
    HARMS[harm](shards[1])
    said = message(tinyset(tmp_path))
    assert str(shards[1]) in said and str(shards[0]) not in said
    assert f"--data_dir={tmp_path}" in said and "restore the shard" in said
    assert "records, but should have 3" in said or "records" not in harm
    assert len(said) < 640


def test_record_of_a_damaged_shard_is_numbered(tmp_path, shards):
    flip(shards[1], shards[1].read_bytes().rindex(b"IHDR"))
    words = f"record 5 of split 'train' of tinyset, in {shards[1]}, cannot be read"
    assert words in message(tinyset(tmp_path))


@pytest.mark.parametrize("size", [0, 500])
def test_shard_that_is_cut_short_after_opening_is_named(tmp_path, shards, size):
    source = data_lib.open_source(tinyset(tmp_path))
    with open(shards[0], "r+b") as file:
        file.truncate(size)
    read_fails(source, "of split 'train' of tinyset", str(shards[0]), "restore the shard")


def test_shard_that_is_damaged_after_opening_is_named(tmp_path, shards):
    source = data_lib.open_source(tinyset(tmp_path))
    with open(shards[1], "r+b") as file:
        content = file.read()
        file.seek(content.index(b"IHDR"))
        file.write(b"XXXX")
    read_fails(source, f"record 3 of split 'train' of tinyset, in {shards[1]}, cannot be read")


def test_broken_image_in_a_record_is_named(tmp_path, shards):
    write_shard(shards[1], [(png(0), 0), (b"no image", 1), (png(20), 2)])
    words = f"record 4 of split 'train' of tinyset, in {shards[1]}, cannot be read as an image"
    read_fails(data_lib.open_source(tinyset(tmp_path)), words, "unknown format")
    write_shard(shards[1], [(png(0), 0), (png(10)[:-30], 1), (png(20), 2)])
    read_fails(data_lib.open_source(tinyset(tmp_path)), words)


@pytest.mark.parametrize("label", [-1, -7, 3, 1000, 2**32, 2**40 + 1])
@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_wrong_label_is_named(tmp_path, shards, label, fraction):
    write_shard(shards[0], [(png(0), 0), (png(0), label), (png(0), 0)])
    said = message(dataclasses.replace(tinyset(tmp_path), test_fraction=fraction))
    assert f"record 1 of split 'train' of tinyset, in {shards[0]}," in said
    assert f"has label {label}," in said and "3 classes are 0 to 2" in said


def test_wrong_labels_are_counted(tmp_path, shards):
    write_shard(shards[1], [(png(0), 0), (png(0), 9), (png(0), -1)])
    assert "(2 records have such labels)" in message(tinyset(tmp_path))


def test_record_without_a_label_is_named(tmp_path, shards):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(shards[0]), "group_size:1")
    for _ in range(3):
        writer.write(b"")
    writer.close()
    assert f"record 0 of split 'train' of tinyset, in {shards[0]}," in message(tinyset(tmp_path))


def test_split_without_labels_is_left_out(tmp_path):
    write_prepared(tmp_path, "tinyset", {"train": LABELS["train"], "test": [-1, -1]})
    assert "no test split of its own" in message(tinyset(tmp_path))
    source = data_lib.open_source(dataclasses.replace(tinyset(tmp_path), test_fraction=0.5))
    assert len(source.labels("train")) + len(source.labels("test")) == 6


def test_training_split_without_labels_is_named(tmp_path):
    write_prepared(tmp_path, "tinyset", {"train": [-1, -1], "test": LABELS["test"]})
    for fraction in (0.0, 0.3):
        said = message(dataclasses.replace(tinyset(tmp_path), test_fraction=fraction))
        assert "record 0 of split 'train'" in said and "label -1" in said


def test_damaged_description_is_named(tmp_path, shards):
    (shards[0].parent / "dataset_info.json").write_text('{"name": "tiny')
    said = message(tinyset(tmp_path))
    assert "config.data.name='tinyset'" in said and str(tmp_path) in said
