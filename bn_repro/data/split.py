"""What a data set is made of: splits, whose examples are gathered by index.

A split gives batches of the view that training takes of an example, and of that
of evaluation. Examples held in memory look the same in both.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import functools
import os
import sys
from typing import Any, Protocol
import zlib

import cv2
import numpy as np

from bn_repro.data import jpeg
from bn_repro.errors import UserError

Batch = dict[str, np.ndarray]


class Split(Protocol):
  """A set of labelled images."""

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels)."""

  @property
  def in_memory(self) -> bool:
    """Whether gathering a batch is but a copy."""

  def __len__(self) -> int:
    """The number of examples."""

  def training_batch(self, indices: np.ndarray, draws: 'Draws') -> Batch:
    """Examples in the view of training.

    Args:
      indices: of the examples, in their order.
      draws: random numbers for each of them.

    Returns:
      `image`, uint8 (examples, *image_shape), `label`, int32 (examples,), and
      `replaced`, bool (examples,): where another example took the place of one
      that cannot be decoded.
    """

  def evaluation_batch(self, indices: np.ndarray) -> Batch:
    """The same in the view of evaluation."""

  def name_of(self, index: int) -> str:
    """What an example is called."""

  def label_of(self, index: int) -> int:
    """The label of an example."""

  def checksum(self, crc: int) -> int:
    """Continues a checksum by all that tells this split from others."""


@dataclasses.dataclass(frozen=True)
class Draws:
  """Random numbers of examples, by their position in the training stream.

  Attributes:
    seed: of the run.
    positions: int64 (examples,), in the stream.
  """

  seed: int
  positions: np.ndarray

  def numbers(self) -> np.ndarray:
    """Uniform in [0, 1), float64 (examples, jpeg.DRAWS).

    The numbers at a position are a stretch of one stream of Philox, which NumPy
    promises never to change; it can be taken up anywhere.
    """
    # Philox makes four numbers at a time.
    blocks = -(-jpeg.DRAWS // 4)
    cuts = np.flatnonzero(np.diff(self.positions) != 1) + 1
    raw = []
    for run in np.split(self.positions, cuts):
      random = np.random.Philox(
        np.random.SeedSequence((self.seed,), spawn_key=(0,))
      )
      random.advance(int(run[0]) * blocks)
      raw.append(random.random_raw(4 * blocks * len(run)))
    numbers = (np.concatenate(raw) >> np.uint64(11)) / 2.0**53
    return numbers.reshape(-1, 4 * blocks)[:, : jpeg.DRAWS]


@dataclasses.dataclass(frozen=True)
class ArraySplit:
  """Examples in memory.

  Attributes:
    images: uint8 (examples, height, width, channels); 1 or 3 channels.
    labels: int32 (examples,).
  """

  images: np.ndarray
  labels: np.ndarray

  in_memory = True

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels)."""
    height, width, channels = self.images.shape[1:]
    return height, width, channels

  def __len__(self) -> int:
    return len(self.labels)

  def take(self, indices: np.ndarray) -> 'ArraySplit':
    """The examples at these indices, in this order."""
    return ArraySplit(self.images[indices], self.labels[indices])

  def training_batch(self, indices: np.ndarray, draws: Draws) -> Batch:
    """Gathers examples."""
    del draws
    return self.evaluation_batch(indices)

  def evaluation_batch(self, indices: np.ndarray) -> Batch:
    """Gathers examples."""
    return {
      'image': self.images[indices],
      'label': self.labels[indices],
      'replaced': np.zeros(len(indices), bool),
    }

  def name_of(self, index: int) -> str:
    """They have no names but their numbers."""
    return f'example {index}'

  def label_of(self, index: int) -> int:
    """The label of an example."""
    return int(self.labels[index])

  def checksum(self, crc: int) -> int:
    """Continues a checksum by every pixel and label."""
    crc = zlib.crc32(np.ascontiguousarray(self.images).data, crc)
    return zlib.crc32(self.labels.astype('<i4').tobytes(), crc)


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
  """Encoded images, read and decoded when they are asked for.

  An image that cannot be decoded is named on standard error, and the next
  example of the split that can be takes its place, image and label.

  Attributes:
    source: examples by index: `image` encoded, `label`, `file_name`.
    indices: int64 (examples,); those of the source that are in the split.
    image_size: pixels of the side of the square that images are made.
    num_threads: that decode; 0 is one a core.
    identity: what tells the source from others.
  """

  source: Sequence[Mapping[str, Any]]
  indices: np.ndarray
  image_size: int
  num_threads: int
  identity: str

  in_memory = False

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels)."""
    return self.image_size, self.image_size, 3

  def __len__(self) -> int:
    return len(self.indices)

  def take(self, indices: np.ndarray) -> 'EncodedSplit':
    """The examples at these indices, in this order."""
    return dataclasses.replace(self, indices=self.indices[indices])

  def training_batch(self, indices: np.ndarray, draws: Draws) -> Batch:
    """Random boxes, mirrored or not."""
    numbers = draws.numbers()

    def decode(row: int, encoded: bytes, out: np.ndarray) -> None:
      jpeg.decode_view(
        encoded,
        lambda width, height: jpeg.random_box(width, height, numbers[row]),
        out,
      )
      if jpeg.is_mirrored(numbers[row]):
        cv2.flip(out, 1, out)

    return self._gather(indices, decode)

  def evaluation_batch(self, indices: np.ndarray) -> Batch:
    """Central boxes."""

    def decode(row: int, encoded: bytes, out: np.ndarray) -> None:
      del row
      jpeg.decode_view(encoded, jpeg.central_box, out)

    return self._gather(indices, decode)

  def name_of(self, index: int) -> str:
    """The name of the file that the image came in."""
    return _name(self._example(index))

  def label_of(self, index: int) -> int:
    """The label of an example."""
    return int(self._example(index)['label'])

  def checksum(self, crc: int) -> int:
    """Continues a checksum; the images themselves are too many to go over."""
    crc = zlib.crc32(self.identity.encode(), crc)
    return zlib.crc32(self.indices.astype('<i8').tobytes(), crc)

  def _example(self, index: int) -> Mapping[str, Any]:
    return self.source[int(self.indices[index])]

  def _read(self, index: int) -> Mapping[str, Any]:
    try:
      return self._example(index)
    except Exception as error:  # ArrayRecord raises what Riegeli raises.
      raise jpeg.UndecodableImage(f'cannot be read: {error}') from error

  def _gather(
    self,
    indices: np.ndarray,
    decode: Callable[[int, bytes, np.ndarray], None],
  ) -> Batch:
    """Decodes examples, in threads."""
    count = len(indices)
    batch: Batch = {
      'image': np.empty((count, *self.image_shape), np.uint8),
      'label': np.empty(count, np.int32),
      'replaced': np.zeros(count, bool),
    }

    def load(row: int) -> None:
      first = int(indices[row])
      # How many may be replaced is decided where all hosts' are counted.
      for index in range(first, first + len(self)):
        name = f'example {index % len(self)}'
        try:
          example = self._read(index % len(self))
          name = _name(example)
          decode(row, example['image'], batch['image'][row])
        except jpeg.UndecodableImage as error:
          _say_once(name, error)
          batch['replaced'][row] = True
          continue
        batch['label'][row] = example['label']
        return
      raise UserError(
        f'not one of {len(self)} images can be decoded. Prepare the data set '
        'again.'
      )

    def load_all(rows: range) -> None:
      for row in rows:
        load(row)

    num_threads = self.num_threads or os.cpu_count() or 1
    # A few runs of rows for each thread: handing over costs time, too.
    length = max(count // (4 * num_threads), 1)
    runs = [range(count)[i : i + length] for i in range(0, count, length)]
    # A list, so that errors come up here.
    list(_pool(num_threads).map(load_all, runs))
    return batch


def _name(example: Mapping[str, Any]) -> str:
  name = example['file_name']
  return name.decode() if isinstance(name, bytes) else name


_named: set[str] = set()


def _say_once(name: str, error: Exception) -> None:
  """Names a damaged image, once a process."""
  if name not in _named:
    _named.add(name)
    print(f'warning: {name}: left out, {error}', file=sys.stderr, flush=True)


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
  return ThreadPoolExecutor(num_threads, thread_name_prefix='decode')


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set.

  Attributes:
    label_names: a word for each class.
    splits: by name: train, and validation, test if any.
  """

  label_names: Sequence[str]
  splits: Mapping[str, Split]

  @property
  def num_classes(self) -> int:
    """How many classes there are."""
    return len(self.label_names)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels)."""
    return self.splits['train'].image_shape

  def fingerprint(self) -> str:
    """A checksum of what is in it, to tell data sets apart."""
    crc = 0
    for name in sorted(self.splits):
      crc = self.splits[name].checksum(crc)
    return f'{crc:08x}'
