"""Distortions against colorsys, pixel by pixel."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_repro import preprocess

IMAGE = np.random.default_rng(0).random((6, 7, 3)).astype(np.float32)
KEYS = [jax.random.key(i) for i in range(4)]


def by_pixel(convert, image):
  flat = [convert(*pixel) for pixel in image.reshape(-1, 3).tolist()]
  return np.array(flat).reshape(image.shape)


@pytest.mark.parametrize('key', KEYS)
def test_hue_turns_hue_alone(key):
  found = np.asarray(preprocess._hue(jnp.asarray(IMAGE), key))
  before, after = (
    by_pixel(colorsys.rgb_to_hsv, image) for image in (IMAGE, found)
  )
  np.testing.assert_allclose(after[..., 1:], before[..., 1:], atol=1e-5)
  turn = (after[..., 0] - before[..., 0] + 0.5) % 1 - 0.5
  np.testing.assert_allclose(turn, turn[0, 0], atol=1e-5)
  assert 0 < abs(turn[0, 0]) <= 0.2


@pytest.mark.parametrize('key', KEYS)
def test_saturation_scales_saturation_alone(key):
  image = IMAGE * 0.4 + 0.3  # Far enough from the limit of 1.
  found = np.asarray(preprocess._saturation(jnp.asarray(image), key))
  before, after = (
    by_pixel(colorsys.rgb_to_hsv, image) for image in (image, found)
  )
  np.testing.assert_allclose(after[..., 0], before[..., 0], atol=1e-4)
  np.testing.assert_allclose(after[..., 2], before[..., 2], atol=1e-6)
  factor = after[..., 1] / before[..., 1]
  np.testing.assert_allclose(factor, factor[0, 0], rtol=1e-4)
  assert 0.5 <= factor[0, 0] <= 1.5


@pytest.mark.parametrize('key', KEYS)
def test_brightness_and_contrast(key):
  shift = np.asarray(preprocess._brightness(jnp.asarray(IMAGE), key)) - IMAGE
  np.testing.assert_allclose(shift, shift[0, 0, 0], atol=1e-6)
  assert abs(shift[0, 0, 0]) <= 32 / 255
  found = np.asarray(preprocess._contrast(jnp.asarray(IMAGE), key))
  means = IMAGE.mean((0, 1))
  np.testing.assert_allclose(found.mean((0, 1)), means, atol=1e-5)
  factor = (found - means) / (IMAGE - means)
  np.testing.assert_allclose(factor, factor[0, 0, 0], rtol=1e-2)
  assert 0.5 <= factor[0, 0, 0] <= 1.5


@pytest.mark.parametrize('strength', ['reduced', 'full'])
def test_distort(strength):
  images = jnp.asarray((IMAGE[None].repeat(8, 0) * 255).astype(np.uint8))
  keys = jax.vmap(jax.random.key)(jnp.arange(8))
  found = np.asarray(preprocess.distort(images, keys, strength))
  assert found.min() >= 0
  assert found.max() <= 255
  assert len(np.unique(found.reshape(8, -1), axis=0)) == 8
  alone = preprocess.distort(images[3:4], keys[3:4], strength)
  np.testing.assert_allclose(alone[0], found[3], atol=1e-3)


def test_no_distortion_is_the_identity():
  images = jnp.zeros((2, 3, 3, 1), jnp.uint8)
  keys = jax.vmap(jax.random.key)(jnp.arange(2))
  assert preprocess.distort(images, keys, 'none') is images


def test_normalize():
  images = jnp.asarray([0, 51, 255], jnp.uint8).reshape(1, 1, 3, 1)
  found = preprocess.normalize(images, jnp.bfloat16)
  assert found.shape == (1, 1, 3, 1)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found[0, 0, :, 0], [-1, -0.6, 1], rtol=1e-6)
