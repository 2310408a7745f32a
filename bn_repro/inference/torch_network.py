"""The exported network in PyTorch; needs nothing of this package.

  weights = safetensors.torch.load_file('network.safetensors')
  found = logits(weights, images, **settings)

`weights` are named as in `bninception` of Cadene's pretrained-models.pytorch.
The settings of a network stand on its card. Widths and window sizes are those
of the weights, and the modules are those whose weights exist.
"""

from collections.abc import Mapping

import torch
from torch.nn import functional as F

MODULES = ('3a', '3b', '3c', '4a', '4b', '4c', '4d', '4e', '5a', '5b')


def logits(
  weights: Mapping[str, torch.Tensor],
  images: torch.Tensor,
  *,
  padding: str,
  epsilon: float,
  stem_pool: bool,
  nonlinearity: str,
) -> torch.Tensor:
  """Maps images to logits (batch, classes), with frozen BN statistics.

  Args:
    weights: tensors by name, of the dtype of `images`.
    images: normalized images (batch, 1 or 3, height, width).
    padding: of strided convolutions and average pooling: `same` as in
      TensorFlow, where padding is not averaged, or `torch`.
    epsilon: constant that BN adds to the variance.
    stem_pool: max pooling after the first convolution.
    nonlinearity: `relu` or `sigmoid`.
  """

  def unit(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
    kernel = weights[f'{name}.weight']
    size = kernel.shape[-1]
    pads = (size // 2,) * 4 if padding == 'torch' else same(x, size, stride)
    x = F.conv2d(F.pad(x, pads), kernel, weights[f'{name}.bias'], stride)
    parts = ('running_mean', 'running_var', 'weight', 'bias')
    bn = {part: weights[f'{name}_bn.{part}'] for part in parts}
    x = F.batch_norm(x, **bn, eps=epsilon)
    return getattr(torch, nonlinearity)(x)

  def max_pool(x: torch.Tensor, stride: int = 2) -> torch.Tensor:
    x = F.pad(x, same(x, 3, stride), value=-torch.inf)
    return F.max_pool2d(x, 3, stride)

  x = unit('conv1_7x7_s2', images.expand(-1, 3, -1, -1), 2)
  x = max_pool(x) if stem_pool else x
  x = unit('conv2_3x3', unit('conv2_3x3_reduce', x))
  x = max_pool(x)
  for module in MODULES:
    name = f'inception_{module}'
    if f'{name}_3x3.weight' not in weights:
      continue
    stride = 1 if f'{name}_1x1.weight' in weights else 2
    branches = [unit(f'{name}_1x1', x)] if stride == 1 else []
    y = unit(f'{name}_3x3_reduce', x)
    branches.append(unit(f'{name}_3x3', y, stride))
    y = unit(f'{name}_double_3x3_reduce', x)
    y = unit(f'{name}_double_3x3_1', y)
    branches.append(unit(f'{name}_double_3x3_2', y, stride))
    if stride == 2 or module == '5b':
      y = max_pool(x, stride)
    else:
      y = F.avg_pool2d(x, 3, 1, 1, count_include_pad=padding == 'torch')
    branches.append(unit(f'{name}_pool_proj', y) if stride == 1 else y)
    x = torch.cat(branches, 1)
  return F.linear(
    x.mean((2, 3)), weights['last_linear.weight'], weights['last_linear.bias']
  )


def same(x: torch.Tensor, size: int, stride: int) -> tuple[int, int, int, int]:
  """TensorFlow's SAME padding: (left, right, top, bottom)."""
  height, width = (
    max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[2:]
  )
  return (width // 2, width - width // 2, height // 2, height - height // 2)
