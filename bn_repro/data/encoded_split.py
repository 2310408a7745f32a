"""Encoded images, read and decoded on demand."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import functools
import sys
from typing import Any, TypeVar
import zlib

import cv2
import numpy as np

from bn_repro import host
from bn_repro.data import crops, jpeg
from bn_repro.data.split import Batch, WholeImage
from bn_repro.errors import UserError

T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
  """Encoded images, read and decoded on demand.

  An image that cannot be decoded is named on standard error, and the next
  decodable example of the split takes its place, image and label.

  Attributes:
    source: examples by index, with `image` (encoded), `label` and `file_name`.
    indices: int64 (examples,), indices into `source`.
    labels: int32 (examples,); None if only reading an example tells its label.
    num_classes: number of classes.
    image_size: side of the square images, in pixels.
    num_threads: number of decoding threads; 0 means one per core.
    evaluation_box: chooses the box that evaluation sees.
    as_shown: see `jpeg.decode_view`.
    identity: text that tells the source from other sources.
  """

  source: Sequence[Mapping[str, Any]]
  indices: np.ndarray
  labels: np.ndarray | None
  num_classes: int
  image_size: int
  num_threads: int
  evaluation_box: crops.ChooseBox
  as_shown: bool
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
    labels = None if self.labels is None else self.labels[indices]
    return dataclasses.replace(
      self, indices=self.indices[indices], labels=labels
    )

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
        as_shown=self.as_shown,
      )
      if crops.is_mirrored(draws[row]):
        cv2.flip(out, 1, out)

    return self._gather(indices, decode)

  def evaluation_batch(self, indices: np.ndarray) -> Batch:
    """Decodes the boxes that `evaluation_box` chooses."""

    def decode(row: int, encoded: bytes, out: np.ndarray) -> None:
      del row
      jpeg.decode_view(
        encoded, self.evaluation_box, out, as_shown=self.as_shown
      )

    return self._gather(indices, decode)

  def whole_image(self, index: int, shorter_side: int) -> WholeImage:
    """Decodes an example."""
    return WholeImage(
      *self._decode(
        index,
        lambda encoded: jpeg.decode_image(
          encoded, shorter_side, as_shown=self.as_shown
        ),
      )
    )

  def name_of(self, index: int) -> str:
    """The file name of an example."""
    return _file_name(self._example(index))

  def label_of(self, index: int) -> int:
    """The label of an example."""
    return self._label(self._example(index), f'example {index}')

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
      return decoded, self._label(example, name), index != first
    raise UserError(
      f'none of {len(self)} images can be decoded. Get the data again.'
    )

  def _read(self, index: int) -> Mapping[str, Any]:
    try:
      return self._example(index)
    except Exception as error:  # ArrayRecord documents no exceptions.
      raise jpeg.UndecodableImage(f'cannot be read: {error}') from error

  def _label(self, example: Mapping[str, Any], name: str) -> int:
    """The label of an example.

    Raises:
      UserError: if there is no such class.
    """
    label = int(example['label'])
    if not 0 <= label < self.num_classes:
      raise UserError(
        f'{name}: has the label {label}, and the classes are 0 to '
        f'{self.num_classes - 1}. Get the data again.'
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
