"""BN alone, against the layers of Flax and PyTorch."""

from collections.abc import Callable
import functools
import itertools
import statistics
from typing import Any

import numpy as np

from benchmarks import measure
from bn_repro.errors import UserError
from bn_repro.runtime import backend

# The inputs of the BN layers of conv2_reduce, 3a and 4a at 224 pixels.
SHAPES = ((32, 56, 56, 64), (32, 28, 28, 192), (32, 14, 14, 576))


def _jax_layer(
  layer: Any, x: Any, dy: Any, *, backward: bool
) -> Callable[[], Any]:
  """Creates a function that runs a linen layer, and its gradient given `dy`."""
  import jax

  variables = layer.init(jax.random.key(0), x)

  def forward(params: Any, x: Any) -> Any:
    y, updated = layer.apply(
      {**variables, 'params': params}, x, mutable=['batch_stats']
    )
    return (y * dy).sum() if backward else y, updated

  if backward:
    compiled = jax.jit(jax.grad(forward, argnums=(0, 1), has_aux=True))
  else:
    compiled = jax.jit(forward)
  return lambda: jax.block_until_ready(compiled(variables['params'], x))


def import_torch() -> Any:
  """Returns PyTorch.

  Raises:
    UserError: if it is not installed.
  """
  try:
    import torch
  except ImportError as error:
    raise UserError(
      'PyTorch is not installed. Run: pip install -r requirements-dev.txt'
    ) from error
  return torch


def _torch_layer(x: Any, dy: Any, *, backward: bool) -> Callable[[], Any]:
  """Creates the same function for PyTorch's layer."""
  torch = import_torch()
  layer = torch.nn.BatchNorm2d(x.shape[-1])
  images, gradient = (
    torch.tensor(np.array(array).transpose(0, 3, 1, 2)).contiguous()
    for array in (x, dy)
  )
  images.requires_grad_(backward)

  def call() -> None:
    y = layer(images)
    if backward:
      y.backward(gradient)

  return call


def bn(rounds: int) -> list[measure.Figure]:
  """Times BN layers at three shapes, in float32."""
  import_torch()
  backend.import_jax()
  backend.check_devices()
  import flax.linen as nn
  import jax
  import jax.numpy as jnp

  from bn_repro.models import batch_norm

  layers = {
    'ours': batch_norm.BatchNorm(use_running_average=False),
    "Flax's": nn.BatchNorm(use_running_average=False),
    "Flax's with two-pass variance": nn.BatchNorm(
      use_running_average=False, use_fast_variance=False
    ),
  }

  def milliseconds(call: Callable[[], Any]) -> float:
    return 1e3 * min(measure.seconds(call) for _ in range(20))

  figures = []
  for backward in (False, True):
    what = 'forward and backward' if backward else 'forward'
    found: dict[str, list[measure.Results]] = {}
    for shape in SHAPES:
      x, dy = jax.random.normal(jax.random.key(1), (2, *shape), jnp.float32)
      calls = {
        name: _jax_layer(layer, x, dy, backward=backward)
        for name, layer in layers.items()
      }
      calls["PyTorch's"] = _torch_layer(x, dy, backward=backward)
      print(f'{what}, {"x".join(map(str, shape))}, ms')
      results = measure.interleaved(
        {
          name: functools.partial(milliseconds, call)
          for name, call in calls.items()
        },
        rounds,
      )
      for name in itertools.islice(calls, 1, None):
        found.setdefault(name, []).append(results)
    figures += [
      _mean_ratio(f'{what}, ours over {peer}', peer, of_shapes)
      for peer, of_shapes in found.items()
    ]
  return figures


def _mean_ratio(
  name: str, peer: str, of_shapes: list[measure.Results]
) -> measure.Figure:
  """Returns the geometric mean over shapes of our time over a peer's."""
  value = statistics.geometric_mean(
    measure.ratio(results, 'ours', peer).value for results in of_shapes
  )
  by_round = [
    statistics.geometric_mean(each)
    for each in zip(
      *(
        [a / b for a, b in zip(r['ours'], r[peer], strict=True)]
        for r in of_shapes
      ),
      strict=True,
    )
  ]
  return measure.in_rounds(name, value, by_round)
