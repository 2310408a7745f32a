"""Views: the crops of an image over which class probabilities are averaged.

144 crops are those of GoogLeNet (Szegedy et al., 2015, section 7). The image is
resized to shorter sides of 256, 288, 320 and 352 pixels. Of each size there are
three squares: left, center and right, or top, center and bottom of a portrait.
Of each square there are six crops: four corners and the center, of 224 x 224
pixels, and the whole square, resized to that. All of them are mirrored as well.

Ten crops are the corners and the center of the central square of the smallest
size, and their mirror images (Krizhevsky et al., 2012).
"""

import cv2
import numpy as np

# Numbers of crops that can be evaluated; one is `Split.evaluation_batch`.
COUNTS = (1, 10, 144)

# The shorter sides, for a network of images of `_SIZE`.
_SIDES = (256, 288, 320, 352)
_SIZE = 224
# A longer image is cut to this ratio of its sides: resized as a whole, it would
# fill the memory. Our choice.
_MAX_RATIO = 16


def shorter_sides(crops: int, size: int) -> list[int]:
  """Returns the shorter sides that an image is resized to, in pixels.

  Those of GoogLeNet are scaled to the images that a network takes.

  Args:
    crops: 10 or 144.
    size: side of the network's images, in pixels.
  """
  sides = _SIDES if crops == 144 else _SIDES[:1]
  return [round(side * size / _SIZE) for side in sides]


def views(pixels: np.ndarray, crops: int, size: int) -> np.ndarray:
  """Returns the crops of an image; the second half mirrors the first.

  Args:
    pixels: uint8 (height, width, channels), an image of any size.
    crops: 10 or 144.
    size: side of the network's images, in pixels.

  Returns:
    uint8 (crops, size, size, channels).
  """
  found = []
  height, width = pixels.shape[:2]
  longest = _MAX_RATIO * min(height, width)
  top, left = (max(length - longest, 0) // 2 for length in (height, width))
  pixels = pixels[top : top + longest, left : left + longest]
  for side in shorter_sides(crops, size):
    # Most crops are windows of this image, which is resized once.
    squares = _squares(_resize(pixels, side))
    for square in squares if crops == 144 else squares[1:2]:
      found += _windows(square, size)
      if crops == 144:
        found.append(_resize(square, size))
  upright = np.stack(found)
  return np.concatenate([upright, upright[:, :, ::-1]])


def convert_channels(images: np.ndarray, channels: int) -> np.ndarray:
  """Converts color to gray (Rec. 601 luma, as Pillow) or gray to color.

  Args:
    images: uint8 (..., height, width, 1 or 3).
    channels: 1 or 3.

  Returns:
    uint8 (..., height, width, channels).
  """
  if images.shape[-1] == channels:
    return images
  if channels == 3:
    return np.repeat(images, 3, axis=-1)
  *shape, width, _ = images.shape
  gray = cv2.cvtColor(images.reshape(-1, width, 3), cv2.COLOR_RGB2GRAY)
  return gray.reshape(*shape, width, 1)


def _squares(pixels: np.ndarray) -> list[np.ndarray]:
  """The squares at both ends of the longer side and in the middle."""
  height, width = pixels.shape[:2]
  side, excess = min(height, width), abs(height - width)
  squares = []
  for start in (0, excess // 2, excess):
    top, left = (start, 0) if height > width else (0, start)
    squares.append(pixels[top : top + side, left : left + side])
  return squares


def _windows(square: np.ndarray, size: int) -> list[np.ndarray]:
  """The windows of `size` at the four corners of a square and at its center."""
  excess = len(square) - size
  return [
    square[top : top + size, left : left + size]
    for top, left in (
      (0, 0),
      (0, excess),
      (excess, 0),
      (excess, excess),
      (excess // 2, excess // 2),
    )
  ]


def _resize(pixels: np.ndarray, side: int) -> np.ndarray:
  """Resizes an image to this shorter side; its aspect ratio is kept.

  One decoded image is shrunk by several factors. Each pixel is the average of
  the area that it covers, whatever the factor. (Training uses `jpeg.resize`,
  which samples fewer pixels to be fast. Here the network takes far longer.) An
  image is enlarged bilinearly.
  """
  height, width, channels = pixels.shape
  shorter = min(height, width)
  new_height, new_width = (
    round(length * side / shorter) for length in (height, width)
  )
  resized = cv2.resize(
    pixels,
    (new_width, new_height),
    interpolation=cv2.INTER_AREA if side < shorter else cv2.INTER_LINEAR,
  )
  return resized.reshape(new_height, new_width, channels)
