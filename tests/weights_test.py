"""The committed weights are what their cards say."""

from pathlib import Path

import pytest

import bn_repro
from bn_repro import config as config_lib
from bn_repro import config_fields
from bn_repro.data import datasets
from bn_repro.data.split import stratified

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
  """On the first 50 test digits per class of fold 0, counted here.

  They were the test digits when there were no folds. The networks are of that
  time, and were trained on the other test digits of fold 0.
  """
  model = bn_repro.load(WEIGHTS / f'{name}.safetensors')
  assert model.file.config.data.fold == config_fields.BEFORE_FOLDS
  data = config_lib.load('inception:mini').data
  test = datasets.load(data, 0).splits['test']
  test = test.take(stratified(test.labels, 500))
  probabilities = model.predict(test.images[:, 2:-2, 2:-2])
  correct = int((probabilities.argmax(-1) == test.labels).sum())
  card = (WEIGHTS / f'{name}.safetensors.md').read_text()
  assert f'({correct} of 500 test images)' in card
