"""ImageNet as `scripts/prepare_imagenet.sh` prepares it: ArrayRecord, by tfds.

A damaged or wrong copy is refused before training begins.
"""

from collections.abc import Mapping
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from bn_repro import files
from bn_repro.data import crops, imagenet_metadata, jpeg, prepared
from bn_repro.data.encoded_split import EncodedSplit
from bn_repro.data.split import ArraySplit, Dataset
from bn_repro.errors import UserError

_PREPARE = (
  'Run: bash scripts/prepare_imagenet.sh --manual_dir=ARCHIVES --data_dir='
)
# Examples of each split whose names are compared with their labels. Our choice.
_SAMPLES = 200


def load(data: ConfigDict) -> Dataset:
  """Opens ImageNet or a stand-in for it.

  The 50,000 images on which the paper reports are `validation`, ImageNet's own
  name for them.

  Args:
    data: the `data` sub-tree of a config.

  Raises:
    UserError: if the copy is missing, incomplete, damaged or inconsistent.
  """
  jpeg.load_turbojpeg()
  data_dir = (
    files.expand('config.data.data_dir', data.data_dir)
    if data.data_dir
    else prepared.default_dir()
  )
  folder = data_dir / imagenet_metadata.NAME / imagenet_metadata.VERSION
  try:
    splits = _open_splits(data, data_dir, folder)
    _check_classes(folder)
    _check_names(splits, folder)
  except UserError:
    raise
  # Damaged files raise errors of JSON, of ArrayRecord and of the system.
  except Exception as error:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    raise UserError(
      f'{folder}: cannot be read ({reason}). Check its permissions, or prepare '
      'it again.'
    ) from error
  return Dataset(imagenet_metadata.class_names(), splits)


def blank(data: ConfigDict) -> Dataset:
  """ImageNet with black images: sizes and classes, read from no copy.

  Args:
    data: the `data` sub-tree of a config.
  """

  def black(count: int) -> ArraySplit:
    shape = (count, data.image_size, data.image_size, 3)
    # Views of one pixel and of one label.
    return ArraySplit(
      np.broadcast_to(np.uint8(0), shape),
      np.broadcast_to(np.int32(0), (count,)),
    )

  counts = dict(imagenet_metadata.NUM_EXAMPLES)
  if data.holdout:
    counts['train'] -= data.holdout
    counts['test'], counts['validation'] = counts['validation'], data.holdout
  return Dataset(
    imagenet_metadata.class_names(),
    {name: black(count) for name, count in counts.items()},
  )


def _open_splits(
  data: ConfigDict, data_dir: Path, folder: Path
) -> dict[str, EncodedSplit]:
  """Opens train and validation, once their shards are known to be whole."""
  info = {split['name']: split for split in _read_splits(folder, data_dir)}
  lengths = {
    split: [int(n) for n in info.get(split, {}).get('shardLengths', [])]
    for split in imagenet_metadata.NUM_EXAMPLES
  }
  prepared.require_open_shards(sum(map(len, lengths.values())))
  for split, expected in imagenet_metadata.NUM_EXAMPLES.items():
    found = sum(lengths[split])
    if not found:
      raise UserError(
        f'{folder}: has no {split} images. Delete it and prepare it again.'
      )
    if data.name != imagenet_metadata.STAND_IN and found != expected:
      raise UserError(
        f'{folder}: {found:,} {split} images, not {expected:,}. Delete it and '
        f'prepare it again. {_PREPARE}{data_dir} (A stand-in needs '
        f'--config.data.name={imagenet_metadata.STAND_IN}.)'
      )
    num_shards = len(lengths[split])
    prepared.check_shards(
      {
        imagenet_metadata.shard_path(folder, split, shard, num_shards): length
        for shard, length in enumerate(lengths[split])
      },
      'Copy it again, or prepare the data set again.',
    )
  return {
    split: EncodedSplit(
      source=prepared.EncodedExamples(imagenet_metadata.NAME, split, data_dir),
      indices=np.arange(sum(lengths[split])),
      labels=None,
      num_classes=imagenet_metadata.NUM_CLASSES,
      image_size=data.image_size,
      num_threads=data.num_threads,
      evaluation_box=crops.EVALUATION_BOXES[data.evaluation_box],
      as_shown=False,
      identity=json.dumps([split, lengths[split], info[split]['numBytes']]),
    )
    for split in imagenet_metadata.NUM_EXAMPLES
  }


def _read_splits(folder: Path, data_dir: Path) -> list[dict[str, Any]]:
  """Returns the splits that dataset_info.json of a copy describes."""
  path = folder / 'dataset_info.json'
  if not path.is_file():
    versions = sorted(path.name for path in folder.parent.glob('*'))
    found = f' (found {", ".join(versions)})' if versions else ''
    raise UserError(
      f'{folder}: no ImageNet here{found}. {_PREPARE}{data_dir}, or name the '
      'folder of a copy with --config.data.data_dir. Without ImageNet, :mini '
      'after the config file trains the same network on digits.'
    )
  try:
    info = json.loads(path.read_text())
  except ValueError as error:
    raise UserError(
      f'{path}: damaged ({error}). Copy it again, or prepare it again.'
    ) from error
  if info.get('fileFormat') != 'array_record':
    raise UserError(
      f'{folder}: prepared as TFRecord, which only TensorFlow reads. Convert '
      f'it: bash scripts/prepare_imagenet.sh --from_tfrecord={data_dir} '
      '--data_dir=ANOTHER'
    )
  return info['splits']


def _check_classes(folder: Path) -> None:
  """Compares the labels' WordNet ids with ImageNet's."""
  path = folder / 'label.labels.txt'
  found = path.read_text().split() if path.is_file() else []
  expected = imagenet_metadata.synsets()
  if found == expected:
    return
  reason = f'{len(found)} classes, not {len(expected)}'
  for label, (a, b) in enumerate(zip(found, expected, strict=False)):
    if a != b:
      reason = f'label {label} is {a}, not {b}'
      break
  raise UserError(
    f"{path}: the classes are not ImageNet's: {reason}. Prepare it again."
  )


def _check_names(splits: Mapping[str, EncodedSplit], folder: Path) -> None:
  """Compares the names of a sample of examples with their labels.

  A training image is named after its class, a validation image by its number.
  Names also reveal images that are in the wrong split.
  """
  synsets = imagenet_metadata.synsets()
  validation_synsets = imagenet_metadata.validation_synsets()

  def true_class(split: str, name: str) -> str | None:
    if split == 'train':
      return name.removesuffix('.JPEG').split('_')[0]
    number = imagenet_metadata.validation_number(name)
    return None if number is None else validation_synsets[number - 1]

  for split, examples in splits.items():
    count = min(len(examples), _SAMPLES)
    for sample in range(count):
      index = sample * len(examples) // count
      name, label = examples.name_of(index), examples.label_of(index)
      expected = true_class(split, name)
      if expected not in synsets:
        raise UserError(
          f'{folder}: {split} image {index} is {name}, which is not one of '
          f"ImageNet's {split} images. Prepare it again."
        )
      if synsets[label] != expected:
        raise UserError(
          f'{folder}: {split} image {index}, {name}, has the label '
          f'{synsets[label]}, not {expected}. Prepare it again.'
        )
