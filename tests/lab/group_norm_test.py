"""Group and layer normalization against PyTorch, and in the networks."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bn_repro import config as config_lib
from bn_repro.lab.conv_network import ConvNetwork
from bn_repro.lab.group_norm import GroupNorm
from bn_repro.models import factory, inception
from bn_repro.models.layers import NoNorm

RNG = np.random.default_rng(0)


def to_torch(x):
  """float64, with the channels first."""
  return torch.tensor(np.float64(np.moveaxis(x, -1, 1)), requires_grad=True)


@pytest.mark.parametrize('num_groups', [1, 4])
def test_equals_torch(num_groups):
  """Outputs and gradients; E[x^2] - E[x]^2 would have an error of 3 %."""
  x = RNG.normal(1000, 2, (3, 5, 2, 8)).astype(np.float32)
  dz = RNG.standard_normal(x.shape).astype(np.float32)
  scale, bias = RNG.standard_normal((2, 8)).astype(np.float32)
  same = to_torch(x)
  expected = F.group_norm(same, num_groups, eps=1e-5)
  if num_groups == 1:
    layer = F.layer_norm(same, same.shape[1:], eps=1e-5)
    torch.testing.assert_close(layer, expected)
  a, b = (torch.tensor(v)[:, None, None] for v in (scale, bias))
  expected = (a * expected + b).relu()
  expected.backward(to_torch(dz))

  module = GroupNorm(
    num_groups, use_running_average=False, nonlinearity=nn.relu
  )
  params = {'GroupNorm_0': {'scale': scale, 'bias': bias}}
  found, pull_back = jax.vjp(
    lambda x: module.apply({'params': params}, x), jnp.asarray(x)
  )
  for ours, theirs in (
    (found, expected.detach()),
    (pull_back(jnp.asarray(dz))[0], same.grad),
  ):
    theirs = np.moveaxis(theirs.numpy(), 1, -1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize('groups', [None, 2])
def test_network_equals_torch(groups):
  """Two convolutions, padded on one side, with and without a norm."""
  norm = NoNorm if groups is None else functools.partial(GroupNorm, groups)
  network = ConvNetwork(2, 4, norm, jnp.float32)
  images = RNG.standard_normal((3, 8, 8, 1)).astype(np.float32)
  variables = network.init(jax.random.key(0), images, train=True)
  variables = jax.tree.map(
    lambda v: RNG.standard_normal(v.shape).astype(np.float32), variables
  )
  params = jax.tree.map(lambda v: torch.tensor(v).double(), variables['params'])
  x = to_torch(images)
  for number in range(2):
    unit = params[f'ConvUnit_{number}']
    kernel = unit['conv']['kernel'].permute(3, 2, 0, 1)
    x = F.pad(x, (0, 1, 0, 1))
    x = F.conv2d(x, kernel, unit['conv'].get('bias'), stride=2)
    if groups:
      norm = unit['bn']['GroupNorm_0']
      x = F.group_norm(x, groups, norm['scale'], norm['bias'])
    x = x.relu()
  last = params['classifier']
  expected = x.mean((2, 3)) @ last['kernel'] + last['bias']
  found = network.apply(variables, images, train=True).main
  np.testing.assert_allclose(found, expected.detach(), rtol=1e-4, atol=1e-4)


def test_in_the_inception_network():
  """An example does not see the others; the scale of kernels has no effect."""
  config = config_lib.load(
    'configs/inception.py:mini',
    [
      'model.name=inception_tiny',
      'model.width=0.125',
      'model.dropout_rate=0.0',
    ],
  )
  norm = functools.partial(GroupNorm, 4)
  conv = functools.partial(nn.Conv, use_bias=False)
  network = inception.create(config.model, 10, conv, norm, norm, jnp.float32)
  images = RNG.standard_normal((2, 32, 32, 1)).astype(np.float32)
  params = factory.initial_variables(network, images[0].shape, 0, 0.0, 1.0)[
    'params'
  ]

  @functools.partial(jax.jit, static_argnames='train')
  def logits(params, images, *, train):
    return network.apply({'params': params}, images, train=train).main

  both = logits(params, images, train=True)
  assert np.ptp(both, 0).max() > 1e-3
  alone = logits(params, images[1:], train=False)
  np.testing.assert_allclose(alone, both[1:], rtol=1e-3, atol=1e-6)
  scaled = jax.tree_util.tree_map_with_path(
    lambda path, v: 9 * v if path[-2].key == 'conv' else v, params
  )
  found = logits(scaled, images, train=True)
  np.testing.assert_allclose(found, both, rtol=0.02, atol=1e-4)
