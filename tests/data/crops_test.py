"""Boxes that evaluation and training see, and the numbers behind them."""

import numpy as np
import pytest

from bn_repro.data import crops
from bn_repro.data.crops import Box, CropRandomness


def draws(seed, count):
  return np.random.default_rng(seed).random((count, crops.NUM_DRAWS))


def test_proportional_box_is_875_of_1000():
  assert crops.proportional_box(400, 200) == (25, 12, 350, 175)
  assert crops.proportional_box(1, 1) == (0, 0, 1, 1)


def test_largest_box_of_a_ratio():
  assert crops.largest_box(28, 28, 100, 56) == (22, 0, 56, 56)
  assert crops.largest_box(28, 28, 56, 100) == (0, 22, 56, 56)
  assert crops.largest_box(2, 3, 60, 60) == (0, 10, 60, 40)
  assert crops.largest_box(2, 3, 45, 30) == (0, 0, 45, 30)


def test_central_box_is_224_of_256():
  """The box equals cropping after resizing the shorter side to 256."""
  for width, height in ((500, 375), (375, 500), (256, 256), (1000, 300)):
    box = crops.central_box(width, height)
    scale = 256 / min(width, height)
    assert box.width == box.height
    found = np.array([box.width, box.left, box.top]) * scale
    expected = [224, (width * scale - 224) / 2, (height * scale - 224) / 2]
    assert found == pytest.approx(expected, abs=scale)


def test_random_boxes_have_the_areas_and_ratios_of_the_recipe():
  boxes = [crops.random_box(1000, 800, numbers) for numbers in draws(1, 4000)]
  left, top, width, height = np.array(boxes).T
  assert (left >= 0).all() and (left + width <= 1000).all()
  assert (top >= 0).all() and (top + height <= 800).all()
  area, ratio = width * height / 800_000, width / height
  assert 0.079 < area.min() < 0.085
  assert 0.9 < area.max() <= 1.0
  assert 0.745 < ratio.min() < 0.755 and 1.325 < ratio.max() < 1.34
  # Where every shape fits, areas are uniform and ratios log-uniform.
  small = area < 0.5
  assert area[small].mean() == pytest.approx((0.08 + 0.5) / 2, abs=0.01)
  assert np.log(ratio[small]).mean() == pytest.approx(0, abs=0.01)
  assert np.log(ratio[small]).std() == pytest.approx(
    2 * np.log(4 / 3) / np.sqrt(12), rel=0.03
  )
  # All positions are equally likely.
  position = left[width < 900] / (1000 - width[width < 900])
  assert position.mean() == pytest.approx(0.5, abs=0.02)
  assert np.quantile(position, [0.1, 0.9]) == pytest.approx(
    [0.1, 0.9], abs=0.03
  )


def test_random_boxes_reach_both_edges():
  """Of 12 pixels, a box of 11 starts at 0 or 1, each half of the time."""
  boxes = [crops.random_box(12, 12, numbers) for numbers in draws(4, 4000)]
  starts = [
    start
    for box in boxes
    for start, side in ((box.left, box.width), (box.top, box.height))
    if side == 11
  ]
  assert len(starts) > 300 and set(starts) == {0, 1}
  assert np.mean(starts) == pytest.approx(0.5, abs=0.1)
  assert {box.left for box in boxes if box.width == 12} == {0}


def test_random_boxes_equal_the_formula_in_numpy():
  """All attempts at once, and the first that fits."""
  for width, height in ((500, 375), (64, 200), (20, 17)):
    numbers = draws(5, 1000)
    area, ratio = numbers[:, 3::2], numbers[:, 4::2]
    area = (0.08 + 0.92 * area) * width * height
    ratio = np.exp(np.log(3 / 4) + ratio * 2 * np.log(4 / 3))
    widths = np.rint(np.sqrt(area * ratio)).astype(int)
    heights = np.rint(np.sqrt(area / ratio)).astype(int)
    fits = (np.minimum(widths, heights) > 0) & (widths <= width)
    fits &= heights <= height
    first = fits.argmax(1)
    rows = np.flatnonzero(fits.any(1))
    assert len(rows) > 800
    for row in rows:
      sides = widths[row, first[row]], heights[row, first[row]]
      position = numbers[row, 1:3] * (np.array([width, height]) - sides + 1)
      expected = Box(*position.astype(int).tolist(), *map(int, sides))
      assert crops.random_box(width, height, numbers[row]) == expected


def test_where_no_shape_fits_the_box_is_central():
  for width, height in ((1000, 20), (20, 1000), (1, 1), (1, 500)):
    for numbers in draws(2, 20):
      left, top, right, bottom = crops.random_box(
        width, height, numbers
      ).corners
      assert 0 <= left < right <= width and 0 <= top < bottom <= height
  box = crops.random_box(1000, 20, np.full(crops.NUM_DRAWS, 0.99))
  assert box == Box(486, 0, 27, 20)


def test_every_other_view_is_mirrored():
  mirrored = [crops.is_mirrored(numbers) for numbers in draws(3, 2000)]
  assert np.mean(mirrored) == pytest.approx(0.5, abs=0.03)


def test_draws_are_a_function_of_the_position():
  positions = np.array([5, 6, 7, 100, 101, 3, 2**40])
  numbers = CropRandomness(1, positions).draws()
  assert numbers.shape == (7, crops.NUM_DRAWS)
  assert numbers.min() >= 0 and numbers.max() < 1
  for position, expected in zip(positions, numbers, strict=True):
    alone = CropRandomness(1, np.array([position])).draws()[0]
    np.testing.assert_array_equal(alone, expected)
  assert (CropRandomness(2, positions).draws() != numbers).all()
  assert len(np.unique(numbers)) == numbers.size


def test_draws_are_uniform():
  numbers = CropRandomness(0, np.arange(4000)).draws()
  assert numbers.mean(0) == pytest.approx(0.5, abs=0.02)
  assert numbers.std(0) == pytest.approx(12**-0.5, abs=0.01)
