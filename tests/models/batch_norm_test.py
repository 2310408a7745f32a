"""The module against flax's, and against NumPy over devices and groups."""

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from bn_repro import parallel
from bn_repro.models.batch_norm import BatchNorm

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


@pytest.mark.parametrize('mask', [False, True])
@pytest.mark.parametrize('fast', [True, False])
@pytest.mark.parametrize(
  'kwargs',
  [
    {},
    {'axis': 1},
    {'axis': (1, 2, 3)},
    {'use_scale': False},
    {'use_bias': False},
    {'momentum': 0.5, 'epsilon': 0.1},
    {'dtype': jnp.bfloat16},
  ],
)
def test_equals_flax_leaf_by_leaf(kwargs, fast, mask):
  x = jnp.asarray(random(6, 3, 4, 5), jnp.float32)
  weight = jnp.asarray(random(6, 3, 4, 5, seed=1), jnp.float32)
  where = (jnp.arange(6) < 4)[:, None, None, None] if mask else None
  kwargs = {**kwargs, 'use_fast_variance': fast}
  results = []
  for module in (nn.BatchNorm(**kwargs), BatchNorm(unbiased=False, **kwargs)):
    variables = module.init(KEY, x, use_running_average=False)

    def loss(params, x, module=module, variables=variables):
      y, updated = module.apply(
        {**variables, 'params': params},
        x,
        use_running_average=False,
        mask=where,
        mutable=['batch_stats'],
      )
      return jnp.sum(y.astype(jnp.float32) * weight), (y, updated)

    params = variables.get('params', {})
    gradients, (y, updated) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    inferred = module.apply(
      {**variables, **updated}, x, use_running_average=True
    )
    results.append((variables, y, updated, gradients, inferred))
  coarse = kwargs.get('dtype') == jnp.bfloat16
  tolerance = (
    {'rtol': 2e-2, 'atol': 3e-2}
    if coarse
    else {
      'rtol': 2e-4,
      'atol': 2e-5,
    }
  )
  assert_trees_close(results[1], results[0], **tolerance)


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

  def test_one_all_reduce_forward_and_one_backward(self):
    module = self.module()
    x = jnp.ones(self.GLOBAL)
    variables = module.init(KEY, x)

    def forward(x):
      return module.apply(variables, x, mutable=['batch_stats'])[0]

    def count(f):
      sharded = jax.shard_map(
        f,
        mesh=parallel.create_mesh(),
        in_specs=P('data'),
        out_specs=P('data'),
        check_vma=False,
      )
      return jax.jit(sharded).lower(x).as_text().count('stablehlo.all_reduce')

    assert count(forward) == 1
    assert count(jax.grad(lambda x: forward(x).sum())) == 2

  def test_group_that_does_not_fit(self):
    x = jnp.ones(self.GLOBAL)
    with pytest.raises(ValueError, match='virtual_batch_size=3'):
      self.sharded(self.module(virtual_batch_size=3), x, x)


def test_one_value_per_statistic():
  module = BatchNorm()
  x = jnp.ones((1, 4))
  variables = module.init(KEY, x, use_running_average=False)
  module.apply(variables, x, use_running_average=True)
  with pytest.raises(ValueError, match='one value per statistic'):
    module.apply(variables, x, use_running_average=False, mutable=True)


def test_unsupported_arguments():
  x = jnp.ones((4, 2))
  with pytest.raises(ValueError, match='force_float32_reductions'):
    BatchNorm(force_float32_reductions=False, use_running_average=False).init(
      KEY, x
    )
  with pytest.raises(ValueError, match='complex'):
    BatchNorm(use_running_average=False).init(KEY, x.astype(jnp.complex64))


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
