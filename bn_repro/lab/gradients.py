"""Gradient explosion at initialization.

In a deep network of ReLUs with BN, He's initial weights and a large batch, the
gradient grows towards the input by sqrt(pi / (pi - 1)) = 1.211 per layer (Yang
et al., "A Mean Field Theory of Batch Normalization", 2019). Without BN, He's
weights keep it.

Where the number comes from: the outputs of ReLUs on standard normal inputs have
mean square 1/2 and mean 1 / sqrt(2 pi). Their products with weights of variance
2 / n have variance 1 - 1 / pi over the batch, by whose root BN divides. On the
way back a factor 2 of the weights cancels with the half of ReLUs that are 0,
and the division remains.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from bn_repro.errors import UserError
from bn_repro.lab import plain
from bn_repro.lab.findings import Finding, Result
from bn_repro.report import drawing

YANG = math.sqrt(math.pi / (math.pi - 1))

# Layers at either end that the growth leaves out: the last ones feel the loss,
# the first ones the input. Our choice.
_ENDS = 3

_NETWORKS = {
  'BN': plain.NETWORKS['BN, relu'],
  'no BN': plain.NETWORKS['no BN, relu'],
}

FINDINGS = (
  Finding(
    'With BN, gradients grow by 1.21 per layer towards the input.',
    'Yang et al. 2019: 1.211, derived and measured',
    lambda result: growth(result['norms']['BN']),
    YANG - 0.02,
    YANG + 0.02,
  ),
  Finding(
    "Without BN and with He's weights, gradients keep their size.",
    'He et al. 2015: 1, derived',
    lambda result: growth(result['norms']['no BN']),
    0.95,
    1.05,
  ),
)


def check(config: ConfigDict) -> None:
  """Checks that the growth is defined.

  Raises:
    UserError: if it is not.
  """
  if config.model.depth < 2 * _ENDS + 2:
    raise UserError(
      f'config.model.depth={config.model.depth}: the growth is measured '
      f'between layers {_ENDS} from either end. Use at least {2 * _ENDS + 2}.'
    )
  if config.batch_size < 2 or config.model.width < 1:
    raise UserError(
      'config: BN needs a batch_size of at least 2, and a model.width of at '
      'least 1.'
    )


def run(config: ConfigDict, seed: int) -> Result:
  """Norms of the gradients of each layer's weights, with BN and without."""
  width, rng = config.model.width, np.random.default_rng(seed)
  shape = (config.batch_size, width)
  x, direction = rng.normal(size=(2, *shape)).astype(config.model.dtype)
  weights = [
    rng.normal(scale=math.sqrt(2 / width), size=(width, width)).astype(x.dtype)
    for _ in range(config.model.depth)
  ]
  return {
    'norms': {
      name: np.array(_norms(network, weights, x, direction)).tolist()
      for name, network in _NETWORKS.items()
    }
  }


@functools.partial(jax.jit, static_argnums=0)
def _norms(network: Any, weights: Any, x: Any, direction: Any) -> Any:
  """Norms of the gradients of a random linear function of the outputs."""

  def loss(weights: Any) -> jax.Array:
    outputs = x
    for w in weights:
      outputs = network.layer(w, outputs)
    return (outputs * direction).sum()

  return [jnp.linalg.norm(gradient) for gradient in jax.grad(loss)(weights)]


def growth(norms: Sequence[float]) -> float:
  """Growth per layer towards the input, between the ends of the network."""
  middle = np.log(norms[_ENDS:-_ENDS])
  return float(np.exp((middle[0] - middle[-1]) / (len(middle) - 1)))


def table(results: Sequence[Result]) -> str:
  """The growth of each seed."""
  lines = ['| seed | with BN | without |', '|---|---|---|']
  for seed, result in enumerate(results):
    found = (f'{growth(result["norms"][name]):.4f}' for name in _NETWORKS)
    lines.append(f'| {seed} | {" | ".join(found)} |')
  return ''.join(f'{line}\n' for line in lines)


def draw(results: Sequence[Result]) -> Any:
  """Norms of gradients by layer, beside the published growth."""
  figure, axes = drawing.plt.subplots(
    figsize=(drawing.WIDTH, 3.6), layout='constrained'
  )
  styles = drawing.styles(['bn_baseline', 'inception'])
  for name, style in zip(_NETWORKS, styles, strict=True):
    norms = np.array([result['norms'][name] for result in results])
    layers = list(range(1, norms.shape[1] + 1))
    relative = list((norms / norms[:, -1:]).T)
    drawing.draw_spread(axes, layers, relative, style, name, marker='')
  axes.plot(
    layers,
    [YANG ** (layers[-1] - layer) for layer in layers],
    **drawing.REFERENCE,
    label='1.211 per layer',
  )
  axes.set(yscale='log', xlabel='layer', ylabel='gradient, over the last layer')
  axes.legend()
  return figure
