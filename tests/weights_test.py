"""The committed weights are what their cards say."""

from pathlib import Path

import pytest

import bn_repro
from bn_repro import config as config_lib
from bn_repro.data import datasets

WEIGHTS = Path(__file__).resolve().parent.parent / 'results' / 'weights'
NAMES = ('inception', 'bn_baseline', 'bn_x5', 'bn_x30', 'bn_x5_sigmoid')


def test_there_is_a_small_file_and_a_card_of_each():
  names = {
    f'{name}.{suffix}'
    for name in NAMES
    for suffix in ('safetensors', 'safetensors.md')
  }
  assert {path.name for path in WEIGHTS.iterdir()} == {*names, 'README.md'}
  assert all(path.stat().st_size < 1e6 for path in WEIGHTS.iterdir())


@pytest.mark.parametrize(
  'name',
  [
    name if name == 'bn_x5' else pytest.param(name, marks=pytest.mark.slow)
    for name in NAMES
  ],
)
def test_weights_have_the_accuracy_of_their_card(name):
  """On the test digits of fold 0, counted here."""
  model = bn_repro.load(WEIGHTS / f'{name}.safetensors')
  data = config_lib.load('inception:mini').data
  assert model.file.config.data.fold == data.fold == 0
  test = datasets.load(data, 0).splits['test']
  probabilities = model.predict(test.images[:, 2:-2, 2:-2])
  correct = int((probabilities.argmax(-1) == test.labels).sum())
  card = (WEIGHTS / f'{name}.safetensors.md').read_text()
  assert f'({correct} of 1,000 test images)' in card
