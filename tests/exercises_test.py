"""Solutions of the exercises in docs/tour.md. Try them first."""

import dataclasses
from pathlib import Path
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bn_repro import config as config_lib
from bn_repro import config_fields, parallel
from bn_repro.data import datasets, mnist
from bn_repro.data.split import ArraySplit, Dataset
from bn_repro.models import mlp
from bn_repro.training import run_info, steps
from bn_repro.training.experiment import create_experiment

ROOT = Path(__file__).resolve().parent.parent

TINY = 'model.name=inception_tiny'


def losses(experiment, num_steps):
  """The mean loss of each of the first steps."""
  state = parallel.replicate(experiment.mesh, experiment.initial_state())
  found = []
  for batches in experiment.stacked_batches(0, num_steps):
    state, sums = experiment.steps.train_steps(state, batches)
    found += [sums.means()['loss'] for sums in sums.fetch_steps()]
  return np.array(found)


def test_sessions_of_the_tour(capsys):
  page = (ROOT / 'docs' / 'tour.md').read_text()
  layer, loop = re.findall(r'^```python\n(.*?)^```$', page, re.M | re.S)
  session = {}
  exec(layer, session)
  capsys.readouterr()
  np.testing.assert_allclose(
    np.abs(session['y'].ravel()), [1.26, 0.63, 0.63, 1.26], atol=0.005
  )
  moved = session['updated']['batch_stats']
  assert round(float(moved['mean'][0]), 3) == 0.3
  assert round(float(moved['var'][0]), 3) == 1.233
  exec(loop, {})
  found = [float(line) for line in capsys.readouterr().out.split()]
  assert len(found) == 6
  np.testing.assert_allclose(found, np.log(10), atol=0.15)


# 1. A variant.

BN_X5_OF_8 = """
\"\"\"BN-x5 whose statistics are those of 8 images, not of 32.\"\"\"

from configs import bn_x5


def get_config(mode='full'):
  config = bn_x5.get_config(mode)
  config.bn.statistics = 'group'
  config.bn.virtual_batch_size = 8
  return config
"""


def test_a_variant(tmp_path):
  path = tmp_path / 'bn_x5_of_8.py'
  path.write_text(BN_X5_OF_8)
  config, parent = (
    config_lib.load(f'{name}:mini', [TINY]) for name in (path, 'bn_x5')
  )
  before, after = map(config_fields.flatten, (parent, config))
  assert {name for name in after if after[name] != before[name]} == {
    'bn.statistics',
    'bn.virtual_batch_size',
  }
  experiment = create_experiment(config, datasets.check(config))
  assert run_info.images_per_statistic(experiment) == 8
  found = losses(experiment, 30)
  assert found[-10:].mean() < found[:10].mean() - 0.1


# 2. A data set.


def load_parity(data):
  """Even and odd digits."""
  digits = mnist.load_mnist_5k(data)
  splits = {
    name: ArraySplit(split.images, split.labels % 2)
    for name, split in digits.splits.items()
  }
  return Dataset(['even', 'odd'], splits)


def test_a_data_set(monkeypatch):
  # In bn_repro/data/datasets.py it is a line of SOURCES.
  source = datasets.Source(load_parity, channels=1, num_classes=2)
  monkeypatch.setitem(datasets.SOURCES, 'parity', source)
  parity, digits = (
    datasets.check(config_lib.load('bn_x5:mini', [f'data.name={name}']))
    for name in ('parity', 'mnist_5k')
  )
  found, expected = (dataset.splits['test'] for dataset in (parity, digits))
  np.testing.assert_array_equal(found.images, expected.images)
  np.testing.assert_array_equal(found.labels, expected.labels % 2)
  config = config_lib.load(
    'bn_mnist:mini',
    ('data.name=parity', 'data.distorted_copies=0', 'batch_size=64'),
  )
  experiment = create_experiment(config, datasets.check(config))
  found = losses(experiment, 50)
  assert abs(found[0] - np.log(2)) < 0.2
  assert found[-10:].mean() < found[:10].mean() - 0.2


# 3. A norm.


class RmsNorm(nn.Module):
  """x over the root mean square of the units, for each example, and scaled.

  It subtracts no mean, so that the layer before it keeps its bias, and shares
  nothing between examples, so that training is as inference.
  """

  use_running_average: bool

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, (1, x.shape[-1]))
    mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
    return scale * x * jax.lax.rsqrt(mean_square + 1e-6)


def with_norm(experiment, norm):
  """The experiment with another norm in its MNIST network."""
  config, dataset = experiment.config, experiment.dataset
  model = mlp.create(
    config.model, dataset.num_classes, nn.Dense, norm, norm, jnp.float32
  )
  step = steps.create_train_step(model, experiment.optimizer, config)
  train_steps = parallel.data_parallel(
    steps.scan_steps(step), experiment.mesh, donate_state=True, batch_axis=1
  )
  return dataclasses.replace(
    experiment,
    model=model,
    steps=experiment.steps._replace(train_steps=train_steps),
  )


def test_a_norm():
  config = config_lib.load(
    'mnist:mini', ('data.distorted_copies=0', 'batch_size=64')
  )
  experiment = with_norm(
    create_experiment(config, datasets.check(config)), RmsNorm
  )
  state = experiment.initial_state()
  assert state.batch_stats == {}
  assert set(state.params['hidden1_bn']) == {'scale'}
  assert set(state.params['hidden1']) == {'kernel', 'bias'}
  # Without a norm it stays at ln(10) = 2.30: the last session of the tour.
  assert losses(experiment, 300)[-50:].mean() < 1.2


def test_the_norm_against_numpy():
  x = np.random.default_rng(0).normal(1, 3, (6, 5)).astype(np.float32)
  y, variables = RmsNorm(use_running_average=False).init_with_output(
    jax.random.key(0), x
  )
  exact = x.astype(np.float64)
  rms = np.sqrt((exact**2).mean(-1, keepdims=True))
  np.testing.assert_allclose(y, exact / rms, rtol=1e-5)
  assert list(variables) == ['params']
