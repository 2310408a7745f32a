"""Scale invariance, and the learning rate that BN tunes.

With epsilon 0, BN((aW)u) = BN(Wu) (section 3.3 of the paper). The gradient g of
such weights w is orthogonal to them, and a step of SGD adds eta^2 |g|^2 to
|w|^2. Their direction changes by the effective rate, eta / |w|^2. As |g|^2 is
c / |w|^2, where c does not depend on |w|, steps that are short beside w give
|w_t|^4 = |w_0|^4 + 2 eta^2 c t (Arora et al., "Theoretical Analysis of Auto
Rate-Tuning by Batch Normalization", 2018). The effective rate is eta / |w_0|^2
at first, and 1 / sqrt(2 c t), whatever eta and w_0 are, once
eta sqrt(2 c t) >> |w_0|^2.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from bn_repro.data import mnist
from bn_repro.errors import UserError
from bn_repro.lab.findings import Finding, Result
from bn_repro.models.batch_norm import BatchNorm
from bn_repro.report import drawing
from bn_repro.training.metrics import cross_entropy

FINDINGS = (
  Finding(
    'Gradients are orthogonal to weights before BN (largest cosine).',
    'derived from section 3.3: 0; our bound is 1e-10',
    lambda result: result['cosine'],
    high=1e-10,
  ),
  Finding(
    'Steps add their squared length to that of the weights (largest error).',
    'Arora et al. 2018: 0, derived; our bound is 1e-10',
    lambda result: result['error'],
    high=1e-10,
  ),
  Finding(
    'From small weights, effective rates come to agree (largest over least).',
    'Arora et al. 2018: 1, derived; our bound is 2',
    lambda result: result['spread'],
    high=2,
  ),
  Finding(
    'From large weights, effective rates stay (least of last over first).',
    'Arora et al. 2018: 1, from the same formula; our bound is 0.9',
    lambda result: result['kept'],
    low=0.9,
  ),
)


def check(config: ConfigDict) -> None:
  """Checks that the identities and both regimes are defined.

  Raises:
    UserError: if they are not.
  """
  if config.model.dtype != 'float64':
    raise UserError('config.model.dtype: only float64 is exact to 1e-10.')
  if not 3 <= config.batch_size <= 4000:
    raise UserError(
      'config.batch_size: must be 3 to 4000, all digits. BN makes two values 1 '
      'and -1, and the weights before it have no gradient.'
    )
  if min(config.num_scales, config.num_rates, config.steps) < 2:
    raise UserError('config: num_scales, num_rates, steps must be at least 2.')
  if config.max_scale <= 1:
    raise UserError('config.max_scale: must exceed 1.')


def run(config: ConfigDict, seed: int) -> Result:
  """Trains from all initial scales at all rates, on the same batches."""
  digits: Any = mnist.load_mnist_5k(ConfigDict({'fold': 0})).splits['train']
  images = digits.images.reshape(len(digits), -1)
  rng, width = np.random.default_rng(seed), config.model.width
  w = rng.normal(scale=1 / 28, size=(28 * 28, width))
  v = rng.normal(scale=width**-0.5, size=(width, 10))
  # All runs side by side: the first scale at all rates, then the next one.
  scales = config.max_scale ** np.linspace(-1, 1, config.num_scales)
  eta = config.min_rate * 10.0 ** np.arange(config.num_rates)
  scale, eta = map(np.ravel, np.meshgrid(scales, eta, indexing='ij'))
  w, v = scale[:, None, None] * w, np.stack([v] * len(eta))
  step, measured = jax.jit(jax.vmap(_step, (0, 0, 0, None, None, None))), []
  for _ in range(config.steps):
    batch = rng.choice(len(images), config.batch_size, replace=False)
    x, y = images[batch] / 255, digits.labels[batch]
    w, v, values = step(w, v, eta, config.classifier_rate, x, y)
    measured.append(values)
  w2, g2, cosine, error = np.moveaxis(np.array(measured), -1, 0)
  ct = np.cumsum(w2 * g2, 0) - w2 * g2  # c, summed over the steps before.
  steps = np.unique(np.geomspace(1, config.steps, 15).astype(int)) - 1
  rates, formula = eta / w2, eta / np.sqrt(w2[0] ** 2 + 2 * eta**2 * ct)
  small, large = (rates[:, scale == scales[end]] for end in (0, -1))
  return {
    'scale': scale.tolist(),
    'steps': steps.tolist(),
    'rates': rates[steps].T.tolist(),
    'formula': formula[steps].T.tolist(),
    'spread': small[-1].max() / small[-1].min(),
    'kept': (large[-1] / large[0]).min(),
    'cosine': cosine.max(),
    'error': error.max(),
  }


def _step(w: Any, v: Any, eta: Any, rate: Any, x: Any, labels: Any) -> Any:
  """A step of SGD; returns the weights, and |w|^2, |g|^2 and both errors."""
  norm = BatchNorm(epsilon=0, use_scale=False, use_bias=False)

  def loss(w: jax.Array, v: jax.Array) -> jax.Array:
    y, _ = norm.apply({}, x @ w, use_running_average=False, mutable=True)
    return cross_entropy(jax.nn.sigmoid(y) @ v, labels).mean()

  g, dv = jax.grad(loss, (0, 1))(w, v)
  new = w - eta * g
  w2, g2, new2 = ((a**2).sum(0) for a in (w, g, new))  # Of each unit.
  cosine = jnp.abs((w * g).sum(0)) / jnp.sqrt(w2 * g2)
  error = jnp.abs(new2 - w2 - eta**2 * g2) / new2
  measured = [w2.sum(), g2.sum(), cosine.max(), error.max()]
  return new, v - rate * dv, jnp.array(measured)


def table(results: Sequence[Result]) -> str:
  """Effective rates of each run; medians over the seeds."""
  lines = ['| scale | at first | at the end | formula |', '|---|---|---|---|']
  rates, formula = np.median([[r['rates'], r['formula']] for r in results], 0)
  ends = rates[:, 0], rates[:, -1], formula[:, -1]
  for run in zip(results[0]['scale'], *ends, strict=True):
    lines.append(f'| {" | ".join(f"{figure:.3g}" for figure in run)} |')
  return ''.join(f'{line}\n' for line in lines)


def draw(results: Sequence[Result]) -> Any:
  """Effective rates by step, beside the formula; medians over the seeds."""
  size = (drawing.WIDTH, 4.6)
  figure, axes = drawing.plt.subplots(figsize=size, layout='constrained')
  steps, scale = results[0]['steps'], np.array(results[0]['scale'])
  rates, formula = np.median([[r['rates'], r['formula']] for r in results], 0)
  scales = np.unique(scale)
  for value, style in zip(scales, drawing.styles(scales), strict=True):
    lines = axes.plot(steps, rates[scale == value].T, **style, ms=4)
    lines[0].set_label(f'w x{value:.2g}')
  axes.plot(steps, formula.T, **drawing.REFERENCE)[0].set_label('formula')
  axes.set(xscale='symlog', yscale='log', xlabel='step', ylabel='eta / |w|^2')
  axes.legend(ncols=3)
  return figure
