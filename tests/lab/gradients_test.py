"""Growth of gradients, against backpropagation written out in NumPy."""

import math

import numpy as np
import pytest

from bn_repro.errors import UserError
from bn_repro.lab import __main__ as lab
from bn_repro.lab import gradients


def config(**changes):
  found = lab.load('gradients', (), quick=True)
  found.model.update({'depth': 8, 'width': 12})
  found.batch_size = 24
  found.update_from_flattened_dict(changes)
  return found


def numpy_gradients(kernels, x, direction, *, bn):
  """Gradients of sum(outputs * direction) with respect to each kernel."""
  kept = []
  for kernel in kernels:
    inputs = np.maximum(x, 0)
    h = inputs @ kernel
    std = np.sqrt(h.var(0) + 1e-5) if bn else 1.0
    y = (h - h.mean(0)) / std if bn else h
    kept.append((x, inputs, kernel, y, std))
    x = y
  found, dy = [], direction
  for x, inputs, kernel, y, std in reversed(kept):
    if bn:  # The equations of section 3, with gamma = 1, put together.
      dy = (dy - dy.mean(0) - y * (dy * y).mean(0)) / std
    found.append(inputs.T @ dy)
    dy = dy @ kernel.T * (x > 0)
  return found[::-1]


@pytest.mark.parametrize('norm', ['BN', 'no BN'])
def test_gradients(norm, monkeypatch):
  """They are those of the weights, inputs and direction that are used."""
  used = []
  compute = gradients._norms

  def record(network, *arguments):
    used.append(arguments)
    return compute(network, *arguments)

  monkeypatch.setattr(gradients, '_norms', record)
  measured = gradients.run(config(), seed=3)['norms'][norm]
  weights, x, direction = (np.float64(part) for part in used[norm == 'no BN'])
  expected = numpy_gradients(weights, x, direction, bn=norm == 'BN')
  np.testing.assert_allclose(
    measured, [np.linalg.norm(g) for g in expected], rtol=1e-3
  )
  for with_bn, without in zip(*used, strict=True):
    np.testing.assert_array_equal(with_bn, without)


def test_the_published_growth():
  """BN divides by the standard deviation that it finds behind a ReLU."""
  rng = np.random.default_rng(0)
  outputs = np.maximum(rng.standard_normal((4000, 4000)), 0)
  kernel = rng.standard_normal((4000, 8)) * math.sqrt(2 / 4000)
  assert 1 / (outputs @ kernel).std(0).mean() == pytest.approx(
    gradients.YANG, abs=0.03
  )


def test_growth_of_a_geometric_series():
  assert gradients.growth([1.3**-i for i in range(12)]) == pytest.approx(1.3)


@pytest.mark.parametrize(
  'changes, problem',
  [
    ({'model.depth': 7}, 'Use at least 8'),
    ({'batch_size': 1}, 'a batch_size of at least 2'),
    ({'model.width': 0}, 'a model.width of at least 1'),
  ],
)
def test_where_it_is_undefined(changes, problem):
  with pytest.raises(UserError, match=problem):
    gradients.check(config(**changes))
