"""Class names and probabilities of image files."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from skd_jax import predict
from skd_jax.data.images import read_images
from skd_jax.errors import UserError
from skd_jax.model import load


def test_predictions_are_the_softmax_of_the_scores(model_file, small_model, pictures):
    found = load(model_file).predict([pictures / "below", pictures / "b.jpg"], top=3)
    assert [p.path for p in found] == [pictures / "below" / "d.png", pictures / "b.jpg"]
    images = read_images([p.path for p in found], small_model.config.data)
    scores = np.asarray(small_model.scores(images), np.float64)
    expected = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    for prediction, row in zip(found, expected, strict=True):
        order = np.argsort(-row)[:3]
        assert prediction.labels == tuple(small_model.class_names[k] for k in order)
        np.testing.assert_allclose(prediction.probabilities, row[order], atol=1e-6)


@pytest.mark.parametrize(("top", "named"), [(1, 1), (4, 4), (9, 4)])
def test_top_names_at_most_all_classes(small_model, pictures, top, named):
    (found,) = small_model.predict(str(pictures / "a.png"), top=top)
    assert len(found.labels) == len(found.probabilities) == named
    assert sorted(found.probabilities, reverse=True) == list(found.probabilities)
    assert (sum(found.probabilities) == pytest.approx(1)) == (named == 4)


@pytest.mark.parametrize("size", [1, 2, 64])
def test_the_size_of_batches_changes_nothing(small_model, pictures, monkeypatch, size):
    expected = small_model.predict(pictures)
    monkeypatch.setattr(predict, "BATCH", size)
    found = small_model.predict(pictures)
    assert [(p.path, p.labels) for p in found] == [(p.path, p.labels) for p in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)


def test_broken_images_are_left_out_or_raise(small_model, pictures, tmp_path):
    broken = [tmp_path / f"{n}.png" for n in range(3)]
    for file in broken:
        file.write_text("no image")
    files = [broken[0], pictures / "a.png", broken[1], pictures / "c.png", broken[2]]
    told: list[UserError] = []
    found = list(predict.predictions(small_model, files, broken=told.append))
    assert [p.path for p in found] == [files[1], files[3]]
    for one, other in zip(found, small_model.predict([files[1], files[3]]), strict=True):
        assert one.labels == other.labels
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-6)
    assert [str(file) in str(error) for file, error in zip(broken, told, strict=True)] == [True] * 3
    with pytest.raises(UserError, match=r"0\.png"):
        small_model.predict(files)
    assert list(predict.predictions(small_model, broken, broken=told.append)) == []


@pytest.mark.parametrize("paths", ["nowhere", ["nowhere.png"]])
def test_a_path_that_is_not_there(small_model, paths, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        small_model.predict(paths)


def test_no_paths_are_no_predictions(small_model):
    assert small_model.predict([]) == []


def test_wrong_top_and_scores_that_are_not_finite(small_model, pictures):
    with pytest.raises(UserError, match="top is 0"):
        small_model.predict(pictures, top=0)
    kept = small_model.kept
    params = {**kept.classifier.params}
    params["head"] = {**params["head"], "bias": params["head"]["bias"] * np.nan}
    classifier = dataclasses.replace(kept.classifier, params=params)
    damaged = dataclasses.replace(
        small_model, kept=dataclasses.replace(kept, classifier=classifier)
    )
    with pytest.raises(UserError, match=r"a\.png are not finite"):
        damaged.predict(Path(pictures / "a.png"))
