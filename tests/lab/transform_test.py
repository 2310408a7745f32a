"""The experiment on whitening at a small scale."""

import numpy as np
import pytest

from bn_repro.errors import UserError
from bn_repro.lab import __main__ as lab
from bn_repro.lab import transform
from bn_repro.runtime import workdir


def test_quick(tmp_path):
  """Each network has a curve at each rate, and the table their means."""
  arguments = ['transform', f'--workdir={tmp_path}', '--quick']
  small = ['steps=60', 'model.depth=1', 'model.width=8', 'batch_size=30']
  assert lab.main([*arguments, *(f'--config.{one}' for one in small)]) == 0
  (result,) = workdir.read_json(tmp_path / 'transform.json')['results']
  names = ('no norm', 'BN', 'whitening')
  curves = np.array([result['accuracy'][name] for name in names])
  assert curves.shape == (3, 5, 20)
  assert (curves[1:, 2, -1] > 0.3).all()
  table = (tmp_path / 'transform.md').read_text()
  means = ' | '.join(f'{100 * mean:.1f} %' for mean in curves[2].mean(-1))
  assert f'| whitening | {means} |' in table
  gain = 100 * (curves[1].mean(-1).max() - curves[0].mean(-1).max())
  assert np.isclose(transform.gain(result, 'BN'), gain)
  assert (tmp_path / 'transform.png').is_file()


@pytest.mark.parametrize(
  'overrides, reason',
  [
    (['steps=30'], 'multiple of 20'),
    (['batch_size=16'], 'covariance of 16 units is singular'),
    (['model.dtype=bfloat16'], 'float32 or float64'),
  ],
)
def test_what_cannot_be_whitened_is_refused(overrides, reason):
  config = lab.load('transform', overrides, quick=True)
  with pytest.raises(UserError, match=reason):
    transform.check(config)
