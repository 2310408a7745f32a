"""The bias that drifts if gradients ignore the normalization.

Section 2 subtracts from x = u + b the mean over the training data. If the
gradient step takes the mean for a constant, it changes b, and the mean with it:
x - E[x] and the loss stay as they are, and b grows without bound. Here u are
the logits of a layer with random weights on digits, and only b is trained.

What if activations are scaled as well? Here hidden layers have BN, without
scale and shift, with constant mean and variance.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from bn_repro.lab import rates
from bn_repro.lab.findings import Finding, Result
from bn_repro.models.batch_norm import BatchNorm
from bn_repro.report import drawing
from bn_repro.training.metrics import cross_entropy

FINDINGS = (
  Finding(
    'If the gradient step takes the mean for a constant, b grows without '
    'bound: in the second half of the steps as far as in the first.',
    'section 2, derived: 1',
    lambda result: growth(result['bias']['constant']),
    0.9,
    1.1,
  ),
  Finding(
    'Meanwhile the loss stays fixed, within 0.1 %.',
    'section 2, derived: 0',
    lambda result: np.ptp(np.log(result['loss']['constant'])).item(),
    high=1e-3,
  ),
  Finding(
    'If the gradient goes through the mean, b moves less than 0.1 % as far.',
    'section 2, derived: 0',
    lambda result: result['bias']['BN'][-1] / result['bias']['constant'][-1],
    high=1e-3,
  ),
  Finding(
    'If it takes mean and variance for constants, the network does not train '
    'at the highest rate: its accuracy is below twice chance.',
    'section 2, implied: gradients must flow through both',
    lambda result: rates.speeds(result['accuracy']['constant'])[-1],
    high=0.2,
  ),
  Finding(
    'With BN it trains at this rate.',
    'section 2, implied',
    lambda result: rates.speeds(result['accuracy']['BN'])[-1],
    low=0.2,
  ),
)


class ConstantStatistics(nn.Module):
  """BN without scale and shift, whose statistics are constant in gradients.

  Attributes:
    use_running_average: not used; the statistics are those of the batch.
  """

  use_running_average: bool

  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalizes the units of `x`, (batch, units)."""
    moments = x.mean(0, keepdims=True), x.var(0, keepdims=True)
    mean, var = jax.lax.stop_gradient(moments)
    return (x - mean) / jnp.sqrt(var + 1e-5)


_BN = partial(BatchNorm, use_scale=False, use_bias=False, momentum=0.9)
_NORMS = {'constant': ConstantStatistics, 'BN': _BN}
_STYLES = (None, 'bn_baseline')

check, table = rates.check, rates.table


def run(config: ConfigDict, seed: int) -> Result:
  """Biases and losses by step, and test accuracies by rate and step."""
  digits = rates.load_digits(config.data)
  tried = rates.tried(config)
  bias, loss, accuracy = {}, {}, {}
  for name, norm in _NORMS.items():
    found = drift(config, digits[0], seed, is_constant=name == 'constant')
    bias[name], loss[name] = np.array(found).tolist()
    model = rates.sigmoids(config.model, norm, use_bias=False)
    accuracy[name], _ = rates.train(model, digits, config, tried, seed)
  return {'bias': bias, 'loss': loss, 'rates': tried, 'accuracy': accuracy}


def drift(
  config: ConfigDict, digits: rates.Images, seed: int, *, is_constant: bool
) -> Any:
  """Norms of the bias, and losses, at points of the training of the bias."""
  pixels = digits.images.reshape(len(digits.images), -1)
  weights = jax.random.normal(jax.random.key(seed), (pixels.shape[1], 10))
  u = pixels @ weights / pixels.shape[1] ** 0.5

  def loss(b: jax.Array) -> jax.Array:
    x = u + b[None]
    mean = x.mean(0, keepdims=True)
    mean = jax.lax.stop_gradient(mean) if is_constant else mean
    return cross_entropy(x - mean, digits.labels).mean()

  def step(b: jax.Array, _: Any) -> Any:
    value, gradient = jax.value_and_grad(loss)(b)
    b = b - config.learning_rate * gradient
    return b, (jnp.linalg.norm(b), value)

  start = jnp.zeros(10)
  _, found = jax.jit(lambda b: jax.lax.scan(step, b, None, config.steps))(start)
  return [values[:: config.steps // rates.POINTS] for values in found]


def growth(bias: Sequence[float]) -> float:
  """How far b moves in the second half of training, over the first half."""
  middle = len(bias) // 2
  return (bias[-1] - bias[middle]) / (bias[middle - 1] - bias[0])


def draw(results: Sequence[Result]) -> Any:
  """The bias and the loss by step, and the speed of training by rate."""
  figure, panels = drawing.plt.subplot_mosaic(
    'AB;CC', figsize=(drawing.WIDTH, 5.6), layout='constrained'
  )
  points = [point / rates.POINTS for point in range(rates.POINTS)]
  for name, style in zip(_NORMS, drawing.styles(_STYLES), strict=True):
    for key, panel in (('bias', 'A'), ('loss', 'B')):
      values = np.transpose([result[key][name] for result in results])
      values = values / values[0] if key == 'loss' else values
      drawing.draw_spread(panels[panel], points, list(values), style, name)
  panels['A'].set(xlabel='share of the steps', ylabel='norm of b')
  panels['B'].set(xlabel='share of the steps', ylabel='loss / first loss')
  panels['B'].set_ylim(0.9, 1.1)
  rates.draw(panels['C'], results, _STYLES)
  panels['C'].legend()
  return figure
