"""The MNIST network against NumPy, and what it stores of itself."""

import jax
import numpy as np
import pytest

from bn_repro import config as config_lib
from bn_repro import parallel
from bn_repro.data import datasets
from bn_repro.models import factory, summary
from bn_repro.training import evaluation
from bn_repro.training.experiment import create_experiment

SHAPE = (28, 28, 1)


def load(name, *overrides):
  return config_lib.load(f'configs/{name}.py:mini', overrides)


def create(name, *overrides):
  config = load(name, *overrides)
  model = factory.create_model(config.model, config.bn, 10, axis_name=None)
  return model, factory.initial_variables(model, SHAPE, 0, 0.05, 1.0)


def create_plain():
  config = load('mnist')
  model = factory.create_model(config.model, config.bn, 10)
  return model, factory.initial_variables(model, SHAPE, 0, 0.05, 1.0)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def images(count, seed=0):
  """Binary images as the network gets them: -1 and 1."""
  rng = np.random.default_rng(seed)
  return 2.0 * rng.integers(0, 2, (count, *SHAPE)) - 1


@pytest.mark.parametrize(
  'name, parameters',
  [
    # 784 * 100 + 2 * 100 * 100 + 100 * 10 weights, 310 biases;
    ('mnist', 99_400 + 310),
    # with BN 10 biases, and gamma and beta of 300 units.
    ('bn_mnist', 99_400 + 10 + 600),
  ],
)
def test_parameters(name, parameters):
  config = load(name)
  model = factory.create_model(config.model, config.bn, 10)
  rows = summary.layers(model, SHAPE, depth=1)
  assert sum(row.parameters for row in rows) == parameters
  assert sum(row.multiply_adds for row in rows) == 99_400


def test_forward_pass_without_bn(x64):
  model, variables = create_plain()
  model = model.clone(dtype=np.float64)
  x = images(7)
  found = model.apply(variables, x, train=False)
  assert found.aux is None
  # The paper's pixels are 0 and 1.
  y = (x.reshape(7, -1) + 1) / 2
  assert set(np.unique(y)) == {0, 1}
  for number in (1, 2, 3):
    layer = variables['params'][f'hidden{number}']
    y = sigmoid(y @ np.float64(layer['kernel']) + layer['bias'])
  layer = variables['params']['classifier']
  expected = y @ np.float64(layer['kernel']) + layer['bias']
  np.testing.assert_allclose(found.main, expected, rtol=1e-5, atol=1e-7)


def test_forward_pass_with_bn():
  """Wu without a bias, normalized over the batch, then the sigmoid."""
  model, variables = create('bn_mnist')
  x = images(64)
  (found, _), state = model.apply(
    variables, x, train=True, mutable=['batch_stats', 'probes']
  )
  y = (x.reshape(64, -1) + 1) / 2
  for number in (1, 2, 3):
    layer = variables['params'][f'hidden{number}']
    assert layer.keys() == {'kernel'}
    z = y @ np.float64(layer['kernel'])
    normalized = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)
    y = sigmoid(normalized)
  layer = variables['params']['classifier']
  expected = y @ np.float64(layer['kernel'])
  np.testing.assert_allclose(found, expected, atol=2e-5)
  (probe,) = state['probes']['last_hidden_input']
  np.testing.assert_allclose(probe, normalized, atol=2e-4)


def test_initial_weights_have_the_std_of_the_config():
  _, variables = create_plain()
  for name in ('hidden1', 'hidden2', 'hidden3', 'classifier'):
    kernel = variables['params'][name]['kernel']
    error = 5 / np.sqrt(2 * kernel.size)
    assert abs(kernel.std() / 0.05 - 1) < error
    assert not variables['params'][name]['bias'].any()


@pytest.mark.parametrize('num_devices', [1, 4])
def test_percentiles_are_those_of_every_example_once(num_devices):
  """1,000 images in batches of 60: the last is padded with 20 copies."""
  config = load('mnist', 'data.distorted_copies=0', 'data.holdout=0')
  mesh = parallel.create_mesh(jax.devices()[:num_devices])
  program = create_experiment(config, datasets.check(config), mesh)
  state = program.initial_state()
  sums, percentiles = evaluation.evaluate_split(
    program, parallel.replicate(mesh, state), 'test', lambda: None
  )
  assert sums.count == 1000
  x = program.dataset.splits['test'].images.reshape(1000, -1) / 255.0
  for number in (1, 2):
    layer = state.params[f'hidden{number}']
    x = sigmoid(x @ np.float64(layer['kernel']) + layer['bias'])
  inputs = x @ np.float64(state.params['hidden3']['kernel'])
  expected = np.percentile(inputs, [15, 50, 85], axis=0)
  found = np.array(percentiles['last_hidden_input'])
  assert found.shape == (3, 100)
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_paper_s_experiment():
  """Section 4.1: 50,000 steps of 60, binary images, both nets alike."""
  for mode in ('full', 'mini'):
    config = config_lib.load(f'configs/bn_mnist.py:{mode}')
    assert (config.batch_size, config.total_steps) == (60, 50_000)
    assert config.data.binarize
    assert config.optim.momentum == 0
    # What is applied at a batch of 60.
    applied = config.optim.learning_rate * 60 / 32
    assert applied == pytest.approx(0.1)
