"""The network against the paper's table and the counts that follow from it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_repro import architecture, inception, overview, parallel
from bn_repro import config as config_lib

READINGS = [
  ('608', 'plain'),
  ('608', 'separable'),
  ('576', 'plain'),
  ('576', 'separable'),
]


def create(*overrides, num_classes=1000, variant='inception', mode='full'):
  config = config_lib.load(f'configs/{variant}.py:{mode}', overrides)
  return inception.create_model(config.model, config.bn, num_classes)


def shapes(model, size=224, train=True):
  return jax.eval_shape(
    lambda key: model.init(
      {'params': key, 'dropout': key},
      jnp.zeros((1, size, size, 3)),
      train=train,
    ),
    jax.random.key(0),
  )


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  'reading, without_bn, with_bn, statistics',
  [
    (READINGS[0], 11_275_208, 11_285_224, 20_032),
    (READINGS[1], 11_268_512, 11_278_528, 20_032),
    (READINGS[2], 11_185_032, 11_194_984, 19_904),
    (READINGS[3], 11_178_336, 11_188_288, 19_904),
  ],
)
def test_parameter_counts(reading, without_bn, with_bn, statistics):
  overrides = f'model.reading={reading[0]}', f'model.stem={reading[1]}'
  assert count(shapes(create(*overrides))['params']) == without_bn
  bn = shapes(create(*overrides, variant='bn_baseline'))
  assert count(bn['params']) == with_bn
  assert count(bn['batch_stats']) == statistics


@pytest.mark.parametrize(
  'reading, variant, expected',
  [
    (READINGS[3], 'inception', 13_594_824),
    (READINGS[2], 'inception', 13_601_520),
    (READINGS[1], 'inception', 13_689_096),
    (READINGS[3], 'bn_baseline', 13_604_776),
  ],
)
def test_one_auxiliary_head_explains_13_6_million(reading, variant, expected):
  model = create(
    f'model.reading={reading[0]}',
    f'model.stem={reading[1]}',
    'model.aux_head=true',
    variant=variant,
  )
  assert count(shapes(model)['params']) == expected


@pytest.mark.parametrize(
  'reading, expected',
  list(zip(READINGS, (2.033, 1.949, 2.019, 1.935), strict=True)),
)
def test_multiply_adds(reading, expected):
  model = create(f'model.reading={reading[0]}', f'model.stem={reading[1]}')
  rows = overview.layers(model, 224, depth=1)
  total = sum(row.multiply_adds for row in rows)
  assert round(total / 1e9, 3) == expected


@pytest.mark.parametrize(
  'reading, sizes',
  [
    ('576', {'4d': (14, 14, 576), '4e': (7, 7, 1024)}),
    ('608', {'4d': (14, 14, 608), '4e': (7, 7, 1056)}),
  ],
)
@pytest.mark.parametrize('padding', ['same', 'torch'])
def test_output_sizes(reading, sizes, padding):
  model = create(f'model.reading={reading}', f'model.padding={padding}')
  outputs = {
    row.name: row.output for row in overview.layers(model, 224, depth=1)
  }
  assert outputs['conv1'] == (112, 112, 64)
  assert outputs['conv2'] == (56, 56, 192)
  assert outputs['inception_3a'] == (28, 28, 256)
  assert outputs['inception_3b'] == (28, 28, 320)
  assert outputs['inception_3c'] == (14, 14, 576)
  assert outputs['inception_5b'] == (7, 7, 1024)
  for name, output in sizes.items():
    assert outputs[f'inception_{name}'] == output


# Convolution weights of each module (reading 608), counted by hand.
WEIGHTS = {
  '3a': 218_112,
  '3b': 259_072,
  '3c': 384_000,
  '4a': 608_256,
  '4b': 663_552,
  '4c': 912_384,
  '4d': 1_140_736,
  '4e': 1_447_936,
  '5a': 2_205_696,
  '5b': 2_276_352,
}


def test_convolution_weights_of_each_module():
  params = shapes(create('model.reading=608'))['params']
  for name, expected in WEIGHTS.items():
    kernels = [
      leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(
        params[f'inception_{name}']
      )
      if path[-1].key == 'kernel'
    ]
    assert count(kernels) == expected


@pytest.mark.parametrize('size', [32, 33, 47, 64])
@pytest.mark.parametrize('pool', ['true', 'false'])
@pytest.mark.parametrize('padding', ['same', 'torch'])
def test_any_size_from_32(size, pool, padding):
  model = create(
    f'model.stem_pool={pool}',
    f'model.padding={padding}',
    'model.aux_head=true',
    'model.dropout_rate=0',
  )
  logits = jax.eval_shape(
    lambda key: model.init_with_output(
      key, jnp.zeros((2, size, size, 3)), train=True
    )[0],
    jax.random.key(0),
  )
  assert logits.main.shape == logits.aux.shape == (2, 1000)


def test_auxiliary_head_is_for_training_alone():
  assert (
    'aux_head'
    not in shapes(create('model.aux_head=true'), train=False)['params']
  )


def test_mini_has_the_prototype_s_size():
  model = create(variant='bn_x5', mode='mini', num_classes=10)
  assert count(shapes(model, 32)['params']) == 162_826


def test_initial_values():
  model = create(variant='bn_baseline')
  variables = inception.initial_variables(model, 64, seed=0)
  again = inception.initial_variables(model, 64, seed=0)
  other = inception.initial_variables(model, 64, seed=1)
  plain = inception.initial_variables(create(), 64, seed=0)
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    name = path[-1].key

    def same(tree, path=path):
      for entry in path:
        tree = tree[entry.key]
      return tree

    np.testing.assert_array_equal(leaf, same(again))
    if name != 'kernel':
      assert (leaf == {'scale': 1, 'var': 1}.get(name, 0)).all()
      continue
    is_classifier = path[-2].key == 'classifier'
    std = 0.01 if is_classifier else math.sqrt(2 / math.prod(leaf.shape[:-1]))
    error = 5 / math.sqrt(2 * leaf.size)
    assert abs(leaf.std() / std - 1) < error, path
    assert abs(leaf.mean() / std) < 5 / math.sqrt(leaf.size), path
    assert (leaf != same(other)).mean() > 0.99
    np.testing.assert_array_equal(leaf, same(plain))


def test_local_response_norm_in_caffe_s_convention():
  x = np.random.default_rng(0).normal(0, 30, (2, 3, 3, 7))
  expected = np.empty_like(x)
  for c in range(7):
    window = x[..., max(0, c - 2) : c + 3]
    total = (window**2).sum(-1)
    expected[..., c] = x[..., c] / (1 + 1e-4 / 5 * total) ** 0.75
  found = inception.local_response_norm(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def dropped(num_devices):
  mesh = parallel.create_mesh(jax.devices()[:num_devices])
  module = inception.Dropout(0.4)

  def f(key, x):
    y = module.apply({}, x, rngs={'dropout': jax.random.key(key)})
    return jax.lax.all_gather(y, parallel.AXIS, tiled=True)

  step = parallel.data_parallel(f, mesh, donate_state=False)
  x = parallel.shard_batch(mesh, np.ones((64, 500), np.float32))
  return np.asarray(step(np.uint32(3), x))


def test_dropout():
  one, eight = dropped(1), dropped(8)
  np.testing.assert_array_equal(one, eight)
  assert set(np.unique(one)) == {0, np.float32(1 / 0.6)}
  assert abs((one == 0).mean() - 0.4) < 0.01
  # No two examples lose the same units.
  assert len(np.unique(one == 0, axis=0)) == 64


@pytest.mark.parametrize('name', ['relu', 'sigmoid'])
def test_nonlinearity(name, monkeypatch):
  rows = architecture.rows
  monkeypatch.setattr(architecture, 'rows', lambda reading: rows(reading)[:1])
  model = create(
    f'model.nonlinearity={name}', variant='bn_x5', mode='mini', num_classes=10
  )
  variables = inception.initial_variables(model, 32, seed=0)
  _, state = model.apply(
    variables,
    jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 32, 3)), 'f'),
    train=False,
    capture_intermediates=True,
  )
  output = state['intermediates']['conv1']['__call__'][0]
  assert output.min() >= 0
  assert (output.max() < 1) == (name == 'sigmoid')
  assert (output == 0).any() == (name == 'relu')


def test_table():
  model = create()
  rows = overview.layers(model, 224, depth=2)
  lines = overview.table(rows)
  # 69 convolutions and the classifier.
  assert len(rows) == 70
  assert lines[-1].split()[:2] == ['total', '11,178,336']
  names = [row.name for row in rows]
  assert names[:3] == ['conv1', 'conv2_reduce', 'conv2']
  assert names[-1] == 'classifier'
