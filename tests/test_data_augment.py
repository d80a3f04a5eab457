"""Augmentation against numpy, and its independence of how a batch is composed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_data_sources import RGB

from skd_jax import data as data_lib
from skd_jax.data.augment import resize_box

CROP = dataclasses.replace(RGB, augment="crop", pad=2, flip=True, mean=(0.1, 0.5, 0.9))
RESIZED = dataclasses.replace(CROP, augment="resized_crop", load_size=12)
KEY = jax.random.key(5)
augment = jax.jit(data_lib.augment, static_argnums=0)
crop_flip = jax.jit(data_lib.crop_flip, static_argnums=(3, 4))
resized_crop = jax.jit(data_lib.resized_crop, static_argnums=(3, 4))


def make_images(n: int, size: int = 8) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (n, size, size, 3)).astype(np.uint8)


def test_normalise_equals_numpy():
    images = make_images(2)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    out = data_lib.normalise(jnp.asarray(images), mean, std)
    assert out.dtype == jnp.float32
    expected = (images / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("data", [CROP, RESIZED])
def test_an_example_depends_on_its_index_alone(data):
    images = make_images(16, data.load_size)
    whole = augment(data, KEY, np.arange(16), images)
    assert whole.shape == (16, 8, 8, 3) and whole.dtype == jnp.float32
    picked = np.array([11, 2, 7, 7] * 4)  # other neighbours, other places
    part = augment(data, KEY, picked, images[picked])
    np.testing.assert_allclose(part, whole[picked], rtol=1e-5, atol=1e-5)
    assert not np.allclose(augment(data, jax.random.key(6), np.arange(16), images), whole)


@pytest.mark.parametrize("data", [CROP, RESIZED])
def test_augmentation_is_the_same_inside_shard_map(data):
    images, spec = make_images(4, data.load_size), jax.sharding.PartitionSpec("d")
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        functools.partial(data_lib.augment, data),
        mesh=mesh,
        in_specs=(jax.sharding.PartitionSpec(), spec, spec),
        out_specs=spec,
    )
    index = np.arange(4)
    np.testing.assert_allclose(
        jax.jit(mapped)(KEY, index, images),
        augment(data, KEY, index, images),
        rtol=1e-5,
        atol=1e-5,
    )


def test_crop_without_padding_or_flip_only_normalises():
    data = dataclasses.replace(CROP, pad=0, flip=False)
    images = make_images(3)
    out = augment(data, KEY, np.arange(3), images)
    np.testing.assert_allclose(out, data_lib.normalise(images, data.mean, data.std), atol=1e-6)


def test_crops_are_the_windows_of_the_padded_image():
    images = np.repeat(make_images(1), 200, axis=0)
    crops = np.asarray(crop_flip(KEY, jnp.arange(200), images, 2, False))
    padded = np.pad(images[0], ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 8, x : x + 8].tobytes() for y in range(5) for x in range(5)}
    assert {crop.tobytes() for crop in crops} == windows  # all 25, and nothing else


@pytest.mark.parametrize("data", [CROP, dataclasses.replace(RESIZED, load_size=8)])
def test_images_that_are_normalised_are_augmented_as_stored_ones(data):
    images = make_images(16)
    normalised = data_lib.normalise(images, data.mean, data.std)
    index = np.arange(16)
    out = jax.jit(data_lib.augment_normalised, static_argnums=0)(data, KEY, index, normalised)
    np.testing.assert_allclose(out, augment(data, KEY, index, images), rtol=1e-4, atol=1e-5)
    none = dataclasses.replace(data, augment="none")
    assert data_lib.augment_normalised(none, KEY, index, normalised) is normalised


def test_half_of_the_images_are_flipped():
    images = np.repeat(make_images(1), 1000, axis=0)
    out = np.asarray(crop_flip(KEY, jnp.arange(1000), images, 0, True))
    flipped = (out == images[:, :, ::-1]).all((1, 2, 3))
    assert ((out == images).all((1, 2, 3)) ^ flipped).all()
    assert 0.45 < flipped.mean() < 0.55


def test_resize_of_the_whole_image_is_the_identity():
    image = make_images(1)[0]
    out = jax.jit(resize_box, static_argnums=3)(
        jnp.asarray(image), jnp.zeros(2), jnp.full(2, 8.0), 8
    )
    np.testing.assert_allclose(out, image, atol=1e-3)


def test_resize_of_a_box_of_whole_pixels_cuts_it_out():
    image = make_images(1, 12)[0]
    out = jax.jit(resize_box, static_argnums=3)(
        jnp.asarray(image), jnp.array((3.0, 1.0)), jnp.full(2, 8.0), 8
    )
    np.testing.assert_allclose(out, image[3:11, 1:9], atol=1e-3)


def test_resized_crops_stay_inside_the_image_and_cover_it():
    y, x = np.mgrid[:64, :64].astype(np.float32)
    ramp = np.repeat(np.stack((y, x, y), -1)[None], 300, 0)
    out = np.asarray(resized_crop(KEY, jnp.arange(300), ramp, 16, False))
    assert out.min() >= 0 and out.max() <= 63
    spread = out.max((1, 2)) - out.min((1, 2))  # height and width of each box, less a pixel or so
    share = (spread[:, 0] + 3) * (spread[:, 1] + 3) / 64**2
    assert 0.4 < share.mean() < 0.65  # uniform on (0.08, 1), large ones cut to fit
    assert share.min() < 0.2 and share.max() > 0.85


def test_evaluation_takes_the_centre():
    images = make_images(2, 12)
    out = data_lib.prepare(RESIZED, jnp.asarray(images))
    expected = data_lib.normalise(images[:, 2:10, 2:10], RESIZED.mean, RESIZED.std)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    none = dataclasses.replace(RESIZED, augment="none", load_size=8)
    images = jnp.asarray(make_images(2))
    np.testing.assert_array_equal(
        data_lib.augment(none, KEY, jnp.arange(2), images), data_lib.prepare(none, images)
    )
