import json

import pytest

from skd_jax import metrics
from skd_jax.methods.skd import quality
from skd_jax.methods.skd.phases import describe
from skd_jax.metrics import Row

# Three steps; task sizes 10, 20, 10 test images.
ROWS = [
    Row((9,), (10,)),
    Row((8, 10), (10, 20)),
    Row((5, 15, 6), (10, 20, 10)),
]
DELEGATOR = {
    "task": 0,
    "teacher_accuracy": 0.75,
    "student_accuracy": 0.5,
    "gap": 0.25,
    "label_entropy": 1.2,
    "label_shares": [0.5, 0.25, 0.25],
    "agreement": 0.5,
    "student_accuracy_at_length": None,
}
MATRIX = [[0.9, None, None], [0.8, 0.5, None], [0.5, 0.75, 0.6]]


def make_summary(rows):
    return metrics.summary(
        method="skd",
        dataset="digits",
        seed=3,
        classes_per_task=(4, 2, 2),
        class_order=range(8),
        class_names=[["a", "b", "c", "d"], ["e", "f"], ["g", "h"]],
        rows=rows,
        reports={"delegator": [DELEGATOR]},
        kept_bytes=12,
        seconds={"base": 1.5},
        device="cpu",
    )


def test_a_first_task_without_test_images_counts_nowhere():
    rows = [metrics.Row((0,), (0,)), metrics.Row((0, 3), (0, 4))]
    assert (rows[0].accuracies, rows[0].top1) == ((None,), None)
    assert (rows[1].accuracies, rows[1].top1) == ((None, 0.75), None)
    matrix = metrics.accuracy_matrix(rows, 3)
    assert matrix == [[None, None, None], [None, 0.75, None]]
    assert metrics.average_incremental_accuracy([None, 0.75]) == 0.75
    assert metrics.average_incremental_accuracy([None]) is None
    assert metrics.forgetting(matrix) is None
    assert metrics.forgetting([[None, None, None], [None, 0.75, None], [None, 0.5, 1.0]]) == 0.25
    assert metrics.table(rows).splitlines()[1].split() == ["after", "0", "-", "-", "-"]


def test_row():
    assert ROWS[2].accuracies == (0.5, 0.75, 0.6)
    assert ROWS[2].top1 == 26 / 40  # not the mean of the three
    for correct, total in [((), ()), ((1,), (1, 2)), ((3,), (2,)), ((1, 0), (1, 0)), ((-1,), (2,))]:
        with pytest.raises(ValueError):
            Row(correct, total)


def test_accuracy_matrix():
    assert metrics.accuracy_matrix(ROWS, 3) == MATRIX
    assert metrics.accuracy_matrix(ROWS[:1], 3) == [[0.9, None, None]]
    with pytest.raises(ValueError, match="row 0 must count 1 tasks"):
        metrics.accuracy_matrix(ROWS[1:], 3)
    with pytest.raises(ValueError, match="3 rows for 2 tasks"):
        metrics.accuracy_matrix(ROWS, 2)


def test_averages():
    assert metrics.average_incremental_accuracy([0.9, 0.6, 0.3]) == pytest.approx(0.6)
    assert metrics.average_incremental_accuracy_without_base([0.9, 0.6, 0.3]) == pytest.approx(0.45)
    assert metrics.average_incremental_accuracy_without_base([0.9]) is None


def test_forgetting():
    # Task 0: best 0.9, now 0.5; task 1: best before the last step 0.5, now 0.75.
    assert metrics.forgetting(MATRIX) == pytest.approx((0.4 - 0.25) / 2)
    assert metrics.forgetting(MATRIX[:2]) == pytest.approx(0.1)
    assert metrics.forgetting(MATRIX[:1]) == 0.0
    # The best may come later than the first step.
    assert metrics.forgetting([[0.2], [0.6, 0.1], [0.5, 0.1, 1.0]]) == pytest.approx(0.05)


def test_summary():
    summary = make_summary(ROWS)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert list(summary) == [
        "method",
        "dataset",
        "seed",
        "classes_per_task",
        "class_order",
        "class_names",
        "accuracy_matrix",
        "top1_seen",
        "average_incremental_accuracy",
        "average_incremental_accuracy_without_base",
        "final_accuracy",
        "forgetting",
        "delegator",
        "kept_bytes",
        "skipped_steps",
        "seconds",
        "device",
        "date",
        "remarks",
    ]
    assert summary["accuracy_matrix"] == MATRIX
    assert summary["top1_seen"] == [0.9, 0.6, 0.65]
    assert summary["average_incremental_accuracy"] == pytest.approx(2.15 / 3)
    assert summary["average_incremental_accuracy_without_base"] == pytest.approx(0.625)
    assert summary["final_accuracy"] == 0.65
    assert summary["forgetting"] == pytest.approx(0.075)
    assert summary["delegator"] == [DELEGATOR]
    assert summary["kept_bytes"] == 12


def test_summary_after_the_base_step():
    summary = make_summary(ROWS[:1])
    assert summary["average_incremental_accuracy"] == 0.9
    assert summary["average_incremental_accuracy_without_base"] is None
    assert summary["forgetting"] == 0.0
    with pytest.raises(ValueError, match="base step"):
        make_summary([])


def test_table():
    assert metrics.table(ROWS).splitlines() == [
        "accuracy, %    task 0   task 1   task 2     seen  average",
        "after 0         90.00                      90.00    90.00",
        "after 1         80.00    50.00             60.00    75.00",
        "after 2         50.00    75.00    60.00    65.00    71.67",
    ]
    assert describe({"delegator": [DELEGATOR]}).splitlines() == [
        "delegator, %  teacher  student      gap",
        "of 0            75.00    50.00    25.00",
    ]
    assert describe({}) == describe({"delegator": []}) == ""


def test_top1_is_over_all_classes_and_averages_are_with_the_base_or_without():
    assert Row((3000, 900), (5000, 1000)).top1 == pytest.approx(0.65)  # the mean of tasks is 0.75
    steps = [76.86, 69.62, 64.64, 59.26, 55.92, 54.41]
    assert metrics.average_incremental_accuracy(steps) == pytest.approx(63.452, abs=5e-4)
    without = metrics.average_incremental_accuracy_without_base(steps)
    assert without == pytest.approx(60.770, abs=5e-4)


def test_remarks_name_what_wants_attention_and_what_to_do():
    names = [["ant", "bee"], ["c\x1bt"], ["dog"]]
    assert metrics.failed(Row((5, 1), (9, 9)), names) == []
    assert metrics.failed(Row((0,), (0,)), names) == []  # no test images
    [line] = metrics.failed(Row((5, 0, 0), (9, 9, 9)), names)
    assert r"(task 1: c\x1bt; task 2: dog)" in line
    sound = {"task": 0, "label_shares": [0.4, 0.6]}
    for reports in ({}, {"delegator": [sound, {"task": 0, "label_shares": []}, {"gap": None}]}):
        assert quality.remarks(names, reports) == []
    rare = {"task": 1, "label_shares": [0.99, 0.01, 0.0]}  # 0.01 is less than 0.05 / 3
    [line] = quality.remarks(names, {"delegator": [sound, rare]})
    assert r"(D_1: bee, c\x1bt)" in line and "config.method.stage_one.epochs" in line
