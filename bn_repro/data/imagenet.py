"""ImageNet as `scripts/prepare_imagenet.sh` leaves it: ArrayRecord, by tfds.

What can be wrong with a copy is found before anything is trained on it.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from bn_repro.data import imagenet_metadata, jpeg
from bn_repro.data.split import Dataset, EncodedSplit
from bn_repro.errors import UserError, require_open_files

# The builder's in tfds 4.9.10.
VERSION = '5.1.0'
_PREPARE = (
  'Run: bash scripts/prepare_imagenet.sh --manual_dir=ARCHIVES --data_dir='
)
# Libraries, threads and sockets besides; our choice.
_OTHER_FILES = 400
# Examples of each split whose names are held against their labels; our choice.
_SAMPLES = 200


def load(data: ConfigDict, data_dir: Path) -> Dataset:
  """Opens ImageNet.

  The 50,000 images that the paper tests on are `validation`, as ImageNet calls
  them; or `test`, where `holdout` training images are set aside to choose
  settings on, which may not be done on the others.

  Args:
    data: the `data` sub-tree of a config.
    data_dir: where tfds keeps its data sets.

  Raises:
    UserError: if it is not there, or not whole, or not what it should be.
  """
  jpeg.library()
  folder = data_dir / imagenet_metadata.NAME / VERSION
  try:
    return _load(data, data_dir, folder)
  except UserError:
    raise
  # What a damaged copy makes of the readers: of JSON, Riegeli, folders.
  except Exception as error:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    raise UserError(
      f'{folder}: cannot be read ({reason}). See that it may be read, or '
      'prepare it again.'
    ) from error


def _load(data: ConfigDict, data_dir: Path, folder: Path) -> Dataset:
  info = _read_info(folder, data_dir)
  # ArrayRecord keeps each shard open that it has read from.
  shards = [
    _shard_lengths(info, s, folder) for s in imagenet_metadata.NUM_EXAMPLES
  ]
  require_open_files(sum(map(len, shards)) + _OTHER_FILES)
  splits = {}
  for name, expected in imagenet_metadata.NUM_EXAMPLES.items():
    lengths = _shard_lengths(info, name, folder)
    if not data.stand_in and sum(lengths) != expected:
      raise UserError(
        f'{folder}: {sum(lengths):,} {name} images, not {expected:,}. '
        f'Delete it, and prepare it again. {_PREPARE}{data_dir} (A stand-in '
        'takes --config.data.stand_in=true.)'
      )
    _check_shards(folder, name, lengths)
    splits[name] = EncodedSplit(
      source=_open(name, data_dir),
      indices=np.arange(sum(lengths)),
      image_size=data.image_size,
      num_threads=data.num_threads,
      identity=json.dumps([name, lengths, _split_info(info, name)['numBytes']]),
    )
  _check_classes(folder)
  _check_names(splits, folder)
  train, validation = splits['train'], splits['validation']
  if not data.holdout:
    return Dataset(imagenet_metadata.words(), splits)
  if data.holdout >= len(train):
    raise UserError(
      f'config.data.holdout={data.holdout}: {imagenet_metadata.NAME} has only '
      f'{len(train)} training images.'
    )
  # Evenly spaced in an order that tfds has mixed.
  chosen = np.zeros(len(train), bool)
  chosen[np.arange(data.holdout) * len(train) // data.holdout] = True
  return Dataset(
    imagenet_metadata.words(),
    {
      'train': train.take(np.flatnonzero(~chosen)),
      'validation': train.take(np.flatnonzero(chosen)),
      'test': validation,
    },
  )


def shard_path(folder: Path, split: str, shard: int, num_shards: int) -> Path:
  """Where tfds puts a shard of a split."""
  name = f'{imagenet_metadata.NAME}-{split}.array_record'
  return folder / f'{name}-{shard:05}-of-{num_shards:05}'


def _read_info(folder: Path, data_dir: Path) -> dict[str, Any]:
  """What tfds has written about a copy."""
  path = folder / 'dataset_info.json'
  if not path.is_file():
    versions = sorted(path.name for path in folder.parent.glob('*'))
    found = f' (found {", ".join(versions)})' if versions else ''
    raise UserError(
      f'config.data.name={imagenet_metadata.NAME}: not found in '
      f'{folder}{found}. '
      f'{_PREPARE}{data_dir}, or say where it is with --config.data.data_dir. '
      'Without ImageNet, :mini after the config file trains the same network '
      'on digits.'
    )
  try:
    info = json.loads(path.read_text())
  except ValueError as error:
    raise UserError(
      f'{path}: damaged ({error}). Copy it again, or prepare it again.'
    ) from error
  if info.get('fileFormat') != 'array_record':
    raise UserError(
      f'{folder}: prepared as TFRecord, which takes TensorFlow to read. '
      'Convert it: bash scripts/prepare_imagenet.sh '
      f'--from_tfrecord={data_dir} --data_dir=ANOTHER'
    )
  return info


def _split_info(info: Mapping[str, Any], name: str) -> dict[str, Any]:
  return next((s for s in info['splits'] if s['name'] == name), {})


def _shard_lengths(
  info: Mapping[str, Any], name: str, folder: Path
) -> list[int]:
  lengths = _split_info(info, name).get('shardLengths', [])
  if not lengths:
    raise UserError(
      f'{folder}: has no {name} images. Delete it, and prepare it again.'
    )
  return [int(length) for length in lengths]


def _check_shards(folder: Path, name: str, lengths: Sequence[int]) -> None:
  """Opens every shard and compares its number of records."""
  from array_record.python import array_record_module

  def problem(shard: int) -> str | None:
    path = shard_path(folder, name, shard, len(lengths))
    if not path.is_file():
      return f'{path} is missing'
    try:
      reader = array_record_module.ArrayRecordReader(str(path))
      found = reader.num_records()
      reader.close()
    except Exception as error:
      return f'{path} is damaged ({error})'
    if found != lengths[shard]:
      return f'{path} has {found} images, not {lengths[shard]}'
    return None

  with ThreadPoolExecutor(16) as pool:
    problems = [p for p in pool.map(problem, range(len(lengths))) if p]
  if problems:
    more = f', and {len(problems) - 1} more like it' if problems[1:] else ''
    raise UserError(
      f'{problems[0]}{more}. Copy it again, or prepare the data set again.'
    )


def _open(name: str, data_dir: Path) -> Sequence[Mapping[str, Any]]:
  import tensorflow_datasets as tfds  # Costs a second, and is seldom needed.

  return tfds.data_source(
    imagenet_metadata.NAME,
    split=name,
    data_dir=data_dir,
    download=False,
    decoders={'image': tfds.decode.SkipDecoding()},
  )


def _check_classes(folder: Path) -> None:
  path = folder / 'label.labels.txt'
  found = path.read_text().split() if path.is_file() else []
  expected = imagenet_metadata.synsets()
  if found != expected:
    wrong = next(
      (
        f'label {label} is {a}, not {b}'
        for label, (a, b) in enumerate(zip(found, expected, strict=False))
        if a != b
      ),
      f'{len(found)} of them, not {len(expected)}',
    )
    raise UserError(
      f"{path}: other classes than ImageNet's: {wrong}. Prepare it again."
    )


def _check_names(splits: Mapping[str, EncodedSplit], folder: Path) -> None:
  """Holds examples' names, which ImageNet gives a meaning, against labels.

  A training image is called after its class, a validation image by its number.
  So a test set that overlaps the training set shows as well.
  """
  synsets, of_validation = (
    imagenet_metadata.synsets(),
    imagenet_metadata.validation_synsets(),
  )

  def true_class(split: str, name: str) -> str | None:
    stem = name.removesuffix('.JPEG')
    if split == 'train':
      return stem.split('_')[0]
    number = stem.removeprefix('ILSVRC2012_val_')
    if number == stem or not number.isdecimal():
      return None
    place = int(number) - 1
    return of_validation[place] if 0 <= place < len(of_validation) else None

  for split, examples in splits.items():
    count = min(len(examples), _SAMPLES)
    for number in range(count):
      index = number * len(examples) // count
      name, label = examples.name_of(index), examples.label_of(index)
      expected = true_class(split, name)
      if expected is None or expected not in synsets:
        raise UserError(
          f'{folder}: {split} image {index} is {name}, which is not one of '
          f"ImageNet's {split} images. Prepare it again."
        )
      if synsets[label] != expected:
        raise UserError(
          f'{folder}: {split} image {index}, {name}, has the label '
          f'{synsets[label]}, not {expected}. Prepare it again.'
        )
