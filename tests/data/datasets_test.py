"""Data sets of a config: fingerprints, distorted copies, and limits."""

import numpy as np
import pytest

from bn_repro import config as config_lib
from bn_repro.data import datasets
from bn_repro.data.split import ArraySplit, Dataset
from bn_repro.errors import UserError


def check(*overrides):
  return datasets.check(config_lib.load('configs/bn_x5.py:mini', overrides))


@pytest.fixture(scope='module')
def digits():
  return check()


def copies(count, *overrides):
  return check(f'data.distorted_copies={count}', *overrides).splits['train']


def test_mnist_5k_is_fixed(digits):
  """Checkpoints and run.json hold these fingerprints."""
  found = [check(f'data.fold={fold}').fingerprint for fold in range(1, 5)]
  assert [digits.fingerprint, *found] == [
    '07d41935',
    'b75cd21d',
    '77e8694b',
    'faf61cfb',
    'c583293d',
  ]
  assert check('seed=3').fingerprint == '07d41935'


@pytest.mark.parametrize('name', ['mnist_5k', 'synthetic'])
def test_input_size_is_that_of_the_data(name):
  config = config_lib.load('bn_x5:mini', (f'data.name={name}',))
  dataset = datasets.load(config.data, seed=0)
  size = dataset.image_shape, dataset.num_classes
  assert datasets.input_size(config) == size


def test_a_new_data_set_is_a_function(monkeypatch):
  """Nothing else knows its name, its channels or its classes."""

  def load(data):
    images = np.random.default_rng(0).integers(0, 256, (60, 24, 30, 3))
    labels = np.arange(60, dtype=np.int32) % 5
    names = ['a', 'b', 'c', 'd', 'e']
    split = ArraySplit(images.astype(np.uint8), labels)
    return Dataset(names, {'train': split})

  monkeypatch.setitem(datasets.SOURCES, 'new', datasets.Source(load))
  overrides = ('data.name=new', 'data.holdout=10', 'data.num_shards=4')
  dataset = check(*overrides)
  assert dataset.num_classes == 5 and dataset.unpadded_shape == (24, 30)
  assert {k: len(x) for k, x in dataset.splits.items()} == {
    'train': 50,
    'validation': 10,
  }
  config = config_lib.load('bn_x5:mini', overrides)
  assert datasets.input_size(config) == ((32, 32, 3), 5)


def test_an_unknown_data_set():
  with pytest.raises(
    UserError, match='data.name=nmist: must be one of mnist_5k'
  ):
    check('data.name=nmist')


def test_distorted_copies(digits):
  original = digits.splits['train']
  found = copies(9000)
  assert len(found) == 9000
  np.testing.assert_array_equal(found.labels[:3500], original.labels)
  np.testing.assert_array_equal(found.labels[3500:7000], original.labels)
  # Two copies of an image differ, and are close to it.
  for source, first, second in zip(
    original.images[:50],
    found.images[:50],
    found.images[3500:3550],
    strict=True,
  ):
    assert not np.array_equal(first, second)
    source = source.astype(float)
    distances = [np.linalg.norm(source - copy) for copy in (first, second)]
    assert 0 < max(distances) < np.linalg.norm(source) * 1.5
  # The brightness stays the same.
  assert found.images.mean() == pytest.approx(original.images.mean(), rel=0.05)


def test_distorted_copies_are_a_function_of_seed_and_index():
  many = copies(500).images
  np.testing.assert_array_equal(copies(500).images, many)
  np.testing.assert_array_equal(copies(300).images, many[:300])
  assert not np.array_equal(copies(500, 'seed=1').images, many)


def test_distorted_copies_of_colored_images():
  synthetic = ('data.name=synthetic', 'data.holdout=64')
  images = copies(64, *synthetic).images
  np.testing.assert_array_equal(copies(64, *synthetic).images, images)
  assert images.min((0, 1, 2)).max() < images.max((0, 1, 2)).min()


def test_distortions_turn_shift_and_scale_within_their_ranges():
  """Moments of a bar of 20 x 2 pixels."""
  images = np.zeros((1, 28, 28, 1), np.uint8)
  images[0, 4:24, 13:15] = 255
  bar = ArraySplit(images, np.zeros(1, np.int32))
  distorted = datasets._distorted(bar, 300, seed=0)
  y, x = np.mgrid[:28, :28]
  angles, centers, lengths = [], [], []
  for image in distorted.images[..., 0].astype(float):
    weight = image / image.sum()
    cy, cx = (weight * y).sum(), (weight * x).sum()
    cov = np.cov(
      np.stack([y.ravel(), x.ravel()]), aweights=weight.ravel(), bias=True
    )
    values, vectors = np.linalg.eigh(cov)
    along = vectors[:, -1] * np.sign(vectors[0, -1])
    angles.append(np.rad2deg(np.arctan2(along[1], along[0])))
    centers.append((cy - 13.5, cx - 13.5))
    lengths.append(np.sqrt(12 * values[-1]))
  # 15 degrees, and 8.5 more from a shear of 0.15.
  assert 15 < np.abs(angles).max() < 24
  assert abs(np.mean(angles)) < 2
  assert np.abs(centers).max() < 2 / 0.85 + 0.5
  assert np.abs(centers).max() > 1.8
  assert 20 / 1.2 < min(lengths) < 19 < 21 < max(lengths) < 20 / 0.8


def test_binary_pixels(digits):
  splits = check('data.binarize=true', 'data.distorted_copies=200').splits
  for split in splits.values():
    assert set(np.unique(split.images)) == {0, 255}
  np.testing.assert_array_equal(
    splits['test'].images == 255, digits.splits['test'].images > 127.5
  )


@pytest.mark.parametrize(
  'override, expected',
  [
    ('batch_size=3501', '3500 training images'),
    ('data.holdout=4000', 'only 4000'),
  ],
)
def test_more_than_there_are_images(override, expected):
  with pytest.raises(UserError, match=expected):
    check(override)


@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize('label', [-1, 10, 200])
def test_labels_without_a_class_are_refused(split, label, monkeypatch):
  load = datasets.SOURCES['synthetic'].load

  def damaged(data):
    dataset = load(data)
    dataset.splits[split].labels[7] = label
    return dataset

  monkeypatch.setitem(datasets.SOURCES, 'synthetic', datasets.Source(damaged))
  with pytest.raises(UserError, match=f'image 7 has {label}') as caught:
    check('data.name=synthetic')
  assert '1 of ' in caught.value.problems[0]
