"""The noise after BN: its distribution, and that evaluation has none."""

import jax
import numpy as np
import pytest
from scipy import stats

from bn_repro.lab.noisy_batch_norm import NoisyBatchNorm
from bn_repro.models.batch_norm import BatchNorm

UNITS = 400
# In each unit, a third of the values is -1, 0 and 1.
X = np.broadcast_to(
  np.repeat(np.float32([-1, 0, 1]), 40)[:, None, None, None],
  (120, 5, 5, UNITS),
)


@pytest.fixture(scope='module')
def variables():
  return NoisyBatchNorm(use_running_average=False).init(jax.random.key(0), X)


def outputs(variables, step):
  """Outputs for the values -1, 0 and 1, (3, draws, units), and statistics."""
  layer = NoisyBatchNorm(use_running_average=False)
  rngs = {'noise': jax.random.key(step)}
  z, updated = layer.apply(variables, X, rngs=rngs, mutable=['batch_stats'])
  return np.float64(z).reshape(3, -1, UNITS), updated


def parameters(z):
  """Estimates of mu and sigma of each unit, for BN's outputs -y, 0 and y."""
  y = np.sqrt(1 / (2 / 3 + 1e-5))
  means = z.mean(1)
  return means[1], (means[2] - means[0]) / (2 * y)


def distance(values, distribution):
  """The largest difference of the cumulative distributions."""
  return stats.kstest(values, distribution.cdf).statistic


def test_noise_of_units(variables):
  """Kolmogorov's 99.9 % quantile is 0.1 for 400 units."""
  mu, sigma = parameters(outputs(variables, 1)[0])
  assert distance(mu, stats.uniform(-0.5, 1)) < 0.1
  assert distance(sigma, stats.uniform(1, 0.25)) < 0.1
  assert abs(np.corrcoef(mu, sigma)[0, 1]) < 0.2


def test_noise_of_values(variables):
  z, _ = outputs(variables, 1)
  mu, sigma = parameters(z)
  y = np.sqrt(1 / (2 / 3 + 1e-5))
  assert distance((z[1] - mu).ravel(), stats.uniform(-0.1, 0.2)) < 0.01
  # A sum of independent normal and uniform noise.
  noise = z[2] - (sigma * y + mu)
  np.testing.assert_allclose(
    noise.var(), (0.1 * y) ** 2 + 0.2**2 / 12, rtol=0.02
  )
  assert abs(stats.kurtosis(noise.ravel())) < 0.1
  # Examples do not share their noise.
  noise = noise.reshape(2, -1)
  assert abs(np.corrcoef(noise)[0, 1]) < 0.01


def test_each_step_has_other_units(variables):
  first, second = (parameters(outputs(variables, step)[0]) for step in (1, 2))
  for a, b in zip(first, second, strict=True):
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.2


def test_evaluation_is_that_of_bn(variables):
  """The running statistics are those before the noise."""
  _, updated = outputs(variables, 1)
  plain = {kind: tree['BatchNorm_0'] for kind, tree in variables.items()}
  layer = BatchNorm(use_running_average=False)
  _, expected = layer.apply(plain, X, mutable=['batch_stats'])
  jax.tree.map(
    np.testing.assert_array_equal,
    updated['batch_stats']['BatchNorm_0'],
    expected['batch_stats'],
  )
  np.testing.assert_array_equal(
    NoisyBatchNorm(use_running_average=True).apply({**variables, **updated}, X),
    BatchNorm(use_running_average=True).apply({**plain, **expected}, X),
  )
