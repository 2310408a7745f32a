import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_repro.errors import UserError
from bn_repro.lab import __main__ as lab
from bn_repro.lab import jacobians, plain

SMALL = ('batch_size=20', 'steps=2', 'model.depth=3', 'model.width=8')


def small_config(*overrides):
  return lab.load('jacobians', (*SMALL, *overrides), quick=True)


def numpy_layer(name, w, x):
  """BN(g(x) W), or g(x) W, in float64."""
  x = np.asarray(x, np.float64)
  x = np.maximum(x, 0) if name.endswith('relu') else 1 / (1 + np.exp(-x))
  x = x @ w
  return x if name[:2] == 'no' else (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)


@pytest.mark.parametrize('name', plain.NETWORKS)
def test_jacobians_are_those_of_differences(name, x64):
  """With the statistics, which the other examples share."""
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(5, 4)), rng.normal(size=(4, 3))
  found = plain.jacobians(plain.NETWORKS[name], w, x)
  assert found.shape == (5, 3, 4)
  for example in range(5):
    for unit in range(4):
      shift = np.zeros_like(x)
      shift[example, unit] = 1e-5
      up, down = (numpy_layer(name, w, x + s)[example] for s in (shift, -shift))
      difference = (up - down) / 2e-5
      np.testing.assert_allclose(found[example, :, unit], difference, atol=1e-7)


def test_figures_at_first_are_those_of_numpy(monkeypatch):
  config, name = small_config(), 'BN, relu'
  monkeypatch.setattr(plain, 'NETWORKS', {name: plain.NETWORKS[name]})
  result = jacobians.run(config, seed=3)[name]['at first']
  images, labels = next(plain.batches(3, config.batch_size))
  weights = plain.initial_weights(config.model, 3)
  assert [w.shape for w in weights] == [(784, 8), *[(8, 8)] * 3, (8, 10)]

  x = residual = numpy_layer(name, weights[0], images)
  means, variances, values = [], [], []
  for w in weights[1:-1]:
    found = plain.jacobians(plain.NETWORKS[name], w, jnp.float32(x))
    values += (
      np.sqrt(np.linalg.eigvalsh(found.mT @ found).clip(0)).ravel().tolist()
    )
    x, residual = (
      numpy_layer(name, w, x),
      residual + numpy_layer(name, w, residual),
    )
    means.append(np.abs(residual.mean(0)).mean())
    variances.append(residual.var(0).mean())
  np.testing.assert_allclose(result['means'], means, atol=1e-5)
  np.testing.assert_allclose(result['variances'], variances, 1e-4)
  assert result['growth'] == pytest.approx(variances[-1] / variances[0], 1e-4)
  near = [0.5 <= value <= 2 for value in values]
  assert result['near 1'] == pytest.approx(np.mean(near), abs=1.5 / len(near))
  assert result['values'][-1] == pytest.approx(max(values), 1e-4)

  @jax.jit
  def loss(weights):
    """By the formulas, which JAX differentiates itself."""
    x = images
    for w in weights[:-1]:
      x = jax.nn.relu(x) @ w
      x = (x - x.mean(0, keepdims=True)) * jax.lax.rsqrt(
        x.var(0, keepdims=True) + 1e-5
      )
    logits = jax.nn.relu(x) @ weights[-1]
    chances = jax.nn.log_softmax(logits)
    return -chances[jnp.arange(len(labels)), labels].mean()

  gradients = jax.grad(loss)(weights)
  for rate, ratio in zip(
    np.geomspace(0.01, 1e5, 29), result['ratios'], strict=True
  ):
    moved = [w - rate * g for w, g in zip(weights, gradients, strict=True)]
    expected = min(loss(moved) / loss(weights), 1e4)
    assert ratio == pytest.approx(float(expected), 1e-2), rate


def test_command(tmp_path, capsys):
  argv = ['jacobians', f'--workdir={tmp_path}', '--quick']
  argv += [f'--config.{assignment}' for assignment in SMALL]
  assert lab.main(argv) == 0
  assert '0 of 7 findings hold here, 7 undecided' in capsys.readouterr().out
  (result,) = json.loads((tmp_path / 'jacobians.json').read_text())['results']
  network = result['no BN, relu']
  # The longest step is that before the first one that diverges.
  rates, ratios = (
    np.geomspace(0.01, 1e5, 29),
    np.array(network['trained']['ratios']),
  )
  longest = network['trained']['longest']
  assert (ratios[rates <= longest] <= 1e3).all()
  assert ratios[rates > longest][0] > 1e3
  row = [f'{network[when]["longest"]:.3g}' for when in ('at first', 'trained')]
  page = (tmp_path / 'jacobians.md').read_text()
  assert f'| no BN, relu | longest | {" | ".join(row)} |\n' in page
  assert (tmp_path / 'jacobians.png').stat().st_size > 10_000


def test_a_network_that_diverges_is_an_error():
  with pytest.raises(UserError, match=r'learning_rate=1e\+30'):
    jacobians.run(small_config('learning_rate=1e30'), 0)


@pytest.mark.parametrize(
  'override',
  [
    'batch_size=2',
    'batch_size=4001',
    'model.depth=1',
    'model.dtype=bfloat16',
    'model.width=7',
    'steps=0',
  ],
)
def test_refuses_what_has_no_figure(override):
  with pytest.raises(UserError, match='must be'):
    jacobians.check(small_config(override))
