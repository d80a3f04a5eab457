"""Accuracy, recall, precision and the confusion matrix, against numbers counted by hand."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from skd_jax import cli
from skd_jax.confusion import Evaluation, confusion_matrix, evaluate, labelled_images
from skd_jax.errors import UserError

NAMES = ("cat", "dog", "eel", "fox")
# Of 4 cats 3 are seen and 1 is taken for a dog; of 2 dogs one is taken for a cat; the one eel is
# taken for a dog; there are no foxes.
LABELS = [0, 0, 0, 0, 1, 1, 2]
PREDICTED = [0, 0, 1, 0, 0, 1, 1]


def test_numbers_counted_by_hand():
    matrix = confusion_matrix(LABELS, PREDICTED, 4)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == [[3, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    found = Evaluation(NAMES, matrix)
    assert found.images.tolist() == [4, 2, 1, 0]
    assert found.accuracy == pytest.approx(4 / 7)
    np.testing.assert_allclose(found.recall, [3 / 4, 1 / 2, 0, np.nan])
    np.testing.assert_allclose(found.precision, [3 / 4, 1 / 3, np.nan, np.nan])
    assert found.absent == ("fox",)


def test_without_images_nothing_is_known():
    found = Evaluation(NAMES, confusion_matrix([], [], 4))
    assert np.isnan([found.accuracy, *found.recall, *found.precision]).all()
    assert found.absent == NAMES


@pytest.fixture
def labelled(small_model, pictures, tmp_path):
    """A folder where three images are of the class they are taken for, and two are not."""
    folder = tmp_path / "labelled"
    for prediction in small_model.predict(pictures, top=2):
        kind = prediction.labels[prediction.path.name in ("a.png", "d.png")]
        (folder / kind).mkdir(parents=True, exist_ok=True)
        shutil.copy(prediction.path, folder / kind)
    return folder


def test_a_labelled_folder(small_model, labelled):
    found = evaluate(small_model, labelled)
    assert (int(found.images.sum()), found.accuracy) == (5, pytest.approx(3 / 5))
    files = labelled_images(labelled, small_model.class_names)
    predicted = [p.labels[0] for p in small_model.predict([file for file, _ in files])]
    for (_, label), name in zip(files, predicted, strict=True):
        found.confusion[label, small_model.class_names.index(name)] -= 1
    assert not found.confusion.any()


def test_broken_images_are_counted_apart(small_model, labelled):
    (labelled / "dog").mkdir(exist_ok=True)
    (labelled / "dog" / "broken.png").write_text("no image")
    told: list[UserError] = []
    found = evaluate(small_model, labelled, told.append)
    assert (int(found.images.sum()), found.unreadable, len(told)) == (5, 1, 1)
    with pytest.raises(UserError, match=r"broken\.png"):
        evaluate(small_model, labelled)


def test_a_folder_of_broken_images_alone(small_model, tmp_path):
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "broken.png").write_text("no image")
    told: list[UserError] = []
    with pytest.raises(UserError, match="none of the 1 images"):
        evaluate(small_model, tmp_path, told.append)
    assert len(told) == 1


def test_folders_that_are_no_classes_are_named_with_the_closest(labelled):
    (labelled / "grösse").mkdir()
    (labelled / "zzz\x1b").mkdir()
    with pytest.raises(UserError) as error:
        labelled_images(labelled, ("cat", "dog", "größe", 'a, "b"'))
    assert "'grösse' (did you mean 'größe'?), 'zzz\\x1b';" in str(error.value)


def test_names_in_another_unicode_form_are_the_same(tmp_path, pictures):
    folder = tmp_path / "gro\u0308\u00dfe"  # as macOS writes it
    folder.mkdir()
    shutil.copy(pictures / "a.png", folder)
    assert labelled_images(tmp_path, ("cat", "größe")) == [(folder / "a.png", 1)]


@pytest.mark.parametrize("flags", [(), ("--confusion=c.png",), ("--output=o.txt",)])
def test_what_cannot_be_listed_is_named_and_not_the_output(
    labelled, model_file, monkeypatch, capsys, tmp_path, flags
):
    """As root, who may list everything, a locked folder is played."""
    locked, real = next(labelled.iterdir()), os.scandir
    monkeypatch.chdir(tmp_path)

    def scandir(path):
        if Path(path) == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert cli.run(["evaluate", f"--model={model_file}", f"--images={labelled}", *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {locked} cannot be listed (Permission denied)")


@pytest.mark.parametrize("folders", [None, [], ["cat"]])
def test_no_folder_no_class_folder_and_no_image(tmp_path, folders):
    place = tmp_path / "place"
    for name in folders or ():
        (place / name).mkdir(parents=True)
    if folders == []:
        place.mkdir()
    with pytest.raises(UserError, match=r"no such folder|no sub-folders|are empty"):
        labelled_images(place, ("cat",))
