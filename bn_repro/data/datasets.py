"""Loads the data set of a config and checks it against the config.

Small data sets are arrays in memory; ImageNet is read on demand. Nothing here
imports JAX or TensorFlow, so that missing data are reported at once.
"""

from collections.abc import Callable, Mapping
import math
from pathlib import Path
import shutil

from ml_collections import ConfigDict
import numpy as np

from bn_repro.data import imagenet, imagenet_metadata, mnist
from bn_repro.data.split import ArraySplit, Dataset, stratified
from bn_repro.errors import UserError

# Largest share of test images that may be training images as well: published
# data sets have a few. Our choice.
_MAX_OVERLAP = 0.01

_SHARED_MEMORY = Path('/dev/shm')
# Batches that Grain keeps per worker process: two in the buffer, one under way
# and one handed over.
_BATCHES_PER_WORKER = 4


def load(data: ConfigDict, seed: int) -> Dataset:
  """Loads the data set that `data.name` names.

  Args:
    data: the `data` sub-tree of a config.
    seed: seed of the affine distortions of `data.distorted_copies`.

  Raises:
    UserError: if the data are missing or damaged, or `data` does not fit them.
  """
  if data.name in imagenet_metadata.NAMES:
    return imagenet.load(data)
  train, test, label_names = _LOADERS[data.name](data)
  for split in (train, test):
    _check_labels(split, len(label_names), data.name)
  _check_overlap(train, test, data.name)
  # Mixes the classes, as preparing a data set in shards does.
  train = train.shuffled()
  splits = {'train': train, 'test': test}
  if data.holdout:
    if data.holdout > len(train) - len(label_names):
      raise UserError(
        f'config.data.holdout={data.holdout}: {data.name} has only '
        f'{len(train)} training images.'
      )
    validation = stratified(train.labels, data.holdout)
    splits['train'] = train.take(~validation)
    splits['validation'] = train.take(validation)
  if data.distorted_copies:
    splits['train'] = _distorted(splits['train'], data.distorted_copies, seed)
  return Dataset(
    label_names,
    {
      name: ArraySplit(binarize_and_pad(split.images, data), split.labels)
      for name, split in splits.items()
    },
    unpadded_shape=train.image_shape[:2],
  )


def check(config: ConfigDict) -> Dataset:
  """Loads the data set and checks it against the rest of the config.

  Raises:
    UserError: as `load`; if the split to evaluate is missing, or the data or
      the shared memory are too small.
  """
  dataset = load(config.data, config.seed)
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


def input_size(data: ConfigDict) -> tuple[tuple[int, int, int], int]:
  """The image shape and the number of classes, without reading the data.

  Returns:
    `((height, width, channels), num_classes)`, equal to those of `load(data)`.
  """
  channels = 1 if data.name in mnist.NAMES else 3
  classes = (
    imagenet_metadata.NUM_CLASSES
    if data.name in imagenet_metadata.NAMES
    else 10
  )
  return (data.image_size, data.image_size, channels), classes


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
      f'{split.labels[wrong[0]]}. Get the data again.'
    )


def _check_overlap(train: ArraySplit, test: ArraySplit, name: str) -> None:
  """Refuses a test set with more than a few training images in it."""
  known = {image.tobytes() for image in train.images}
  overlap = sum(image.tobytes() in known for image in test.images)
  if overlap > _MAX_OVERLAP * len(test):
    raise UserError(
      f'config.data.name={name}: {overlap} of the {len(test)} test images are '
      'training images as well. Download the data again.'
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


def _load_synthetic(data: ConfigDict) -> mnist.Loaded:
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

  return make(512), make(130), [f'pattern {i}' for i in range(num_classes)]


_LOADERS: Mapping[str, Callable[[ConfigDict], mnist.Loaded]] = {
  'mnist_5k': mnist.load_mnist_5k,
  'mnist': mnist.load_mnist,
  'fashion_mnist': mnist.load_mnist,
  'synthetic': _load_synthetic,
}
