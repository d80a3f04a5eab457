"""Class orders, subsets and task splits against numpy's global generator and listed values."""

import dataclasses

import numpy as np
import pytest
from test_data_sources import DIGITS

from skd_jax import data as data_lib
from skd_jax.errors import UserError

NAMES = tuple(f"c{i}" for i in range(12))
DATA = dataclasses.replace(DIGITS, tasks=2)


def test_order_is_lucirs():
    order = data_lib.class_order(100, 1993)
    np.testing.assert_array_equal(order[:10], [68, 56, 78, 8, 23, 84, 90, 65, 74, 76])
    np.testing.assert_array_equal(np.sort(order), np.arange(100))


def test_orders_equal_the_global_generator_and_leave_it_alone():
    state = np.random.get_state()
    np.random.seed(7)
    expected = np.arange(30)
    np.random.shuffle(expected)
    np.random.seed(7)
    chosen = np.random.choice(30, 5, replace=False)
    before = np.random.get_state()[1].copy()
    np.testing.assert_array_equal(data_lib.class_order(30, 7), expected)
    np.testing.assert_array_equal(data_lib.choose_classes(30, 5, 7), chosen)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.random.set_state(state)


def test_imagenet_subset():
    chosen = data_lib.choose_classes(1000, 100, 1993)
    np.testing.assert_array_equal(chosen[:6], [54, 7, 894, 512, 126, 337])
    config = dataclasses.replace(DATA, subset=100, base_classes=50, tasks=5)
    schedule = data_lib.class_schedule(config, [f"n{i:04}" for i in range(1000)])
    assert [len(task) for task in schedule] == [50, 10, 10, 10, 10, 10]
    flat = [c for task in schedule for c in task]
    assert flat == chosen[data_lib.class_order(100, 1993)].tolist()


def test_excluded_classes_are_left_out_before_ordering():
    config = dataclasses.replace(DATA, exclude_classes=("c1", "c5"), base_classes=4, tasks=3)
    schedule = data_lib.class_schedule(config, NAMES)
    left = np.array([0, 2, 3, 4, 6, 7, 8, 9, 10, 11])
    assert sum(schedule, ()) == tuple(left[data_lib.class_order(10, 1993)].tolist())
    assert [len(task) for task in schedule] == [4, 2, 2, 2]


def test_max_classes_cuts_the_order():
    config = dataclasses.replace(DATA, max_classes=6)
    schedule = data_lib.class_schedule(config, NAMES)
    assert sum(schedule, ()) == tuple(data_lib.class_order(12, 1993)[:6].tolist())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_classes": 0}, ["config.data.base_classes=0"]),
        ({"base_classes": 12}, ["config.data.base_classes=12", "none of the 12"]),
        ({"tasks": 0}, ["config.data.tasks=0"]),
        ({"tasks": 3}, ["config.data.tasks=3", "config.data.base_classes=4", "[1, 2, 4, 8]"]),
        ({"exclude_classes": ("dog",)}, ["config.data.exclude_classes", "dog"]),
        ({"subset": 13}, ["config.data.subset=13", "12"]),
        ({"max_classes": -1}, ["config.data.max_classes=-1"]),
    ],
)
def test_wrong_schedules_say_what_to_change(change, words):
    with pytest.raises(UserError) as error:
        data_lib.class_schedule(dataclasses.replace(DATA, **change), NAMES)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fit": "fill"}, ["config.data.fit='fill'", "squash"]),
        ({"augment": "mixup"}, ["config.data.augment='mixup'", "resized_crop"]),
        ({"channels": 2}, ["config.data.channels=2"]),
        ({"mean": (0.5, 0.5)}, ["config.data.mean has 2 values for 1"]),
        ({"std": ()}, ["config.data.std has 0 values"]),
        ({"std": (0.0,)}, ["config.data.std"]),
        ({"load_size": 4}, ["config.data.load_size=4", "config.data.image_size=8"]),
        ({"load_size": 10, "augment": "crop"}, ["config.data.augment='crop'", "load_size=10"]),
        ({"order_seed": -1}, ["config.data.order_seed=-1"]),
        ({"test_fraction": 1.0}, ["config.data.test_fraction=1.0"]),
    ],
)
def test_wrong_fields_are_named(change, words):
    with pytest.raises(UserError) as error:
        data_lib.check(dataclasses.replace(DATA, **change))
    assert all(word in str(error.value) for word in words), error.value


def test_batches_larger_than_a_task_are_named():
    data_lib.check_batches("base.batch", 100, 0, 100)
    with pytest.raises(UserError, match=r"config\.base\.batch=101 .* 100 .* task 0"):
        data_lib.check_batches("base.batch", 101, 0, 100)
    with pytest.raises(UserError, match=r"config\.method\.batch=21 .* 20 .* task 1"):
        data_lib.check_batches("method.batch", 21, 1, 20)
    with pytest.raises(UserError, match=r"config\.method\.batch=0 must be at least 1"):
        data_lib.check_batches("method.batch", 0, 1, 20)


ANIMALS = ("ant", "bee", "cat, wild", "dog", "eel", "fox")


def named(said: str, **changes) -> list[str]:
    data = dataclasses.replace(DIGITS, base_classes=2, tasks=1, class_order=said, **changes)
    return [ANIMALS[i] for task in data_lib.class_schedule(data, ANIMALS) for i in task]


def test_classes_that_are_named_come_first_and_the_rest_in_the_seed_s_order(tmp_path, monkeypatch):
    order = named("")
    assert named("dog, ant") == ["dog", "ant", *(n for n in order if n not in ("dog", "ant"))]
    (tmp_path / "order.txt").write_text("cat, wild\n\n fox \n", encoding="utf-8")
    rest = [n for n in order if n not in ("cat, wild", "fox")]
    for path in (str(tmp_path / "order.txt"), "~/order.txt"):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert named(path) == ["cat, wild", "fox", *rest]
    assert named(",".join(n for n in reversed(order) if n[0] != "c")) == [
        *(n for n in reversed(order) if n[0] != "c"),
        "cat, wild",
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fox").write_text("bee\n")  # a class's name is a name, whatever lies there
    assert named("fox")[0] == "fox"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("dgo,ant", "'dgo' is none of the 6 classes, and there is no such file .* mean 'dog'"),
        ("ant,dog,ant", "'ant' is named twice"),
        ("nowhere.txt", "'nowhere.txt' is none of"),
        ("ant,", "'' is none of"),
        ("s3://b/x", r"^config\.data\.class_order=s3://b/x is an address"),
        (",".join(["x" * 9] * 41), "'xxxxxxxxx' is none of the 6 classes"),
        ("y" * 300, "'y+' is none of"),
        ("~x,ant", "'~x' is none of"),
        ("ab:/c,ant", "'ab:/c' is none of"),
    ],
)
def test_a_class_order_that_cannot_be_is_refused(said, words):
    with pytest.raises(UserError, match=words):
        named(said)


def test_one_class_is_no_class_incremental_task():
    for names in (("ant",), ()):
        with pytest.raises(UserError, match="give images of more"):
            data_lib.class_schedule(dataclasses.replace(DIGITS, base_classes=1, tasks=1), names)
