"""What happens to images on the device: distortion and normalisation.

The photometric distortions are TF-Slim's (the paper gives none): `reduced` is
its fast mode, `full` its slow one. Each example draws from its own key, so that
it is distorted in the same way on any number of devices.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

Array = jax.Array
Adjustment = Callable[[Array, Array], Array]


def normalize(images: Array, dtype: Any) -> Array:
  """Images in 0-255 to [-1, 1], as TF-Slim has them.

  The arithmetic is in `dtype`, or float32 if that is less precise.
  """
  return images.astype(jnp.promote_types(dtype, jnp.float32)) / 127.5 - 1


def distort(images: Array, keys: Array, strength: str) -> Array:
  """Distorts a training batch.

  Args:
    images: uint8 (batch, height, width, 1 or 3).
    keys: one random key an image.
    strength: `none`, `reduced` or `full`.

  Returns:
    The images, float32 in [0, 255] and with 3 channels unless `none`.
  """
  if strength == 'none':
    return images
  images = jnp.broadcast_to(images, (*images.shape[:3], 3))
  scaled = images.astype(jnp.float32) / 255
  orders = _ORDERS[strength]
  return 255 * jax.vmap(lambda image, key: _distort_one(image, key, orders))(
    scaled, keys
  )


def _distort_one(
  image: Array, key: Array, orders: Sequence[Sequence[Adjustment]]
) -> Array:
  """Applies the adjustments in one of the given orders, drawn at random."""
  choice_key, *keys = jax.random.split(key, 1 + len(orders[0]))

  def apply(order: Sequence[Adjustment]) -> Callable[[Array], Array]:
    def run(image: Array) -> Array:
      for adjustment, adjustment_key in zip(order, keys, strict=True):
        image = adjustment(image, adjustment_key)
      return image

    return run

  choice = jax.random.randint(choice_key, (), 0, len(orders))
  image = lax.switch(choice, [apply(order) for order in orders], image)
  return jnp.clip(image, 0, 1)


def _brightness(image: Array, key: Array) -> Array:
  return image + jax.random.uniform(key, (), minval=-32 / 255, maxval=32 / 255)


def _contrast(image: Array, key: Array) -> Array:
  factor = jax.random.uniform(key, (), minval=0.5, maxval=1.5)
  mean = image.mean((0, 1), keepdims=True)
  return mean + factor * (image - mean)


def _saturation(image: Array, key: Array) -> Array:
  """Scales the saturation of HSV; value and hue stay."""
  factor = jax.random.uniform(key, (), minval=0.5, maxval=1.5)
  value = image.max(-1, keepdims=True)
  chroma = value - image.min(-1, keepdims=True)
  # Saturation is chroma / value and at most 1.
  limit = jnp.where(chroma > 0, value / jnp.maximum(chroma, 1e-6), 1)
  return value - jnp.clip(factor, 0, limit) * (value - image)


def _hue(image: Array, key: Array) -> Array:
  """Turns the hue of HSV by up to 0.2 of a circle; value, saturation stay."""
  turn = jax.random.uniform(key, (), minval=-0.2, maxval=0.2)
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


# The four orders of TF-Slim's slow mode, the two of its fast one.
_ORDERS: dict[str, Sequence[Sequence[Adjustment]]] = {
  'reduced': ((_brightness, _saturation), (_saturation, _brightness)),
  'full': (
    (_brightness, _saturation, _hue, _contrast),
    (_saturation, _brightness, _contrast, _hue),
    (_contrast, _hue, _brightness, _saturation),
    (_hue, _saturation, _contrast, _brightness),
  ),
}
