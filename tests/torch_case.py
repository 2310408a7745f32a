"""Weights and batches that JAX and PyTorch are both given. Imports neither.

Everything is drawn by NumPy, layer by layer in the order of the forward pass.
"""

import math

import numpy as np

from bn_repro.models import inception_table

# The small net: BN-Baseline in `mini`, of the 608 reading with torch padding,
# without dropout, whose masks the frameworks do not share.
SMALL = (
  'model.reading=608',
  'model.padding=torch',
  'model.dropout_rate=0',
  'model.dtype=float64',
)
NUM_STEPS = 10
# The full network of the same reading, on two images.
FULL = (
  'model.stem=plain',
  'model.lrn=false',
  'model.dropout_rate=0',
  'model.reading=608',
  'model.padding=torch',
  'model.dtype=float64',
  'bn.epsilon=1e-5',
  'bn.momentum=0.9',
)


def unit_paths():
  """Convolution units in the order of the forward pass, as module names."""
  paths = [('conv1',), ('conv2_reduce',), ('conv2',)]
  for row in inception_table.rows('608'):
    names = ['reduce_3x3', 'conv_3x3']
    names += ['reduce_double', 'conv_double_1', 'conv_double_2']
    if row.conv_1x1:
      names.insert(0, 'conv_1x1')
    if row.projection:
      names.append('projection')
    paths += [(f'inception_{row.name}', name) for name in names]
  return paths


def at(tree, path):
  """The sub-tree at a path."""
  for name in path:
    tree = tree[name]
  return tree


def draw_variables(shapes):
  """Values for the shapes of `params` and `batch_stats`, as nested dicts.

  Gamma, beta and the running statistics are not at their usual values, where
  an error in them could hide.
  """
  rng = np.random.Generator(np.random.Philox(7))
  params, batch_stats = {}, {}

  def put(tree, path, value):
    for name in path[:-1]:
      tree = tree.setdefault(name, {})
    tree[path[-1]] = value

  for path in unit_paths():
    shape = at(shapes['params'], path)['conv']['kernel'].shape
    std = math.sqrt(2 / math.prod(shape[:-1]))
    channels = shape[-1]
    put(params, (*path, 'conv', 'kernel'), std * rng.normal(size=shape))
    put(params, (*path, 'bn', 'scale'), 1 + 0.1 * rng.normal(size=channels))
    put(params, (*path, 'bn', 'bias'), 0.1 * rng.normal(size=channels))
    put(batch_stats, (*path, 'bn', 'mean'), 0.1 * rng.normal(size=channels))
    put(batch_stats, (*path, 'bn', 'var'), rng.uniform(0.5, 2, channels))
  shape = shapes['params']['classifier']['kernel'].shape
  put(params, ('classifier', 'kernel'), 0.01 * rng.normal(size=shape))
  put(params, ('classifier', 'bias'), 0.01 * rng.normal(size=shape[-1]))
  return {'params': params, 'batch_stats': batch_stats}


def leaves(params):
  """Kernels, gammas and betas in the order of the forward pass."""
  found = []
  for path in unit_paths():
    unit = at(params, path)
    found += [unit['conv']['kernel'], unit['bn']['scale'], unit['bn']['bias']]
  return [*found, params['classifier']['kernel'], params['classifier']['bias']]


def statistics(batch_stats):
  """Running means and variances in the order of the forward pass."""
  return [
    at(batch_stats, path)['bn'][name]
    for path in unit_paths()
    for name in ('mean', 'var')
  ]


def projections(arrays):
  """Norm of each array, and its product with a fixed random one: (arrays, 2).

  Two numbers stand for an array, so that the golden files stay small; any
  permutation or scaling of its values changes them.
  """
  rng = np.random.Generator(np.random.Philox(11))
  return np.array(
    [
      [np.linalg.norm(x), np.vdot(x, rng.normal(size=x.shape)) / x.size**0.5]
      for x in map(np.asarray, arrays)
    ]
  )


def batches(number, size, image_size, num_classes):
  """Images uint8 (size, image_size, image_size, 3), and labels."""
  rng = np.random.Generator(np.random.Philox(13))
  for _ in range(number):
    # Blocks of pixels: noise alone looks the same to every feature.
    shape = (size, image_size // 4, image_size // 4, 3)
    images = rng.integers(0, 256, shape).repeat(4, 1).repeat(4, 2)
    labels = rng.integers(0, num_classes, size)
    yield images.astype(np.uint8), labels.astype(np.int32)
