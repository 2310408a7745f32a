"""Group and layer normalization against PyTorch, and the experiment."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bn_repro.errors import UserError
from bn_repro.lab import __main__ as lab
from bn_repro.lab import norms
from bn_repro.lab.group_norm import GroupNorm
from bn_repro.runtime import workdir

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('num_groups', [1, 4])
def test_equals_torch(num_groups):
  """Outputs and gradients; one group is the layer norm of all but examples."""
  x, dy = RNG.normal(3, 2, (2, 5, 3, 2, 8)).astype(np.float32)
  scale, bias = RNG.standard_normal((2, 8)).astype(np.float32)
  channels_first = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
  expected = torch.nn.functional.group_norm(
    channels_first, num_groups, torch.tensor(scale), torch.tensor(bias), 1e-5
  )
  if num_groups == 1:
    shape = channels_first.shape[1:]
    layer = torch.nn.functional.layer_norm(channels_first, shape)
    rescaled = layer * torch.tensor(scale)[:, None, None]
    rescaled = rescaled + torch.tensor(bias)[:, None, None]
    torch.testing.assert_close(rescaled, expected)
  expected = expected.relu()
  expected.backward(torch.tensor(dy.transpose(0, 3, 1, 2)))
  module = GroupNorm(
    use_running_average=False, nonlinearity=nn.relu, num_groups=num_groups
  )
  params = {'GroupNorm_0': {'scale': scale, 'bias': bias}}
  found, pull_back = jax.vjp(
    lambda x: module.apply({'params': params}, x), jnp.asarray(x)
  )
  for ours, theirs in (
    (found, expected.detach()),
    (pull_back(jnp.asarray(dy))[0], channels_first.grad),
  ):
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_quick(tmp_path):
  arguments = ['norms', f'--workdir={tmp_path}', '--quick']
  small = ['model.depth=1', 'model.width=4', 'batch_size=16']
  assert lab.main([*arguments, *(f'--config.{one}' for one in small)]) == 0
  (result,) = workdir.read_json(tmp_path / 'norms.json')['results']
  assert (result['usual']['size'], result['small']['size']) == (16, 2)
  for batch in result.values():
    np.testing.assert_allclose(batch['rates'], [0.02, 0.1, 0.6])
    assert np.shape(list(batch['accuracy'].values())) == (4, 3, 20)
  # Groups and layers differ; without a norm nothing is normalized.
  accuracy = result['usual']['accuracy']
  assert accuracy['group'] != accuracy['layer'] != accuracy['no norm']
  assert (tmp_path / 'norms.png').is_file()


def test_groups_must_divide_the_width():
  config = lab.load('norms', ['model.groups=3'], quick=True)
  with pytest.raises(UserError, match='does not divide'):
    norms.check(config)
