"""Whitening against SciPy and finite differences, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from bn_repro.lab.whitening import Whitening

pytestmark = pytest.mark.usefixtures('x64')

RNG = np.random.default_rng(0)
X = RNG.standard_normal((20, 4)) @ RNG.standard_normal((4, 4)) + [3, 0, -2, 9]
PARAMS = {
  'scale': np.array([1.0, 2.0, -1.0, 0.5]),
  'bias': np.array([0.0, 1.0, 2.0, 3.0]),
}


def whiten(x, epsilon):
  module = Whitening(use_running_average=False, epsilon=epsilon)
  return module.apply({'params': PARAMS}, x)


def test_is_the_symmetric_root_of_the_paper():
  for epsilon in (0.0, 0.3):
    covariance = np.cov(X.T, bias=True) + epsilon * np.eye(4)
    root = linalg.inv(linalg.sqrtm(covariance))
    expected = (X - X.mean(0)) @ root * PARAMS['scale'] + PARAMS['bias']
    found = whiten(jnp.asarray(X), epsilon)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_units_become_uncorrelated_with_the_variances_of_the_scale():
  found = np.cov(np.asarray(whiten(jnp.asarray(X), 0.0)).T, bias=True)
  expected = np.diag(PARAMS['scale'] ** 2)
  np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_gradient_goes_through_the_eigenvectors():
  weights, direction = RNG.standard_normal((2, *X.shape))

  def loss(x):
    return jnp.sum(whiten(x, 1e-3) * weights)

  found = jnp.sum(jax.grad(loss)(jnp.asarray(X)) * direction)
  ahead, behind = (loss(jnp.asarray(X + s * direction)) for s in (1e-6, -1e-6))
  np.testing.assert_allclose(found, (ahead - behind) / 2e-6, rtol=1e-6)
