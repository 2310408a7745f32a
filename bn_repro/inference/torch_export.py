"""Export to PyTorch: weights named as in Cadene's `bninception`.

`torch_network.py` runs them. Cadene's own module does too, if its sizes,
padding and epsilon are those of the network: `model.reading=608`,
`model.padding=torch` and `bn.epsilon=1e-5`.
"""

from typing import Any

from ml_collections import ConfigDict
import numpy as np

from bn_repro import parallel
from bn_repro.data import preprocess
from bn_repro.errors import UserError
from bn_repro.inference import layouts
from bn_repro.training.model_file import ModelFile

# The steps from pixels in [0, 255] to the input, by `data.normalization`.
_INPUTS = {
  'symmetric': 'RGB / 127.5 - 1',
  'caffe': f'BGR - {preprocess.CAFFE_MEAN}',
  'torchvision': f'(RGB / 255 - {preprocess.TORCHVISION_MEAN}) / '
  f'{preprocess.TORCHVISION_STD}',
}


def to_torch(model: ModelFile) -> dict[str, np.ndarray]:
  """Converts the variables of an Inception network with BN.

  A separable first convolution becomes the plain one that it equals. The
  auxiliary head is left out, as only training uses it.

  Args:
    model: a trained network.

  Returns:
    Arrays by name, as `torch_network.logits` takes them.

  Raises:
    UserError: if the layout cannot hold the network; all reasons are listed.
  """
  _check(model.config)
  variables = {
    path: np.asarray(array)
    for path, array in parallel.named_leaves(model.variables).items()
    if '/aux_head/' not in path
  }
  depthwise = variables.pop('params/conv1/depthwise/kernel', None)
  if depthwise is not None:
    kernel = 'params/conv1/conv/kernel'
    variables[kernel] = _merged(depthwise, variables[kernel])
  return layouts.to_cadene(variables)


def _check(config: ConfigDict) -> None:
  problems = []
  if config.model.name == 'mlp':
    problems.append('model.name=mlp')
  if not config.bn.enabled:
    problems.append('bn.enabled=False')
  if config.bn.per_activation:
    problems.append('bn.per_activation=True')
  if config.model.lrn:
    problems.append('model.lrn=True')
  if problems:
    raise UserError(
      *(
        f"config.{problem}: Cadene's layout of PyTorch weights has no such "
        'network. Export as safetensors or stablehlo.'
        for problem in problems
      )
    )


def _merged(depthwise: np.ndarray, pointwise: np.ndarray) -> np.ndarray:
  """The kernel of a depthwise convolution and the pointwise one after it.

  Args:
    depthwise: (height, width, 1, inputs * multiplier).
    pointwise: (1, 1, inputs * multiplier, outputs).

  Returns:
    (height, width, inputs, outputs), of the same dtype; summed in float64.
  """
  height, width, _, channels = depthwise.shape
  first = depthwise.reshape(height, width, 3, channels // 3)
  second = pointwise.reshape(3, channels // 3, -1)
  merged = np.einsum('hwim,imo->hwio', first, second, dtype=np.float64)
  return merged.astype(depthwise.dtype)


def settings(config: ConfigDict) -> dict[str, Any]:
  """The arguments of `torch_network.logits` for the networks of a config."""
  return {
    'padding': config.model.padding,
    'epsilon': config.bn.epsilon,
    'stem_pool': config.model.stem_pool,
    'nonlinearity': config.model.nonlinearity,
  }


def card(model: ModelFile, file: str) -> str:
  """Markdown that says how to run the exported network.

  Args:
    model: the network.
    file: name of the file with its arrays.
  """
  height, width, channels = model.image_shape
  arguments = ', '.join(
    f'{name}={value!r}' for name, value in settings(model.config).items()
  )
  return f"""\
The weights are named as in Cadene's `bninception`. With
`bn_repro/inference/torch_network.py`, which needs PyTorch alone:

```python
import safetensors.torch
import torch_network

weights = safetensors.torch.load_file('{file}')
# images: float32 (batch, {channels}, {height}, {width}), of pixels in 0-255:
# {_INPUTS[model.config.data.normalization]}
logits = torch_network.logits(weights, images, {arguments})
```
"""
