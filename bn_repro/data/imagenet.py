"""ImageNet as `scripts/prepare_imagenet.sh` prepares it: ArrayRecord, by tfds.

A damaged or wrong copy is refused before training begins.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import functools
import json
from pathlib import Path
import sys
from typing import Any, TypeVar
import zlib

import cv2
from ml_collections import ConfigDict
import numpy as np

from bn_repro import files, host
from bn_repro.data import crops, imagenet_metadata, jpeg, prepared
from bn_repro.data.split import ArraySplit, Batch, Dataset, WholeImage
from bn_repro.errors import UserError

T = TypeVar('T')

_PREPARE = (
  'Run: bash scripts/prepare_imagenet.sh --manual_dir=ARCHIVES --data_dir='
)
# Examples of each split whose names are compared with their labels. Our choice.
_SAMPLES = 200


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
  """Encoded images, read and decoded on demand.

  An image that cannot be decoded is named on standard error, and the next
  decodable example of the split takes its place, image and label.

  Attributes:
    source: examples by index, with `image` (encoded), `label` and `file_name`.
    indices: int64 (examples,), indices into `source`.
    image_size: side of the square images, in pixels.
    num_threads: number of decoding threads; 0 means one per core.
    evaluation_box: chooses the box that evaluation sees.
    identity: text that tells the source from other sources.
  """

  source: Sequence[Mapping[str, Any]]
  indices: np.ndarray
  image_size: int
  num_threads: int
  evaluation_box: crops.ChooseBox
  identity: str

  in_memory = False

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels)."""
    return self.image_size, self.image_size, 3

  def __len__(self) -> int:
    return len(self.indices)

  def take(self, indices: np.ndarray) -> 'EncodedSplit':
    """Returns the examples at these indices, or where a mask is True."""
    return dataclasses.replace(self, indices=self.indices[indices])

  def training_batch(
    self, indices: np.ndarray, randomness: crops.CropRandomness
  ) -> Batch:
    """Decodes random boxes, mirrored half of the time."""
    draws = randomness.draws()

    def decode(row: int, encoded: bytes, out: np.ndarray) -> None:
      jpeg.decode_view(
        encoded,
        lambda width, height: crops.random_box(width, height, draws[row]),
        out,
      )
      if crops.is_mirrored(draws[row]):
        cv2.flip(out, 1, out)

    return self._gather(indices, decode)

  def evaluation_batch(self, indices: np.ndarray) -> Batch:
    """Decodes the boxes that `evaluation_box` chooses."""

    def decode(row: int, encoded: bytes, out: np.ndarray) -> None:
      del row
      jpeg.decode_view(encoded, self.evaluation_box, out)

    return self._gather(indices, decode)

  def whole_image(self, index: int, shorter_side: int) -> WholeImage:
    """Decodes an example."""
    return WholeImage(
      *self._decode(
        index, lambda encoded: jpeg.decode_image(encoded, shorter_side)
      )
    )

  def name_of(self, index: int) -> str:
    """The file name of an example in ImageNet's archives."""
    return _file_name(self._example(index))

  def label_of(self, index: int) -> int:
    """The label of an example."""
    return _label(self._example(index), f'example {index}')

  def checksum(self, crc: int) -> int:
    """Updates a CRC-32 with `identity` and `indices`.

    The images are too many to read at every start.
    """
    crc = zlib.crc32(self.identity.encode(), crc)
    return zlib.crc32(self.indices.astype('<i8').tobytes(), crc)

  def contents(self) -> Iterator[bytes]:
    """The encoded images, without those that cannot be read."""
    for index in range(len(self)):
      try:
        yield self._read(index)['image']
      except jpeg.UndecodableImage:
        continue

  def _example(self, index: int) -> Mapping[str, Any]:
    return self.source[int(self.indices[index])]

  def _gather(
    self,
    indices: np.ndarray,
    decode: Callable[[int, bytes, np.ndarray], None],
  ) -> Batch:
    """Decodes examples in threads; `decode(row, encoded, out)` decodes one."""
    count = len(indices)
    batch: Batch = {
      'image': np.empty((count, *self.image_shape), np.uint8),
      'label': np.empty(count, np.int32),
      'mask': np.ones(count, bool),
      'replaced': np.zeros(count, bool),
    }

    def load(row: int) -> None:
      _, batch['label'][row], batch['replaced'][row] = self._decode(
        int(indices[row]),
        lambda encoded: decode(row, encoded, batch['image'][row]),
      )

    def load_all(rows: range) -> None:
      for row in rows:
        load(row)

    num_threads = self.num_threads or host.num_cores()
    # Four tasks per thread: more of them cost time, fewer balance badly.
    length = max(count // (4 * num_threads), 1)
    tasks = [range(count)[i : i + length] for i in range(0, count, length)]
    # The list raises what a thread has raised.
    list(_thread_pool(num_threads).map(load_all, tasks))
    return batch

  def _decode(
    self, first: int, decode: Callable[[bytes], T]
  ) -> tuple[T, int, bool]:
    """Decodes an example, or the next one that can be decoded.

    Args:
      first: index of the example.
      decode: function of the encoded image.

    Returns:
      What `decode` returns, the label, and whether the example was replaced.
    """
    # A limit on replaced images is checked over all hosts, not here.
    for index in range(first, first + len(self)):
      name = f'example {index % len(self)}'
      try:
        example = self._read(index % len(self))
        name = _file_name(example)
        decoded = decode(example['image'])
      except jpeg.UndecodableImage as error:
        _warn_once(name, error)
        continue
      return decoded, _label(example, name), index != first
    raise UserError(
      f'none of {len(self)} images can be decoded. Prepare the data set again.'
    )

  def _read(self, index: int) -> Mapping[str, Any]:
    try:
      return self._example(index)
    except Exception as error:  # ArrayRecord documents no exceptions.
      raise jpeg.UndecodableImage(f'cannot be read: {error}') from error


def _label(example: Mapping[str, Any], name: str) -> int:
  """The label of an example.

  Raises:
    UserError: if there is no such class.
  """
  label = int(example['label'])
  if not 0 <= label < imagenet_metadata.NUM_CLASSES:
    raise UserError(
      f'{name}: has the label {label}, and the classes are 0 to '
      f'{imagenet_metadata.NUM_CLASSES - 1}. Prepare the data set again.'
    )
  return label


def _file_name(example: Mapping[str, Any]) -> str:
  name = example['file_name']
  return name.decode() if isinstance(name, bytes) else name


@functools.cache
def _thread_pool(num_threads: int) -> ThreadPoolExecutor:
  return ThreadPoolExecutor(num_threads, thread_name_prefix='decode')


_warned: set[str] = set()


def _warn_once(name: str, error: Exception) -> None:
  """Names a damaged image on standard error, once per process."""
  if name not in _warned:
    _warned.add(name)
    print(f'warning: {name}: left out, {error}', file=sys.stderr, flush=True)


def load(data: ConfigDict) -> Dataset:
  """Opens ImageNet or a stand-in for it.

  The 50,000 images on which the paper reports are `validation`, ImageNet's own
  name for them. With `holdout`, they are `test`, and `validation` is a part of
  the training images, on which settings may be chosen.

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
  train, validation = splits['train'], splits['validation']
  if not data.holdout:
    return Dataset(imagenet_metadata.class_names(), splits)
  if data.holdout >= len(train):
    raise UserError(
      f'config.data.holdout={data.holdout}: {data.name} has only '
      f'{len(train)} training images.'
    )
  # Evenly spaced: tfds has shuffled the images.
  held_out = np.zeros(len(train), bool)
  held_out[np.arange(data.holdout) * len(train) // data.holdout] = True
  return Dataset(
    imagenet_metadata.class_names(),
    {
      'train': train.take(~held_out),
      'validation': train.take(held_out),
      'test': validation,
    },
  )


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
      image_size=data.image_size,
      num_threads=data.num_threads,
      evaluation_box=crops.EVALUATION_BOXES[data.evaluation_box],
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
    stem = name.removesuffix('.JPEG')
    if split == 'train':
      return stem.split('_')[0]
    number = stem.removeprefix('ILSVRC2012_val_')
    if number == stem or not number.isdecimal():
      return None
    index = int(number) - 1
    if not 0 <= index < len(validation_synsets):
      return None
    return validation_synsets[index]

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
