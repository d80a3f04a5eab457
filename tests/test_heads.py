"""Other heads on the features of a run: what they are learned on, and what is shown of them."""

import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from test_study import options, place, summary

from experiments import heads
from experiments.framework import derived, study
from skd_jax.data import class_schedule, open_source, prepare
from skd_jax.files import write_json
from skd_jax.models import Classifier


@pytest.fixture
def run() -> study.Run:
    """Of digits, with the networks of ``small_model``."""
    fields = (
        ("model.width", 2),
        ("method.delegator.widths", (4, 4, 4)),
        ("method.delegator.z_dim", 4),
    )
    return study.Run("digits", "paper", 0, "base", "tasks=2", fields, 1)


def lda(features: np.ndarray, labels: np.ndarray, unseen: np.ndarray) -> np.ndarray:
    """Classes by the textbook: log priors, and distances by the covariance within classes."""
    classes, counts = np.unique(labels, return_counts=True)
    means = np.stack([features[labels == k].mean(axis=0) for k in classes])
    inverse = np.linalg.pinv(np.cov((features - means[labels]).T, bias=True))
    scores = unseen @ inverse @ means.T - 0.5 * np.sum(means @ inverse * means, axis=1)
    return np.argmax(scores + np.log(counts / len(labels)), axis=1)


def test_they_learn_all_training_images_and_are_tried_on_all_test_images(
    small_model, run, monkeypatch, tmp_path
):
    given = options(tmp_path, scale="paper")
    monkeypatch.setattr(heads, "restore", lambda folder: (small_model.config, small_model.kept))
    found = heads.learn(run, given)

    data = run.config(tmp_path, "").data
    images = open_source(data)
    order = np.concatenate(class_schedule(data, images.class_names))
    network = small_model.kept.classifier
    classifier = Classifier(small_model.nets.features, 4)

    def look(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        labels = images.labels(split)
        stored = images.read(split, np.arange(len(labels)))
        x = prepare(data, stored)
        features, logits = classifier.apply(network.variables(), x, False)
        return np.asarray(features, np.float64), np.asarray(logits), np.argsort(order)[labels]

    features, _, classes = look("train")
    unseen, logits, labels = look("test")
    scale = features.mean(axis=0), features.std(axis=0)
    linear = LogisticRegression(max_iter=1000).fit((features - scale[0]) / scale[1], classes)
    expected = {
        "its own answers": logits.argmax(axis=1),
        "LDA": lda(features, classes, unseen),
        "linear head": linear.predict((unseen - scale[0]) / scale[1]),
    }
    assert list(found) == list(expected)
    base = labels < 4
    for name, predicted in expected.items():
        right = predicted == labels
        share = {"all": right.mean(), "base": right[base].mean(), "new": right[~base].mean()}
        assert found[name] == pytest.approx(share, abs=1.5 / np.sum(~base)), name
    assert found["its own answers"]["new"] == 0
    assert found["linear head"]["new"] > 0.5


def test_what_was_found_of_each_method_is_a_row(tmp_path):
    given = options(tmp_path, seeds=(0, 1))
    assert heads.table(given) is None

    def shares(all_of_them: float) -> dict[str, dict[str, float]]:
        return {name: {"all": all_of_them, "base": 0.5, "new": 0.1} for name in heads.HEADS}

    every = heads._by_name(given)
    assert {"skd", "ours", "lwf", "lucir"} < every.keys()
    assert not {"lda", "ncm", "ridge"} & every.keys()  # whose features are T_0's
    for name, some in (("ours", every["ours"]), (heads.T_0, every[heads.T_0][1:])):
        for run in some:
            place(run, tmp_path, summary(run.seed))
            path, of = heads._path(run, name, given), heads._made_of(run, given)
            derived.write(path, of, shares(0.25 + run.seed / 4))
    table = heads.table(given)
    rows = dict(table.rows)
    assert list(rows) == ["T_0", "ours"]
    assert table.columns[0] == "its own answers: all, %"
    assert rows["ours"][0].ours == (25.0, 50.0)
    assert rows["T_0"][0].ours == (50.0,)
    assert "2 seeds (0, 1), 3 runs" in table.source
    run = every["ours"][0]  # made anew, with other accuracies
    found = {**summary(0), "accuracy_matrix": [[0.7] * 6] * 6}
    (run.folder(tmp_path) / "summary.json").unlink()
    write_json(run.folder(tmp_path) / "summary.json", found)
    assert dict(heads.table(given).rows)["ours"][0].ours == (50.0,)


def test_runs_without_checkpoints_are_left_alone(tmp_path, monkeypatch, capsys):
    given = options(tmp_path, seeds=(0,))
    of = heads._by_name(given)
    for name in (heads.T_0, "ours"):
        place(of[name][0], tmp_path, summary(0))
    made = []
    monkeypatch.setattr(derived, "make", lambda path, *_: made.append(path.name))
    heads.make(given)
    assert made == []
    monkeypatch.setattr(heads, "is_over", lambda run, options: run.name == "tasks5/ours")
    heads.make(dataclasses.replace(given, dry_run=True))
    assert made == []
    heads.make(given)
    assert made == ["heads_ours.json"]
