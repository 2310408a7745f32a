"""How other projects name and store the variables of the Inception network.

Three projects publish weights of BN-Inception: TF-Slim (`inception_v2`), Cadene
(`bninception` of pretrained-models.pytorch, converted from Caffe), and
pytorchcv (`bninception`). The functions here translate names, shapes and the
order of axes, on NumPy arrays alone. Variables of ours have paths such as
'params/inception_3a/conv_1x1/conv/kernel'.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import NamedTuple

import numpy as np

from bn_repro.models import inception_table

Shape = tuple[int, ...]
Arrays = Mapping[str, np.ndarray]


class _Names(NamedTuple):
  """Names of a convolution unit of ours in the three layouts."""

  slim: str
  cadene: str
  pytorchcv: str


_STEM = {
  'conv1': _Names('Conv2d_1a_7x7', 'conv1_7x7_s2', 'conv1'),
  'conv2_reduce': _Names('Conv2d_2b_1x1', 'conv2_3x3_reduce', 'conv2.conv1'),
  'conv2': _Names('Conv2d_2c_3x3', 'conv2_3x3', 'conv2.conv2'),
}
# In a module: the number of the branch, and the name within the branch. A
# module of stride 2 has no branch 0.
_BRANCHES = {
  'conv_1x1': (0, _Names('0a_1x1', '1x1', '')),
  'reduce_3x3': (1, _Names('0a_1x1', '3x3_reduce', '.conv1')),
  'conv_3x3': (1, _Names('0b_3x3', '3x3', '.conv2')),
  'reduce_double': (2, _Names('0a_1x1', 'double_3x3_reduce', '.conv1')),
  'conv_double_1': (2, _Names('0b_3x3', 'double_3x3_1', '.conv2')),
  'conv_double_2': (2, _Names('0c_3x3', 'double_3x3_2', '.conv3')),
  'projection': (3, _Names('0b_1x1', 'pool_proj', '.conv')),
}
# TF-Slim's name of the convolutions of stride 2.
_SLIM_STRIDED = {'conv_3x3': '1a_3x3', 'conv_double_2': '1a_3x3'}
# Modules by their position in the table: TF-Slim counts the pooling before 3a
# as a, and pytorchcv the modules of each size of the grid.
_SLIM_MODULES = ['3b', '3c', '4a', '4b', '4c', '4d', '4e', '5a', '5b', '5c']
_PYTORCHCV_MODULES = [
  f'stage{stage}.unit{unit}'
  for stage, units in ((1, 2), (2, 5), (3, 3))
  for unit in range(1, units + 1)
]

_SLIM_LEAVES = {
  'conv/kernel': 'weights',
  'bn/bias': 'BatchNorm/beta',
  'bn/mean': 'BatchNorm/moving_mean',
  'bn/var': 'BatchNorm/moving_variance',
}
# The first unit is a separable convolution with biases and without BN.
_SLIM_STEM_LEAVES = {
  'depthwise/kernel': 'depthwise_weights',
  'conv/kernel': 'pointwise_weights',
  'bn/bias': 'biases',
}
_TORCH_LEAVES = {
  'kernel': 'weight',
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}


def _module_position(module: str) -> tuple[int, int]:
  """The position of a module such as inception_3a, and its stride."""
  rows = inception_table.rows('576')
  names = [f'inception_{row.name}' for row in rows]
  position = names.index(module)
  return position, rows[position].stride


def _slim_name(path: str) -> str | None:
  _, *unit, layer, leaf = path.split('/')
  if layer == 'classifier':
    leaf = {'kernel': 'weights', 'bias': 'biases'}[leaf]
    return f'InceptionV2/Logits/Conv2d_1c_1x1/{leaf}'
  leaves = _SLIM_STEM_LEAVES if unit == ['conv1'] else _SLIM_LEAVES
  their_leaf = leaves.get(f'{layer}/{leaf}')
  if their_leaf is None:
    return None
  if len(unit) == 1:
    return f'InceptionV2/{_STEM[unit[0]].slim}/{their_leaf}'
  position, stride = _module_position(unit[0])
  number, names = _BRANCHES[unit[1]]
  name = names.slim
  if stride == 2:
    number, name = number - 1, _SLIM_STRIDED.get(unit[1], name)
  return (
    f'InceptionV2/Mixed_{_SLIM_MODULES[position]}/Branch_{number}/'
    f'Conv2d_{name}/{their_leaf}'
  )


def _cadene_name(path: str) -> str:
  _, *unit, layer, leaf = path.split('/')
  if layer == 'classifier':
    name = 'last_linear'
  elif len(unit) == 1:
    name = _STEM[unit[0]].cadene
  else:
    name = f'{unit[0]}_{_BRANCHES[unit[1]][1].cadene}'
  suffix = '_bn' if layer == 'bn' else ''
  return f'{name}{suffix}.{_TORCH_LEAVES[leaf]}'


def _pytorchcv_name(path: str) -> str:
  _, *unit, layer, leaf = path.split('/')
  leaf = _TORCH_LEAVES[leaf]
  if layer == 'classifier':
    return f'output.{leaf}'
  if len(unit) == 1:
    return f'features.init_block.{_STEM[unit[0]].pytorchcv}.{layer}.{leaf}'
  position, stride = _module_position(unit[0])
  number, names = _BRANCHES[unit[1]]
  return (
    f'features.{_PYTORCHCV_MODULES[position]}.branches.'
    f'branch{number + 2 - stride}{names.pytorchcv}.{layer}.{leaf}'
  )


def _slim_shape(path: str, shape: Shape) -> Shape:
  if path.endswith('depthwise/kernel'):
    height, width, _, outputs = shape
    multiplier = inception_table.DEPTH_MULTIPLIER
    return (height, width, outputs // multiplier, multiplier)
  return (1, 1, *shape) if path == 'params/classifier/kernel' else shape


def _torch_shape(path: str, shape: Shape) -> Shape:
  del path
  return (*shape[:-3:-1], *shape[:-2])


def _from_torch(array: np.ndarray, shape: Shape) -> np.ndarray:
  del shape
  axes = (*range(2, array.ndim), 1, 0)
  return array.transpose(axes) if array.ndim > 1 else array


def _to_torch(array: np.ndarray) -> np.ndarray:
  axes = (-1, -2, *range(array.ndim - 2))
  return array.transpose(axes) if array.ndim > 1 else array


@dataclasses.dataclass(frozen=True)
class Layout:
  """The layout of a project, and the network and input of its weights.

  Attributes:
    fields: overrides of `configs/inception.py`, as 'KEY=VALUE'.
    name: maps the path of a variable of ours, or of a bias that one of our
      convolutions could have, to its name; None if the project has none.
    shape: maps (path, shape of ours) to its shape.
    convert: maps (array, shape of ours) to an array of ours.
  """

  fields: tuple[str, ...]
  name: Callable[[str], str | None]
  shape: Callable[[str, Shape], Shape]
  convert: Callable[[np.ndarray, Shape], np.ndarray]


# Inference needs no dropout, and statistics come with the weights.
_BN = ('bn.enabled=true', 'bn.population_batches=0', 'model.lrn=false')
_CAFFE = (
  *_BN,
  'model.reading=608',
  'model.stem=plain',
  'model.padding=torch',
  'model.dropout_rate=0',
  'bn.epsilon=1e-5',
  'bn.momentum=0.9',
)
LAYOUTS: Mapping[str, Layout] = {
  'slim': Layout(
    fields=(
      *_BN,
      'model.dropout_rate=0.2',
      'data.evaluation_box=proportional',
    ),
    name=_slim_name,
    shape=_slim_shape,
    convert=np.reshape,
  ),
  'cadene': Layout(
    fields=(*_CAFFE, 'data.normalization=caffe'),
    name=_cadene_name,
    shape=_torch_shape,
    convert=_from_torch,
  ),
  'pytorchcv': Layout(
    fields=(*_CAFFE, 'data.normalization=torchvision'),
    name=_pytorchcv_name,
    shape=_torch_shape,
    convert=_from_torch,
  ),
}


def num_classes(layout: Layout, arrays: Arrays) -> int:
  """The number of classes of the classifier; 1,000 if there is none."""
  bias = arrays.get(layout.name('params/classifier/bias') or '')
  return 1000 if bias is None else bias.size


def without_background(arrays: Arrays) -> dict[str, np.ndarray]:
  """Drops class 0 of 1,001 classes in TF-Slim's layout, the background.

  The other classes then have the labels of ImageNet. A classifier of another
  size belongs to a network that was trained further, and stays as it is.
  """
  layout = LAYOUTS['slim']
  if num_classes(layout, arrays) != 1001:
    return dict(arrays)
  parts = {layout.name(f'params/classifier/{x}') for x in ('kernel', 'bias')}
  return {
    name: array[..., 1:] if name in parts else array
    for name, array in arrays.items()
  }


def their_shapes(
  layout: Layout, shapes: Mapping[str, Shape]
) -> dict[str, Shape]:
  """The variables that a file has in a layout.

  Args:
    layout: the layout.
    shapes: shape of each variable of ours, by path.

  Returns:
    Shape of each variable, by the name in the layout.
  """
  shapes = {**shapes, **{_bias(x): shapes[x] for x in _means(shapes)}}
  named = {path: layout.name(path) for path in shapes}
  return {
    name: layout.shape(path, shapes[path])
    for path, name in named.items()
    if name is not None
  }


def to_ours(
  layout: Layout,
  arrays: Arrays,
  shapes: Mapping[str, Shape],
  epsilon: float,
) -> dict[str, np.ndarray]:
  """Converts arrays of a layout to variables of ours.

  BN takes over the bias of the convolution before it: its mean is smaller by
  the bias. What TF-Slim lacks, gamma and the BN of the first unit, becomes an
  identity: gamma 1, mean 0, variance 1 - epsilon.

  Args:
    layout: the layout.
    arrays: arrays that have the names and shapes of `their_shapes`.
    shapes: shape of each variable of ours, by path.
    epsilon: the constant that BN adds to the variance.

  Returns:
    Arrays by path, of the dtype of `arrays`.
  """
  dtype = next(iter(arrays.values())).dtype
  identity = {'scale': 1, 'mean': 0, 'var': 1 - epsilon}
  variables = {}
  for path, shape in shapes.items():
    name = layout.name(path)
    variables[path] = (
      np.full(shape, identity[path.rpartition('/')[2]], dtype)
      if name is None
      else np.ascontiguousarray(layout.convert(arrays[name], shape))
    )
  for path in _means(shapes):
    bias = layout.name(_bias(path))
    if bias is not None:
      variables[path] = variables[path] - arrays[bias]
  return variables


def to_cadene(variables: Arrays) -> dict[str, np.ndarray]:
  """Converts variables of ours, by path, to arrays of Cadene's layout.

  Our convolutions have no biases: the biases are 0. The first convolution must
  be plain.
  """
  arrays = {
    _cadene_name(path): np.ascontiguousarray(_to_torch(array))
    for path, array in variables.items()
  }
  for path in _means(variables):
    arrays[_cadene_name(_bias(path))] = np.zeros_like(variables[path])
  return arrays


def _means(paths: Mapping[str, object]) -> list[str]:
  """The paths of the running means."""
  return [path for path in paths if path.endswith('/bn/mean')]


def _bias(mean: str) -> str:
  """The path that the bias of the convolution before a BN would have."""
  return mean.replace('batch_stats/', 'params/').replace('bn/mean', 'conv/bias')
