"""Files of arrays: their splits and names, and what is wrong with others."""

import io

import numpy as np
import pytest
import support
import written_images

from bn_repro import config as config_lib
from bn_repro.data import datasets
from bn_repro.errors import UserError


def check(path, *overrides):
  return datasets.check(
    config_lib.load(
      'bn_x5:mini',
      (
        'data.name=npz',
        f'data.data_dir={path}',
        'data.holdout=0',
        'data.num_shards=1',
        'batch_size=4',
        'eval_split=train',
        *overrides,
      ),
    )
  )


def rows(split):
  """Pixels, without padding, and labels as lists that can be sorted."""
  images = split.images[:, 4:28, 6:26].reshape(len(split), -1)
  return np.column_stack([images, split.labels]).tolist()


def test_images_are_padded_and_shuffled(tmp_path):
  path = tmp_path / 'x.npz'
  images, labels = written_images.write_npz(path, 30)
  dataset = check(path)
  train = dataset.splits['train']
  assert dataset.image_shape == (32, 32, 3)
  assert dataset.unpadded_shape == (24, 20)
  assert list(dataset.label_names) == ['0', '1', '2']
  expected = np.column_stack([images.reshape(30, -1), labels]).tolist()
  assert rows(train) != expected and sorted(rows(train)) == sorted(expected)
  border = train.images.copy()
  border[:, 4:28, 6:26] = 0
  assert not border.any()


@pytest.mark.parametrize('shape', [(24, 20), (24, 20, 1)])
def test_images_without_colors(shape, tmp_path):
  images, labels = written_images.pictures(12, shape)
  path = tmp_path / 'x.npz'
  written_images.write_npz(path, 12, images=images, labels=labels)
  dataset = check(path)
  assert dataset.image_shape == (32, 32, 1)
  assert (dataset.splits['train'].images.sum() == images.sum()).all()


def test_holdout_test_images_and_names(tmp_path):
  path = tmp_path / 'x.npz'
  test_images, test_labels = written_images.pictures(9, seed=1)
  label_names = np.array([*written_images.CLASSES, 'not among these'])
  images, labels = written_images.write_npz(
    path,
    30,
    label_names=label_names,
    test_images=test_images,
    test_labels=test_labels.astype(np.uint8),
  )
  dataset = check(path, 'data.holdout=7', 'eval_split=validation')
  assert list(dataset.label_names) == list(label_names)
  splits = dataset.splits
  assert rows(splits['test']) == (
    np.column_stack([test_images.reshape(9, -1), test_labels]).tolist()
  )
  assert sorted(rows(splits['train']) + rows(splits['validation'])) == sorted(
    np.column_stack([images.reshape(30, -1), labels]).tolist()
  )
  assert sorted(np.bincount(splits['validation'].labels)) == [2, 2, 3]


def test_validation_images_that_are_training_images(tmp_path):
  images, labels = written_images.pictures(30)
  path = tmp_path / 'x.npz'
  twice = {
    'images': np.tile(images, (2, 1, 1, 1)),
    'labels': np.tile(labels, 2),
  }
  written_images.write_npz(path, 30, **twice)
  check(path)
  with pytest.raises(UserError, match='validation images are training images'):
    check(path, 'data.holdout=20')


IMAGES, LABELS = written_images.pictures(12)
FLOATS = IMAGES / np.float32(255)

BAD_ARRAYS = {
  'other keys': ({'images': None, 'x_train': IMAGES}, 'unknown array x_train'),
  'no labels': ({'labels': None}, 'no labels; the arrays are called images,'),
  'test images alone': ({'test_images': IMAGES}, 'no test_labels'),
  'floats': ({'images': FLOATS}, 'images are float32, not uint8'),
  'NaN': ({'images': FLOATS * np.nan}, 'images are float32, not uint8'),
  '16 bits': ({'images': IMAGES.astype(np.uint16)}, 'uint16, not uint8'),
  'two channels': ({'images': IMAGES[..., :2]}, 'shape (12, 24, 20, 2), not'),
  'flat': ({'images': IMAGES.reshape(12, -1)}, 'shape (12, 1440), not'),
  'no images': ({'images': IMAGES[:0], 'labels': LABELS[:0]}, '(0, 24, 20, 3)'),
  'fewer labels': ({'labels': LABELS[:-1]}, 'shape (11,), not (12,)'),
  'one-hot': ({'labels': np.eye(3, dtype=int)[LABELS]}, 'shape (12, 3), not'),
  'real labels': ({'labels': LABELS / 1}, 'labels are float64, not integers'),
  'negative': ({'labels': LABELS - 1}, 'labels has -1 but no 0'),
  'gap': ({'labels': 2 * LABELS}, 'labels has 2 but no 1'),
  'a 33rd bit': ({'labels': LABELS + 2**32 * (LABELS == 2)}, 'has 2147483647'),
  'fewer names': (
    {'label_names': np.array(['a', 'b'])},
    '4 of 12 images have a label outside 0 to 1',
  ),
  'negative, with names': (
    {'labels': LABELS - 1, 'label_names': np.array(['a', 'b'])},
    'has -1',
  ),
  'a name twice': ({'label_names': np.array(list('aba'))}, 'a name twice'),
  'numbers as names': ({'label_names': np.arange(3)}, 'not a list of strings'),
  'one class': ({'labels': 0 * LABELS}, 'at least two classes'),
  'objects': ({'label_names': np.array(list('abc'), object)}, 'pickle'),
  'other test images': (
    {'test_images': IMAGES[:, 1:], 'test_labels': LABELS},
    'test_images have the shape (23, 20, 3), not (24, 20, 3)',
  ),
  'large': ({}, 'config.data.image_size=20: smaller than the images'),
}


def npy(array):
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


BAD_FILES = {
  'truncated': (lambda raw: raw[: len(raw) // 2], 'not a sound file'),
  'damaged': (
    lambda raw: raw[:5000] + bytes(100) + raw[5100:],
    'not a sound file from numpy.savez (BadZipFile: Bad CRC-32',
  ),
  'empty': (lambda raw: b'', 'not a sound file'),
  'text': (lambda raw: b'images', 'not a sound file'),
  'a single array': (lambda raw: npy(IMAGES), 'a single array'),
}


def test_bad_files(tmp_path):
  """One line each, before JAX is imported, and nothing is written."""
  cases = {}
  for name, (changes, expected) in BAD_ARRAYS.items():
    path = tmp_path / f'{name}.npz'
    written_images.write_npz(path, 12, **changes)
    cases[path] = expected
  for name, (damage, expected) in BAD_FILES.items():
    path = tmp_path / f'{name}.npz'
    written_images.write_npz(path, 12)
    path.write_bytes(damage(path.read_bytes()))
    cases[path] = expected
  cases[tmp_path / 'missing.npz'] = 'cannot be read (No such file'
  cases[tmp_path] = 'cannot be read (Is a directory)'
  commands = [
    (
      '--config=bn_x5:mini',
      f'--workdir={tmp_path / "run"}',
      '--config.data.name=npz',
      f'--config.data.data_dir={path}',
      '--config.data.holdout=0',
      *(['--config.data.image_size=20'] if path.stem == 'large' else []),
      *(['--config.model.name=mlp'] if path.stem == 'large' else []),
    )
    for path in cases
  ]
  for result, (path, expected) in zip(
    support.run_without_jax(*commands), cases.items(), strict=True
  ):
    assert result.code == 1, path
    (line,) = result.err.splitlines()
    assert line.startswith('error: ') and expected in line, path
  assert not (tmp_path / 'run').exists()


def test_no_file_is_named():
  with pytest.raises(
    UserError, match=r'^config.data.data_dir: .* needs a file'
  ):
    check('')
