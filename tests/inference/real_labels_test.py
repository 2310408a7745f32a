"""ReaL labels: an image may have several, or none."""

import json
import random

import numpy as np
import pytest
import written_imagenet

from bn_repro import config as config_lib
from bn_repro import evaluate
from bn_repro.data import datasets, imagenet_metadata
from bn_repro.errors import UserError
from bn_repro.inference import real_labels
from bn_repro.models import factory
from bn_repro.training import model_file

COUNT = 50_000


class Names:
  """A split of which only the names are asked for."""

  def __init__(self, numbers):
    self._numbers = numbers

  def name_of(self, index):
    return f'ILSVRC2012_val_{self._numbers[index]:08}.JPEG'


def write(path, labels):
  path.write_text(json.dumps(labels))
  return path


def test_counts_by_the_number_in_the_name(tmp_path):
  labels = [[i % 1000] for i in range(COUNT)]
  labels[4] = []
  labels[9] = [3, 9, 500]
  read = real_labels.read(write(tmp_path / 'real.json', labels))
  # Images 10, 5, 1, 10 and 7, in this order.
  split = Names([10, 5, 1, 10, 7])
  found = real_labels.count_correct(np.array([500, 4, 0, 4, 6]), split, read)
  # 500 is one of the labels of image 10, and 4 is not; image 5 has none.
  assert found == (3, 4)


@pytest.mark.parametrize(
  'labels, message',
  [
    ([[0]] * (COUNT - 1), 'not a list of 50,000'),
    ({}, 'not a list of 50,000'),
    ([[0]] * (COUNT - 1) + [[1000]], 'image 50000 has [1000]'),
    ([0] + [[0]] * (COUNT - 1), 'image 1 has 0'),
    ([['a']] + [[0]] * (COUNT - 1), "image 1 has ['a']"),
  ],
)
def test_other_files_are_refused(tmp_path, labels, message):
  with pytest.raises(UserError) as error:
    real_labels.read(write(tmp_path / 'real.json', labels))
  assert message in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
  with pytest.raises(UserError, match='No such file'):
    real_labels.read(tmp_path / 'real.json')
  (tmp_path / 'real.json').write_text('[[')
  with pytest.raises(UserError, match='not JSON'):
    real_labels.read(tmp_path / 'real.json')


def test_command(tmp_path, capsys):
  """On a small ImageNet, with random labels, against counting here."""
  written_imagenet.write(tmp_path / 'data', written_imagenet.examples())
  config = config_lib.load(
    'bn_x5',
    (
      'model.name=inception_tiny',
      'model.width=0.125',
      'data.name=imagenet_stand_in',
      'data.num_shards=4',
      'data.image_size=32',
      f'data.data_dir={tmp_path / "data"}',
    ),
  )
  dataset = datasets.check(config)
  network = factory.create_model(config.model, config.bn, 1000)
  variables = factory.initial_variables(network, (32, 32, 3), 0, 0.0, 1.0)
  run = tmp_path / 'run'
  run.mkdir()
  model_file.write(
    run / model_file.NAME,
    model_file.ModelFile(
      variables,
      config,
      imagenet_metadata.class_names(),
      (32, 32, 3),
      None,
      {'statistics': 'moving'},
    ),
  )
  out = tmp_path / 'out.npz'
  arguments = [f'--workdir={run}', f'--save_probabilities={out}']
  assert evaluate.main(arguments) == 0
  predictions = np.load(out)['probabilities'].argmax(1)
  rng = random.Random(0)
  labels = [[rng.randrange(1000)] for _ in range(COUNT)]
  expected = 0
  for index, predicted in enumerate(predictions):
    name = dataset.splits['validation'].name_of(index)
    number = int(name[15:23])
    if index % 3 == 0:
      labels[number - 1] = [int(predicted), 5]
      expected += 1
    elif index % 3 == 1:
      labels[number - 1] = []
  correct = sum(
    int(p) in labels[int(dataset.splits['validation'].name_of(i)[15:23]) - 1]
    for i, p in enumerate(predictions)
  )
  assert correct >= expected > 2
  path = write(tmp_path / 'real.json', labels)
  capsys.readouterr()
  assert evaluate.main([*arguments, f'--real_labels={path}']) == 0
  total = sum(index % 3 != 1 for index in range(len(predictions)))
  left = len(predictions) - total
  assert (
    f'ReaL labels: accuracy {correct / total:.4f} ({total} images, {left} '
    'without a label left out)'
  ) in capsys.readouterr().out
