"""Augmentation and normalisation inside jit, in pure JAX.

Randomness is drawn per example from the key and the example's position in the global batch, so
that a batch split over several devices is augmented as it is on one.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from skd_jax.compiler import platform
from skd_jax.config import Data

SCALE = (0.08, 1.0)  # resized_crop: the crop's share of the image's area
RATIO = (3 / 4, 4 / 3)  # resized_crop: the crop's width over its height


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Scales images to [0, 1], then subtracts the mean and divides by the deviation.

    Args:
      images: [B, H, W, C] of 0..255, uint8 or float.
      mean: C values.
      std: C values.

    Returns:
      float32 [B, H, W, C].
    """
    scaled = jnp.asarray(images, jnp.float32) / 255
    shape = (1, 1, 1, -1)
    return (scaled - jnp.array(mean).reshape(shape)) / jnp.array(std).reshape(shape)


def crop_flip(
    key: jax.Array, index: jax.Array, images: jax.Array, pad: int, flip: bool
) -> jax.Array:
    """Pads with zeros, crops back at a random place, and flips half of the images.

    The zeros are black, as stored images have it, which are normalised afterwards: torchvision's
    RandomCrop, as LUCIR uses it.

    Args:
      key: a PRNG key, the same for the whole batch.
      index: int32 [B], position of each example in the global batch.
      images: [B, H, W, C], uint8 or any other dtype in which 0 is black.
      pad: pixels on each side.
      flip: whether to flip.

    Returns:
      Of the same shape and dtype.
    """

    def one(position: jax.Array, image: jax.Array) -> jax.Array:
        crop_key, flip_key = jax.random.split(jax.random.fold_in(key, position))
        top, left = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
        padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        if platform() == "cpu":
            image = jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
        else:
            image = _shifted(_shifted(padded, top, pad, 0), left, pad, 1)
        return _random_flip(flip_key, image) if flip else image

    return jax.vmap(one)(index, images)


def resized_crop(
    key: jax.Array, index: jax.Array, images: jax.Array, size: int, flip: bool
) -> jax.Array:
    """Crops a random box, resizes it to a square, and flips half of the images.

    Area and ratio of the box are drawn as torchvision's RandomResizedCrop draws them. It draws up
    to ten times until the box fits into the image; here the first draw is cut to fit. The box need
    not lie on whole pixels.

    Args:
      key: a PRNG key, the same for the whole batch.
      index: int32 [B], position of each example in the global batch.
      images: [B, H, W, C], uint8 or float.
      size: height and width of the result.
      flip: whether to flip.

    Returns:
      float32 [B, size, size, C], of the same range.
    """
    height, width = images.shape[1:3]

    def one(position: jax.Array, image: jax.Array) -> jax.Array:
        area_key, ratio_key, place_key, flip_key = jax.random.split(
            jax.random.fold_in(key, position), 4
        )
        area = jax.random.uniform(area_key, (), minval=SCALE[0], maxval=SCALE[1]) * height * width
        log_ratio = jnp.log(jnp.array(RATIO))
        ratio = jnp.exp(jax.random.uniform(ratio_key, (), minval=log_ratio[0], maxval=log_ratio[1]))
        box = jnp.array((jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)))
        box = jnp.minimum(box, jnp.array((height, width), jnp.float32))
        corner = jax.random.uniform(place_key, (2,)) * (
            jnp.array((height, width), jnp.float32) - box
        )
        image = resize_box(image, corner, box, size)
        return _random_flip(flip_key, image) if flip else image

    return jax.vmap(one)(index, images)


def resize_box(image: jax.Array, corner: jax.Array, box: jax.Array, size: int) -> jax.Array:
    """Resizes a box of one image to a square, bilinearly and with antialiasing.

    Args:
      image: [H, W, C].
      corner: float32 [2], top and left edge of the box in pixels.
      box: float32 [2], its height and width.
      size: height and width of the result.

    Returns:
      float32 [size, size, C].
    """
    scale = size / box
    return jax.image.scale_and_translate(
        image.astype(jnp.float32),
        (size, size, image.shape[-1]),
        spatial_dims=(0, 1),
        scale=scale,
        translation=-corner * scale,
        method="linear",
        antialias=True,
    )


def centre_crop(images: jax.Array, size: int) -> jax.Array:
    """The central square of images [B, H, W, C] as [B, size, size, C]; size is at most H and W."""
    top, left = (images.shape[1] - size) // 2, (images.shape[2] - size) // 2
    return images[:, top : top + size, left : left + size]


def augment(data: Data, key: jax.Array, index: jax.Array, images: jax.Array) -> jax.Array:
    """Makes a training batch of stored images, as ``data.augment`` says.

    Args:
      data: the data section of the configuration; static under jit.
      key: a PRNG key, the same for the whole batch.
      index: int32 [B], position of each example in the global batch.
      images: uint8 [B, load_size, load_size, C].

    Returns:
      float32 [B, image_size, image_size, C], normalised.
    """
    if data.augment == "none":
        return prepare(data, images)
    return normalise(_at_random(data, key, index, images), data.mean, data.std)


def augment_normalised(
    data: Data, key: jax.Array, index: jax.Array, images: jax.Array
) -> jax.Array:
    """Changes images that are normalised already, such as pseudo images, as ``data.augment`` says.

    "crop" does to them what :func:`augment` does to stored images. "resized_crop" takes its boxes
    from ``image_size`` pixels, where that takes them from ``load_size``.

    Args:
      data: the data section of the configuration; static under jit.
      key: a PRNG key, the same for the whole batch.
      index: int32 [B], position of each example in the global batch.
      images: [B, image_size, image_size, C].

    Returns:
      Of the same shape and dtype; the images themselves where ``data.augment`` is "none".
    """
    if data.augment == "none":
        return images
    black = normalise(jnp.zeros((1, 1, 1, data.channels)), data.mean, data.std)
    above = images.astype(jnp.float32) - black  # what is padded with zeros is black then
    return (_at_random(data, key, index, above) + black).astype(images.dtype)


def _at_random(data: Data, key: jax.Array, index: jax.Array, images: jax.Array) -> jax.Array:
    if data.augment == "crop":
        return crop_flip(key, index, images, data.pad, data.flip)
    return resized_crop(key, index, images, data.image_size, data.flip)


def prepare(data: Data, images: jax.Array) -> jax.Array:
    """Makes an evaluation batch of stored images: the centre, normalised.

    Args:
      data: the data section of the configuration; static under jit.
      images: uint8 [B, load_size, load_size, C].

    Returns:
      float32 [B, image_size, image_size, C], normalised.
    """
    return normalise(centre_crop(images, data.image_size), data.mean, data.std)


def _shifted(padded: jax.Array, start: jax.Array, pad: int, axis: int) -> jax.Array:
    """Takes ``padded``, less 2 ``pad`` along an axis, from ``start`` (int32 scalar) on.

    By selection among all 2 ``pad`` + 1 places: over a batch, slices at places of their own are a
    loop over the images on a TPU.
    """
    length = padded.shape[axis] - 2 * pad
    taken = jax.lax.slice_in_dim(padded, 0, length, axis=axis)
    for place in range(1, 2 * pad + 1):
        there = jax.lax.slice_in_dim(padded, place, place + length, axis=axis)
        taken = jnp.where(start == place, there, taken)
    return taken


def _random_flip(key: jax.Array, image: jax.Array) -> jax.Array:
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)
