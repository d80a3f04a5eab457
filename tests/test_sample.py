"""What a model's delegator draws, by class, and where it is written."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from skd_jax.errors import UserError
from skd_jax.methods import method_of
from skd_jax.sample import folder_names, sample, write_samples


@pytest.fixture(scope="module")
def samples(small_model):
    return sample(small_model, 3, seed=1)


def test_images_are_of_the_class_that_the_model_gives_them(small_model, samples):
    assert samples.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert samples.images.shape == (12, 8, 8, 1)
    config = small_model.config
    scores = method_of(config).scores(
        config.method, small_model.nets, small_model.kept, jax.numpy.asarray(samples.images)
    )
    assert scores.argmax(axis=1).tolist() == samples.labels.tolist()
    assert len(np.unique(samples.images.reshape(12, -1), axis=0)) == 12


def test_a_seed_draws_the_same_again_and_another_others(small_model, samples):
    again, other = sample(small_model, 3, seed=1), sample(small_model, 3, seed=2)
    np.testing.assert_array_equal(again.images, samples.images)
    assert (again.drawn == samples.drawn).all()
    assert not np.isin(other.images[:3].sum((1, 2, 3)), samples.images.sum((1, 2, 3))).any()


def test_draws_are_bounded(small_model):
    found = sample(small_model, 1000, most=70)
    assert found.drawn.sum() == len(found.images) == 70
    assert sample(small_model, 1, most=5).drawn.sum() == 5


def test_files_are_the_images_denormalised(small_model, samples, tmp_path):
    write_samples(small_model, samples, tmp_path / "out")
    data = small_model.config.data
    for label, name in enumerate(folder_names(small_model.class_names)):
        files = sorted((tmp_path / "out" / name).iterdir())
        assert [file.name for file in files] == ["0001.png", "0002.png", "0003.png"]
        for file, image in zip(files, samples.images[samples.labels == label], strict=True):
            with Image.open(file) as opened:
                expected = np.clip(image[..., 0] * data.std[0] + data.mean[0], 0, 1)
                np.testing.assert_allclose(np.asarray(opened) / 255, expected, atol=0.51 / 255)
    with Image.open(tmp_path / "out" / "samples.png") as picture:
        assert min(picture.size) > 100
    with pytest.raises(UserError, match="not empty"):
        write_samples(small_model, samples, tmp_path / "out")


def test_a_class_name_leaves_no_folder_and_two_share_none():
    names = ["cat", "Cat", "../up", "/etc", "", ".", "..", "a/b", "a\\b", "nul\0", "x" * 300]
    names += ["samples.png", "\udcff", "größe", "猫", "con\nverse", ".hidden"]
    found = folder_names(names)
    assert (found[0], *found[-4:-2]) == ("cat", "größe", "猫")
    assert len({name.lower() for name in found}) == len(names)
    for name in found:
        assert name and not name.startswith(".") and name.isprintable()
        assert not set(name) & set("/\\") and len(name.encode()) < 255


def test_a_model_without_a_delegator_says_how_to_get_one(small_model):
    bare = dataclasses.replace(
        small_model, kept=dataclasses.replace(small_model.kept, delegator=None)
    )
    with pytest.raises(UserError, match="`skd-jax extend` trains one"):
        sample(bare)
    with pytest.raises(UserError, match="per_class is 0"):
        sample(small_model, 0)
