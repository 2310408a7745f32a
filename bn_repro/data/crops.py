"""Crops: the box of an image that the network sees, in numbers alone.

Training sees a random box, mirrored half of the time; evaluation sees the
central box. Both are GoogLeNet's (Szegedy et al., 2015): the paper does not
describe its crops.
"""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import NamedTuple

import numpy as np

# Attempts at the shape of a random box. Our choice.
_ATTEMPTS = 10
# Random numbers of one crop: one for the mirror, two for the position of the
# box, and two for each attempt at its shape.
NUM_DRAWS = 3 + 2 * _ATTEMPTS


class Box(NamedTuple):
  """A rectangle in an image, in pixels from the top left corner."""

  left: int
  top: int
  width: int
  height: int

  @property
  def corners(self) -> tuple[int, int, int, int]:
    """(left, top, right, bottom), the form that Pillow takes."""
    return (
      self.left,
      self.top,
      self.left + self.width,
      self.top + self.height,
    )


# Chooses a box given the width and height of an image.
ChooseBox = Callable[[int, int], Box]


def whole_box(width: int, height: int) -> Box:
  """Returns the whole image."""
  return Box(0, 0, width, height)


def central_box(width: int, height: int) -> Box:
  """Returns the central square whose side is 224/256 of the shorter side.

  This equals resizing the shorter side to 256 pixels and cropping the central
  224 (GoogLeNet's single crop).
  """
  side = max(round(min(width, height) * 224 / 256), 1)
  return _centered(width, height, side, side)


def proportional_box(width: int, height: int) -> Box:
  """Returns the central 87.5 % of each side (TF-Slim's evaluation)."""
  return _centered(
    width,
    height,
    max(round(width * 0.875), 1),
    max(round(height * 0.875), 1),
  )


def largest_box(rows: int, columns: int, width: int, height: int) -> Box:
  """Returns the largest central box with the aspect ratio of rows x columns.

  Args:
    rows: height of the images that the box is resized to.
    columns: their width.
    width: width of the image.
    height: height of the image.
  """
  return _centered(
    width,
    height,
    max(min(width, round(height * columns / rows)), 1),
    max(min(height, round(width * rows / columns)), 1),
  )


def random_box(width: int, height: int, draws: np.ndarray) -> Box:
  """Returns a box of 8-100 % of the area and an aspect ratio of 3/4 to 4/3.

  The area is uniform and the aspect ratio log-uniform. Both are drawn again
  while the box does not fit, ten times in all; then the box is the largest
  central one with an aspect ratio in this range.

  Args:
    width: width of the image.
    height: height of the image.
    draws: `NUM_DRAWS` numbers in [0, 1).
  """
  # Plain numbers: for so few of them NumPy would take ten times as long.
  _, x, y, *shapes = draws.tolist()
  limit = math.log(4 / 3)
  for area, ratio in zip(shapes[::2], shapes[1::2], strict=True):
    area = (0.08 + 0.92 * area) * width * height
    ratio = math.exp((2 * ratio - 1) * limit)
    box_width = round(math.sqrt(area * ratio))
    box_height = round(math.sqrt(area / ratio))
    if 1 <= box_width <= width and 1 <= box_height <= height:
      return Box(
        int(x * (width - box_width + 1)),
        int(y * (height - box_height + 1)),
        box_width,
        box_height,
      )
  return _centered(
    width,
    height,
    max(min(width, round(height * 4 / 3)), 1),
    max(min(height, round(width * 4 / 3)), 1),
  )


def is_mirrored(draws: np.ndarray) -> bool:
  """Returns whether a training crop is mirrored, with probability 1/2."""
  return bool(draws[0] < 0.5)


def _centered(width: int, height: int, box_width: int, box_height: int) -> Box:
  return Box(
    (width - box_width) // 2, (height - box_height) // 2, box_width, box_height
  )


# By `config.data.evaluation_box`.
EVALUATION_BOXES: Mapping[str, ChooseBox] = {
  'square': central_box,
  'proportional': proportional_box,
}


@dataclasses.dataclass(frozen=True)
class CropRandomness:
  """The random numbers of training crops, a function of (seed, position).

  Attributes:
    seed: seed of the run.
    positions: int64 (examples,), positions in the stream of training examples.
  """

  seed: int
  positions: np.ndarray

  def draws(self) -> np.ndarray:
    """Returns float64 (examples, NUM_DRAWS), uniform in [0, 1).

    Each position owns a fixed section of one Philox stream, which can be
    entered at any point. NumPy guarantees that the raw output never changes.
    """
    # Philox produces numbers in blocks of four.
    blocks = -(-NUM_DRAWS // 4)
    breaks = np.flatnonzero(np.diff(self.positions) != 1) + 1
    raw = []
    for run in np.split(self.positions, breaks):
      random = np.random.Philox(
        np.random.SeedSequence((self.seed,), spawn_key=(0,))
      )
      random.advance(int(run[0]) * blocks)
      raw.append(random.random_raw(4 * blocks * len(run)))
    draws = (np.concatenate(raw) >> np.uint64(11)) / 2.0**53
    return draws.reshape(-1, 4 * blocks)[:, :NUM_DRAWS]
