"""ImageNet-V2: the number of a folder is the label."""

import io

import numpy as np
from PIL import Image
import pytest

from bn_repro import config as config_lib
from bn_repro.data import datasets, imagenet_metadata
from bn_repro.errors import UserError


def jpeg(label):
  """An image whose brightness tells the label, up to 4 classes."""
  file = io.BytesIO()
  Image.new('RGB', (40, 30), (label // 4,) * 3).save(file, 'JPEG', quality=95)
  return file.getvalue()


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  root = tmp_path_factory.mktemp('v2')
  for label in range(1000):
    (root / str(label)).mkdir()
    (root / str(label) / f'{label:x}.jpeg').write_bytes(jpeg(label))
  return root


def load(root):
  config = config_lib.load(
    'bn_x5',
    ('data.name=imagenet_v2', f'data.data_dir={root}', 'data.image_size=32'),
  )
  return config, datasets.load(config.data, 0)


def test_labels_are_numbers_and_not_places_in_the_alphabet(root):
  _, dataset = load(root)
  assert list(dataset.splits) == ['test']
  assert dataset.label_names == imagenet_metadata.class_names()
  test = dataset.splits['test']
  assert len(test) == 1000
  batch = test.evaluation_batch(np.arange(1000))
  assert sorted(batch['label']) == list(range(1000))
  shades = batch['image'][:, 16, 16].astype(int)
  assert abs(shades - batch['label'][:, None] // 4).max() <= 1
  for index in range(0, 1000, 100):
    name = test.name_of(index)
    assert name == f'{batch["label"][index]}/{batch["label"][index]:x}.jpeg'


def test_it_is_not_for_training(root):
  config, _ = load(root)
  with pytest.raises(UserError, match='has no training images'):
    datasets.check(config)


def test_other_folders_are_refused(root):
  (root / '7').rename(root / 'seven')
  try:
    with pytest.raises(UserError, match='the folder 7 is missing'):
      load(root)
  finally:
    (root / 'seven').rename(root / '7')
  with pytest.raises(UserError, match='needs the folder'):
    load('')
