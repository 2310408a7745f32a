"""What the trainings of the experiment share, and its command."""

import numpy as np
import pytest

from bn_repro.errors import UserError
from bn_repro.lab import __main__ as lab
from bn_repro.lab import norms, rates
from bn_repro.runtime import workdir


def test_both_sizes_of_batches_take_as_many_images(monkeypatch):
  """Rates are in proportion to the batch, and so is what averages forget."""
  trained = []

  def train(model, digits, config, tried, seed):
    trained.append((model.norm, config.batch_size, config.steps, tried))
    assert np.bincount(digits[1].labels).tolist() == [25] * 10
    assert digits[1].images.shape[1:] == (28, 28, 1)
    assert config.momentum == 0.9 and seed == 3
    return [[0.1] * 20] * 3, 0.0

  monkeypatch.setattr(rates, 'train', train)
  overrides = ['batch_size=16', 'small_batch_size=4', 'steps=40']
  config = lab.load('norms', overrides, quick=True)
  norms.check(config)
  result = norms.run(config, 3)
  assert result['small']['rates'] == pytest.approx([0.02, 0.1, 0.6])
  facts = [(size, steps, tried) for _, size, steps, tried in trained]
  usual, small = facts[0], facts[-1]
  assert facts == [usual] * 5 + [small] * 5
  assert usual[:2] == (16, 40) and small[:2] == (4, 160)
  assert usual[2] == pytest.approx([0.08, 0.4, 2.4])
  momentum = [trained[i][0].keywords['momentum'] for i in (0, 5)]
  assert momentum[0] == 0.9
  assert momentum[1] ** 4 == pytest.approx(0.9)
  renorm = [trained[i][0] for i in (1, 6)]
  assert [norm.args for norm in renorm] == [(3.0, 5.0)] * 2  # Ioffe (2017).
  sizes = [norm.keywords['virtual_batch_size'] for norm in renorm]
  assert sizes == [16, 4]
  assert [norm.keywords['momentum'] for norm in renorm] == momentum
  assert [trained[i][0].args for i in (2, 3)] == [(4,), (1,)]


def test_findings():
  def accuracies(*speeds):
    return [[speed] * 20 for speed in speeds]

  result = {
    'usual': {
      'accuracy': {
        'BN': accuracies(0.5, 0.6, 0.7),
        'no norm': accuracies(0.4, 0.3, 0.1),
      }
    },
    'small': {
      'accuracy': {
        'BN': accuracies(0.5, 0.2, 0.1),
        'group': accuracies(0.3, 0.56, 0.1),
      }
    },
  }
  found = [finding.measure(result) for finding in norms.FINDINGS]
  assert found == pytest.approx([0.7, 0.3, 6])
  # Twice chance, and any difference.
  bounds = [(finding.low, finding.high) for finding in norms.FINDINGS]
  assert bounds == [(0.2, np.inf), (-np.inf, 0.2), (0, np.inf)]


def test_quick(tmp_path):
  arguments = ['norms', f'--workdir={tmp_path}', '--quick']
  small = ['model.depth=1', 'model.width=4', 'steps=20', 'small_batch_size=8']
  assert lab.main([*arguments, *(f'--config.{one}' for one in small)]) == 0
  (result,) = workdir.read_json(tmp_path / 'norms.json')['results']
  for batch in result.values():
    assert np.shape(list(batch['accuracy'].values())) == (5, 3, 20)
  # The norms differ.
  curves = [str(curve) for curve in result['usual']['accuracy'].values()]
  assert len(set(curves)) == 5
  page = (tmp_path / 'norms.md').read_text()
  assert 'Batches of 32:' in page and 'Batches of 8:' in page
  assert (tmp_path / 'norms.png').is_file()


@pytest.mark.parametrize(
  'override, problem',
  [
    ('steps=30', 'multiple of 20'),
    ('model.groups=3', r'groups=3: must divide config\.model\.width=8'),
    ('model.depth=5 model.groups=8', 'two values in a group'),
    ('small_batch_size=1', 'BN needs 2 images'),
    ('small_batch_size=5', r'must divide config\.batch_size=32'),
  ],
)
def test_where_it_is_undefined(override, problem):
  config = lab.load('norms', override.split(), quick=True)
  with pytest.raises(UserError, match=problem):
    norms.check(config)
