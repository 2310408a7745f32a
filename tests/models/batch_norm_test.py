"""The module against flax's, and against NumPy over devices and groups."""

import functools

from flax import nnx
import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from bn_repro import parallel
from bn_repro.models.batch_norm import BatchNorm, inference_transform
from bn_repro.tpu import collectives

KEY = jax.random.key(0)


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(0.5, 2.0, shape)


def assert_trees_close(found, expected, **tolerance):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(
      np.asarray(a, np.float64), np.asarray(b, np.float64), **tolerance
    )


# Flax's layer and ours, which then have the same definition of the variance.
LAYERS = (nn.BatchNorm, functools.partial(BatchNorm, unbiased=False))
MASK = np.random.default_rng(2).random((6, 3, 4, 5)) < 0.6
# Every activation has values.
WITHOUT_EMPTY = MASK | (np.arange(6) < 3)[:, None, None, None]


def outcome(layer, x, mask=None, **kwargs):
  """Variables, outputs, updated statistics and all gradients of a layer.

  The loss depends on the outputs that are not masked and on the updated
  statistics.
  """
  module = layer(**kwargs)
  x = jnp.asarray(x)
  variables = module.init(KEY, x, use_running_average=False)
  weight = jnp.asarray(random(*x.shape, seed=1), jnp.float32)

  def loss(variables, x):
    y, updated = module.apply(
      variables, x, False, mask=mask, mutable=['batch_stats']
    )
    if mask is not None:
      y = jnp.where(jnp.asarray(mask, bool), y, 0)
    total = jnp.sum(y.astype(jnp.float32) * weight)
    for statistic in jax.tree.leaves(updated):
      total += 10 * jnp.sum(statistic.astype(jnp.float32) ** 2)
    return total, (y, updated)

  inputs = (0, 1) if jnp.issubdtype(x.dtype, jnp.floating) else 0
  gradients, (y, updated) = jax.jit(jax.grad(loss, inputs, has_aux=True))(
    variables, x
  )
  inferred = module.apply({**variables, **updated}, jnp.nan_to_num(x), True)
  return variables, y, updated, gradients, inferred


@pytest.mark.parametrize(
  'kwargs, mask',
  [
    ({}, None),
    ({'use_fast_variance': False}, None),
    ({'axis': 1}, None),
    ({'axis': np.int64(-3)}, MASK),
    ({'axis': [2, -1]}, None),
    ({'axis': (1, 2, 3)}, WITHOUT_EMPTY),
    ({'axis': (1, 1, -3)}, None),
    ({'axis': ()}, MASK),
    ({'use_scale': False}, MASK),
    ({'use_bias': False}, None),
    ({'momentum': 0.5, 'epsilon': 0.1}, MASK),
    ({'momentum': jnp.float32(0.5), 'epsilon': np.float32(0.1)}, None),
    ({'scale_init': nn.initializers.normal()}, None),
    ({'param_dtype': jnp.bfloat16}, None),
    ({'axis_index_groups': [[0, 1], [2, 3]]}, None),  # Unused without a name.
  ],
)
def test_equals_flax_leaf_by_leaf(kwargs, mask):
  x = np.float32(random(6, 3, 4, 5))
  expected, found = (outcome(layer, x, mask, **kwargs) for layer in LAYERS)
  assert_trees_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
  'mask, hidden, fast',
  [
    (MASK, np.nan, True),
    (MASK, np.inf, False),
    (MASK.astype(np.uint8) * 255, 1e30, True),
    (-MASK.astype(np.int32), np.nan, False),
    (np.where(MASK, 0.3, 0), -np.inf, True),
    (np.float16(MASK[:, :1]), np.nan, True),
    ([[[True]], [[False]], [[True]]], np.nan, True),
  ],
)
def test_masked_values_do_not_matter(mask, hidden, fast):
  """Flax's gradients need finite values there; ours do not."""
  x = np.float32(random(6, 3, 4, 5))
  counts = np.broadcast_to(np.asarray(mask, bool), x.shape)
  expected, found = (
    outcome(
      layer,
      np.where(counts, x, np.float32(value)),
      mask,
      use_fast_variance=fast,
    )[:4]
    for layer, value in zip(LAYERS, (0, hidden), strict=True)
  )
  assert_trees_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures('x64')
@pytest.mark.parametrize(
  'x_dtype, dtype',
  [
    ('float16', None),
    ('bfloat16', None),
    ('float64', None),
    ('int32', None),
    ('uint8', None),
    ('bool', None),
    ('bfloat16', 'float32'),
    ('float32', 'float16'),
    ('float32', 'float64'),
    ('float64', 'float32'),
    ('int64', 'bfloat16'),
  ],
)
def test_dtypes_equal_flax(x_dtype, dtype):
  """With parameters, and for `None` without, where the input alone decides."""
  x = jnp.asarray(random(6, 3, 4, 5)).astype(x_dtype)
  learned = dtype is not None
  expected, found = (
    outcome(layer, x, dtype=dtype, use_scale=learned, use_bias=learned)
    for layer in LAYERS
  )
  assert_trees_close(found, expected, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize('g', [nn.relu, nn.sigmoid, jnp.tanh])
@pytest.mark.parametrize('mask', [None, WITHOUT_EMPTY])
@pytest.mark.parametrize('training', [True, False])
def test_nonlinearity_in_the_layer_equals_one_after_it(g, mask, training):
  """The value to the bit; the gradients are rounded elsewhere."""
  x = jnp.asarray(random(6, 3, 4, 5), jnp.float32)
  weight = jnp.asarray(random(6, 3, 4, 5, seed=1), jnp.float32)
  inside = BatchNorm(not training, nonlinearity=g)
  outside = BatchNorm(not training)
  variables = outside.init(KEY, x)

  def loss(layer, after, variables, x):
    y, updated = layer.apply(variables, x, mask=mask, mutable=['batch_stats'])
    return (after(y) * weight).sum(), (after(y), updated)

  (found, expected) = (
    jax.grad(loss, argnums=(2, 3), has_aux=True)(layer, after, variables, x)
    for layer, after in ((inside, lambda y: y), (outside, g))
  )
  assert_trees_close(found[1], expected[1], rtol=0, atol=0)
  assert_trees_close(found[0], expected[0], rtol=1e-5, atol=1e-5)


def test_masked_gradients_count_where_the_loss_uses_them():
  """Masked values are normalized; only statistics ignore them."""
  x = np.float32(random(6, 4))
  mask = np.arange(6)[:, None] < 4
  module = BatchNorm(use_running_average=False, unbiased=False)
  variables = module.init(KEY, x)

  def loss(params):
    y, _ = module.apply(
      {**variables, 'params': params}, x, mask=mask, mutable=['batch_stats']
    )
    return jnp.sum(y[4:])

  gradient = jax.grad(loss)(variables['params'])
  xhat = (x - x[:4].mean(0)) / np.sqrt(x[:4].var(0) + 1e-5)
  np.testing.assert_allclose(gradient['scale'], xhat[4:].sum(0), rtol=1e-4)
  np.testing.assert_allclose(gradient['bias'], 2)


def test_variance_of_a_mask_of_bytes():
  x = np.float32(random(32, 3))
  mask = np.where(np.arange(32) < 20, 255, 0).astype(np.uint8)[:, None]
  module = BatchNorm(momentum=0.0, use_running_average=False, unbiased=False)
  variables = module.init(KEY, x)
  _, updated = module.apply(variables, x, mask=mask, mutable=['batch_stats'])
  stats = updated['batch_stats']
  np.testing.assert_allclose(stats['mean'], x[:20].mean(0), rtol=1e-5)
  np.testing.assert_allclose(stats['var'], x[:20].var(0), rtol=1e-5)


class TestStatisticsOfNothing:
  """A mask leaves features or groups without values."""

  X = np.float32(random(8, 3))
  STATS = {
    'mean': np.float32([0.1, -0.7, 3]),
    'var': np.float32([0.3, 1.7, 0.9]),
  }
  PARAMS = {'scale': np.float32([1.5, -2, 1]), 'bias': np.float32([0, 1, 2])}

  def apply(self, x, mask, stats=None, **kwargs):
    module = BatchNorm(use_running_average=False, **kwargs)
    y, updated = module.apply(
      {'params': self.PARAMS, 'batch_stats': stats or self.STATS},
      x,
      mask=mask,
      mutable=['batch_stats'],
    )
    return y, updated['batch_stats']

  @pytest.mark.parametrize('fast', [True, False])
  @pytest.mark.parametrize('empty', [[0], [1, 2], [0, 1, 2]])
  def test_a_feature_is_normalized_with_running_statistics(self, empty, fast):
    mask = np.ones((8, 3), bool)
    mask[:, empty] = False
    x = np.where(mask, self.X, np.float32(5))
    x[0, empty] = np.nan
    y, stats = self.apply(x, mask, use_fast_variance=fast)
    y, stats = jax.tree.map(np.asarray, (y, stats))
    inference = BatchNorm(use_running_average=True)
    expected = np.asarray(
      inference.apply({'params': self.PARAMS, 'batch_stats': self.STATS}, x)
    )
    np.testing.assert_allclose(y[:, empty], expected[:, empty], rtol=1e-6)
    filled = [i for i in range(3) if i not in empty]
    for name, old in self.STATS.items():
      np.testing.assert_array_equal(stats[name][empty], old[empty])
      assert (stats[name][filled] != old[filled]).all()

  def test_gradients_are_those_of_inference(self):
    mask = np.broadcast_to(np.array([True, False, True]), (8, 3))
    weight = np.float32(random(8, 3, seed=1))
    inference = BatchNorm(use_running_average=True)

    def loss(x, stats, params, module, **kwargs):
      y = module.apply(
        {'params': params, 'batch_stats': stats},
        x,
        mutable=['batch_stats'],
        **kwargs,
      )[0]
      return jnp.sum(weight * y)

    arguments = (self.X, self.STATS, self.PARAMS)
    found, expected = (
      jax.grad(loss, (0, 1, 2))(*arguments, module, **kwargs)
      for module, kwargs in (
        (BatchNorm(use_running_average=False), {'mask': mask}),
        (inference, {}),
      )
    )
    for a, b in zip(
      jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
      np.testing.assert_allclose(a[..., 1], b[..., 1], rtol=1e-5)

  @pytest.mark.parametrize('unbiased', [True, False])
  def test_only_groups_with_values_enter_the_average(self, unbiased):
    """Group 0 has four values, group 1 none, group 2 one, group 3 two."""
    mask = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0, 1, 0], bool)
    x = np.float32(random(16, 3))
    groups = [x[:4], x[9:10], x[[12, 14]]]
    _, stats = self.apply(
      x,
      mask[:, None],
      momentum=0.0,
      virtual_batch_size=4,
      unbiased=unbiased,
    )
    mean = np.mean([group.mean(0) for group in groups], 0)
    np.testing.assert_allclose(stats['mean'], mean, rtol=1e-5)
    # One value has no unbiased variance.
    usable = [group for group in groups if len(group) > unbiased]
    var = np.mean([group.var(0, ddof=int(unbiased)) for group in usable], 0)
    np.testing.assert_allclose(stats['var'], var, rtol=1e-5)

  def test_one_value_leaves_the_unbiased_variance(self):
    mask = np.arange(8)[:, None] == 3
    _, stats = self.apply(self.X, mask)
    np.testing.assert_array_equal(stats['var'], self.STATS['var'])
    expected = 0.99 * self.STATS['mean'] + 0.01 * self.X[3]
    np.testing.assert_allclose(stats['mean'], expected, rtol=1e-6)

  @pytest.mark.parametrize('shape', [(0, 3), (4, 0, 3)])
  @pytest.mark.parametrize('group', [None, 2])
  def test_a_batch_of_no_examples(self, shape, group):
    x = np.zeros(shape, np.float32)
    module = BatchNorm(virtual_batch_size=group)
    variables = module.init(KEY, x, use_running_average=False)
    assert module.apply(variables, x, True).shape == shape
    with pytest.raises(ValueError, match='BatchNorm: no values per statistic'):
      module.apply(variables, x, False, mutable=['batch_stats'])


def remat(layer, **kwargs):
  return nn.remat(layer)(**kwargs)


def mapped(layer, **kwargs):
  axes = {'params': 0, 'batch_stats': 0}
  return nn.vmap(layer, variable_axes=axes, split_rngs={'params': True})(
    **kwargs
  )


def mapped_as_devices(layer, **kwargs):
  shared = {'params': None, 'batch_stats': None}
  return nn.vmap(
    layer,
    variable_axes=shared,
    split_rngs={'params': False},
    axis_name='lanes',
  )(axis_name='lanes', **kwargs)


def scanned(layer, **kwargs):
  """The layer applied to one example after another, carrying its statistics."""

  class Steps(nn.Module):
    @nn.compact
    def __call__(self, x):
      norm = layer(name='norm', **kwargs)
      if self.is_initializing():
        return norm(x[0])
      scan = nn.scan(
        lambda norm, carry, x: (carry, norm(x)),
        variable_broadcast='params',
        variable_carry='batch_stats',
      )
      return scan(norm, None, x)[1]

  return Steps()


def called_twice(layer, **kwargs):
  """With an axis that does not exist while variables are initialized."""

  class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
      name = 'batch' if self.is_initializing() else None
      norm = layer(name='norm', axis_name=name, **kwargs)
      return norm(x) + norm(2 * x)

  return Twice()


@pytest.mark.parametrize(
  'transform', [remat, mapped, mapped_as_devices, scanned, called_twice]
)
def test_transformations_equal_flax(transform):
  x = jnp.asarray(random(4, 6, 5), jnp.float32)
  weight = jnp.asarray(random(4, 6, 5, seed=1), jnp.float32)
  results = []
  for layer, kwargs in ((nn.BatchNorm, {}), (BatchNorm, {'unbiased': False})):
    module = transform(layer, use_running_average=False, **kwargs)
    variables = module.init(KEY, x)

    def loss(variables, x, module=module):
      y, updated = module.apply(variables, x, mutable=['batch_stats'])
      statistics = sum(jnp.sum(s**2) for s in jax.tree.leaves(updated))
      return jnp.sum(y * weight) + 10 * statistics, (y, updated)

    gradients, aux = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(variables, x)
    results.append((variables, aux, gradients))
  assert_trees_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_nnx_bridge_equals_flax():
  x = jnp.asarray(random(6, 5), jnp.float32)
  results = []
  for layer in LAYERS:
    module = nnx.bridge.ToNNX(
      layer(use_running_average=False), rngs=nnx.Rngs(0)
    )
    nnx.bridge.lazy_init(module, x)

    def loss(module):
      return jnp.sum(module(x, mutable=['batch_stats']) ** 3)

    gradients = nnx.grad(loss)(module)
    variables = nnx.split(module, nnx.RngState, ...)[2]
    results.append(tuple(map(nnx.to_pure_dict, (gradients, variables))))
  assert_trees_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_tabulate_and_intermediates_equal_flax():
  """The helpers of the layer are not layers."""

  class Net(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x):
      x = nn.Dense(4)(x)
      return self.norm(use_running_average=False)(x)

  x = jnp.ones((3, 2))
  tables, intermediates = [], []
  for layer in (nn.BatchNorm, BatchNorm):
    net = Net(layer)
    tables.append(net.tabulate(KEY, x, console_kwargs={'width': 200}))
    _, state = net.apply(
      net.init(KEY, x), x, capture_intermediates=True, mutable=True
    )
    intermediates.append(jax.tree.map(jnp.shape, state['intermediates']))
  assert tables[0] == tables[1]
  assert intermediates[0] == intermediates[1]


def test_replaces_flax_in_a_model():
  class Net(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train):
      x = nn.Dense(4)(x)
      return self.norm(use_running_average=not train, name='norm')(x)

  x = jnp.ones((3, 2))
  trees = [
    jax.tree.map(jnp.shape, Net(norm).init(KEY, x, train=False))
    for norm in (nn.BatchNorm, BatchNorm)
  ]
  assert trees[0] == trees[1]


def test_forward_mode_needs_inference():
  x = np.float32(random(6, 5))
  module = BatchNorm()
  variables = module.init(KEY, x, use_running_average=False)

  def tangent(average):
    def f(x):
      return module.apply(variables, x, average, mutable=['batch_stats'])[0]

    return jax.jvp(f, (x,), (x,))[1]

  np.testing.assert_allclose(tangent(True), x / np.sqrt(1 + 1e-5), rtol=1e-6)
  with pytest.raises(TypeError, match='custom_vjp'):
    tangent(False)


def batch_variance(module, x, mean=0.0):
  """The variance that enters the running average."""
  variables = module.init(KEY, x)
  variables['batch_stats']['mean'] = jnp.full(x.shape[-1:], mean)
  _, updated = module.apply(variables, x, mutable=['batch_stats'])
  return np.asarray(updated['batch_stats']['var'])


@pytest.mark.parametrize(
  'fast, running_mean, within',
  [(True, 1e4, 1e-3), (True, 9_900.0, 1e-3), (False, 0.0, 1e-3)],
)
def test_variance_survives_a_large_mean(fast, running_mean, within):
  x = random(64, 8, 8, 3) / 2 + 1e4
  x = x.astype(np.float32)
  expected = x.astype(np.float64).var((0, 1, 2))
  settings = {'momentum': 0.0, 'use_running_average': False}
  found = batch_variance(
    BatchNorm(use_fast_variance=fast, unbiased=False, **settings),
    jnp.asarray(x),
    running_mean,
  )
  np.testing.assert_allclose(found, expected, rtol=within)
  flax_variance = batch_variance(nn.BatchNorm(**settings), jnp.asarray(x))
  assert np.abs(flax_variance / expected - 1).max() > within


@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize('running_mean', [0.0, 3.0, -50.0])
def test_running_mean_is_a_pivot_and_nothing_more(fast, running_mean):
  """Output and statistics do not depend on where the moments are taken."""
  module = BatchNorm(
    use_running_average=False, use_fast_variance=fast, momentum=0.0
  )
  x = np.float32(random(64, 5) * [1, 2, 3, 4, 5] + [0, 1, -2, 5, 10])
  variables = module.init(jax.random.key(0), x)
  variables['batch_stats']['mean'] = jnp.full(5, running_mean)
  y, updated = module.apply(variables, x, mutable=['batch_stats'])
  x = x.astype(np.float64)
  expected = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
  np.testing.assert_allclose(y, expected, atol=1e-3)
  stats = updated['batch_stats']
  np.testing.assert_allclose(stats['mean'], x.mean(0), atol=1e-4)
  np.testing.assert_allclose(stats['var'], x.var(0, ddof=1), rtol=1e-2)


def test_bfloat16_inputs_have_float32_statistics():
  x = jnp.asarray(random(256, 8), jnp.bfloat16)
  module = BatchNorm(momentum=0.0, use_running_average=False, unbiased=False)
  exact = np.asarray(x, np.float64).var(0)
  found = batch_variance(module, x)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, exact, rtol=1e-5)


@pytest.mark.usefixtures('x64')
class TestDevices:
  """Eight devices, float64, against NumPy and one device."""

  GLOBAL = (16, 2, 3, 4)

  def sharded(self, module, x, dy, mask=None):
    """y, dx, and batch_stats averaged over devices."""
    mesh = parallel.create_mesh()
    variables = module.init(KEY, x[:2])

    def f(variables, x, dy, mask):
      def forward(x):
        return module.apply(variables, x, mask=mask, mutable=['batch_stats'])

      y, pullback, updated = jax.vjp(forward, x, has_aux=True)
      return y, pullback(dy)[0], lax.pmean(updated['batch_stats'], 'data')

    split = P('data')
    return jax.jit(
      jax.shard_map(
        f,
        mesh=mesh,
        in_specs=(P(), split, split, split),
        out_specs=(split, split, P()),
        check_vma=False,
      )
    )(variables, x, dy, mask)

  def module(self, **kwargs):
    return BatchNorm(
      momentum=0.0,
      use_running_average=False,
      param_dtype=jnp.float64,
      axis_name='data',
      **kwargs,
    )

  def naive(self, x, groups):
    """Output of normalizing each group of examples by its own moments."""
    grouped = x.reshape(groups, -1, *x.shape[1:])
    mean = grouped.mean((1, 2, 3), keepdims=True)
    var = ((grouped - mean) ** 2).mean((1, 2, 3), keepdims=True)
    return ((grouped - mean) / jnp.sqrt(var + 1e-5)).reshape(x.shape)

  @pytest.mark.parametrize('group', [None, 1, 2, 4, 8, 16])
  def test_groups_against_numpy(self, group):
    x, dy = random(*self.GLOBAL), random(*self.GLOBAL, seed=1)
    module = self.module(virtual_batch_size=group)
    y, dx, stats = self.sharded(module, jnp.asarray(x), jnp.asarray(dy))
    size = group or 16
    expected, pullback = jax.vjp(
      lambda x: self.naive(x, 16 // size), jnp.asarray(x)
    )
    np.testing.assert_allclose(y, expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(
      dx, pullback(jnp.asarray(dy))[0], rtol=1e-9, atol=1e-11
    )
    grouped = x.reshape(16 // size, -1, 4)
    np.testing.assert_allclose(
      stats['mean'], grouped.mean(1).mean(0), rtol=1e-11
    )
    np.testing.assert_allclose(
      stats['var'], grouped.var(1, ddof=1).mean(0), rtol=1e-11
    )

  def test_uneven_masks_are_weighted_by_their_counts(self):
    """Not the mean of the devices' means, which is another number."""
    x = random(*self.GLOBAL)
    mask = np.arange(16) < 5
    y, _, stats = self.sharded(
      self.module(),
      jnp.asarray(x),
      jnp.ones(self.GLOBAL),
      jnp.asarray(mask)[:, None, None, None],
    )
    counted = x[mask].reshape(-1, 4)
    mean, var = counted.mean(0), counted.var(0)
    np.testing.assert_allclose(stats['mean'], mean, rtol=1e-11)
    np.testing.assert_allclose(stats['var'], counted.var(0, ddof=1), rtol=1e-11)
    np.testing.assert_allclose(
      y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-10, atol=1e-11
    )

  def test_gradient_with_a_mask(self):
    x, dy = random(*self.GLOBAL), random(*self.GLOBAL, seed=1)
    mask = jnp.asarray(np.arange(16) < 5)[:, None, None, None]
    _, dx, _ = self.sharded(
      self.module(), jnp.asarray(x), jnp.asarray(dy), mask
    )

    def naive(x):
      weight = jnp.broadcast_to(mask, x.shape)
      mean = jnp.mean(x, (0, 1, 2), keepdims=True, where=weight)
      var = jnp.mean((x - mean) ** 2, (0, 1, 2), keepdims=True, where=weight)
      return (x - mean) / jnp.sqrt(var + 1e-5)

    expected = jax.vjp(naive, jnp.asarray(x))[1](jnp.asarray(dy))[0]
    np.testing.assert_allclose(dx, expected, rtol=1e-9, atol=1e-11)

  @pytest.mark.parametrize(
    'map_devices, group, masked, fast',
    [
      ('shard_map', None, False, True),
      ('shard_map', None, True, False),
      ('shard_map', 1, False, True),
      ('shard_map', 2, True, True),
      ('shard_map', 4, True, True),
      ('vmap', None, False, True),
      ('vmap', None, True, False),
      ('inner vmap', None, True, True),
    ],
  )
  def test_gradient_of_the_statistics(self, map_devices, group, masked, fast):
    """Each device has a loss of its own on the updated running averages."""
    x, dy = jnp.asarray(random(*self.GLOBAL)), random(*self.GLOBAL, seed=1)
    weights = random(8, 2, 4, seed=3)
    mask = np.ones(self.GLOBAL, bool)
    if masked:
      mask = random(*self.GLOBAL, seed=4) > 0
      mask[:2, ..., 1] = False  # Feature 1 has no values on device 0.
    module = self.module(virtual_batch_size=group, use_fast_variance=fast)
    variables = module.init(KEY, x[:2])

    def device_loss(x, dy, weights, mask):
      y, updated = module.apply(
        variables, x, mask=mask if masked else None, mutable=['batch_stats']
      )
      stats = updated['batch_stats']
      both = jnp.stack([stats['mean'], stats['var']])
      return jnp.sum(y * dy) + jnp.sum(both**2 * weights)

    devices = [a.reshape(8, -1, *a.shape[1:]) for a in (x, dy, mask)]
    devices.insert(2, weights)
    if map_devices == 'vmap':
      losses = jax.vmap(device_loss, axis_name='data')
      gradient = jax.grad(lambda *arguments: losses(*arguments).sum())
    elif map_devices == 'inner vmap':
      gradient = jax.vmap(jax.grad(device_loss), axis_name='data')
    else:

      def own_gradient(*arguments):
        return jax.grad(device_loss)(*(a[0] for a in arguments))[None]

      gradient = jax.shard_map(
        own_gradient,
        mesh=parallel.create_mesh(),
        in_specs=P('data'),
        out_specs=P('data'),
        check_vma=False,
      )
    found = jax.jit(gradient)(*devices)

    def naive(x):
      """The sum of all losses; a statistic of nothing is not used."""
      size = group or 16
      of_groups = lambda a: a.reshape(16 // size, -1, *a.shape[1:])  # noqa: E731
      x, where = of_groups(x), of_groups(jnp.asarray(mask))
      moments = {'axis': (1, 2, 3), 'keepdims': True, 'where': where}
      mean = jnp.mean(x, **moments)
      count = jnp.sum(where, (1, 2, 3), keepdims=True)
      var = jnp.mean((x - mean) ** 2, **moments)
      y = (x - mean) / jnp.sqrt(var + 1e-5)
      both = jnp.stack([mean, var * count / (count - 1)])[:, :, 0, 0, 0]
      # One row for each example, then the average over those of a device.
      both = both.repeat(size, 1).reshape(2, 8, 2, 4).mean(2).swapaxes(0, 1)
      return jnp.sum(y.reshape(dy.shape) * dy) + jnp.sum(both**2 * weights)

    expected = jax.jit(jax.grad(naive))(x)
    if masked and group in (1, 2):
      # Feature 1 of device 0 is normalized with running statistics, 0 and 1.
      expected = expected.at[:2, ..., 1].set(dy[:2, ..., 1] / np.sqrt(1 + 1e-5))
    np.testing.assert_allclose(
      found.reshape(self.GLOBAL), expected, rtol=1e-9, atol=1e-10
    )

  def test_one_all_reduce_forward_and_one_backward(self):
    module = self.module()
    x = jnp.ones(self.GLOBAL)
    variables = module.init(KEY, x)

    def forward(x):
      return module.apply(variables, x, mutable=['batch_stats'])[0]

    def lower(f):
      sharded = jax.shard_map(
        f,
        mesh=parallel.create_mesh(),
        in_specs=P('data'),
        out_specs=P('data'),
        check_vma=False,
      )
      return jax.jit(sharded).lower(x)

    def count(f):
      return lower(f).as_text().count('stablehlo.all_reduce')

    assert count(forward) == 1
    assert count(jax.grad(lambda x: forward(x).sum())) == 2

    def statistics_loss(x):
      y, updated = module.apply(variables, x, mutable=['batch_stats'])
      return (y**2).sum() + updated['batch_stats']['var'].sum()

    compiled = lower(jax.grad(statistics_loss)).compile().as_text()
    assert collectives.count_compiled_all_reduces(compiled) == 2

  def test_group_that_does_not_fit(self):
    x = jnp.ones(self.GLOBAL)
    with pytest.raises(ValueError, match='virtual_batch_size=3'):
      self.sharded(self.module(virtual_batch_size=3), x, x)


def test_inference_survives_a_large_mean():
  """A * x + c, which `inference_transform` gives, is off by 0.02 here."""
  x = 1e3 + 1e-3 * random(64, 4)
  stats = {'mean': np.full(4, 1e3), 'var': np.full(4, 1e-6)}
  params = {'scale': np.full(4, 1.5), 'bias': np.full(4, -0.5)}
  x, stats, params = jax.tree.map(np.float32, (x, stats, params))
  y = BatchNorm(use_running_average=True).apply(
    {'params': params, 'batch_stats': stats}, x
  )
  exact = (np.float64(x) - 1e3) / np.sqrt(np.float64(stats['var']) + 1e-5)
  np.testing.assert_allclose(y, 1.5 * exact - 0.5, rtol=1e-5, atol=1e-6)
  a, c = inference_transform(*params.values(), *stats.values(), 1e-5)
  assert (
    np.abs(np.asarray(a) * x + np.asarray(c) - (1.5 * exact - 0.5)).max() > 1e-3
  )


def test_one_value_per_statistic():
  module = BatchNorm()
  x = jnp.ones((1, 4))
  variables = module.init(KEY, x, use_running_average=False)
  module.apply(variables, x, use_running_average=True)
  with pytest.raises(ValueError, match='one value per statistic'):
    module.apply(variables, x, use_running_average=False, mutable=True)


@pytest.mark.parametrize(
  'kwargs, call, message',
  [
    ({'force_float32_reductions': False}, {}, 'force_float32_reductions=False'),
    ({'axis': 2}, {}, r'axis=2 does not name axes of .* shape \(4, 2\)'),
    ({'axis': -3}, {}, 'axis=-3'),
    ({'axis': (0, 5)}, {}, r'axis=\(0, 5\)'),
    ({'axis': 1.0}, {}, 'axis=1.0'),
    ({'axis': None}, {}, 'axis=None'),
    ({'virtual_batch_size': 0}, {}, 'virtual_batch_size=0'),
    ({'virtual_batch_size': -4}, {}, 'virtual_batch_size=-4'),
    ({'virtual_batch_size': 2.5}, {}, 'virtual_batch_size=2.5'),
    ({'virtual_batch_size': 3}, {}, 'virtual_batch_size=3'),
    ({'virtual_batch_size': 2, 'axis': 0}, {}, 'first axis'),
    (
      {'virtual_batch_size': 2, 'axis_index_groups': [[0, 1]]},
      {},
      'axis_index_groups',
    ),
    (
      {'axis_name': 'data', 'axis_index_groups': [[0], [1, 2]]},
      {},
      'differ in size',
    ),
    ({}, {'mask': np.ones(3)}, r'mask of shape \(3,\)'),
    ({}, {'mask': np.ones((2, 4, 2))}, r'mask of shape \(2, 4, 2\)'),
  ],
)
def test_arguments_that_do_not_fit(kwargs, call, message):
  x = jnp.ones((4, 2))
  if kwargs.get('axis') == 0:
    x = jnp.ones((2, 4))
  variables = BatchNorm().init(KEY, jnp.ones((4, 2)), False)
  # The layer has no name here, and one in a network.
  with pytest.raises(ValueError, match=f'^BatchNorm: .*{message}'):
    BatchNorm(**kwargs).apply(variables, x, False, **call, mutable=True)

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return BatchNorm(name='norm', **kwargs)(x, False, **call)

  variables = {name: {'norm': tree} for name, tree in variables.items()}
  with pytest.raises(ValueError, match=f'^BatchNorm norm: .*{message}'):
    Net().apply(variables, x, mutable=True)


def test_complex_inputs_are_refused():
  x = jnp.ones((4, 2), jnp.complex64)
  with pytest.raises(ValueError, match='complex'):
    BatchNorm(use_running_average=False).init(KEY, x)


def test_statistics_move_in_training_alone():
  x = jnp.asarray(random(8, 3), jnp.float32)
  module = BatchNorm()
  variables = module.init(KEY, x, use_running_average=False)
  np.testing.assert_array_equal(variables['batch_stats']['mean'], 0)
  np.testing.assert_array_equal(variables['batch_stats']['var'], 1)
  for average in (True, False):
    _, updated = module.apply(
      variables, x, use_running_average=average, mutable=['batch_stats']
    )
    moved = updated['batch_stats']['mean'] != variables['batch_stats']['mean']
    assert bool(moved.all()) is not average
