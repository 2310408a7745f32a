"""Distortions against colorsys, pixel by pixel."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_repro.data import preprocess

IMAGE = np.random.default_rng(0).random((6, 7, 3)).astype(np.float32)
PIXELS = (255 * IMAGE).astype(np.uint8)

distort = jax.jit(preprocess.distort, static_argnums=2)


def random_keys(count):
  return jax.vmap(jax.random.key)(jnp.arange(count))


def by_pixel(convert, image):
  flat = [convert(*pixel) for pixel in image.reshape(-1, 3).tolist()]
  return np.array(flat).reshape(image.shape)


def hsv_before_and_after(change, factor):
  found = np.asarray(jax.jit(change)(jnp.asarray(IMAGE), factor))
  return (by_pixel(colorsys.rgb_to_hsv, image) for image in (IMAGE, found))


@pytest.mark.parametrize('turn', [-0.2, -0.05, 0.13, 0.2])
def test_hue_turns_hue_alone(turn):
  before, after = hsv_before_and_after(preprocess._turn_hue, turn)
  np.testing.assert_allclose(after[..., 1:], before[..., 1:], atol=1e-5)
  turned = (after[..., 0] - before[..., 0] + 0.5) % 1 - 0.5
  np.testing.assert_allclose(turned, turn, atol=1e-5)


@pytest.mark.parametrize('factor', [0.5, 0.9, 1.0, 1.5])
def test_saturation_scales_saturation_alone(factor):
  before, after = hsv_before_and_after(preprocess._saturate, factor)
  expected = np.minimum(factor * before[..., 1], 1)
  np.testing.assert_allclose(after[..., 1], expected, atol=1e-4)
  np.testing.assert_allclose(after[..., 2], before[..., 2], atol=1e-6)
  colored = after[..., 1] > 1e-3
  np.testing.assert_allclose(
    after[colored][:, 0], before[colored][:, 0], atol=1e-4
  )


def test_pixels_darker_than_black_become_gray():
  image = jnp.asarray([[[-0.1, -0.05, -0.2]]])
  found = preprocess._saturate(image, 1.2)
  np.testing.assert_allclose(found, [[[-0.05, -0.05, -0.05]]], atol=1e-7)


def adjustments(drawn):
  """Each adjustment as a function, in float64 and pixel by pixel."""

  def in_hsv(change):
    def convert(red, green, blue):
      # Lifts values above 0, which changes neither hue nor chroma.
      lift = max(0.0, -min(red, green, blue))
      hue, saturation, value = colorsys.rgb_to_hsv(
        red + lift, green + lift, blue + lift
      )
      chroma, value = saturation * value, value - lift
      return change(hue, chroma, value)

    return lambda image: by_pixel(convert, image)

  def rgb(hue, chroma, value):
    top = value if chroma < value else chroma
    saturation = chroma / top if top > 0 else 0.0
    return [x + value - top for x in colorsys.hsv_to_rgb(hue, saturation, top)]

  def turn(hue, chroma, value):
    return rgb((hue + drawn.hue) % 1, chroma, value)

  def saturate(hue, chroma, value):
    limit = max(value, 0.0)
    return rgb(hue, min(drawn.saturation * chroma, limit), value)

  def contrast(image):
    means = image.mean((0, 1))
    return means + drawn.contrast * (image - means)

  return {
    'b': lambda image: image + drawn.brightness,
    's': in_hsv(saturate),
    'h': in_hsv(turn),
    'c': contrast,
  }


@pytest.mark.parametrize(
  'strength, orders',
  [('reduced', ('bs', 'sb')), ('full', ('bshc', 'sbch', 'chbs', 'hscb'))],
)
def test_orders_of_the_adjustments(strength, orders):
  """Equals one adjustment after another, in TF-Slim's orders."""
  # Not so dark or colorful that rounding decides about a pixel.
  image = (40 + 200 * IMAGE).astype(np.uint8)
  keys = random_keys(24)
  images = jnp.asarray(image)[None].repeat(24, 0)
  found = np.asarray(distort(images, keys, strength))
  columns = map(np.asarray, jax.vmap(preprocess._draw)(keys))
  seen = set()
  for result, *row in zip(found, *columns, strict=True):
    drawn = preprocess.Adjustments(*map(float, row))
    order = orders[int(len(orders) * drawn.order)]
    seen.add(order)
    expected = image.astype(np.float64) / 255
    for name in order:
      expected = adjustments(drawn)[name](expected)
    np.testing.assert_allclose(result / 255, np.clip(expected, 0, 1), atol=2e-5)
  assert seen == set(orders)


def test_ranges_of_the_adjustments():
  drawn = jax.vmap(preprocess._draw)(random_keys(2000))
  for name, low, high in (
    ('order', 0, 1),
    ('brightness', -32 / 255, 32 / 255),
    ('saturation', 0.5, 1.5),
    ('hue', -0.2, 0.2),
    ('contrast', 0.5, 1.5),
  ):
    values = np.asarray(getattr(drawn, name))
    width = high - low
    assert low <= values.min() < low + 0.01 * width
    assert high - 0.01 * width < values.max() <= high
    assert values.mean() == pytest.approx((low + high) / 2, abs=0.02 * width)


@pytest.mark.parametrize('strength', ['reduced', 'full'])
def test_each_image_of_a_batch_is_distorted_by_its_key(strength):
  images, keys = jnp.asarray(PIXELS)[None].repeat(24, 0), random_keys(24)
  found = np.asarray(distort(images, keys, strength))
  assert found.min() >= 0
  assert found.max() <= 255
  assert len(np.unique(found.reshape(24, -1), axis=0)) == 24
  alone = distort(images[3:4], keys[3:4], strength)
  np.testing.assert_allclose(alone[0], found[3], atol=1e-3)


def test_no_distortion_is_the_identity():
  images = jnp.zeros((2, 3, 3, 1), jnp.uint8)
  assert preprocess.distort(images, random_keys(2), 'none') is images


def test_normalize():
  images = jnp.asarray([0, 51, 255], jnp.uint8).reshape(1, 1, 3, 1)
  found = preprocess.normalize(images, jnp.bfloat16, 'symmetric')
  assert found.shape == (1, 1, 3, 1)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found[0, 0, :, 0], [-1, -0.6, 1], rtol=1e-6)


def test_normalization_of_other_projects():
  """By plain arithmetic, color by color; gray is three equal colors."""
  red, green, blue = 10, 20, 200
  image = jnp.array([red, green, blue], jnp.uint8).reshape(1, 1, 1, 3)
  caffe = preprocess.normalize(image, jnp.float32, 'caffe')
  np.testing.assert_array_equal(
    caffe.ravel(), [blue - 104, green - 117, red - 128]
  )
  found = preprocess.normalize(image, jnp.float32, 'torchvision')
  expected = [
    (red / 255 - 0.485) / 0.229,
    (green / 255 - 0.456) / 0.224,
    (blue / 255 - 0.406) / 0.225,
  ]
  np.testing.assert_allclose(found.ravel(), expected, rtol=1e-6)
  gray = jnp.full((1, 1, 1, 1), 50, jnp.uint8)
  three = jnp.full((1, 1, 1, 3), 50, jnp.uint8)
  for name in ('caffe', 'torchvision'):
    np.testing.assert_array_equal(
      preprocess.normalize(gray, jnp.float32, name),
      preprocess.normalize(three, jnp.float32, name),
    )
