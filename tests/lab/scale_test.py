import json

from ml_collections import ConfigDict
import numpy as np
import pytest

from bn_repro.data import mnist
from bn_repro.errors import UserError
from bn_repro.lab import __main__ as lab
from bn_repro.lab import scale
from bn_repro.models.batch_norm import BatchNorm

SMALL = ('batch_size=7', 'steps=6', 'model.width=3', 'num_seeds=1')


def small_config(*overrides):
  return lab.load('scale', (*SMALL, *overrides), quick=True)


def gradients(w, v, images, labels):
  """Written out, with Algorithm 1 for epsilon 0."""
  u = images @ w
  std = u.std(0)
  xhat = (u - u.mean(0)) / std
  hidden = 1 / (1 + np.exp(-xhat))
  p = np.exp(hidden @ v)
  p /= p.sum(1, keepdims=True)
  d_logits = (p - np.eye(10)[labels]) / len(labels)
  d = d_logits @ v.T * hidden * (1 - hidden)
  du = (d - d.mean(0) - xhat * (d * xhat).mean(0)) / std
  return images.T @ du, hidden.T @ d_logits


def test_rates_and_formula_are_those_of_plain_training(x64):
  """The second seed, the largest scale and the middle rate."""
  config = small_config('max_scale=3.0', 'min_rate=0.5')
  result = scale.run(config, seed=1)
  rng = np.random.default_rng(1)
  w = rng.normal(scale=1 / 28, size=(784, 3)) * 3
  v = rng.normal(scale=3**-0.5, size=(3, 10))
  digits = mnist.load_mnist_5k(ConfigDict({'fold': 0})).splits['train']
  eta, ct, w0, rates, formula = 5.0, 0, (w**2).sum(), [], []
  for _ in range(6):
    rates.append(eta / (w**2).sum())
    formula.append(eta / np.sqrt(w0**2 + 2 * eta**2 * ct))
    batch = rng.choice(4000, 7, replace=False)
    images = digits.images[batch].reshape(7, 784) / 255
    g, dv = gradients(w, v, images, digits.labels[batch])
    ct += (g**2).sum() * (w**2).sum()
    w, v = w - eta * g, v - config.classifier_rate * dv
  assert result['steps'] == list(range(6))
  assert result['scale'][-2] == pytest.approx(3)
  np.testing.assert_allclose(result['rates'][-2], rates, 1e-12)
  np.testing.assert_allclose(result['formula'][-2], formula, 1e-12)
  # Far from the first rate, so that the numbers above could differ.
  assert rates[-1] < 0.9 * rates[0]


def test_only_the_effective_rate_counts(x64):
  """Weights times sqrt(10) at ten times the rate: the same run."""
  result = scale.run(
    small_config('num_scales=3', f'max_scale={10**0.5}', 'min_rate=0.5'), 0
  )
  rates = np.reshape(result['rates'], (3, 3, -1))
  np.testing.assert_allclose(rates[2, 1:], rates[1, :-1], 1e-9)
  np.testing.assert_allclose(rates[1, 1:], rates[0, :-1], 1e-9)
  assert result['spread'] == pytest.approx(
    max(rates[0, :, -1]) / min(rates[0, :, -1])
  )
  assert result['kept'] == pytest.approx(
    (rates[2, :, -1] / rates[2, :, 0]).min()
  )


def test_identities_need_epsilon_0(x64, monkeypatch):
  result = scale.run(small_config(), 0)
  assert max(result['cosine'], result['error']) < 1e-10
  monkeypatch.setattr(
    scale,
    'BatchNorm',
    lambda **options: BatchNorm(**options | {'epsilon': 0.1}),
  )
  # Another size, as the step is compiled for the one above.
  result = scale.run(small_config('batch_size=8'), 0)
  assert min(result['cosine'], result['error']) > 1e-10


def test_command(tmp_path, capsys):
  argv = ['scale', f'--workdir={tmp_path}', '--quick']
  argv += [f'--config.{assignment}' for assignment in SMALL]
  assert lab.main(argv) == 0
  assert '0 of 4 findings hold here, 4 undecided' in capsys.readouterr().out
  (result,) = json.loads((tmp_path / 'scale.json').read_text())['results']
  row = (
    '| 0.05 | '
    f'{result["rates"][0][0]:.3g} | {result["rates"][0][-1]:.3g} | '
    f'{result["formula"][0][-1]:.3g} |\n'
  )
  assert row in (tmp_path / 'scale.md').read_text()
  assert (tmp_path / 'scale.png').stat().st_size > 10_000


@pytest.mark.parametrize(
  ('override', 'reason'),
  [
    ('model.dtype=float32', 'float64'),
    ('batch_size=2', '1 and -1'),
    ('batch_size=4001', '4000'),
    ('num_rates=1', 'at least 2'),
    ('max_scale=1', 'exceed 1'),
  ],
)
def test_refuses_what_has_no_figure(override, reason):
  with pytest.raises(UserError, match=reason):
    scale.check(small_config(override))
