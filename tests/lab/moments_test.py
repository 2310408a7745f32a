"""The forms of the variance against NumPy."""

import math

import numpy as np
import pytest

from bn_repro.errors import UserError
from bn_repro.lab import __main__ as lab
from bn_repro.lab import moments
from bn_repro.runtime import workdir

X = np.float32(np.random.default_rng(0).normal(300, 1, (512, 8)))


def naive(x):
  """E[x^2] - E[x]^2 of a column in float32, one value at a time."""
  total = squares = np.float32(0)
  for value in x:
    total += value
    squares += value * value
  n = np.float32(len(x))
  return squares / n - (total / n) ** 2


def error(found, x):
  return np.max(np.abs(np.float64(found) / np.float64(x).var(0) - 1))


def test_one_reduction_about_0_is_the_naive_form():
  """Both lose about (mean / std)^2 / 2^24 = 5e-3 of the variance."""
  expected = error([naive(column) for column in X.T], X)
  found = error(moments.variance(X, moments.NAIVE), X)
  assert expected / 30 < found < expected * 30
  assert found > 1e-3


@pytest.mark.parametrize(
  'form, within',
  [
    ('pivot 1 std off', 1e-6),
    ('pivot 100 std off', 1e-2),
    ('two passes', 1e-6),
  ],
)
def test_other_forms_are_near_the_exact_variance(form, within):
  assert error(moments.variance(X, form), X) < within
  # Farther from the pivot the error is larger.
  assert (within == 1e-2) == (error(moments.variance(X, form), X) > 1e-5)


def test_growth_is_the_slope_on_logarithmic_axes():
  places = [[1.0, 64], [10.0, 64], [100.0, 64], [100.0, 16]]
  values = {moments.NAIVE: [3e-6, 1.0, 3e-3, 1.0]}
  growth = moments.growth({'places': places, 'values': values})
  assert math.isclose(growth, 1.5)


def test_quick(tmp_path):
  arguments = ['moments', f'--workdir={tmp_path}', '--quick']
  assert lab.main([*arguments, '--config.batch_size=64']) == 0
  (result,) = workdir.read_json(tmp_path / 'moments.json')['results']
  assert result['places'][3:] == [
    [1e3, 64],
    [1e4, 64],
    [100.0, 16],
    [100.0, 4],
  ]
  values = result['values']
  assert values[moments.NAIVE][4] > 0.5  # The variance is lost,
  assert values['epsilon 0.001'][4] > 100  # and the outputs with it.
  for form in ('pivot 1 std off', 'two passes'):
    assert max(values[form]) < 1e-4
  assert (tmp_path / 'moments.png').is_file()
  assert '| 100 | 16 |' in (tmp_path / 'moments.md').read_text()


@pytest.mark.parametrize(
  'override, reason',
  [
    ('model.dtype=float64', 'float32'),
    ('batch_size=7', 'batch_size=7: the figure needs at least 8'),
  ],
)
def test_undefined_values_are_refused(override, reason):
  config = lab.load('moments', [override], quick=True)
  with pytest.raises(UserError, match=reason):
    moments.check(config)
