"""Distortion and normalization of images, on the device.

The photometric distortions are TF-Slim's, as the paper does not describe its
own: `reduced` is TF-Slim's fast mode, `full` its slow mode. Each example has a
key, so that its distortion does not depend on the number of devices.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


# Mean blue, green and red of Caffe's BN-Inception (Cadene's `bninception`).
CAFFE_MEAN = (104, 117, 128)
# Mean and standard deviation of red, green and blue in torchvision, of pixel
# values in [0, 1]. The networks of pytorchcv take them too.
TORCHVISION_MEAN = (0.485, 0.456, 0.406)
TORCHVISION_STD = (0.229, 0.224, 0.225)


def normalize(images: Array, dtype: Any, normalization: str) -> Array:
  """Maps pixel values in [0, 255] to what a network sees.

  Args:
    images: (..., channels) of any number type, with 1 or 3 channels.
    dtype: type to compute in and to return; float32 if it is less precise.
    normalization: `symmetric` for [-1, 1], as TF-Slim; `caffe` for blue, green
      and red minus `CAFFE_MEAN`; `torchvision` for RGB in [0, 1] minus
      `TORCHVISION_MEAN`, over `TORCHVISION_STD`.
  """
  images = images.astype(jnp.promote_types(dtype, jnp.float32))
  if normalization == 'symmetric':
    return images / 127.5 - 1
  colors = jnp.broadcast_to(images, (*images.shape[:-1], 3))
  if normalization == 'caffe':
    return colors[..., ::-1] - _of_channels(CAFFE_MEAN, colors)
  mean, std = (
    _of_channels(values, colors)
    for values in (TORCHVISION_MEAN, TORCHVISION_STD)
  )
  return (colors / 255 - mean) / std


def _of_channels(values: Sequence[float], like: Array) -> Array:
  """A value for each channel, broadcast to the shape of `like`."""
  return jnp.broadcast_to(jnp.array(values, like.dtype), like.shape)


def distort(images: Array, keys: Array, strength: str) -> Array:
  """Applies random photometric distortions to a training batch.

  Args:
    images: uint8 (batch, height, width, channels), with 1 or 3 channels.
    keys: random keys (batch,).
    strength: `none`, `reduced` or `full`.

  Returns:
    float32 (batch, height, width, 3) in [0, 255]; with `none`, `images` itself.
  """
  if strength == 'none':
    return images
  images = jnp.broadcast_to(images, (*images.shape[:3], 3))
  scaled = images.astype(jnp.float32) / 255
  distort_one = {'reduced': _distort_reduced, 'full': _distort_full}[strength]
  draws = jax.vmap(_draw)(keys)
  return 255 * jnp.clip(jax.vmap(distort_one)(scaled, draws), 0, 1)


class Adjustments(NamedTuple):
  """Random parameters of the distortion of an image with values in [0, 1].

  Attributes:
    order: uniform in [0, 1); selects the order of the adjustments.
    brightness: offset of all values.
    saturation: factor of the saturation in HSV.
    hue: offset of the hue in HSV, in full turns.
    contrast: factor of the distance from a channel's mean.
  """

  order: Array
  brightness: Array
  saturation: Array
  hue: Array
  contrast: Array


def _draw(key: Array) -> Adjustments:
  low = jnp.array([0, -32 / 255, 0.5, -0.2, 0.5])
  high = jnp.array([1, 32 / 255, 1.5, 0.2, 1.5])
  return Adjustments(*jax.random.uniform(key, (5,), minval=low, maxval=high))


def _distort_reduced(image: Array, drawn: Adjustments) -> Array:
  """Adjusts brightness and saturation, in either order."""
  first = drawn.order < 0.5
  image = image + jnp.where(first, drawn.brightness, 0)
  image = _saturate(image, drawn.saturation)
  return image + jnp.where(first, 0, drawn.brightness)


def _distort_full(image: Array, drawn: Adjustments) -> Array:
  """Applies all adjustments, in one of four orders.

  The orders are brightness, saturation, hue, contrast; saturation, brightness,
  contrast, hue; contrast, hue, brightness, saturation; and hue, saturation,
  contrast, brightness. Selecting an order per image would compute all four. But
  hue commutes with brightness and saturation, and contrast with brightness, so
  that each order is a subsequence of the one sequence below.
  """
  order = jnp.floor(4 * drawn.order)

  def is_one_of(*orders: int) -> Array:
    return jnp.isin(order, jnp.array(orders, jnp.float32))

  def shift(image: Array, where: Array) -> Array:
    return image + jnp.where(where, drawn.brightness, 0)

  def recolor(image: Array, saturate: Array, turn: Array) -> Array:
    image = jnp.where(saturate, _saturate(image, drawn.saturation), image)
    return _turn_hue(image, jnp.where(turn, drawn.hue, 0))

  image = shift(image, is_one_of(0))
  image = recolor(image, is_one_of(0, 1, 3), is_one_of(0, 3))
  image = _adjust_contrast(image, drawn.contrast)
  image = shift(image, is_one_of(2))
  image = recolor(image, is_one_of(2), is_one_of(1, 2))
  return shift(image, is_one_of(1, 3))


def _adjust_contrast(image: Array, factor: Array) -> Array:
  mean = image.mean((0, 1), keepdims=True)
  return mean + factor * (image - mean)


def _saturate(image: Array, factor: Array) -> Array:
  """Scales the saturation in HSV; value and hue stay the same."""
  value = image.max(-1, keepdims=True)
  chroma = value - image.min(-1, keepdims=True)
  # Saturation is chroma / value, at most 1. Pixels with value <= 0 become gray.
  limit = jnp.where(
    chroma > 0, jnp.maximum(value, 0) / jnp.maximum(chroma, 1e-6), 1
  )
  return value - jnp.minimum(factor, limit) * (value - image)


def _turn_hue(image: Array, turn: Array) -> Array:
  """Shifts the hue in HSV by `turn`; value and saturation stay the same."""
  red, green, blue = jnp.moveaxis(image, -1, 0)
  value = image.max(-1)
  chroma = value - image.min(-1)
  safe = jnp.where(chroma > 0, chroma, 1)
  hue = jnp.select(
    [value == red, value == green],
    [(green - blue) / safe, 2 + (blue - red) / safe],
    4 + (red - green) / safe,
  )
  hue = hue + 6 * turn
  sextant = (hue[..., None] + jnp.array([[[5.0, 3.0, 1.0]]])) % 6
  falling = jnp.clip(jnp.minimum(sextant, 4 - sextant), 0, 1)
  return value[..., None] - chroma[..., None] * falling
