"""The stream hands out one task's images, forgets finished tasks, and steps are random access."""

import jax
import numpy as np
import pytest
from test_data_sources import DIGITS

from skd_jax import data as data_lib


def open_stream(in_memory=True):
    source = data_lib.open_source(DIGITS)
    schedule = data_lib.class_schedule(DIGITS, source.class_names)
    return source, schedule, data_lib.TrainingStream(source, schedule, in_memory)


def test_a_task_holds_its_own_classes_only():
    source, schedule, stream = open_stream()
    original = source.labels("train")
    assert stream.counts() == tuple(int(np.isin(original, c).sum()) for c in schedule)
    for task, classes in enumerate(schedule):
        images = stream.open(task)
        first = sum(len(earlier) for earlier in schedule[:task])
        assert images.classes == classes and images.first_label == first
        assert images.n == stream.counts()[task]
        assert images.labels.dtype == np.int32
        np.testing.assert_array_equal(
            np.unique(images.labels), np.arange(first, first + len(classes))
        )
        counts = [(original == c).sum() for c in classes]
        np.testing.assert_array_equal(np.bincount(images.labels)[first:], counts)


def test_labels_go_with_their_images():
    source, schedule, stream = open_stream()
    original = source.labels("train")
    everything = source.read("train", np.arange(len(original)))
    by_content = {image.tobytes(): label for image, label in zip(everything, original, strict=True)}
    images = stream.open(0)
    batches = np.arange(images.n, dtype=np.int32)[None]
    found, labels = images.fetch(batches)
    found = [by_content[image.tobytes()] for image in np.asarray(found)[0]]
    np.testing.assert_array_equal(found, np.array(schedule[0])[np.asarray(labels)[0]])


@pytest.mark.parametrize("in_memory", [True, False])
def test_finished_tasks_are_out_of_reach(in_memory):
    source, schedule, stream = open_stream(in_memory)
    rows = {c: np.flatnonzero(source.labels("train") == c) for c in range(10)}
    batches = np.arange(6, dtype=np.int32).reshape(2, 3)
    old = stream.open(0)
    old.fetch(batches)
    pool = old._pool
    stream.open(1)
    with pytest.raises(RuntimeError, match="over"):
        old.fetch(batches)
    with pytest.raises(RuntimeError, match="over"):
        old.prefetch(batches)
    with pytest.raises(RuntimeError, match="task 0 is over"):
        stream.open(0)
    for c in schedule[0]:
        for row in rows[c][::20]:
            with pytest.raises(RuntimeError, match="finished task"):
                source.read("train", [row])
    assert not np.isin(source.labels("train"), schedule[0]).any()
    assert len(source.read("train", rows[schedule[1][0]])) > 0
    if in_memory:
        assert all(array.is_deleted() for array in pool)
    fresh = data_lib.TrainingStream(source, schedule, in_memory)
    assert fresh.counts()[0] == 0


def test_skipping_tasks_forgets_those_between():
    source, schedule, stream = open_stream()
    stream.open(3)
    left = set(source.labels("train").tolist())
    assert left == {-1, *schedule[3]}


def test_streamed_batches_equal_those_in_memory():
    _, _, stream = open_stream(True)
    _, _, streamed = open_stream(False)
    resident, reading = stream.open(1), streamed.open(1)
    for start in (0, 3, 6):
        batches = data_lib.epoch_batches(0, 1, 2, start, start + 3, resident.n, 32)
        if start == 3:
            reading.prefetch(batches)
        if start == 6:
            reading.prefetch(batches + 1)  # not what is asked for next: must not be handed out
        for here, there in zip(resident.fetch(batches), reading.fetch(batches), strict=True):
            assert here.dtype == there.dtype and here.shape[:2] == (3, 32)
            np.testing.assert_array_equal(here, there)


def test_the_pool_is_uploaded_once():
    _, _, stream = open_stream()
    images = stream.open(0)
    images.fetch(np.zeros((1, 2), np.int32))
    first = images._pool
    images.fetch(np.ones((1, 2), np.int32))
    assert isinstance(first[0], jax.Array) and images._pool is first


def test_test_images_stay_after_tasks_end():
    source, schedule, stream = open_stream()
    tests = data_lib.TestImages(source, schedule)
    stream.open(2)
    images, labels = tests.task(1)
    assert images.shape == (len(labels), 8, 8, 1)
    np.testing.assert_array_equal(np.unique(labels), [4, 5])
    assert tests.task(1)[0] is images
    total = sum(len(tests.task(task)[1]) for task in range(4))
    assert total == len(source.labels("test"))


def test_epochs_are_permutations():
    n, batch = 103, 10
    batches = data_lib.epoch_batches(3, 1, 0, 0, 40, n, batch)
    assert batches.dtype == np.int32 and batches.shape == (40, 10)
    epochs = batches.reshape(4, -1)
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 100 and epoch.min() >= 0 and epoch.max() < n
    assert not np.array_equal(epochs[0], epochs[1])


def test_steps_are_random_access():
    full = data_lib.epoch_batches(3, 1, 0, 0, 40, 103, 10)
    for start, stop in ((39, 40), (7, 23), (0, 1), (20, 20)):
        part = data_lib.epoch_batches(3, 1, 0, start, stop, 103, 10)
        np.testing.assert_array_equal(part, full[start:stop])


def test_each_seed_task_and_phase_has_its_own_order():
    orders = [
        data_lib.epoch_batches(*where, 0, 10, 103, 10).tobytes()
        for where in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0))
    ]
    assert len(set(orders)) == 5


def test_batch_larger_than_the_task_raises():
    with pytest.raises(ValueError, match="do not fill"):
        data_lib.epoch_batches(0, 0, 0, 0, 1, 5, 6)
