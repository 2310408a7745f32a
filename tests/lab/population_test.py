"""A small network's statistics against NumPy, its training against optax."""

import functools
import json

import jax
import numpy as np
import optax
import pytest

from bn_repro.data.split import ArraySplit
from bn_repro.errors import UserError
from bn_repro.lab import __main__ as lab
from bn_repro.lab import inference_statistics, population, small_network
from bn_repro.lab.small_network import BN, RENORM, SmallNetwork
from bn_repro.training.metrics import cross_entropy

EPSILON = 1e-5
NETWORK = SmallNetwork(BN, group=4, momentum=0.9, dtype='float32')


def split(count, seed):
  """Noise of different contrasts."""
  rng = np.random.default_rng(seed)
  images = rng.random((count, 9, 9, 1)) * rng.integers(0, 256, (count, 1, 1, 1))
  return ArraySplit(
    images.astype(np.uint8), rng.integers(0, 10, count, dtype=np.int32)
  )


SPLITS = {'train': split(32, 0), 'test': split(77, 1)}


@functools.cache
def variables():
  """Random parameters and moving averages."""
  rng = np.random.default_rng(2)

  def normal(*shape):
    return rng.normal(0, 0.3, shape).astype('f')

  def positive(features):
    return rng.uniform(0.5, 1.5, features).astype('f')

  params = {'classifier': {'kernel': normal(64, 10), 'bias': normal(10)}}
  averages = {}
  for layer, (inputs, features) in enumerate([(1, 16), (16, 32), (32, 64)]):
    params[f'Conv_{layer}'] = {'kernel': normal(3, 3, inputs, features)}
    params[f'norm{layer}'] = {
      'scale': positive(features),
      'bias': normal(features),
    }
    averages[f'norm{layer}'] = {
      'mean': normal(features),
      'var': positive(features),
    }
  return {'params': params, 'batch_stats': averages}


def convolve(x, kernel):
  """3x3, stride 2, padded as TensorFlow does."""
  size = -(-x.shape[1] // 2)
  padding = max((size - 1) * 2 + 3 - x.shape[1], 0)
  sides = (padding // 2, padding - padding // 2)
  x = np.pad(x, ((0, 0), sides, sides, (0, 0)))
  return sum(
    x[:, i : i + 2 * size - 1 : 2, j : j + 2 * size - 1 : 2] @ kernel[i, j]
    for i in range(3)
    for j in range(3)
  )


def numpy_network(values, images, group=None):
  """Answers, and the statistics of each layer, averaged over groups.

  Without a group, the answers are those of inference.
  """
  values = jax.tree.map(np.float64, values)
  params, averages = values['params'], values['batch_stats']
  x = images / 127.5 - 1.0
  statistics = {}
  for layer in range(3):
    name = f'norm{layer}'
    x = convolve(x, params[f'Conv_{layer}']['kernel'])
    groups = x.reshape(-1, group or len(x), *x.shape[1:])
    axes, kept = (1, 2, 3), {'keepdims': True}
    mean, var = groups.mean(axes, **kept), groups.var(axes, **kept)
    m = groups[0, ..., 0].size
    statistics[name] = {
      'mean': mean.mean(0).ravel(),
      'var': (var * m / (m - 1)).mean(0).ravel(),
    }
    if group is None:
      mean, var = averages[name]['mean'], averages[name]['var']
    xhat = (groups - mean) / np.sqrt(var + EPSILON)
    y = params[name]['scale'] * xhat + params[name]['bias']
    x = np.maximum(y, 0).reshape(x.shape)
  kernel, bias = (params['classifier'][key] for key in ('kernel', 'bias'))
  return (x.mean((1, 2)) @ kernel + bias).argmax(-1), statistics


def numpy_population(size, count, group):
  found = [
    numpy_network(variables(), batch['image'], group)[1]
    for batch in small_network.batches(SPLITS['train'], 0, size, count)
  ]
  assert len(found) == count // size
  return jax.tree.map(lambda *x: np.mean(x, 0), *found)


@pytest.mark.parametrize('size, count, group', [(8, 32, 4), (2, 2, 2)])
def test_population_statistics(size, count, group):
  data = small_network.batches(SPLITS['train'], 0, size, count)
  found = inference_statistics.with_population_statistics(
    NETWORK.clone(group=group), variables(), data
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
    found['batch_stats'],
    numpy_population(size, count, group),
  )
  assert found['params'] is variables()['params']


def test_accuracies():
  """Of full batches of test images, with each kind of statistics."""
  images = SPLITS['test'].images
  labels, _ = numpy_network(variables(), images)  # With moving averages.
  splits = {**SPLITS, 'test': ArraySplit(images, labels)}

  def expected(statistics, group=None):
    values = {**variables(), 'batch_stats': statistics}
    data = small_network.batches(splits['test'], 0, 8, len(labels))
    right = [
      numpy_network(values, b['image'], group)[0] == b['label'] for b in data
    ]
    return 100 * np.mean(right)

  found = inference_statistics.accuracies(
    NETWORK, variables(), splits, seed=0, size=8, counts=(2, 32)
  )
  moving = variables()['batch_stats']
  assert found == pytest.approx(
    [
      100,
      expected(moving, 4),
      expected(numpy_population(2, 2, 2)),
      expected(numpy_population(8, 32, 4)),
    ]
  )
  assert len(set(found)) == 4


def test_batches_are_without_repetition():
  data = small_network.batches(SPLITS['train'], 5, 8, 32)
  images = np.concatenate([batch['image'] for batch in data])
  assert len(np.unique(images, axis=0)) == 32


@pytest.mark.parametrize('norm', [BN, RENORM])
def test_training(norm):
  """SGD of optax, with a cosine, at a rate proportional to the batch."""
  network = NETWORK.clone(norm=norm)
  config = lab.load('population', (), quick=True)
  config.update({'epochs': 1.0, 'marks': 4, 'batch_size': 4})
  found = list(small_network.train(network, config, SPLITS, seed=3, size=8))
  optimizer = optax.sgd(
    optax.cosine_decay_schedule(2 * config.learning_rate, 4), momentum=0.9
  )
  values = network.init(
    jax.random.key(3), SPLITS['train'].images[:2], train=True
  )
  state = optimizer.init(values['params'])

  @jax.jit
  def gradients(values, images, labels, progress):
    def loss(params):
      logits, updated = network.apply(
        {**values, 'params': params},
        images,
        train=True,
        progress=progress,
        mutable=['batch_stats'],
      )
      return cross_entropy(logits, labels).mean(), updated

    return jax.grad(loss, has_aux=True)(values['params'])

  data = small_network.batches(SPLITS['train'], 3, 8, 32)
  for step, (batch, now) in enumerate(zip(data, found, strict=True)):
    of_loss, updated = gradients(
      values, batch['image'], batch['label'], step / 4
    )
    updates, state = optimizer.update(of_loss, state)
    params = optax.apply_updates(values['params'], updates)
    values = {'params': params, **updated}
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4),
      now,
      values,
    )


def test_batch_renorm_starts_as_bn():
  @jax.jit
  def outputs(progress):
    return [
      NETWORK.clone(norm=norm).apply(
        variables(),
        SPLITS['train'].images[:8],
        train=True,
        progress=progress,
        mutable=['batch_stats'],
      )[0]
      for norm in (BN, RENORM)
    ]

  np.testing.assert_allclose(*outputs(0.0), rtol=1e-4, atol=1e-5)
  bn, renorm = outputs(1.0)
  assert np.abs(renorm - bn).max() > 0.01


SMALL = (
  *('population', '--quick', '--config.epochs=0.1', '--config.marks=2'),
  *('--config.batch_size=32', '--config.large_batch_size=64'),
  '--config.images=16,64',
)


def test_the_command(tmp_path):
  assert lab.main([*SMALL, f'--workdir={tmp_path}']) == 0
  path = tmp_path / 'population.json'
  (result,) = json.loads(path.read_text())['results']
  assert result['counts'] == [16, 64, 4000]
  assert list(result['networks']) == ['BN 4', 'BN 32', 'Batch Renorm 4']
  for accuracies in result['networks'].values():
    assert len(accuracies) == 5
    assert all(0 <= value <= 100 for value in accuracies)
  assert all(value >= 0 for value in result['noise'])
  page = (tmp_path / 'population.md').read_text()
  assert '| BN 32 | ' in page and '4,000 images' in page


RESULT = {
  'networks': {
    'BN 4': [80.0, 81.0, 30.0, 82.1, 82.0],
    'BN 32': [85.0, 85.0, 40.0, 84.3, 85.0],
    'Batch Renorm 4': [83.0, 83.0, 50.0, 83.0, 83.0],
  },
  'noise': [0.5, 2.5],
}


def test_findings():
  found = [finding.measure(RESULT) for finding in population.FINDINGS]
  assert found == pytest.approx([0.7, 2.0, 5.0, 3.0])


@pytest.mark.parametrize(
  'key, value, problem',
  [
    ('groups', '4,12,32', 'powers of 2'),
    ('groups', '4,x,32', 'powers of 2'),
    ('groups', '1,4,32', 'powers of 2'),
    ('groups', '8,32', 'groups have 4, 32'),
    ('groups', '4,32,256', 'none above batch_size'),
    ('large_batch_size', 128, 'batch_size < large_batch_size'),
    ('images', '10,100', 'powers of 2'),
    ('images', '8192', 'at most the 4000 of the training'),
    ('marks', 16, 'from 1 to its 15 steps'),
    ('data.name', 'imagenet2012', 'use fashion_mnist, mnist or mnist_5k'),
  ],
)
def test_where_it_is_undefined(key, value, problem):
  config = lab.load('population', (f'{key}={value}',), quick=True)
  with pytest.raises(UserError, match=problem):
    population.check(config)
