"""The bias of section 2 against its closed form, and constant statistics."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from bn_repro.errors import UserError
from bn_repro.lab import __main__ as lab
from bn_repro.lab import drift, rates
from bn_repro.runtime import workdir

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('is_constant', [True, False])
def test_bias_drifts_at_a_constant_rate(is_constant):
  """Its gradient is the mean error of the probabilities, or 0."""
  images = RNG.standard_normal((50, 4, 4, 1)).astype(np.float32)
  labels = RNG.integers(0, 3, 50)
  config = ConfigDict({'learning_rate': 0.5, 'steps': 40})
  norms, losses = drift.drift(
    config, rates.Images(images, labels), 1, is_constant=is_constant
  )
  weights = np.float64(jax.random.normal(jax.random.key(1), (16, 10)))
  u = images.reshape(50, 16) @ weights / 4
  p = np.exp(u - u.mean(0))
  p /= p.sum(1, keepdims=True)
  loss = -np.log(p[np.arange(50), labels]).mean()
  gradient = (p - np.eye(10)[labels]).mean(0) if is_constant else np.zeros(10)
  expected = 0.5 * np.arange(1, 41, 2) * np.linalg.norm(gradient)
  np.testing.assert_allclose(norms, expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(losses, np.full(20, loss), rtol=1e-5)


def test_growth_compares_the_halves():
  assert drift.growth([1.0, 2.0, 3.0, 4.0, 6.0, 8.0]) == 2


def test_gradient_takes_the_statistics_for_constants():
  x, dy = RNG.standard_normal((2, 9, 4)).astype(np.float32)
  module = drift.ConstantStatistics(use_running_average=False)
  y, pull_back = jax.vjp(lambda x: module.apply({}, x), jnp.asarray(x))
  std = np.sqrt(x.var(0) + 1e-5)
  np.testing.assert_allclose(y, (x - x.mean(0)) / std, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(pull_back(dy)[0], dy / std, rtol=1e-4)


def test_quick(tmp_path):
  arguments = ['drift', f'--workdir={tmp_path}', '--quick']
  small = ['steps=40', 'model.depth=1', 'model.width=8']
  assert lab.main([*arguments, *(f'--config.{one}' for one in small)]) == 0
  (result,) = workdir.read_json(tmp_path / 'drift.json')['results']
  assert np.shape(result['accuracy']['BN']) == (5, 20)
  for finding in drift.FINDINGS[:3]:
    assert finding.low < finding.measure(result) < finding.high
  assert (tmp_path / 'drift.png').is_file()


def test_steps_must_have_points():
  with pytest.raises(UserError, match='multiple of 20'):
    drift.check(lab.load('drift', ['steps=30'], quick=True))
