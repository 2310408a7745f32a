"""Training at several rates against a plain loop of NumPy."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from bn_repro.lab import rates
from bn_repro.models import factory, mlp
from bn_repro.models.batch_norm import BatchNorm

CONFIG = ConfigDict({'steps': 40, 'batch_size': 8, 'momentum': 0.9})
train = functools.partial(rates.train, config=CONFIG)


@pytest.fixture(scope='module')
def digits():
  """Patterns of ten classes with noise, 300 to train on and 100 to test."""
  rng = np.random.default_rng(0)
  labels = rng.integers(0, 10, 400)
  patterns = rng.standard_normal((10, 4, 4, 1))
  images = patterns[labels] + rng.standard_normal((400, 4, 4, 1))
  images, labels = images.astype(np.float32), labels.astype(np.int32)
  return (
    rates.Images(images[:300], labels[:300]),
    rates.Images(images[300:], labels[300:]),
  )


def create(norm, features=()):
  return mlp.Mlp(10, features, nn.Dense, norm, nn.sigmoid, jnp.float32)


def test_softmax_regression_equals_a_loop(digits):
  model = create(None)
  found, _ = train(model, digits, rates=(0.3, 3.0), seed=5)

  variables = factory.initial_variables(model, (4, 4, 1), 5, 0.0, 1.0)
  order = np.random.default_rng(5).integers(300, size=(40, 8))
  inputs, tests = ((d.images.reshape(-1, 16) + 1.0) / 2 for d in digits)
  for rate, accuracies in zip((0.3, 3.0), found, strict=True):
    w = np.float64(variables['params']['classifier']['kernel'])
    b, v_w, v_b, expected = np.zeros(10), 0, 0, []
    for step, batch in enumerate(order, start=1):
      x, y = inputs[batch], np.eye(10)[digits[0].labels[batch]]
      p = np.exp(x @ w + b)
      error = (p / p.sum(1, keepdims=True) - y) / len(x)
      v_w, v_b = 0.9 * v_w + x.T @ error, 0.9 * v_b + error.sum(0)
      w, b = w - rate * v_w, b - rate * v_b
      if step % 2 == 0:
        guesses = (tests @ w + b).argmax(1)
        expected.append(np.mean(guesses == digits[1].labels))
    assert len(accuracies) == rates.POINTS
    # One test image may be a tie in float32.
    np.testing.assert_allclose(accuracies, expected, atol=0.0101)
    assert expected[-1] > 0.5


def test_batch_norm_is_evaluated_with_its_running_statistics(digits):
  """Two test images at once are classified as they are one at a time."""
  network = create(functools.partial(BatchNorm, momentum=0.5), (8,))

  def accuracies(*images):
    test = rates.Images(*(values[list(images)] for values in digits[1]))
    return train(network, (digits[0], test), rates=(0.3,), seed=0)[0][0]

  found = accuracies(0, 1)
  np.testing.assert_allclose(
    2 * np.array(found), accuracies(0) + np.array(accuracies(1))
  )
  assert max(found) > 0
