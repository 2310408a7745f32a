"""Crops against a slow, plain implementation of GoogLeNet's description."""

import math

import numpy as np
from PIL import Image
import pytest

from bn_repro.inference import crops


def area_weights(length, new_length):
  """Row i holds the share of output pixel i that each input pixel covers."""
  scale = length / new_length
  i, k = np.arange(new_length)[:, None], np.arange(length)
  overlap = np.minimum((i + 1) * scale, k + 1) - np.maximum(i * scale, k)
  return overlap.clip(0) / scale


def linear_weights(length, new_length):
  """Interpolates between the centers of the two nearest input pixels."""
  weights = np.zeros((new_length, length))
  for i in range(new_length):
    center = (i + 0.5) * length / new_length - 0.5
    low = math.floor(center)
    for k, weight in ((low, 1 - (center - low)), (low + 1, center - low)):
      weights[i, min(max(k, 0), length - 1)] += weight
  return weights


def resized(pixels, height, width):
  weights = area_weights if height < len(pixels) else linear_weights
  rows = weights(pixels.shape[0], height)
  columns = weights(pixels.shape[1], width)
  channels = [
    rows @ channel @ columns.T for channel in np.moveaxis(pixels, -1, 0)
  ]
  return np.rint(np.stack(channels, -1))


def expected_views(pixels, count, size):
  """Float (count, size, size, channels), image by image and crop by crop."""
  height, width = pixels.shape[:2]
  found = []
  for side in (256, 288, 320, 352) if count == 144 else (256,):
    side = math.floor(side * size / 224 + 0.5)
    if height > width:
      longer = math.floor(height * side / width + 0.5)
      image = resized(pixels, longer, side)
    else:
      longer = math.floor(width * side / height + 0.5)
      image = resized(pixels, side, longer)
    middle = (longer - side) // 2
    starts = (0, middle, longer - side) if count == 144 else (middle,)
    for start in starts:
      y, x = (start, 0) if height > width else (0, start)
      square = image[y : y + side, x : x + side]
      low, center, high = 0, (side - size) // 2, side - size
      places = [(low, low), (low, high), (high, low), (high, high)]
      found += [
        square[y : y + size, x : x + size]
        for y, x in [*places, (center, center)]
      ]
      if count == 144:
        found.append(resized(square, size, size))
  return np.stack(found + [view[:, ::-1] for view in found])


@pytest.mark.parametrize('count', [10, 144])
@pytest.mark.parametrize(
  'height, width, channels',
  [
    pytest.param(75, 100, 3, id='landscape'),
    pytest.param(101, 67, 3, id='portrait'),
    pytest.param(60, 60, 1, id='square'),
    pytest.param(37, 90, 1, id='shorter side of the smallest size'),
    pytest.param(28, 28, 1, id='enlarged'),
    pytest.param(43, 200, 3, id='some shrunk, some enlarged'),
    pytest.param(5, 3, 3, id='tiny'),
    pytest.param(1, 4, 1, id='a row'),
    pytest.param(1, 1, 3, id='a pixel'),
  ],
)
def test_views_of_32_pixels(height, width, channels, count):
  """Noise: a view that is off by a pixel differs everywhere."""
  rng = np.random.default_rng(height * width)
  pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
  found = crops.views(pixels, count, 32)
  expected = expected_views(pixels, count, 32)
  assert found.dtype == np.uint8
  assert found.shape == expected.shape == (count, 32, 32, channels)
  # OpenCV rounds once or, of a resized square, twice, and interpolates with
  # weights of 11 bits.
  assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize(
  'count, size, height, width',
  [(10, 224, 375, 500), (10, 224, 400, 353), (144, 112, 200, 177)],
)
def test_views_of_larger_sizes(count, size, height, width):
  rng = np.random.default_rng(0)
  pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
  found = crops.views(pixels, count, size)
  assert np.abs(found - expected_views(pixels, count, size)).max() <= 2


def test_144_crops_are_different():
  rng = np.random.default_rng(0)
  found = crops.views(rng.integers(0, 256, (300, 400, 3), np.uint8), 144, 224)
  assert len({view.tobytes() for view in found}) == 144


def test_sizes_are_those_of_googlenet_or_in_proportion():
  assert crops.shorter_sides(144, 224) == [256, 288, 320, 352]
  assert crops.shorter_sides(10, 224) == [256]
  assert crops.shorter_sides(144, 32) == [37, 41, 46, 50]


def test_gray_is_that_of_pillow():
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (2, 20, 30, 3), np.uint8)
  found = crops.convert_channels(images, 1)
  for gray, image in zip(found, images, strict=True):
    expected = np.asarray(Image.fromarray(image).convert('L')).astype(int)
    assert np.abs(gray[..., 0] - expected).max() <= 1
  # Gray images that are stored in color are unharmed, in any shape.
  color = crops.convert_channels(found[0], 3)
  assert color.shape == (20, 30, 3)
  np.testing.assert_array_equal(crops.convert_channels(color, 1), found[0])


def test_a_very_long_image_is_cut_before_it_is_enlarged():
  """At 16 times its shorter side, around its center."""
  rng = np.random.default_rng(0)
  strip = rng.integers(0, 256, (2, 1000, 3), np.uint8)
  for pixels in (strip, strip.swapaxes(0, 1)):
    cut = pixels[484:516] if len(pixels) > 2 else pixels[:, 484:516]
    np.testing.assert_array_equal(
      crops.views(pixels, 144, 32), crops.views(cut, 144, 32)
    )
