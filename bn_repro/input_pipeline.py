"""Batches, in an order that is arithmetic on (seed, step, batch size).

The examples of global step k stand at positions k * batch_size and on of an
endless stream of epochs; which example stands at a position is computed, never
remembered. A run can therefore be taken up at any step, on any number of hosts.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import grain
from grain.experimental import index_shuffle
import numpy as np

from bn_repro.datasets import Split

Batch = dict[str, np.ndarray]

# Rounds of the block cipher behind `index_shuffle`; Grain's own choice.
_SHUFFLE_ROUNDS = 4


class Order:
  """Which training example stands at which position of the stream.

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
    self._starts = np.linspace(0, num_examples, num_shards + 1).astype(np.int64)
    self._within = shuffle != 'none'
    self._seed = seed
    self._epoch = self._order_shards(0)

  def examples(self, step: int, batch_size: int) -> np.ndarray:
    """Indices of the examples of a step, int64 (batch_size,)."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, self.num_examples)
    return np.concatenate(
      [
        self._examples_of_epoch(int(epoch), offsets[epochs == epoch])
        for epoch in np.unique(epochs)
      ]
    )

  def _examples_of_epoch(self, epoch: int, offsets: np.ndarray) -> np.ndarray:
    # One read and one write of one attribute: threads may share an Order.
    order = self._epoch
    if order.epoch != epoch:
      order = self._epoch = self._order_shards(epoch)
    places = np.searchsorted(order.ends, offsets, side='right')
    shards = order.shards[places]
    lengths = np.diff(self._starts)[shards]
    within = offsets - (order.ends[places] - lengths)
    if self._within:
      keys = order.keys[shards]
      within = np.array(
        [
          _permuted(int(index), int(length), int(key))
          for index, length, key in zip(within, lengths, keys, strict=True)
        ]
      )
    return self._starts[shards] + within

  def _order_shards(self, epoch: int) -> '_EpochOrder':
    num_shards = len(self._starts) - 1
    sequence = np.random.SeedSequence((self._seed, epoch))
    key, *keys = sequence.generate_state(1 + num_shards).tolist()
    shards = np.array(
      [_permuted(i, num_shards, key) for i in range(num_shards)]
    )
    ends = np.cumsum(np.diff(self._starts)[shards])
    return _EpochOrder(epoch, shards, ends, np.array(keys))


class _EpochOrder(NamedTuple):
  """The shards of an epoch in their order, and a key for each shard."""

  epoch: int
  shards: np.ndarray
  ends: np.ndarray
  keys: np.ndarray


def _permuted(index: int, length: int, key: int) -> int:
  return index_shuffle(
    index, max_index=length - 1, seed=key, rounds=_SHUFFLE_ROUNDS
  )


def train_batches(
  split: Split, order: Order, batch_size: int, first_step: int, last_step: int
) -> Iterator[Batch]:
  """The batches of steps `first_step` to `last_step` - 1, prefetched.

  Every batch is full: it runs on into the next epoch where one ends.
  """

  def load(step: int) -> Batch:
    return _batch(split, order.examples(step, batch_size), batch_size)

  steps: Any = grain.MapDataset.range(first_step, last_step)
  # One thread keeps ahead of any step, and leaves the cores to it.
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
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
