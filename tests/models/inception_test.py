"""The network against the paper's table and the counts that follow from it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bn_repro import cli, overview, parallel
from bn_repro import config as config_lib
from bn_repro.models import factory, inception, inception_table, layers, summary
from bn_repro.training import optimizer as optimizer_lib
from bn_repro.training import steps

READINGS = [
  ('608', 'plain'),
  ('608', 'separable'),
  ('576', 'plain'),
  ('576', 'separable'),
]


def create(*overrides, num_classes=1000, variant='inception', mode='full'):
  config = config_lib.load(f'configs/{variant}.py:{mode}', overrides)
  return factory.create_model(config.model, config.bn, num_classes)


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
  rows = summary.layers(model, (224, 224, 3), depth=1)
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
    row.name: row.output
    for row in summary.layers(model, (224, 224, 3), depth=1)
  }
  assert outputs['conv1'] == (112, 112, 64)
  assert outputs['conv2'] == (56, 56, 192)
  assert outputs['inception_3a'] == (28, 28, 256)
  assert outputs['inception_3b'] == (28, 28, 320)
  assert outputs['inception_3c'] == (14, 14, 576)
  assert outputs['inception_5b'] == (7, 7, 1024)
  for name, output in sizes.items():
    assert outputs[f'inception_{name}'] == output


# Convolution weights of each module, counted by hand.
WEIGHTS_608 = {
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
WEIGHTS_576 = WEIGHTS_608 | {
  '4c': 893_952,
  '4d': 1_105_920,
  '4e': 1_437_696,
  '5a': 2_179_072,
}


@pytest.mark.parametrize(
  'reading, weights', [('608', WEIGHTS_608), ('576', WEIGHTS_576)]
)
def test_convolution_weights_of_each_module(reading, weights):
  params = shapes(create(f'model.reading={reading}'))['params']
  for name, expected in weights.items():
    kernels = [
      leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(
        params[f'inception_{name}']
      )
      if path[-1].key == 'kernel'
    ]
    assert count(kernels) == expected


@pytest.mark.parametrize('size', [32, 33, 47, 64, 224])
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


def few_rows(monkeypatch, *names):
  """Leaves these modules of the table, so that compiling takes seconds."""
  rows = inception_table.rows
  monkeypatch.setattr(
    inception_table,
    'rows',
    lambda reading, **options: tuple(
      row for row in rows(reading, **options) if row.name in names
    ),
  )


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

  def draw(model, seed=0, init_scale=1):
    return factory.initial_variables(
      model, (64, 64, 3), seed, init_std=0, init_scale=init_scale
    )

  variables, again, other = draw(model), draw(model), draw(model, seed=1)
  plain, doubled = draw(create()), draw(model, init_scale=2)
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
    np.testing.assert_array_equal(2 * leaf, same(doubled))


def dropped(num_devices):
  mesh = parallel.create_mesh(jax.devices()[:num_devices])
  module = layers.Dropout(0.4)

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


def at(tree, path):
  for name in path.split('/'):
    tree = tree[name]
  return tree


def traced(images, *overrides, variant='inception'):
  """Kernels and outputs of a small network's layers in inference, by path."""
  model = create(*overrides, variant=variant, mode='mini', num_classes=10)
  variables = factory.initial_variables(
    model, images.shape[1:], seed=0, init_std=0, init_scale=1
  )
  _, state = model.apply(
    variables, jnp.asarray(images, 'f'), train=False, capture_intermediates=True
  )
  return (
    lambda path: np.asarray(
      at(variables['params'], path)['conv']['kernel'], 'd'
    ),
    lambda path: np.asarray(
      at(state['intermediates'], path)['__call__'][0], 'd'
    ),
  )


@pytest.mark.parametrize(
  'name, g',
  [
    ('relu', lambda x: np.where(x > 0, x, 0)),
    ('sigmoid', lambda x: 1 / (1 + np.exp(-x))),
  ],
  ids=['relu', 'sigmoid'],
)
def test_each_unit_ends_in_the_nonlinearity(name, g, monkeypatch):
  """Z = g(BN(Wu)), where the running mean is 0 and the variance 1."""
  few_rows(monkeypatch, '3a')
  images = np.random.default_rng(0).normal(size=(2, 32, 32, 3))
  _, output = traced(images, f'model.nonlinearity={name}', variant='bn_x5')
  module = ('conv_1x1', 'reduce_3x3', 'conv_3x3', 'reduce_double')
  module += ('conv_double_1', 'conv_double_2', 'projection')
  units = ['conv1', 'conv2_reduce', 'conv2']
  for unit in units + [f'inception_3a/{unit}' for unit in module]:
    x = output(f'{unit}/conv') / np.sqrt(1 + 1e-3)
    assert x.min() < 0 < x.max()
    np.testing.assert_allclose(output(unit), g(x), rtol=1e-4, atol=1e-7)
  branches = ('conv_1x1', 'conv_3x3', 'conv_double_2', 'projection')
  np.testing.assert_array_equal(
    output('inception_3a'),
    np.concatenate([output(f'inception_3a/{b}') for b in branches], axis=-1),
  )


PER_ACTIVATION = 'bn.per_activation=true'


def test_variables_of_per_activation_bn():
  """Scale and statistics of 5b are (H, W, C); those of other layers stay."""
  usual, found = (
    jax.tree_util.tree_leaves_with_path(
      shapes(create(*overrides, variant='bn_x30'))
    )
    for overrides in ((), (PER_ACTIVATION,))
  )
  changed = set()
  for (path, before), (same_path, after) in zip(usual, found, strict=True):
    assert path == same_path
    keys = [entry.key for entry in path]
    if keys[1] == 'inception_5b' and keys[3] == 'bn':
      assert after.shape == (7, 7, *before.shape)
      changed.add((keys[2], keys[4]))
    else:
      assert after.shape == before.shape, path
  # Seven units, each with scale, bias, mean and var.
  assert len(changed) == 28


def test_per_activation_bn_in_training(monkeypatch, x64):
  """Each unit of 5b against NumPy: over the batch there, elsewhere over all."""
  few_rows(monkeypatch, '3a', '5b')
  config = config_lib.load(
    'configs/bn_x30.py:mini', (PER_ACTIVATION, 'model.dtype=float64')
  )
  model = factory.create_model(config.model, config.bn, 10, axis_name=None)
  images = np.random.default_rng(0).normal(size=(5, 32, 32, 3))
  variables = factory.initial_variables(
    model, images.shape[1:], seed=0, init_std=0, init_scale=1
  )
  rng = np.random.default_rng(1)
  variables['params'] = jax.tree.map(
    lambda x: rng.normal(1, 0.5, x.shape), variables['params']
  )
  _, state = model.apply(
    variables,
    jnp.asarray(images),
    train=True,
    rngs={'dropout': jax.random.key(0)},
    mutable=['batch_stats', 'intermediates'],
    capture_intermediates=True,
  )
  count = 0
  for module, axes in (('inception_3a', (0, 1, 2)), ('inception_5b', 0)):
    for unit, outputs in state['intermediates'][module].items():
      if unit == '__call__':
        continue
      (x,), (z,) = outputs['conv']['__call__'], outputs['__call__']
      x = np.asarray(x)
      assert x.shape[:3] == (5, 8, 8)
      params = variables['params'][module][unit]['bn']
      normalized = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-3)
      y = params['scale'] * normalized + params['bias']
      np.testing.assert_allclose(z, np.maximum(y, 0), rtol=1e-9, atol=1e-9)
      # With m / (m - 1), and m the number of examples in 5b.
      found = state['batch_stats'][module][unit]['bn']
      mean, var = x.mean(axes), x.var(axes, ddof=1)
      np.testing.assert_allclose(found['mean'], 0.1 * mean, rtol=1e-9)
      np.testing.assert_allclose(found['var'], 0.9 + 0.1 * var, rtol=1e-9)
      count += 1
  assert count == 14


def caffe_lrn(x):
  expected = np.empty_like(x)
  for c in range(x.shape[-1]):
    window = x[..., max(0, c - 2) : c + 3]
    expected[..., c] = x[..., c] / (1 + 1e-4 / 5 * (window**2).sum(-1)) ** 0.75
  return expected


def test_local_response_norm_in_caffe_s_convention():
  x = np.random.default_rng(0).normal(0, 300, (2, 3, 3, 7))
  found = inception.local_response_norm(jnp.asarray(x, jnp.float32))
  np.testing.assert_allclose(found, caffe_lrn(x), rtol=1e-4)


@pytest.mark.parametrize('lrn', [True, False])
def test_places_of_local_response_norm(lrn, monkeypatch):
  """Before the 1x1 and after the 3x3 convolution of the stem, as GoogLeNet."""
  few_rows(monkeypatch, '3a')
  images = np.random.default_rng(0).normal(0, 300, size=(1, 32, 32, 3))
  kernel, output = traced(images, f'model.lrn={lrn}')
  norm = caffe_lrn if lrn else lambda x: x
  np.testing.assert_allclose(
    output('conv2_reduce/conv'),
    norm(output('conv1')) @ kernel('conv2_reduce')[0, 0],
    rtol=1e-3,
    atol=1e-2,
  )
  x = norm(np.maximum(output('conv2/conv'), 0))[0]
  pooled = pool(x, lambda window: window.max((0, 1)))[1::2, 1::2]
  name = 'inception_3a/conv_1x1'
  np.testing.assert_allclose(
    output(f'{name}/conv')[0], pooled @ kernel(name)[0, 0], rtol=1e-3, atol=1e-2
  )


def test_table():
  model = create()
  rows = summary.layers(model, (224, 224, 3), depth=2)
  lines = summary.table(rows)
  # 69 convolutions and the classifier.
  assert len(rows) == 70
  assert lines[-1].split()[:2] == ['total', '11,178,336']
  names = [row.name for row in rows]
  assert names[:3] == ['conv1', 'conv2_reduce', 'conv2']
  assert names[-1] == 'classifier'


def test_command(monkeypatch, capsys):
  def run(*arguments):
    monkeypatch.setattr('sys.argv', ['overview', *arguments])
    monkeypatch.setattr(cli, 'set_up_jax', lambda config: None)
    code = overview.main()
    return code, capsys.readouterr()

  code, printed = run('--config=configs/bn_x5.py', '--config.model.reading=608')
  assert code == 0 and printed.err == ''
  assert printed.out.splitlines()[-1].split()[1] == '11,278,528'
  # The networks that `main` trains.
  for config, parameters in (('bn_x5', '162,826'), ('bn_mnist', '100,010')):
    code, printed = run(f'--config={config}:mini')
    assert code == 0
    assert printed.out.splitlines()[-1].split()[1] == parameters
  code, printed = run('--config=configs/bn_x5.py', '--config.model.width=0')
  assert code == 1 and printed.out == ''
  assert printed.err.startswith('error: ') and printed.err.count('\n') == 1


def test_auxiliary_loss_is_weighted(monkeypatch):
  """The gradient is that of loss + weight * auxiliary loss: affine in it."""
  few_rows(monkeypatch, '3a', '4d')
  mesh = parallel.create_mesh(jax.devices()[:1])
  images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3))
  batch = {
    'image': images.astype(np.uint8),
    'label': np.arange(8, dtype=np.int32),
    'mask': np.ones(8, bool),
    'replaced': np.zeros(8, bool),
  }

  def step(weight):
    config = config_lib.load(
      'configs/inception.py:mini',
      (
        f'model.aux_loss_weight={weight}',
        'model.aux_head=true',
        'optim.weight_decay=0',
      ),
    )
    model = factory.create_model(config.model, config.bn, 10)
    optimizer = optimizer_lib.create_optimizer(
      config.optim, 32, lambda step: 1.0
    )
    params = factory.initial_variables(
      model, (32, 32, 3), seed=0, init_std=0, init_scale=1
    )['params']
    state = steps.TrainState(
      np.int32(0), np.uint32(0), params, {}, optimizer.init(params)
    )
    train_step = parallel.data_parallel(
      steps.create_train_step(model, optimizer, config),
      mesh,
      donate_state=False,
    )
    state, sums = train_step(
      parallel.replicate(mesh, state), parallel.shard_batch(mesh, batch)
    )
    # After one step momentum is the gradient.
    gradient = optax.tree.get(state.opt_state, 'trace')
    return jax.device_get(gradient), sums.fetch()

  (without, sums), (weighted, same), (whole, _) = map(step, (0.0, 0.3, 1.0))
  # What is reported is the loss of the network that remains.
  assert same.loss == pytest.approx(sums.loss)
  assert not without['aux_head']['hidden']['kernel'].any()
  for path, found in jax.tree_util.tree_leaves_with_path(weighted):
    keys = '/'.join(entry.key for entry in path)
    a, b = at(without, keys), at(whole, keys)
    expected = a + 0.3 * (b - a)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(b).max(), keys
    # All but the classifier of the network itself learn from both.
    assert keys.startswith('classifier/') or np.abs(b - a).max() > 0, keys


def convolve(x, kernel, stride, before, after):
  """Convolution of one padded image, one output position at a time."""
  x = np.pad(x, ((before, after), (before, after), (0, 0)))
  size = kernel.shape[0]
  starts = range(0, x.shape[0] - size + 1, stride)
  return np.array(
    [
      [
        np.tensordot(x[i : i + size, j : j + size], kernel, axes=3)
        for j in starts
      ]
      for i in starts
    ]
  )


def pool(x, reduce):
  """3x3 windows of stride 1, each cut off at the border."""
  n = x.shape[0]
  return np.array(
    [
      [
        reduce(x[max(0, i - 1) : i + 2, max(0, j - 1) : j + 2])
        for j in range(n)
      ]
      for i in range(n)
    ]
  )


@pytest.mark.parametrize(
  'padding, before_conv1, before_3c', [('same', 1, 0), ('torch', 2, 1)]
)
def test_borders(padding, before_conv1, before_3c, monkeypatch):
  """Every convention of padding, from one layer's output to the next."""
  few_rows(monkeypatch, '3a', '3c')
  images = np.random.default_rng(0).normal(size=(1, 32, 32, 3))
  kernel, outputs = traced(
    images, f'model.padding={padding}', 'model.lrn=false'
  )

  def output(path):
    return outputs(path)[0]

  def assert_equal(path, expected):
    np.testing.assert_allclose(output(f'{path}/conv'), expected, atol=1e-4)

  assert_equal(
    'conv1', convolve(images[0], kernel('conv1'), 2, before_conv1, 2)
  )
  # A 3x3 convolution of stride 1 has one convention.
  double = 'inception_3a/conv_double'
  assert_equal(
    f'{double}_2',
    convolve(output(f'{double}_1'), kernel(f'{double}_2'), 1, 1, 1),
  )
  # Stride 2, in the last convolution of each branch.
  reduced = output('inception_3c/reduce_3x3')
  name = 'inception_3c/conv_3x3'
  assert_equal(name, convolve(reduced, kernel(name), 2, before_3c, 1))
  name = 'inception_3c/conv_double_1'
  assert_equal(
    name, convolve(output('inception_3c/reduce_double'), kernel(name), 1, 1, 1)
  )
  name = 'inception_3c/conv_double_2'
  doubled = output('inception_3c/conv_double_1')
  assert_equal(name, convolve(doubled, kernel(name), 2, before_3c, 1))
  # Max pools of stride 2 begin in the corner and are cut off at the far side.
  module = output('inception_3a')
  passed = output('inception_3c')[..., -module.shape[-1] :]
  expected = pool(module, lambda window: window.max((0, 1)))[1::2, 1::2]
  np.testing.assert_allclose(passed, expected, rtol=1e-6)
  # At the border Caffe and PyTorch divide by 9, TensorFlow by what is there.
  x = np.maximum(output('conv2/conv'), 0)
  x = pool(x, lambda window: window.max((0, 1)))[1::2, 1::2]
  if padding == 'torch':
    averages = pool(x, lambda window: window.sum((0, 1)) / 9)
  else:
    averages = pool(x, lambda window: window.mean((0, 1)))
  name = 'inception_3a/projection'
  assert_equal(name, averages @ kernel(name)[0, 0])
