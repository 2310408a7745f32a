"""Random weights in the layouts of other projects. Imports no framework."""

import math
import zlib

import numpy as np

IMAGE_SIZE = 224


def draw(shapes):
  """Arrays float64 for shapes by name, each a function of its name.

  Biases, gammas and running statistics are not at their usual values, where an
  error in them could hide.
  """
  return {name: _draw(name, tuple(shape)) for name, shape in shapes.items()}


def _draw(name, shape):
  rng = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
  leaf = name.replace('/', '.').rpartition('.')[2]
  if leaf in ('running_var', 'moving_variance'):
    return rng.uniform(0.5, 2, shape)
  noise = rng.normal(size=shape)
  if len(shape) == 1:
    return 0.1 * noise + (leaf == 'weight')  # A gamma.
  # PyTorch has the outputs first, TensorFlow last.
  fan_in = math.prod(shape[1:] if leaf == 'weight' else shape[:-1])
  return math.sqrt(2 / fan_in) * noise


def images():
  """One normalized image, float64 (1, height, width, 3) in [-1, 1]."""
  rng = np.random.Generator(np.random.Philox(13))
  blocks = rng.uniform(-1, 1, (1, IMAGE_SIZE // 8, IMAGE_SIZE // 8, 3))
  return blocks.repeat(8, 1).repeat(8, 2)
