"""Splits of a data set: labeled images, gathered into batches by index.

A split has two views of an image: that of training, which may be a random crop,
and that of evaluation. For images in memory both are the whole image.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
from typing import Any, NamedTuple, Protocol, TypedDict
import zlib

import numpy as np

from bn_repro.data.crops import CropRandomness


class Batch(TypedDict):
  """A batch of examples: NumPy arrays on the host, JAX arrays on devices.

  Attributes:
    image: uint8 (batch, height, width, channels), with 1 or 3 channels.
    label: int32 (batch,).
    mask: bool (batch,), False for padding.
    replaced: bool (batch,), True where the image cannot be decoded and another
      example takes its place.
  """

  image: Any
  label: Any
  mask: Any
  replaced: Any


class WholeImage(NamedTuple):
  """An example that is not cropped.

  Attributes:
    pixels: uint8 (height, width, channels), of any height and width.
    label: its class.
    replaced: whether it takes the place of an image that cannot be decoded.
  """

  pixels: np.ndarray
  label: int
  replaced: bool


class Split(Protocol):
  """A set of labeled images."""

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels)."""

  @property
  def in_memory(self) -> bool:
    """Whether gathering a batch only copies memory."""

  @property
  def labels(self) -> np.ndarray | None:
    """int32 (examples,); None if only reading an example tells its label."""

  def __len__(self) -> int:
    """The number of examples."""

  def take(self, indices: np.ndarray) -> 'Split':
    """Returns the examples at these indices, or where a mask is True."""

  def training_batch(
    self, indices: np.ndarray, randomness: CropRandomness
  ) -> Batch:
    """Gathers examples in the view of training.

    Args:
      indices: int64 (batch,), indices of the examples.
      randomness: random numbers of these examples' crops.

    Returns:
      A batch without padding.
    """

  def evaluation_batch(self, indices: np.ndarray) -> Batch:
    """Gathers examples in the view of evaluation."""

  def whole_image(self, index: int, shorter_side: int) -> WholeImage:
    """Returns an example from which crops are made.

    Args:
      index: index of the example.
      shorter_side: shorter side that the crops need, in pixels. A larger image
        may be decoded at a smaller scale, at which it still has this size.
    """

  def name_of(self, index: int) -> str:
    """The file name of an example, or a name made from its index."""

  def label_of(self, index: int) -> int:
    """The label of an example."""

  def contents(self) -> Iterator[bytes]:
    """The encoded images or the pixels of all examples that can be read."""

  def checksum(self, crc: int) -> int:
    """Updates a CRC-32 with everything that identifies this split."""


@dataclasses.dataclass(frozen=True)
class ArraySplit:
  """Examples in memory.

  Attributes:
    images: uint8 (examples, height, width, channels), with 1 or 3 channels.
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
    """Returns the examples at these indices, or where a mask is True."""
    return ArraySplit(self.images[indices], self.labels[indices])

  def training_batch(
    self, indices: np.ndarray, randomness: CropRandomness
  ) -> Batch:
    """Gathers examples; nothing is cropped."""
    del randomness
    return self.evaluation_batch(indices)

  def evaluation_batch(self, indices: np.ndarray) -> Batch:
    """Gathers examples."""
    return {
      'image': self.images[indices],
      'label': self.labels[indices],
      'mask': np.ones(len(indices), bool),
      'replaced': np.zeros(len(indices), bool),
    }

  def whole_image(self, index: int, shorter_side: int) -> WholeImage:
    """Returns an example."""
    del shorter_side
    return WholeImage(self.images[index], self.label_of(index), replaced=False)

  def name_of(self, index: int) -> str:
    """A name made from the index."""
    return f'example {index}'

  def label_of(self, index: int) -> int:
    """The label of an example."""
    return int(self.labels[index])

  def contents(self) -> Iterator[bytes]:
    """The pixels of all examples."""
    return (image.tobytes() for image in self.images)

  def checksum(self, crc: int) -> int:
    """Updates a CRC-32 with every pixel and label."""
    crc = zlib.crc32(np.ascontiguousarray(self.images).data, crc)
    return zlib.crc32(self.labels.astype('<i4').tobytes(), crc)


def shuffled_order(count: int) -> np.ndarray:
  """Returns a fixed random order of `count` examples, int64 (count,).

  It sorts the SHA-256 digests of the indices: it is the same on every machine
  and with every version of NumPy.
  """
  return np.array(
    sorted(
      range(count),
      key=lambda index: hashlib.sha256(index.to_bytes(8, 'big')).digest(),
    )
  )


def overlap(train: Split, other: Split) -> int:
  """Counts the examples of `other` whose image is in `train` as well.

  Only equal bytes count, encoded or as pixels. Memory holds a digest of each
  image of `other`.
  """

  def digests(split: Split) -> Iterator[bytes]:
    return (
      hashlib.blake2b(content, digest_size=16).digest()
      for content in split.contents()
    )

  counts = Counter(digests(other))
  found = {digest for digest in digests(train) if digest in counts}
  return sum(counts[digest] for digest in found)


def stratified(labels: np.ndarray, count: int) -> np.ndarray:
  """Selects the first examples of each class, equally many up to rounding.

  A class that is smaller than its share is made up for by the other classes.

  Args:
    labels: int (examples,).
    count: number of examples to select.

  Returns:
    bool (examples,), True for the selected examples.
  """
  selected = np.zeros(len(labels), bool)
  by_class = np.argsort(labels, kind='stable')
  _, sizes = np.unique(labels, return_counts=True)
  rank_in_class = np.concatenate([np.arange(size) for size in sizes])
  selected[by_class[np.argsort(rank_in_class, kind='stable')[:count]]] = True
  return selected


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A data set.

  Attributes:
    label_names: name of each class, by label.
    splits: `train`, and `validation`, `test` or both; or `test` alone.
    unpadded_shape: (height, width) of the images before they were padded to
      `image_shape`; None if they are cropped to it.
  """

  label_names: Sequence[str]
  splits: Mapping[str, Split]
  unpadded_shape: tuple[int, int] | None = None

  @property
  def num_classes(self) -> int:
    """The number of classes."""
    return len(self.label_names)

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(height, width, channels)."""
    return next(iter(self.splits.values())).image_shape

  @functools.cached_property
  def fingerprint(self) -> str:
    """A checksum of all splits, eight hexadecimal digits.

    Checkpoints and run.json hold it: a run resumes on the same data only.
    """
    crc = 0
    for name in sorted(self.splits):
      crc = self.splits[name].checksum(crc)
    return f'{crc:08x}'
