"""Training with and without BN against NumPy, and the command."""

import itertools
import json

import jax
import numpy as np
import pytest

from bn_repro.errors import UserError
from bn_repro.lab import __main__, descent, landscape
from bn_repro.report.verdicts import FAILS, HOLDS

SMALL = (
  'batch_size=16',
  'total_steps=3',
  'measure_every=2',
  'model.depth=2',
  'model.width=8',
)


def config(*overrides):
  return __main__.load('landscape', [*SMALL, *overrides], quick=True)


def numpy_loss(w, image, label):
  """The loss of a network of two hidden layers, with BN if it has scales."""
  x = image.reshape(len(image), -1) / 255
  for name in ('hidden1', 'hidden2'):
    x = x @ w[name]['kernel'] + w[name].get('bias', 0)
    if f'{name}_bn' in w:
      bn = w[f'{name}_bn']
      x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
      x = x * bn['scale'] + bn['bias']
    x = np.maximum(x, 0)
  logits = x @ w['classifier']['kernel'] + w['classifier']['bias']
  logits -= logits.max(1, keepdims=True)
  log_sums = np.log(np.exp(logits).sum(1))
  return (log_sums - logits[np.arange(len(label)), label]).mean()


def descend(name, *overrides):
  every = 'measure_every=1'
  return list(descent.descend(config(every, *overrides), name, 0.1, 3))


def batch_of(step):
  return step.gradient.args[2]


@pytest.mark.parametrize('name', ['no BN', 'BN'])
def test_steps_descend_the_loss_of_numpy(name):
  """Along the update d = -rate * g, the loss has the slope -|d|^2 / rate."""
  steps = descend(name)
  for step in steps:
    w, updated = (
      jax.tree.map(np.float64, tree) for tree in (step.w, step.updated)
    )
    image, label = (batch_of(step)[key] for key in ('image', 'label'))

    def loss(h, w=w, updated=updated, image=image, label=label):
      moved = jax.tree.map(lambda a, b: a + h * (b - a), w, updated)
      return numpy_loss(moved, image, label)

    np.testing.assert_allclose(step.loss, loss(0), rtol=1e-5)
    slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
    squares = jax.tree.map(lambda a, b: ((b - a) ** 2).sum(), w, updated)
    expected = -sum(jax.tree.leaves(squares)) / 0.1
    np.testing.assert_allclose(slope, expected, rtol=1e-3)
  for step, following in itertools.pairwise(steps):
    jax.tree.map(np.testing.assert_array_equal, step.updated, following.w)


def test_networks_share_weights_and_batches():
  without, *others = (descend(name) for name in descent.NETWORKS)
  for steps in others:
    for layer in ('hidden1', 'hidden2', 'classifier'):
      np.testing.assert_array_equal(
        steps[0].w[layer]['kernel'], without[0].w[layer]['kernel']
      )
    for step, expected in zip(steps, without, strict=True):
      np.testing.assert_array_equal(
        batch_of(step)['image'], batch_of(expected)['image']
      )


def test_noise_is_that_of_the_step():
  with_bn, noisy = descend('BN'), descend('noisy BN')
  first, second = noisy[:2]
  loss, _ = first.gradient(first.w)
  assert float(loss) == first.loss != with_bn[0].loss
  # On the same batch and weights.
  function, arguments = first.gradient.func, list(first.gradient.args)
  arguments[3] = second.gradient.args[3]
  assert function(*arguments, first.w)[0] != loss


def test_findings_compare_medians():
  """Over steps, of widths where a figure is a range."""

  def network(scale, training):
    return {
      'loss': [[1, 1 + scale], [1, 1 + 5 * scale], [1, 1 + 2 * scale]],
      'change': [[0, 4 * scale]],
      'smoothness': [scale, 100, 0],
      'shift': [3 * scale],
      'training': [training],
    }

  networks = {
    'no BN': network(1, 2),
    'BN': network(0.5, 1),
    'noisy BN': network(7, 1.2),
  }
  result = {'low': networks, 'high': networks}
  found = [finding.measure(result) for finding in landscape.FINDINGS]
  np.testing.assert_allclose(found, 2 * [*5 * [0.5], 0.6, 0.8])
  verdicts = [one.verdict([result] * 5) for one in landscape.FINDINGS[:7]]
  assert verdicts == [*3 * [HOLDS], FAILS, *3 * [HOLDS]]


def test_command(tmp_path):
  arguments = [
    'landscape',
    f'--workdir={tmp_path}',
    '--quick',
    *(f'--config.{one}' for one in SMALL),
  ]
  assert __main__.main(arguments) == 0
  saved = json.loads((tmp_path / 'landscape.json').read_text())['results']
  small = config()
  assert saved == [landscape.run(small, 0)]
  step, _ = (
    step for step in descent.descend(small, 'BN', small.learning_rate.high, 0)
  )
  found = saved[0]['high']['BN']
  assert found['step'] == [0, 2]
  assert found['training'][0] == step.loss
  # The learning rate itself is among those along the gradient.
  low, high = found['loss'][0]
  assert low <= float(step.gradient(step.updated)[0]) <= high
  median = landscape.median(saved[0], 'high', 'BN', 'shift')
  page = (tmp_path / 'landscape.md').read_text()
  row = next(line for line in page.splitlines() if '| high | BN |' in line)
  assert f' {median:.3g} ' in row


@pytest.mark.parametrize(
  'override, message',
  [
    ('batch_size=1', 'batch_size=1: one example'),
    ('learning_rate.low=0.2', 'needs 0 < low < high, not 0.2 and 0.1'),
    ('data.name=npz', 'data.name=npz: must be one of mnist_5k'),
  ],
)
def test_check_refuses(override, message):
  with pytest.raises(UserError, match=message):
    landscape.check(config(override))


def test_divergence_is_refused():
  with pytest.raises(UserError, match='no BN diverges at step'):
    landscape.run(config('learning_rate.high=1e9'), 0)
