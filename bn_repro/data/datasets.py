"""Loads the data set of a config and checks it against the config.

Small data sets are arrays in memory, others are read on demand. Nothing here
imports JAX or TensorFlow, so that missing data are reported at once.
"""

from collections.abc import Callable
import dataclasses
import math
from pathlib import Path
import shutil
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from bn_repro.data import (
  folder,
  imagenet,
  imagenet_metadata,
  imagenet_v2,
  mnist,
  npz,
)
from bn_repro.data.split import (
  ArraySplit,
  Dataset,
  Split,
  overlap,
  shuffled_order,
  stratified,
)
from bn_repro.errors import UserError

# Largest share of test images that may be training images as well: published
# data sets have a few. Our choice.
_MAX_OVERLAP = 0.01

_SHARED_MEMORY = Path('/dev/shm')
# Batches that Grain keeps per worker process: two in the buffer, one under way
# and one handed over.
_BATCHES_PER_WORKER = 4


@dataclasses.dataclass(frozen=True)
class Source:
  """A data set that `data.name` can select.

  Attributes:
    load: function of the `data` sub-tree of a config; returns the data set with
      `train` and at most one of the splits `validation` and `test`, or with
      `test` alone.
    channels: channels of its images; None if only its files tell.
    num_classes: number of its classes; None if only its files tell.
    installed: whether the required packages contain it, or the code makes it.
  """

  load: Callable[[ConfigDict], Dataset]
  channels: int | None = None
  num_classes: int | None = None
  installed: bool = False


def find(name: str) -> Source:
  """Returns the data set that `data.name` selects.

  Raises:
    UserError: if there is none of this name.
  """
  if name not in SOURCES:
    raise UserError(
      f'config.data.name={name}: must be one of {", ".join(SOURCES)}.'
    )
  return SOURCES[name]


def load(data: ConfigDict, seed: int) -> Dataset:
  """Loads the data set that `data.name` names.

  Args:
    data: the `data` sub-tree of a config.
    seed: seed of the affine distortions of `data.distorted_copies`.

  Raises:
    UserError: if the data are missing or damaged, or `data` does not fit them.
  """
  dataset = find(data.name).load(data)
  if 'train' not in dataset.splits:
    return dataset
  train = dataset.splits['train']
  if not isinstance(train, ArraySplit):
    _check_options(data)
    return _hold_out(dataset, data)
  splits: dict[str, Any] = dict(dataset.splits)
  for name, split in splits.items():
    _check_labels(split, dataset.num_classes, data.name)
    if name != 'train':
      _check_overlap(train, split, data.name, name)
  # Mixes the classes, as preparing a data set in shards does.
  splits['train'] = train.take(shuffled_order(len(train)))
  dataset = _hold_out(dataclasses.replace(dataset, splits=splits), data)
  splits = dict(dataset.splits)
  if data.holdout:
    _check_overlap(
      splits['train'], splits['validation'], data.name, 'validation'
    )
  if data.distorted_copies:
    splits['train'] = _distorted(splits['train'], data.distorted_copies, seed)
  return Dataset(
    dataset.label_names,
    {
      name: ArraySplit(binarize_and_pad(split.images, data), split.labels)
      for name, split in splits.items()
    },
    unpadded_shape=train.image_shape[:2],
  )


def _hold_out(dataset: Dataset, data: ConfigDict) -> Dataset:
  """Sets `data.holdout` training images aside as the split `validation`.

  Settings may be chosen on them. The data set's own `validation`, on which
  results are reported, is then called `test`.

  Raises:
    UserError: if no training images of a class are left.
  """
  if not data.holdout:
    return dataset
  splits = dict(dataset.splits)
  train = splits['train']
  if data.holdout >= len(train):
    raise UserError(
      f'config.data.holdout={data.holdout}: {data.name} has only '
      f'{len(train)} training images.'
    )
  if train.labels is None:
    # Evenly spaced: tfds has shuffled the images.
    held_out = np.zeros(len(train), bool)
    held_out[np.arange(data.holdout) * len(train) // data.holdout] = True
  else:
    held_out = stratified(train.labels, data.holdout)
    lost = np.setdiff1d(train.labels, train.labels[~held_out])
    if len(lost):
      raise UserError(
        f'config.data.holdout={data.holdout}: leaves no training images of '
        f'{dataset.label_names[lost[0]]}. Set aside fewer images.'
      )
  if 'validation' in splits:
    splits['test'] = splits['validation']
  splits['train'] = train.take(~held_out)
  splits['validation'] = train.take(held_out)
  return dataclasses.replace(dataset, splits=splits)


def check(config: ConfigDict) -> Dataset:
  """Loads the data set and checks it against the rest of the config.

  Raises:
    UserError: as `load`; if the split to evaluate is missing, or the data or
      the shared memory are too small.
  """
  dataset = load(config.data, config.seed)
  if 'train' not in dataset.splits:
    raise UserError(
      f'config.data.name={config.data.name}: has no training images. Evaluate '
      'a trained network on it: python -m bn_repro.evaluate --help.'
    )
  if config.eval_split not in dataset.splits:
    raise UserError(
      f'config.eval_split={config.eval_split}: {config.data.name} has no such '
      f'split (it has {", ".join(dataset.splits)}). Set config.data.holdout to '
      'the number of training images to validate on, or choose another split.'
    )
  num_examples = len(dataset.splits['train'])
  for name, value in (
    ('batch_size', config.batch_size),
    ('data.num_shards', config.data.num_shards),
  ):
    if value > num_examples:
      raise UserError(
        f'config.{name}={value}: larger than the {num_examples} training '
        f'images of {config.data.name}.'
      )
  _check_shared_memory(config, dataset)
  return dataset


def choose_split(dataset: Dataset, config: ConfigDict, name: str) -> str:
  """Returns the split to evaluate.

  Args:
    dataset: the data set of `config`.
    config: a config.
    name: value of --split; empty for `config.eval_split`.

  Raises:
    UserError: if the data set has no such split.
  """
  name = name or config.eval_split
  if name not in dataset.splits:
    raise UserError(
      f'--split={name}: {config.data.name} has {", ".join(dataset.splits)}.'
    )
  return name


def check_num_classes(dataset: Dataset, expected: int, workdir: Path) -> None:
  """Checks that data have as many classes as a trained network.

  Args:
    dataset: the data to evaluate.
    expected: number of classes of the network.
    workdir: value of --workdir, for the message.

  Raises:
    UserError: if they have not.
  """
  if dataset.num_classes != expected:
    raise UserError(
      f'--workdir={workdir}: the network has {expected} classes, and the data '
      f'have {dataset.num_classes}. Evaluate on data with the same classes.'
    )


def load_sizes(config: ConfigDict) -> Dataset:
  """Returns a data set of which only the sizes and classes may be used.

  ImageNet need not be on this machine: its images are black. Any other data set
  is loaded and checked.

  Raises:
    UserError: as `check`.
  """
  if config.data.name == imagenet_metadata.NAME:
    return imagenet.blank(config.data)
  return check(config)


def input_size(config: ConfigDict) -> tuple[tuple[int, int, int], int]:
  """The image shape and the number of classes, read from the data if needed.

  Returns:
    `((height, width, channels), num_classes)`, equal to those of the data.

  Raises:
    UserError: as `load`, if only the data tell.
  """
  source = find(config.data.name)
  if source.channels is None or source.num_classes is None:
    dataset = load(config.data, config.seed)
    return dataset.image_shape, dataset.num_classes
  size = config.data.image_size
  return (size, size, source.channels), source.num_classes


def _check_shared_memory(config: ConfigDict, dataset: Dataset) -> None:
  """Checks that the batches of worker processes fit into shared memory."""
  workers = config.data.num_workers
  if not workers or not _SHARED_MEMORY.is_dir():
    return
  images = config.batch_size * config.steps_per_call
  needed = (
    workers * _BATCHES_PER_WORKER * images * math.prod(dataset.image_shape)
  )
  free = shutil.disk_usage(_SHARED_MEMORY).free
  if needed > free:
    raise UserError(
      f'config.data.num_workers={workers}: needs {needed / 1e6:,.0f} MB of '
      f'shared memory, but {_SHARED_MEMORY} has {free / 1e6:,.0f} MB free. Use '
      'fewer workers, or enlarge it (docker run --shm-size).'
    )


def _check_labels(split: ArraySplit, num_classes: int, name: str) -> None:
  """Refuses examples whose class does not exist."""
  wrong = np.flatnonzero((split.labels < 0) | (split.labels >= num_classes))
  if len(wrong):
    raise UserError(
      f'config.data.name={name}: {len(wrong)} of {len(split)} images have a '
      f'label outside 0 to {num_classes - 1}; image {wrong[0]} has '
      f'{split.labels[wrong[0]]}. Correct them, or get the data again.'
    )


def _check_options(data: ConfigDict) -> None:
  """Refuses options for images in memory where they are decoded on demand."""
  for name, value in (
    ('distorted_copies', data.distorted_copies),
    ('binarize', data.binarize),
  ):
    if value:
      raise UserError(
        f'config.data.{name}={value}: needs images in memory, and those of '
        f'{data.name} are read from disk; turn it off.'
      )


def _check_overlap(train: Split, other: Split, name: str, split: str) -> None:
  """Refuses a split `other` with more than a few training images in it."""
  count = overlap(train, other)
  if count > _MAX_OVERLAP * len(other):
    raise UserError(
      f'config.data.name={name}: {count} of the {len(other)} {split} images '
      'are training images as well. Remove the copies, or get the data again.'
    )


def _distorted(split: ArraySplit, count: int, seed: int) -> ArraySplit:
  """Makes `count` images by small affine distortions of a split's images.

  Image i comes from example i modulo the number of examples. Its rotation,
  scales, shear and shift are a function of (seed, i); their ranges are our
  choice.
  """
  from scipy import ndimage  # Few configs need it.

  random = np.random.Philox(np.random.SeedSequence((seed,)))
  # Uniform in [-1, 1).
  draws = random.random_raw(6 * count).reshape(count, 6) / 2.0**63 - 1
  angle = np.deg2rad(15) * draws[:, 0]
  scale = 1 + 0.15 * draws[:, 1:3]
  shear = 0.15 * draws[:, 3]
  shift = 2 * draws[:, 4:6]
  matrices = np.empty((count, 2, 2))
  matrices[:, 0, 0] = scale[:, 0] * np.cos(angle)
  matrices[:, 0, 1] = -scale[:, 1] * (np.sin(angle) - shear)
  matrices[:, 1, 0] = scale[:, 0] * np.sin(angle)
  matrices[:, 1, 1] = scale[:, 1] * np.cos(angle)
  sources = split.take(np.arange(count) % len(split))
  center = (np.array(split.images.shape[1:3]) - 1) / 2
  offsets = center - matrices @ center + shift
  images = np.empty_like(sources.images)
  for channel in range(images.shape[-1]):
    for image, source, matrix, offset in zip(
      images[..., channel],
      sources.images[..., channel],
      matrices,
      offsets,
      strict=True,
    ):
      ndimage.affine_transform(source, matrix, offset, output=image, order=1)
  return ArraySplit(images, sources.labels)


def binarize_and_pad(images: np.ndarray, data: ConfigDict) -> np.ndarray:
  """Binarizes images if `data.binarize`, and pads them to `data.image_size`.

  Padding is black and equal on opposite sides, up to a pixel.

  Args:
    images: uint8 (images, height, width, channels).
    data: the `data` sub-tree of a config.

  Raises:
    UserError: if the images are larger than `data.image_size`.
  """
  if data.binarize:
    images = np.where(images > 127, np.uint8(255), np.uint8(0))
  size = data.image_size
  height, width = images.shape[1:3]
  if height > size or width > size:
    raise UserError(
      f'config.data.image_size={size}: smaller than the images, which are '
      f'{height}x{width}.'
    )
  top, left = (size - height) // 2, (size - width) // 2
  rows, columns = (top, size - height - top), (left, size - width - left)
  return np.pad(images, ((0, 0), rows, columns, (0, 0)))


def _load_synthetic(data: ConfigDict) -> Dataset:
  """Makes noise around a color pattern per class, for tests and benchmarks."""
  num_classes = 10
  rng = np.random.Generator(np.random.Philox(0))
  patterns = rng.integers(0, 192, (num_classes, 8, 8, 3))

  def make(count: int) -> ArraySplit:
    labels = np.arange(count) % num_classes
    cell = math.ceil(data.image_size / 8)
    images = patterns[labels].repeat(cell, 1).repeat(cell, 2)
    images = images[:, : data.image_size, : data.image_size]
    images = images + rng.integers(0, 64, images.shape)
    return ArraySplit(images.astype(np.uint8), labels.astype(np.int32))

  return Dataset(
    [f'pattern {i}' for i in range(num_classes)],
    {'train': make(512), 'test': make(130)},
  )


# A new data set needs one line here.
SOURCES = {
  'mnist_5k': Source(mnist.load_mnist_5k, 1, 10, installed=True),
  'mnist': Source(mnist.load_mnist, 1, 10),
  'fashion_mnist': Source(mnist.load_mnist, 1, 10),
  imagenet_metadata.NAME: Source(
    imagenet.load, 3, imagenet_metadata.NUM_CLASSES
  ),
  imagenet_metadata.STAND_IN: Source(
    imagenet.load, 3, imagenet_metadata.NUM_CLASSES
  ),
  'imagenet_v2': Source(imagenet_v2.load, 3, imagenet_metadata.NUM_CLASSES),
  'folder': Source(folder.load),
  'npz': Source(npz.load),
  'synthetic': Source(_load_synthetic, 3, 10, installed=True),
}
