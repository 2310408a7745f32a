"""Batches, in an order that is arithmetic on (seed, step, batch size).

The examples of global step k stand at positions k * batch_size and on of an
endless stream of epochs; which example stands at a position is computed, never
remembered. A run can therefore be taken up at any step, on any number of hosts.
"""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from bn_repro.datasets import Split

Batch = dict[str, np.ndarray]


class Order:
  """Which training example stands at which position of the stream.

  The order of an epoch is worked out when the first of its examples is asked
  for, and kept until another epoch's is.

  Attributes:
    num_examples: length of an epoch.
  """

  def __init__(
    self, num_examples: int, *, num_shards: int, shuffle: str, seed: int
  ):
    """Describes the order.

    Args:
      num_examples: length of an epoch.
      num_shards: shards, of equal length up to one, in the order of the data.
      shuffle: `none` permutes the shards in each epoch, `within_shard` also the
        examples of each shard, `global` all examples at once.
      seed: of all permutations.
    """
    if shuffle == 'global':
      num_shards = 1
    self.num_examples = num_examples
    bounds = np.linspace(0, num_examples, num_shards + 1).astype(np.int64)
    self._shard_of = np.repeat(np.arange(num_shards), np.diff(bounds))
    self._num_shards = num_shards
    self._within = shuffle != 'none'
    self._seed = seed
    self._epoch = self._order_epoch(0)

  def examples(self, step: int, batch_size: int) -> np.ndarray:
    """Indices of the examples of a step, int64 (batch_size,)."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, self.num_examples)
    return np.concatenate(
      [
        self._examples_of_epoch(int(epoch))[offsets[epochs == epoch]]
        for epoch in np.unique(epochs)
      ]
    )

  def _examples_of_epoch(self, epoch: int) -> np.ndarray:
    # One read and one write of one attribute: threads may share an Order.
    ordered = self._epoch
    if ordered[0] != epoch:
      ordered = self._epoch = self._order_epoch(epoch)
    return ordered[1]

  def _order_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
    """The epoch, and its examples in their order.

    Sorted by random numbers for the shards, then for the examples in them.
    They are the raw output of Philox, which NumPy promises never to change.
    """
    random = np.random.Philox(np.random.SeedSequence((self._seed, epoch)))
    of_shard = random.random_raw(self._num_shards)[self._shard_of]
    if not self._within:
      return epoch, np.argsort(of_shard, kind='stable')
    return epoch, np.lexsort((random.random_raw(self.num_examples), of_shard))


def train_batches(
  split: Split, order: Order, batch_size: int, first_step: int, last_step: int
) -> Iterator[Batch]:
  """The batches of steps `first_step` to `last_step` - 1.

  Every batch is full: it runs on into the next epoch where one ends.
  """

  def load(step: int) -> Batch:
    return _batch(split, order.examples(step, batch_size), batch_size)

  steps: Any = grain.MapDataset.range(first_step, last_step)
  # A batch of arrays in memory takes 30 microseconds: a thread of its own would
  # only take a core from the step.
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  return iter(steps.map(load).to_iter_dataset(options))


def eval_batches(split: Split, batch_size: int) -> Iterator[Batch]:
  """Every example once, in order; the last batch is padded and masked."""
  for first in range(0, len(split), batch_size):
    last = min(first + batch_size, len(split))
    yield _batch(split, np.arange(first, last), batch_size)


def _batch(split: Split, indices: np.ndarray, batch_size: int) -> Batch:
  """Gathers `image`, `label` and `mask`, padded to `batch_size` examples."""
  padding = batch_size - len(indices)
  examples = split.take(np.pad(indices, (0, padding)))
  return {
    'image': examples.images,
    'label': examples.labels,
    'mask': np.arange(batch_size) < len(indices),
  }
