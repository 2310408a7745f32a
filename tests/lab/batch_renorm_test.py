"""Batch Renormalization against NumPy, and against BN."""

import jax
import numpy as np
import pytest

from bn_repro.lab.batch_renorm import BatchRenorm
from bn_repro.models.batch_norm import BatchNorm

RNG = np.random.default_rng(0)
X = RNG.normal(0.3, 2.0, (8, 3, 2, 4))
WEIGHT = RNG.normal(size=X.shape)
# The last feature is the only one that no limit touches.
MEAN = np.array([9.0, -9.0, 0.5, 0.2])
VAR = np.array([90.0, 0.05, 30.0, 3.0])
SCALE, BIAS = RNG.normal(size=(2, 4))
R_MAX, D_MAX, EPSILON = 1.8, 0.7, 1e-5
VARIABLES = {
  'params': {'scale': SCALE, 'bias': BIAS},
  'batch_stats': {'mean': MEAN, 'var': VAR},
}


def layer(**changes):
  options = {
    'r_max': R_MAX,
    'd_max': D_MAX,
    'virtual_batch_size': 4,
    'momentum': 0.9,
    'epsilon': EPSILON,
    **changes,
  }
  return BatchRenorm(**options)


def corrections(group, r_max=R_MAX, d_max=D_MAX):
  """`(r, d)` of a group of examples."""
  sigma = np.sqrt(VAR + EPSILON)
  r = np.sqrt(group.var((0, 1, 2)) + EPSILON) / sigma
  d = (group.mean((0, 1, 2)) - MEAN) / sigma
  return np.clip(r, 1 / r_max, r_max), np.clip(d, -d_max, d_max)


def numpy_outputs(x, constants):
  """Outputs with given `(r, d)` of each group, in float64."""
  outputs = []
  for group, (r, d) in zip(x.reshape(2, 4, 3, 2, 4), constants, strict=True):
    std = np.sqrt(group.var((0, 1, 2)) + EPSILON)
    xhat = (group - group.mean((0, 1, 2))) / std
    outputs.append(SCALE * (xhat * r + d) + BIAS)
  return np.concatenate(outputs)


CONSTANTS = [corrections(group) for group in X.reshape(2, 4, 3, 2, 4)]


def test_the_limits_bind_in_both_directions():
  r, d = np.moveaxis(np.array(CONSTANTS), 1, 0)
  for values, low, high in ((r, 1 / R_MAX, R_MAX), (d, -D_MAX, D_MAX)):
    assert {low, high} < set(values.ravel())
    assert ((low < values) & (values < high)).any()


@pytest.mark.usefixtures('x64')
def test_outputs_and_statistics():
  outputs, updated = layer().apply(
    VARIABLES, X, use_running_average=False, mutable=['batch_stats']
  )
  np.testing.assert_allclose(
    outputs, numpy_outputs(X, CONSTANTS), rtol=1e-10, atol=1e-12
  )
  groups = X.reshape(2, 24, 4)
  found = updated['batch_stats']
  np.testing.assert_allclose(
    found['mean'], 0.9 * MEAN + 0.1 * groups.mean((0, 1)), rtol=1e-10
  )
  unbiased = groups.var(1, ddof=1).mean(0)
  np.testing.assert_allclose(
    found['var'], 0.9 * VAR + 0.1 * unbiased, rtol=1e-10
  )


@pytest.mark.usefixtures('x64')
def test_gradients_take_r_and_d_for_constants():
  def loss(x):
    outputs, _ = layer().apply(
      VARIABLES, x, use_running_average=False, mutable=['batch_stats']
    )
    return (outputs * WEIGHT).sum()

  found = jax.grad(loss)(X)
  step = 1e-5
  for index in [(0, 0, 0, 0), (3, 2, 1, 1), (5, 1, 0, 2), (7, 2, 1, 3)]:
    change = np.zeros_like(X)
    change[index] = step
    above, below = (
      (numpy_outputs(x, CONSTANTS) * WEIGHT).sum()
      for x in (X + change, X - change)
    )
    expected = (above - below) / (2 * step)
    assert found[index] == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.usefixtures('x64')
def test_without_limits_training_is_inference():
  """The identity from which Ioffe derives r and d."""
  trained, _ = layer(r_max=1e9, d_max=1e9).apply(
    VARIABLES, X, use_running_average=False, mutable=['batch_stats']
  )
  inferred = layer().apply(VARIABLES, X, use_running_average=True)
  expected = SCALE * (X - MEAN) / np.sqrt(VAR + EPSILON) + BIAS
  np.testing.assert_allclose(inferred, expected, rtol=1e-10, atol=1e-12)
  np.testing.assert_allclose(trained, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.usefixtures('x64')
def test_with_limits_1_and_0_it_is_bn():
  def outcome(module):
    variables = module.init(jax.random.key(0), X, use_running_average=False)
    assert jax.tree.structure(variables) == jax.tree.structure(VARIABLES)

    def loss(variables, x):
      outputs, updated = module.apply(
        variables, x, use_running_average=False, mutable=['batch_stats']
      )
      return (outputs * WEIGHT).sum(), (outputs, updated)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(VARIABLES, X)

  options = {'momentum': 0.9, 'nonlinearity': jax.nn.relu}
  (found, found_dx), found_outputs = outcome(
    layer(r_max=1.0, d_max=0.0, **options)
  )
  (expected, expected_dx), expected_outputs = outcome(
    BatchNorm(virtual_batch_size=4, epsilon=EPSILON, **options)
  )
  for a, b in (
    (found['params'], expected['params']),
    (found_dx, expected_dx),
    (found_outputs, expected_outputs),
  ):
    jax.tree.map(
      lambda u, v: np.testing.assert_allclose(u, v, rtol=1e-8, atol=1e-9), a, b
    )
