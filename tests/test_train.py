"""Whole runs on a tiny network: what they write, resume, read and leave alone."""

import dataclasses
import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from guarded import Guarded
from PIL import Image

from configs import digits
from configs.recipes import OURS
from experiments.with_and_without_delegator import compare
from skd_jax import experiment, loop, plots, replica, steps, train
from skd_jax.checkpoint import Checkpoints
from skd_jax.config import Config, to_dict
from skd_jax.errors import UserError
from skd_jax.loop import no_images
from skd_jax.losses import adaptive_loss_weight
from skd_jax.methods import from_config_dict, method_of
from skd_jax.models import align_head
from skd_jax.stepping import Stepping
from skd_jax.writer import Writer

# Over configs/digits.py: 4 base classes and 2 tasks of 3.
TASKS = 2
TINY = {
    "model.width": 4,
    "method.delegator.z_dim": 8,
    "method.delegator.widths": (8, 8, 4),
    "base.epochs": 2,
    "base.batch": 128,
    "base.drop_epochs": (1,),
    "method.stage_one.epochs": 2,
    "method.stage_one.finetune_epochs": 1,
    "method.stage_one.rounds_per_epoch": 2,
    "method.stage_one.imitate_steps": 2,
    "method.stage_one.batch": 16,
    "method.stage_one.drop_every": 1,
    "method.stage_one.finetune_drop_every": 1,
    "method.stage_two.epochs": 2,
    "method.stage_two.batch": 128,
    "method.stage_two.drop_epochs": (1,),
    "run.log_every": 2,
    "run.checkpoint_every": 3,
    "run.eval_batch": 100,
    "run.pseudo_images": 4,
    "run.quality_images": 0,
}
# (task, phase, steps, steps logged: every second, each saved one, and the last)
PHASES = [
    (0, "base", 6, (2, 3, 4, 6)),
    (0, "delegator", 4, (2, 3, 4)),
    (1, "learn", 4, (2, 3, 4)),
    (1, "delegator", 2, (2,)),
    (2, "learn", 4, (2, 3, 4)),
]
TOTAL = 20
LAST = TOTAL + len(PHASES)  # the number of the last checkpoint: an evaluation counts as a step
LOSSES = {
    "base": {"classification", "train_accuracy", "skipped"},
    "delegator": {
        *("imitation", "explore", "exploration", "category", "diversity"),
        *("feature_statistics", "label_entropy", "largest_share", "skipped"),
    },
    "learn": {"cil", "classification", "consolidation", "skipped"},
}
COMPILED = (steps.advance, steps.predict)


def tiny(**changes) -> Config:
    """The shared configuration; ``section__field=value`` changes a field."""
    config = digits.get_config(f"tasks={TASKS}")
    changes = {field(name): value for name, value in changes.items()}
    config.update_from_flattened_dict({**TINY, **changes})
    return from_config_dict(config)


def field(name: str) -> str:
    """The path of ``section__field``; SKD's sections are those of its method."""
    path = name.replace("__", ".")
    own = path.split(".")[0] in ("delegator", "stage_one", "stage_two")
    return f"method.{path}" if own else path


def bits(tree) -> list[bytes]:
    """The leaves to the bit, and a copy of them: what is donated later stays readable."""
    leaves, treedef = jax.tree.flatten(tree)
    return [str(treedef).encode(), *(np.asarray(leaf).tobytes() for leaf in leaves)]


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def rows(workdir: Path, without: tuple[str, ...] = ()) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in without} for line in lines]


def assert_logs_agree(
    here: Path, there: Path, accuracy: float = 0.02, until: float = math.inf
) -> None:
    """To rounding in the first line; later, rounding has been amplified by training.

    Args:
      here: a workdir.
      there: another.
      accuracy: by how much that of a batch may differ in later lines.
      until: the step of a phase after which its lines are not compared.
    """
    pairs = list(zip(rows(here, ("time",)), rows(there, ("time",)), strict=True))
    assert pairs
    for line, (one, other) in enumerate(pairs):
        assert one.pop("phase") == other.pop("phase")
        if one["step"] > until:
            assert line  # one was compared
            continue
        tolerance = 0.02 if line else 1e-4
        if line and "train_accuracy" in other:
            found, expected = one.pop("train_accuracy"), other.pop("train_accuracy")
            assert found == pytest.approx(expected, rel=tolerance, abs=accuracy)
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)


def results(workdir: Path) -> dict:
    """The summary without what depends on the clock."""
    summary = json.loads((workdir / "summary.json").read_text())
    del summary["seconds"]
    return summary


def silent(line: str) -> None:
    """Instead of print."""


def newest(config: Config, workdir: Path) -> tuple[int, Any, dict]:
    """(step, kept, meta) of a finished run's newest checkpoint."""
    kept = method_of(config).kept()
    for phase in train.open_experiment(config).phases:
        kept = jax.eval_shape(lambda k, p=phase: p.finish(p.init(k), k, no_images), kept)
    with Checkpoints(workdir / "checkpoints", 2) as checkpoints:
        found = checkpoints.read(checkpoints.steps()[0])
    return found.step, found.into({"kept": kept, "state": None})["kept"], found.meta


def assert_same_result(config: Config, here: Path, there: Path) -> None:
    assert results(here) == results(there)
    assert rows(here, ("time",)) == rows(there, ("time",))
    (step, kept, meta), (step_, kept_, meta_) = newest(config, here), newest(config, there)
    assert step == step_ == LAST
    assert bits(kept) == bits(kept_)
    for measured in (meta["measured"], meta_["measured"]):
        del measured["seconds"]
    assert meta == meta_


class SpySource:
    """Notes every read with the phase it happens in."""

    def __init__(self, source, log: SimpleNamespace):
        self.source, self.log = source, log
        self.class_names = source.class_names
        log.labels = source.labels("train")
        log.test_labels = source.labels("test")

    def labels(self, split):
        return self.source.labels(split)

    def read(self, split, indices):
        self.log.reads.append((self.log.phase, split, np.array(indices)))
        return self.source.read(split, indices)

    def forget(self, indices):
        self.source.forget(indices)


def spied(phase, log: SimpleNamespace):
    """The phase, noting its name while it runs and the bits of what it was given."""
    name = (phase.name, phase.task)

    def init(kept):
        log.phase = name
        log.before[name] = bits((kept.classifier, kept.delegator))
        return phase.init(kept)

    def finish(state, kept, take):
        left = phase.finish(state, kept, take)
        log.phase = None
        log.after[name] = bits((kept.classifier, kept.delegator))
        log.left[name] = [bits(left.classifier), bits(left.delegator)]
        return left

    return dataclasses.replace(phase, init=init, finish=finish)


_shared: dict[str, SimpleNamespace] = {}


def finished_run(factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One whole run, watched; other modules' fixtures share it."""
    if "finished" not in _shared:
        _shared["finished"] = watched_run(factory)
    return _shared["finished"]


def watched_run(factory: pytest.TempPathFactory) -> SimpleNamespace:
    config, workdir = tiny(), factory.mktemp("finished") / "run"
    log = SimpleNamespace(
        phase=None, reads=[], before={}, after={}, left={}, images={}, said=[], config=config
    )
    planned = experiment.planned
    open_experiment = train.open_experiment

    def opened(*args, **kwargs):
        log.experiment = open_experiment(*args, **kwargs)
        return log.experiment

    def stepping(phase, setting, mesh, images, most, seeds):
        if images is not None:
            log.images[phase.task] = images
        return Stepping(phase, setting, mesh, images, most, seeds)

    for function in COMPILED:
        function.jitted.clear_cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "open_source", lambda data: SpySource(Guarded(data), log))
        patch.setattr(train, "open_experiment", opened)
        patch.setattr(experiment, "planned", lambda s: [spied(p, log) for p in planned(s)])
        patch.setattr(loop, "Stepping", stepping)
        patch.setattr(replica, "plots", plots)  # in place of blank ones
        patch.setattr(steps, "initial", inspect.unwrap(steps.initial))  # of remembered ones
        log.summary = train.train(config, workdir, log.said.append)
    log.compiled = [function.jitted._cache_size() for function in COMPILED]
    log.workdir = workdir
    log.files = snapshot(workdir)
    return log


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> SimpleNamespace:
    return finished_run(tmp_path_factory)


@pytest.fixture(scope="session")
def off(tmp_path_factory) -> SimpleNamespace:
    """A whole run without the delegator."""
    config = tiny(stage_two__delegator=False)
    workdir = tmp_path_factory.mktemp("off") / "run"
    return SimpleNamespace(
        config=config, workdir=workdir, summary=train.train(config, workdir, silent)
    )


@contextmanager
def interrupted_after(owner, name: str, when: Callable[..., bool]) -> Iterator[None]:
    """Raises KeyboardInterrupt once ``owner.name`` has been called with arguments like that."""
    real = getattr(owner, name)

    def patched(*args, **kwargs):
        result = real(*args, **kwargs)
        if when(*args, **kwargs):
            raise KeyboardInterrupt
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, patched)
        with pytest.raises(KeyboardInterrupt):
            yield


def at_row(global_step: int):
    """Just after the row of that step has been written."""
    return interrupted_after(Writer, "write", lambda *_, **k: k["global_step"] == global_step)


def at_evaluation(number: int):
    """When the phase with that number has ended and been measured, but not been saved."""
    return interrupted_after(train.Run, "_end", lambda run, *_: run.at.phase == number + 1)


def at_save(number: int):
    """Just after the checkpoint of that number: one more a phase than the global step."""
    return interrupted_after(Checkpoints, "save", lambda _, step, *__: step == number)


# What ends a run, and the step of the checkpoint that the next start goes on from.
INTERRUPTIONS = [
    ("base, before the first checkpoint", lambda: at_row(2), 0),
    ("middle of base, ahead of a checkpoint", lambda: at_row(4), 3),
    ("base done, but not saved", lambda: at_evaluation(0), 3),
    ("base done and saved", lambda: at_save(7), 7),
    ("middle of stage one, before its first checkpoint", lambda: at_row(8), 7),
    ("middle of stage one, just saved", lambda: at_save(10), 10),
    ("stage one of task 0 done, but not saved", lambda: at_evaluation(1), 10),
    ("middle of stage two, ahead of a checkpoint", lambda: at_row(14), 15),
    ("stage one of task 1 done and saved", lambda: at_save(20), 20),
    ("middle of the last stage two", lambda: at_save(23), 23),
    ("all done and saved, but no summary", lambda: at_save(LAST), LAST),
]


@pytest.fixture(scope="session")
def interrupted(finished, tmp_path_factory) -> SimpleNamespace:
    """One run that was interrupted everywhere, with a copy of its folder at each interruption."""
    compiled = sum(function.jitted._cache_size() for function in COMPILED)
    base = tmp_path_factory.mktemp("interrupted")
    workdir, copies, said = base / "run", [], []
    for number, (name, interruption, _) in enumerate(INTERRUPTIONS):
        lines: list[str] = []
        with interruption():
            train.train(finished.config, workdir, lines.append)
        assert not (workdir / "summary.json").exists(), name
        said.append(lines)
        copies.append(base / str(number))
        shutil.copytree(workdir, copies[-1])
    lines = []
    train.train(finished.config, workdir, lines.append)
    said.append(lines)
    return SimpleNamespace(
        workdir=workdir,
        copies=copies,
        said=said,
        compiled=sum(function.jitted._cache_size() for function in COMPILED) - compiled,
    )


# What a run writes


def test_summary_has_all_fields_and_is_what_train_returns(finished):
    assert json.loads((finished.workdir / "summary.json").read_text()) == finished.summary
    assert set(finished.summary) == {
        *("method", "dataset", "seed", "classes_per_task", "class_order", "accuracy_matrix"),
        *("top1_seen", "average_incremental_accuracy", "final_accuracy", "forgetting"),
        *("average_incremental_accuracy_without_base", "delegator", "seconds", "device", "date"),
        *("class_names", "skipped_steps", "kept_bytes", "remarks"),
    }
    assert finished.summary["skipped_steps"] == 0
    delegator = finished.left["learn", 2][1][1:]  # its leaves, to the bit
    assert finished.summary["kept_bytes"] == sum(len(leaf) for leaf in delegator) > 0
    assert finished.summary["method"] == "skd"
    assert finished.summary["dataset"] == "digits"
    assert finished.summary["seed"] == 1
    assert finished.summary["classes_per_task"] == [4, 3, 3]
    assert sorted(finished.summary["class_order"]) == list(range(10))
    assert [len(names) for names in finished.summary["class_names"]] == [4, 3, 3]
    assert set(finished.summary["seconds"]) == {"base", "delegator", "learn", "evaluate"}
    assert all(seconds > 0 for seconds in finished.summary["seconds"].values())
    assert "cpu" in finished.summary["device"] or jax.default_backend() != "cpu"


def test_summary_agrees_with_itself(finished):
    summary = finished.summary
    matrix, top1 = summary["accuracy_matrix"], summary["top1_seen"]
    order, sizes = summary["class_order"], [4, 3, 3]
    images = [
        np.isin(finished.test_labels, order[start : start + size]).sum()
        for start, size in zip((0, 4, 7), sizes, strict=True)
    ]
    for step, row in enumerate(matrix):
        assert all(value is None for value in row[step + 1 :])
        seen = row[: step + 1]
        assert len(row) == 3
        assert all(0 <= value <= 1 for value in seen)
        right = np.array(seen) * images[: step + 1]
        np.testing.assert_allclose(right, np.rint(right), atol=1e-6)  # counts of images
        assert top1[step] == pytest.approx(right.sum() / sum(images[: step + 1]))
    assert summary["average_incremental_accuracy"] == pytest.approx(sum(top1) / 3)
    assert summary["average_incremental_accuracy_without_base"] == pytest.approx(sum(top1[1:]) / 2)
    assert summary["final_accuracy"] == top1[-1]
    drops = [max(matrix[0][0], matrix[1][0]) - matrix[2][0], matrix[1][1] - matrix[2][1]]
    assert summary["forgetting"] == pytest.approx(sum(drops) / 2)
    assert [row["task"] for row in summary["delegator"]] == [0, 1]
    for row in summary["delegator"]:
        assert set(row) == {
            *("task", "teacher_accuracy", "student_accuracy", "gap", "agreement"),
            *("student_accuracy_at_length", "label_entropy", "label_shares"),
        }
        assert row["student_accuracy_at_length"] is None  # it draws no image to measure lengths on
        assert len(row["label_shares"]) == (4, 7)[row["task"]]
        assert sum(row["label_shares"]) == pytest.approx(1)
        assert 0 <= row["label_entropy"] <= np.log(len(row["label_shares"])) + 1e-6
        assert row["teacher_accuracy"] == top1[row["task"]]
        assert 0 <= row["student_accuracy"] <= 1
        assert row["gap"] == row["teacher_accuracy"] - row["student_accuracy"]


def test_every_metrics_row_has_its_place_and_its_losses(finished):
    expected, start = [], 0
    for task, phase, length, logged in PHASES:
        expected += [(task, phase, step, start + step) for step in logged]
        start += length
    assert start == TOTAL
    written = rows(finished.workdir)
    position = ("task", "phase", "step", "global_step")
    assert [tuple(row[name] for name in position) for row in written] == expected
    for row in written:
        losses = {k: v for k, v in row.items() if k not in (*position, "time")}
        assert set(losses) == LOSSES[row["phase"]]
        assert all(np.isfinite(value) for value in losses.values())
    times = [row["time"] for row in written]
    assert times == sorted(times)


def test_logged_terms_add_up_to_the_objectives(finished):
    gammas = {
        task: adaptive_loss_weight(finished.config.method.stage_two.beta, TASKS, [3, 3][:task])
        for task in (1, 2)
    }
    assert gammas[2] == pytest.approx(gammas[1] / 2)
    for row in rows(finished.workdir):
        if row["phase"] == "delegator":
            terms = sum(row[name] for name, _ in finished.config.method.stage_one.terms)
            assert row["explore"] == pytest.approx(terms, rel=1e-4)
        elif row["phase"] == "learn":
            cil = gammas[row["task"]] * row["classification"] + row["consolidation"]
            assert row["cil"] == pytest.approx(cil, rel=1e-4)


def test_tensorboard_file_has_every_loss(finished):
    files = list((finished.workdir / "tensorboard").glob("events.out.tfevents.*"))
    written = b"".join(file.read_bytes() for file in files)
    for phase, names in LOSSES.items():
        for name in names:
            assert f"{phase}/{name}".encode() in written


@pytest.mark.parametrize(
    "name",
    ["accuracy_curve.png", "accuracy_matrix.png", "pseudo_images_0.png", "pseudo_images_1.png"],
)
def test_pictures_are_images_with_something_in_them(finished, name):
    with Image.open(finished.workdir / name) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("L"))
    assert pixels.std() > 0


def test_workdir_holds_nothing_unexpected(finished):
    names = {name.split("/")[0] for name in finished.files}
    assert names == {
        *("checkpoints", "tensorboard", "metrics.jsonl", "config.json", "summary.json", "lock"),
        *("accuracy_curve.png", "accuracy_matrix.png"),
        *("pseudo_images_0.png", "pseudo_images_1.png"),
    }
    kept = {path.name for path in (finished.workdir / "checkpoints").iterdir()}
    assert kept == {str(LAST - 2), str(LAST)}


def test_align_head_is_what_a_task_leaves_to_the_next(tmp_path):
    for align in (False, True):
        config = tiny(stage_two__align_head=align, run__phases=3)
        train.train(config, tmp_path / str(align), silent)
    (_, plain), (_, aligned) = (train.restore(tmp_path / str(a)) for a in (False, True))
    expected = align_head(plain.classifier.params, 4)
    assert bits(aligned.classifier.params["head"]) != bits(plain.classifier.params["head"])
    assert np.asarray(aligned.classifier.params["head"]["kernel"]) == pytest.approx(
        np.asarray(expected["head"]["kernel"]), rel=1e-5
    )


def test_config_json_is_the_configuration(finished):
    saved = json.loads((finished.workdir / "config.json").read_text())
    assert saved == json.loads(json.dumps(to_dict(finished.config)))
    assert from_config_dict(saved) == finished.config


def test_progress_lines_end_with_where_the_results_are(finished):
    *_, last = (line for line in finished.said if not line.startswith("note: "))
    assert last == f"finished; results are in {finished.workdir}"
    assert sum("after 0" in line for line in finished.said) == 3  # a table after every task


# Randomness and resuming


def test_same_seed_gives_the_same_bits(finished, tmp_path):
    train.train(tiny(), tmp_path / "run", silent)
    assert_same_result(finished.config, finished.workdir, tmp_path / "run")


def test_another_seed_gives_other_losses(finished, tmp_path):
    with at_row(2):
        train.train(tiny(seed=2), tmp_path / "run", silent)
    here, there = rows(tmp_path / "run")[0], rows(finished.workdir)[0]
    assert here["global_step"] == there["global_step"] == 2
    assert here["classification"] != there["classification"]


def test_interrupted_run_ends_as_the_uninterrupted_one_to_the_bit(finished, interrupted):
    assert_same_result(finished.config, interrupted.workdir, finished.workdir)
    assert {path.name for path in interrupted.workdir.glob("*.png")} == {
        path.name for path in finished.workdir.glob("*.png")
    }


@pytest.mark.parametrize("number", range(len(INTERRUPTIONS)), ids=[i[0] for i in INTERRUPTIONS])
def test_interruption_leaves_a_prefix_of_the_run_and_the_newest_checkpoint(
    finished, interrupted, number
):
    copy, newest_step = interrupted.copies[number], INTERRUPTIONS[number][2]
    with Checkpoints(copy / "checkpoints", 2) as checkpoints:
        assert checkpoints.steps()[0] == newest_step
    written, whole = rows(copy, ("time",)), rows(finished.workdir, ("time",))
    assert len(written) > 0
    assert written == whole[: len(written)]


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (2, "going on at task 0, base, step 3"),
        (4, "going on at task 0, delegator, round 0"),
        (6, "going on at task 0, delegator, round 3"),
        (8, "going on at task 1, learn, step 3"),
        (9, "going on at task 2, learn, step 0"),
    ],
)
def test_resumed_run_says_where_it_goes_on(interrupted, number, line):
    assert interrupted.said[number][0] == line


def test_run_that_ended_before_its_summary_writes_it_when_started_again(interrupted):
    assert not (interrupted.copies[-1] / "summary.json").exists()
    assert interrupted.said[-1][0].startswith("this run is finished")
    assert (interrupted.workdir / "summary.json").exists()


def test_finished_run_started_again_trains_nothing_and_changes_nothing(
    finished, tmp_path, monkeypatch
):
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    said = []
    monkeypatch.setattr(train.Run, "_train", lambda *_: pytest.fail("a phase was run"))
    # How a run goes may differ.
    config = dataclasses.replace(
        finished.config, run=dataclasses.replace(finished.config.run, log_every=1)
    )
    assert train.train(config, workdir, said.append) == finished.summary
    assert said[0] == f"this run is finished; its results are in {workdir}"
    after = snapshot(workdir)
    assert after.keys() == finished.files.keys()
    changed = {name for name in after if after[name] != finished.files[name]}
    assert {name for name in changed if not name.endswith(".png")} == set()


def test_finished_workdir_refuses_another_seed_and_stays_as_it_is(finished, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    with pytest.raises(UserError, match=r"config\.seed=1, not 7"):
        train.train(tiny(seed=7), workdir, silent)
    assert snapshot(workdir) == finished.files


@pytest.mark.slow
@pytest.mark.parametrize("global_step", [9, 14])
def test_killed_process_loses_nothing(finished, repo, tmp_path, global_step):
    workdir = tmp_path / "run"
    overrides = [f"--config.{name}={value}" for name, value in TINY.items()]
    config = f"--config=configs/digits.py:tasks={TASKS}"
    process = subprocess.Popen(
        [sys.executable, "-m", "skd_jax.main", config, f"--workdir={workdir}", *overrides],
        cwd=repo,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        wanted = f'"global_step": {global_step},'
        while wanted not in (text := _text(workdir / "metrics.jsonl")):
            assert process.poll() is None, f"ended by itself after: {text}"
            assert time.monotonic() < deadline, "too slow"
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (workdir / "summary.json").exists()
    train.train(finished.config, workdir, silent)
    assert_same_result(finished.config, finished.workdir, workdir)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


# What a run computes once, reads, and leaves alone


def test_each_step_is_compiled_once_a_head_size(finished):
    heads = TASKS + 1
    phases = 1 + 2 * TASKS
    assert finished.compiled == [phases, heads]


def test_resumed_run_compiles_no_step_again(interrupted):
    assert interrupted.compiled == 0  # beyond what the uninterrupted run compiled


@pytest.mark.parametrize(("phase", "task"), [(name, task) for task, name, _, _ in PHASES])
def test_training_reads_the_task_s_own_images_only(finished, phase, task):
    schedule = finished.experiment.schedule
    reads = [(split, i) for where, split, i in finished.reads if where == (phase, task)]
    if phase == "delegator":
        assert not reads  # stage one sees no image at all
        return
    assert {split for split, _ in reads} == {"train"}
    labels = finished.labels[np.concatenate([indices for _, indices in reads])]
    assert set(labels) == set(schedule[task])


def test_between_phases_only_test_images_are_read(finished):
    assert {split for phase, split, _ in finished.reads if phase is None} == {"test"}


@pytest.mark.parametrize("task", range(TASKS))
def test_images_of_finished_tasks_are_gone(finished, task):
    with pytest.raises(RuntimeError, match="gone"):
        finished.images[task].fetch(np.zeros((1, 1), np.int32))
    with pytest.raises(RuntimeError, match="gone"):
        finished.experiment.stream.open(task)
    old = np.flatnonzero(np.isin(finished.labels, finished.experiment.schedule[task]))
    for index in (old[0], old[-1]):
        with pytest.raises(RuntimeError, match="finished task"):
            finished.experiment.source.read("train", [index])


@pytest.mark.parametrize(
    ("phase", "task"), [(name, task) for task, name, _, _ in PHASES if name != "base"]
)
def test_old_classifier_and_delegator_stay_as_they_were_to_the_bit(finished, phase, task):
    name = (phase, task)
    assert finished.before[name] == finished.after[name]


@pytest.mark.parametrize("task", range(TASKS))
def test_stages_change_what_they_should(finished, task):
    kept, new = 0, 1  # the order of (classifier, delegator) in stage one
    after_one, after_two = finished.left["delegator", task], finished.left["learn", task + 1]
    previous = finished.left["learn", task] if task else finished.left["base", 0]
    assert after_one[kept] == previous[kept]
    assert after_one[new] != previous[new]
    assert after_two[0] != after_one[0]
    assert after_two[1] == after_one[1]


def test_without_delegator_there_is_no_stage_one(finished, off):
    assert off.summary["method"] == "skd without delegator"
    assert "delegator" not in off.summary
    assert {row["phase"] for row in rows(off.workdir)} == {"base", "learn"}
    assert set(off.summary["seconds"]) == {"base", "learn", "evaluate"}
    assert not list(off.workdir.glob("pseudo_images_*"))
    assert off.summary["top1_seen"][0] == finished.summary["top1_seen"][0]  # the same T_0
    assert len(off.summary["top1_seen"]) == TASKS + 1


def test_comparison_shows_both_runs(finished, off, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished.workdir, workdir)
    shutil.copytree(off.workdir, workdir / "without_delegator")
    compare(finished.config, str(workdir))
    shown = " ".join(capsys.readouterr().out.split())
    on, without = (100 * run.summary["final_accuracy"] for run in (finished, off))
    assert f"final accuracy {on:.2f} {without:.2f} {on - without:.2f}" in shown
    with Image.open(workdir / "with_and_without.png") as image:
        assert image.format == "PNG"
    assert snapshot(workdir)["summary.json"] == finished.files["summary.json"]


def all_finite(*trees) -> bool:
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(trees))


# Ablations: a few steps of each switch


def stage_steps(config: Config, wanted: str, count: int = 2):
    """The first steps of a phase of task 0 or 1; untrained networks will do.

    Returns what was kept before, what the phase leaves (of stage one its state), and the metrics.
    """
    experiment = train.open_experiment(config)
    by_name = {(phase.name, phase.task): phase for phase in experiment.phases}
    base = by_name["base", 0]
    kept = method_of(config).kept()
    kept = base.finish(base.init(kept), kept, no_images)
    phase = by_name.get(("delegator", 0))
    metrics = None
    if phase:
        state = phase.init(kept)
        if wanted == "delegator":
            before = bits(kept.classifier)
            stepping = Stepping(phase, experiment.setting, None, None)
            state, metrics = stepping(state, kept, 0, 1)
            assert bits(phase.finish(state, kept, no_images).classifier) == before
            return kept, state, jax.device_get(metrics)
        kept = phase.finish(state, kept, no_images)
    phase = by_name["learn", 1]
    state, values = phase.init(kept), []
    stepping = Stepping(phase, experiment.setting, None, experiment.stream.open(1))
    for step in range(count):  # a call of one step each: one compilation
        state, metrics = stepping(state, kept, step, step + 1)
        values.append(metrics)
    metrics = {name: np.concatenate([v[name] for v in values]) for name in values[0]}
    return kept, phase.finish(state, kept, no_images), metrics


def test_all_switches_of_stage_one_together(finished):
    config = tiny(
        stage_one__imitate_steps=1,
        stage_one__terms={
            **{"exploration": 1.0, "category": 0.0, "diversity": 0.0},
            **{"feature_statistics": 0.5, "total_variation": 1.0},
        },
        stage_one__student_explores=False,
        stage_one__feature_source="student",
        stage_one__feature_distance="kl",
        delegator__helper_bn=False,
        delegator__upsample="transposed",
    )
    _, left, metrics = stage_steps(config, "delegator")
    terms = {"exploration", "feature_statistics", "total_variation"}
    counted = {"label_entropy", "label_shares", "skipped"}
    assert set(metrics) == {"imitation", "explore", *terms, *counted}
    total = (
        metrics["exploration"] + 0.5 * metrics["feature_statistics"] + metrics["total_variation"]
    )
    np.testing.assert_allclose(metrics["explore"], total, rtol=1e-5)
    assert all_finite(left, metrics)


@pytest.mark.slow
@pytest.mark.parametrize("term", ["category", "diversity", "exploration", "feature_statistics"])
def test_stage_one_runs_without_any_one_term(term):
    _, left, metrics = stage_steps(tiny(**{f"stage_one__terms__{term}": 0.0}), "delegator")
    terms = {name for name, _ in tiny().method.stage_one.terms}
    told = {"imitation", "explore", "label_entropy", "label_shares", "skipped"}
    assert set(metrics) == {*told, *terms} - {term}
    assert all_finite(left, metrics)


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"delegator__helper_bn": False},
        {"delegator__upsample": "transposed"},
        {"stage_one__feature_source": "student"},
        {"stage_one__student_explores": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_stage_one_runs_with_each_switch_and_the_switch_matters(change):
    _, usual_left, usual = stage_steps(tiny(), "delegator")
    _, left, metrics = stage_steps(tiny(**change), "delegator")
    assert set(metrics) == set(usual)
    assert all_finite(left, metrics)
    assert bits((left.student, left.delegator)) != bits((usual_left.student, usual_left.delegator))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "gamma"),
    [
        ({"stage_two__adaptive": False, "stage_two__gamma": 0.7}, 0.7),
        ({"stage_two__adaptive": False, "stage_two__delegator": False}, 1.0),
        ({"stage_two__classification": "new", "stage_two__delegator": False}, 0.1),
        ({"stage_two__classification": "old_head_fixed"}, 0.1),
        ({"stage_two__classification": "old_head_fixed", "stage_two__delegator": False}, 0.1),
        ({"stage_two__classification": "local_old_head_fixed"}, 0.1),
        ({f"stage_two__{name}": value for name, value in OURS.items()}, 0.1),
    ],
)
def test_stage_two_runs_with_each_switch(change, gamma):
    config = tiny(**change)
    kept, left, metrics = stage_steps(config, "learn")
    total = gamma * metrics["classification"] + metrics["consolidation"]
    np.testing.assert_allclose(metrics["cil"], total, rtol=1e-5)
    assert all_finite(left, metrics)
    old, new = kept.classifier.params["head"], left.classifier.params["head"]
    fixed = config.method.stage_two.classification.endswith("old_head_fixed")
    assert np.array_equal(new["kernel"][:, :4], old["kernel"]) == fixed
    assert np.array_equal(new["bias"][:4], old["bias"]) == (
        fixed or config.method.stage_two.classification == "new"
    )
    assert np.any(np.asarray(new["bias"][4:]) != 0)
