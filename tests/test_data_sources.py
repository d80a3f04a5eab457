"""Readers: digits, image folders, data sets prepared by TFDS (a tiny one, and the real ones)."""

import dataclasses
import io
import json
import os
import pathlib

import numpy as np
import pytest
from PIL import Image

from skd_jax import data as data_lib
from skd_jax.config import Data
from skd_jax.data.extended import extended_source
from skd_jax.errors import UserError

DIGITS = Data(
    name="digits",
    data_dir="",
    image_size=8,
    channels=1,
    load_size=8,
    fit="squash",
    mean=(0.5,),
    std=(0.5,),
    augment="none",
    pad=0,
    flip=False,
    in_memory=True,
    test_fraction=0.2,
    split_seed=1,
    exclude_classes=(),
    subset=0,
    order_seed=1993,
    max_classes=0,
    base_classes=4,
    tasks=3,
)
RGB = dataclasses.replace(DIGITS, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


def colour_image(value: int, size: tuple[int, int] = (12, 9)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def write_folder(root: pathlib.Path, counts: dict[str, int]) -> None:
    for k, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            suffix = ("png", "bmp", "JPG")[i % 3]
            colour_image(40 * k + i).save(root / name / f"{i:02}.{suffix}")


def folder(root: pathlib.Path, **changes) -> Data:
    return dataclasses.replace(RGB, name="folder", data_dir=str(root), **changes)


def message(data: Data) -> str:
    with pytest.raises(UserError) as error:
        data_lib.open_source(data)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_digits_are_split_by_class_the_same_way_each_time():
    source, again = data_lib.open_source(DIGITS), data_lib.open_source(DIGITS)
    train, test = source.labels("train"), source.labels("test")
    assert source.class_names == tuple("0123456789")
    assert len(train) + len(test) == 1797
    shares = np.bincount(test) / (np.bincount(test) + np.bincount(train))
    np.testing.assert_allclose(shares, 0.2, atol=0.005)
    picked = np.arange(0, len(train), 97)
    images = source.read("train", picked)
    assert images.dtype == np.uint8 and images.shape == (len(picked), 8, 8, 1)
    assert images.max() == 255 and images.min() == 0
    np.testing.assert_array_equal(images, again.read("train", picked))
    other = data_lib.open_source(dataclasses.replace(DIGITS, split_seed=2))
    assert not np.array_equal(train, other.labels("train"))


def test_digits_resize_and_convert():
    big = data_lib.open_source(dataclasses.replace(RGB, load_size=32, image_size=32))
    images = big.read("test", [3, 1])
    assert images.shape == (2, 32, 32, 3)
    np.testing.assert_array_equal(images[..., 0], images[..., 2])


def test_forgotten_images_cannot_be_read():
    source = data_lib.open_source(DIGITS)
    source.forget([0, 5])
    source.forget([5])
    with pytest.raises(RuntimeError, match="finished task"):
        source.read("train", [4, 5])
    assert source.labels("train")[5] == -1
    source.read("train", [4])
    source.read("test", [5])


def test_folder_with_a_split_of_its_own(tmp_path):
    write_folder(tmp_path / "train", {"cat": 3, "ant": 2})
    write_folder(tmp_path / "val", {"cat": 1, "ant": 1})
    source = data_lib.open_source(folder(tmp_path, test_fraction=0.0))
    assert source.class_names == ("ant", "cat")
    np.testing.assert_array_equal(source.labels("train"), [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(source.labels("test"), [0, 1])
    np.testing.assert_array_equal(source.read("train", [3, 0])[:, 4, 4, 0], [1, 40])


SPLIT_NAMES = [
    ("train", "test", "test"),
    ("Train", "Validation", "test"),
    ("training", "valid", "test"),
    ("TRAIN", "val", "test"),
]


@pytest.mark.parametrize(("train", "test", "part"), SPLIT_NAMES)
def test_folder_that_comes_split_is_never_split_anew(tmp_path, capsys, train, test, part):
    write_folder(tmp_path / train, {"cat": 3, "ant": 2})
    write_folder(tmp_path / test, {"cat": 1, "ant": 1})
    source = data_lib.open_source(folder(tmp_path, test_fraction=0.4))
    np.testing.assert_array_equal(source.labels("train"), [0, 0, 1, 1, 1])
    np.testing.assert_array_equal(source.labels(part), [0, 1])
    [said] = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in said and "config.data.test_fraction=0.4" in said
    data_lib.open_source(folder(tmp_path, test_fraction=0.0))  # as it was asked for
    assert capsys.readouterr().err == ""


def test_folders_beside_the_splits_are_told(tmp_path, capsys):
    for split in ("train", "test", "val"):
        write_folder(tmp_path / split, {"cat": 2, "ant": 2})
    write_folder(tmp_path, {"flat": 2})
    source = data_lib.open_source(folder(tmp_path, test_fraction=0.0))
    assert len(source.labels("train")) == len(source.labels("test")) == 4
    [said] = capsys.readouterr().err.splitlines()
    assert said.endswith(
        "images are read from train and test, and these folders are left out: flat, val"
    )


def test_training_split_alone_is_split_and_the_rest_told(tmp_path, capsys):
    write_folder(tmp_path / "train", {"cat": 4, "ant": 4})
    write_folder(tmp_path, {"test": 3})  # images without a class
    source = data_lib.open_source(folder(tmp_path, test_fraction=0.25))
    assert (len(source.labels("train")), len(source.labels("test"))) == (6, 2)
    assert capsys.readouterr().err.strip().endswith("left out: test")
    assert "config.data.test_fraction" in message(folder(tmp_path, test_fraction=0.0))


def test_splits_that_are_missing_or_there_twice_are_refused(tmp_path):
    for split in ("test", "val"):
        write_folder(tmp_path / split, {"cat": 1, "ant": 1})
    assert "has test and val and no train" in message(folder(tmp_path))
    for split in ("train", "validation"):
        write_folder(tmp_path / split, {"cat": 1, "ant": 1})
    assert "has both val and validation" in message(folder(tmp_path))


def test_folder_without_a_split_has_at_least_one_test_image_a_class(tmp_path):
    write_folder(tmp_path, {"a": 2, "b": 9})
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    source = data_lib.open_source(folder(tmp_path, test_fraction=0.1))
    np.testing.assert_array_equal(np.bincount(source.labels("test")), [1, 1])
    assert "config.data.test_fraction" in message(folder(tmp_path, test_fraction=0.0))


def test_what_is_held_out_is_of_the_training_images_alone(tmp_path):
    write_folder(tmp_path / "train", {"cat": 20, "ant": 10})
    write_folder(tmp_path / "val", {"cat": 3, "ant": 3})
    plain = folder(tmp_path, test_fraction=0.0)
    source = data_lib.open_source(dataclasses.replace(plain, held_out=0.2))
    whole = data_lib.open_source(plain)

    def values(of, split) -> list[int]:
        labels = of.labels(split)
        images = of.read(split, np.arange(len(labels)))[:, 4, 4, 0]
        return [1000 * label + value for label, value in zip(labels, images.tolist(), strict=True)]

    np.testing.assert_array_equal(np.bincount(source.labels("test")), [2, 4])
    np.testing.assert_array_equal(np.bincount(source.labels("train")), [8, 16])
    assert sorted(values(source, "train") + values(source, "test")) == values(whole, "train")
    again = data_lib.open_source(dataclasses.replace(plain, held_out=0.2))
    assert values(again, "test") == values(source, "test")
    assert "config.data.held_out" in message(dataclasses.replace(plain, held_out=1.0))
    assert "config.data.held_out" in message(dataclasses.replace(plain, held_out=-0.1))


def test_a_class_too_small_to_hold_out_of_is_named(tmp_path):
    write_folder(tmp_path / "train", {"cat": 1, "ant": 4})
    write_folder(tmp_path / "val", {"cat": 1, "ant": 1})
    said = message(folder(tmp_path, test_fraction=0.0, held_out=0.5))
    assert "'cat'" in said and "config.data.held_out=0.5" in said


def test_fit_crop_takes_the_centre_and_squash_everything(tmp_path):
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = 200
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.fromarray(wide).save(tmp_path / name / f"{i}.png")
    crop = data_lib.open_source(folder(tmp_path, fit="crop")).read("test", [0])
    squash = data_lib.open_source(folder(tmp_path, fit="squash")).read("test", [0])
    assert crop.min() == 200
    assert squash[..., 0, :].max() == 0 and squash[..., 4, :].min() > 150


def test_folder_errors_name_the_place(tmp_path):
    assert "config.data.data_dir=''" in message(dataclasses.replace(RGB, name="folder"))
    assert str(tmp_path / "none") in message(folder(tmp_path / "none"))
    assert "no class sub-folders" in message(folder(tmp_path))
    write_folder(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} holds no images" in message(folder(tmp_path))
    colour_image(1).save(tmp_path / "empty" / "0.png")
    assert "'empty' has 1 image, and config.data.test_fraction=" in message(folder(tmp_path))
    colour_image(1).save(tmp_path / "empty" / "1.png")
    data_lib.open_source(folder(tmp_path))
    (tmp_path / "b" / "text.png").write_text("not an image")
    assert str(tmp_path / "b" / "text.png") in message(folder(tmp_path))


def test_truncated_image_is_found_at_open(tmp_path):
    write_folder(tmp_path, {"a": 3, "b": 3})
    noise = np.random.RandomState(0).randint(0, 255, (64, 64, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    cut = tmp_path / "a" / "cut.png"
    cut.write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    assert f"{cut} cannot be read" in message(folder(tmp_path))


def test_folder_splits_must_have_the_same_classes(tmp_path):
    write_folder(tmp_path / "train", {"a": 2, "b": 2})
    write_folder(tmp_path / "test", {"a": 2})
    words = message(folder(tmp_path, test_fraction=0.0))
    assert str(tmp_path / "test") in words and "'b'" in words


def png(value: int) -> bytes:
    stream = io.BytesIO()
    colour_image(value, (6, 6)).save(stream, "PNG")
    return stream.getvalue()


def write_shard(file: pathlib.Path, records: list[tuple[bytes, int]]) -> None:
    """Writes the images and labels of some records as TFDS does."""
    writer_lib = pytest.importorskip("array_record.python.array_record_module")
    from tensorflow_datasets.proto import tf_example_pb2

    writer = writer_lib.ArrayRecordWriter(str(file), "group_size:1")
    for image, label in records:
        example = tf_example_pb2.Example()
        example.features.feature["image"].bytes_list.value.append(image)
        example.features.feature["label"].int64_list.value.append(label)
        writer.write(example.SerializeToString())
    writer.close()


def write_prepared(
    root: pathlib.Path, name: str, labels: dict[str, list[int]], shards: int = 1
) -> pathlib.Path:
    """Prepares a TFDS data set of 6x6 images, each filled with ten times its label."""
    place = root / name / "1.0.0"
    place.mkdir(parents=True)
    lengths = {}
    for split, values in labels.items():
        parts = [part.tolist() for part in np.array_split(values, shards)]
        for i, part in enumerate(parts):
            file = place / f"{name}-{split}.array_record-{i:05}-of-{shards:05}"
            write_shard(file, [(png(10 * label), label) for label in part])
        lengths[split] = [str(len(part)) for part in parts]
    classes = max(max(values) for values in labels.values()) + 1
    (place / "label.labels.txt").write_text("".join(f"class{i}\n" for i in range(classes)))
    core = "tensorflow_datasets.core.features"
    features = {
        "image": {
            "image": {"dtype": "uint8", "shape": {"dimensions": ["6", "6", "3"]}},
            "pythonClassName": f"{core}.image_feature.Image",
        },
        "label": {
            "classLabel": {"numClasses": str(classes)},
            "pythonClassName": f"{core}.class_label_feature.ClassLabel",
        },
    }
    (place / "features.json").write_text(
        json.dumps(
            {
                "featuresDict": {"features": features},
                "pythonClassName": f"{core}.features_dict.FeaturesDict",
            }
        )
    )
    keys = [{"featureKey": "image"}, {"featureKey": "label"}]
    info = {
        "fileFormat": "array_record",
        "name": name,
        "version": "1.0.0",
        "supervisedKeys": {"tuple": {"items": keys}},
        "splits": [
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": "1000",
                "shardLengths": lengths[split],
            }
            for split in labels
        ],
    }
    (place / "dataset_info.json").write_text(json.dumps(info))
    return place


def test_prepared_data_set_is_read_in_the_order_asked(tmp_path):
    labels = {"train": [1, 0, 2, 1], "validation": [0, 2], "test": [2, 1, 0]}
    write_prepared(tmp_path, "tinyset", labels)
    data = dataclasses.replace(RGB, name="tinyset", data_dir=str(tmp_path), test_fraction=0.0)
    source = data_lib.open_source(data)
    assert source.class_names == ("class0", "class1", "class2")
    np.testing.assert_array_equal(source.labels("train"), labels["train"])
    np.testing.assert_array_equal(source.labels("test"), labels["test"])
    np.testing.assert_array_equal(source.read("train", [2, 1, 3])[:, 0, 0, 0], [20, 0, 10])
    pooled = data_lib.open_source(dataclasses.replace(data, test_fraction=0.3))
    assert len(pooled.labels("train")) + len(pooled.labels("test")) == 9
    images = pooled.read("train", np.arange(len(pooled.labels("train"))))
    np.testing.assert_array_equal(images[:, 3, 3, 1], 10 * pooled.labels("train"))


def test_imagenet_is_tested_on_its_validation_split(tmp_path):
    write_prepared(tmp_path, "imagenet2012", {"train": [0, 1], "validation": [1], "test": [0, 0]})
    data = dataclasses.replace(RGB, name="imagenet2012", data_dir=str(tmp_path), test_fraction=0.0)
    assert "it has imagenet2012:1.0.0" in message(data)  # another version than TFDS's own
    data = dataclasses.replace(data, name="imagenet2012:1.0.0")
    np.testing.assert_array_equal(data_lib.open_source(data).labels("test"), [1])


def test_unprepared_data_set_says_how_to_get_it(tmp_path):
    (tmp_path / "cifar100" / "3.0.2").mkdir(parents=True)
    (tmp_path / "cifar100" / "3.0.2" / "dataset_info.json").write_text("{}")
    words = message(dataclasses.replace(RGB, name="mnist", data_dir=str(tmp_path)))
    for part in (
        "'mnist'",
        str(tmp_path),
        "cifar100",
        "pip install tensorflow",
        "tfds build mnist",
    ):
        assert part in words
    assert "config.data.data_dir" in words
    missing = tmp_path / "nowhere"
    assert "no such folder" in message(
        dataclasses.replace(RGB, name="mnist", data_dir=str(missing))
    )


def test_unknown_name_suggests_close_ones(tmp_path):
    words = message(dataclasses.replace(RGB, name="cifr100", data_dir=str(tmp_path)))
    assert "cifr100" in words and "cifar100" in words
    for name in ("", "cifar100:9.9.9"):
        words = message(dataclasses.replace(RGB, name=name, data_dir=str(tmp_path)))
        assert f"config.data.name={name!r}" in words


@pytest.mark.parametrize(
    ("name", "fraction", "images", "classes"),
    [
        ("cifar100", 0.0, (50_000, 10_000), 100),
        ("caltech101", 0.2, (7315, 1829), 101),
        ("oxford_flowers102", 0.2, (6556, 1633), 102),
    ],
)
def test_real_data(name, fraction, images, classes):
    default = pathlib.Path(__file__).resolve().parents[2] / "shared" / "tensorflow_datasets"
    root = pathlib.Path(os.environ.get("TFDS_DATA_DIR", default))
    if not (root / name).is_dir():
        pytest.skip(f"{name} is not in {root}")
    excluded = ("background_google",) if name == "caltech101" else ()
    data = dataclasses.replace(
        RGB,
        name=name,
        data_dir=str(root),
        image_size=32,
        load_size=32,
        test_fraction=fraction,
        exclude_classes=excluded,
        max_classes=100,
        base_classes=50,
        tasks=10,
    )
    source = data_lib.open_source(data)
    assert (len(source.labels("train")), len(source.labels("test"))) == images
    assert len(source.class_names) - len(excluded) == classes
    schedule = data_lib.class_schedule(data, source.class_names)
    assert [len(task) for task in schedule] == [50] + [5] * 10
    dropped = {source.class_names.index(c) for c in excluded}
    assert not dropped & {c for task in schedule for c in task}
    if name == "cifar100":
        assert set(np.bincount(source.labels("train"))) == {500}
    assert source.read("test", [0, images[1] - 1]).std() > 10


def test_check_folder_that_comes_split_gives_its_test_images(tmp_path):
    write_folder(tmp_path / "new" / "train", {"eel": 3})
    write_folder(tmp_path / "new" / "validation", {"eel": 2})
    write_folder(tmp_path / "check" / "train", {"cat": 5, "ant": 5})  # the model may have had them
    write_folder(tmp_path / "check" / "test", {"cat": 1, "ant": 2})
    source = extended_source(RGB, ("ant", "cat"), tmp_path / "new", tmp_path / "check")
    np.testing.assert_array_equal(source.labels("train"), [2, 2, 2])
    np.testing.assert_array_equal(np.bincount(source.labels("test")), [2, 1, 2])
    images = source.read("test", np.arange(5))[:, 4, 4, 0]
    np.testing.assert_array_equal(images, [0, 1, 40, 41, 0])
