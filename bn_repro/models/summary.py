"""Layers of a network: output shapes, parameters and multiply-adds."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Layer:
  """One row of the table.

  Attributes:
    name: path of the module.
    output: shape for one image, (height, width, channels) or (features,).
    parameters: number of trained values, including BN.
    multiply_adds: those of convolutions and dense layers, for one image.
  """

  name: str
  output: tuple[int, ...]
  parameters: int
  multiply_adds: int


def layers(
  model: nn.Module, image_shape: Sequence[int], depth: int
) -> list[Layer]:
  """The layers of a network in the order of the forward pass.

  Args:
    model: a network, called with `(images, train=...)`.
    image_shape: (height, width, channels).
    depth: 1 for a row per module, 2 for a row per convolution or dense layer.
  """
  images = jnp.zeros((1, *image_shape), jnp.float32)
  _, variables = jax.eval_shape(
    lambda key: model.init_with_output(
      {'params': key, 'dropout': key},
      images,
      train=True,
      capture_intermediates=True,
      mutable=['params', 'batch_stats', 'intermediates'],
    ),
    jax.random.key(0),
  )
  outputs = {
    _keys(path)[:-2]: leaf.shape[1:]
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      variables['intermediates']
    )
  }
  parameters: dict[tuple[str, ...], int] = {}
  multiply_adds: dict[tuple[str, ...], int] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables['params']):
    *module, kind = _keys(path)
    # The stem and the classifier are at the top level, one layer each.
    is_nested = module[0].startswith(('inception', 'aux'))
    row = tuple(module[: depth if is_nested else 1])
    parameters[row] = parameters.get(row, 0) + leaf.size
    if kind == 'kernel':
      positions = math.prod(outputs[tuple(module)][:-1])
      multiply_adds[row] = multiply_adds.get(row, 0) + positions * leaf.size
  order = [row for row in outputs if row in parameters]
  return [
    Layer(
      '/'.join(row),
      outputs[row],
      parameters[row],
      multiply_adds.get(row, 0),
    )
    for row in sorted(order, key=_forward_order)
  ]


def _keys(path: Sequence[Any]) -> tuple[str, ...]:
  return tuple(
    str(getattr(entry, 'key', getattr(entry, 'idx', ''))) for entry in path
  )


# Layers in the order of the forward pass, which is not that of their names.
_FORWARD = (
  'conv1',
  'conv2_reduce',
  'conv2',
  'conv_1x1',
  'reduce_3x3',
  'conv_3x3',
  'reduce_double',
  'conv_double_1',
  'conv_double_2',
  'projection',
)


def _forward_order(row: tuple[str, ...]) -> tuple[Any, ...]:
  stage = 0 if row[0].startswith('conv') else 1
  stage = {'aux_head': 2, 'classifier': 3}.get(row[0], stage)
  rank = [_FORWARD.index(name) for name in row if name in _FORWARD]
  module = row[0] if row[0].startswith('inception') else ''
  return (stage, module, rank, row)


def table(rows: Sequence[Layer]) -> list[str]:
  """The rows as lines of text, with a last line of totals."""
  total = Layer(
    'total',
    (),
    sum(row.parameters for row in rows),
    sum(row.multiply_adds for row in rows),
  )
  width = max(len(row.name) for row in rows)
  lines = [
    f'{"layer":<{width}}  {"output":>14}  {"parameters":>11}  {"mult-adds":>14}'
  ]
  for row in [*rows, total]:
    output = 'x'.join(str(size) for size in row.output)
    lines.append(
      f'{row.name:<{width}}  {output:>14}  {row.parameters:>11,}  '
      f'{row.multiply_adds:>14,}'
    )
  return lines
