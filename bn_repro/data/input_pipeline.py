"""Batches, in an order that is arithmetic on (seed, step, batch size).

The examples of global step k stand at positions k * batch_size and on of an
endless stream of epochs; which example stands at a position is computed, never
remembered, and so is how it is cropped. A run can therefore be taken up at any
step, on any number of hosts, threads or worker processes.
"""

from collections.abc import Callable, Iterator
import dataclasses
import multiprocessing
import os
import signal
import threading
from typing import Any

from absl import flags
import grain
from ml_collections import ConfigDict
import numpy as np

from bn_repro.data.split import Batch, Draws, Split

# A batch of arrays in memory takes 30 microseconds: a thread of its own would
# only take a core from the step.
_COPYING = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
# Each of these threads waits for a batch that many others decode: two, so that
# the others never run dry. Few batches, because they are large.
_DECODING = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True)
class Share:
  """What a process makes of every batch: one of `count` equal parts."""

  index: int
  count: int

  def of(self, batch: np.ndarray) -> np.ndarray:
    """This part of the last axis."""
    size = batch.shape[-1] // self.count
    return batch[..., self.index * size : (self.index + 1) * size]


WHOLE = Share(0, 1)


class Order:
  """Which training example stands at which position of the stream.

  The order of an epoch is worked out when the first of its examples is asked
  for, and kept until another epoch's is.

  Attributes:
    num_examples: length of an epoch.
    seed: of all permutations.
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
    self.seed = seed
    self._epoch: tuple[int, np.ndarray] | None = None

  def examples(self, positions: np.ndarray) -> np.ndarray:
    """Indices of the examples at positions of the stream, int64."""
    epochs, offsets = np.divmod(positions, self.num_examples)
    examples = np.empty_like(positions)
    for epoch in np.unique(epochs):
      there = epochs == epoch
      examples[there] = self._examples_of_epoch(int(epoch))[offsets[there]]
    return examples

  def _examples_of_epoch(self, epoch: int) -> np.ndarray:
    # One read and one write of one attribute: threads may share an Order.
    ordered = self._epoch
    if ordered is None or ordered[0] != epoch:
      ordered = self._epoch = self._order_epoch(epoch)
    return ordered[1]

  def _order_epoch(self, epoch: int) -> tuple[int, np.ndarray]:
    """The epoch, and its examples in their order.

    Sorted by random numbers for the shards, then for the examples in them.
    They are the raw output of Philox, which NumPy promises never to change.
    """
    random = np.random.Philox(np.random.SeedSequence((self.seed, epoch)))
    of_shard = random.random_raw(self._num_shards)[self._shard_of]
    if not self._within:
      return epoch, np.argsort(of_shard, kind='stable')
    return epoch, np.lexsort((random.random_raw(self.num_examples), of_shard))


def create_order(config: ConfigDict, num_examples: int) -> Order:
  """The order that a config asks for."""
  return Order(
    num_examples,
    num_shards=config.data.num_shards,
    shuffle=config.data.shuffle,
    seed=config.seed,
  )


def positions(step: int, batch_size: int) -> np.ndarray:
  """Positions of a step's examples in the stream, int64 (batch_size,)."""
  return np.arange(step * batch_size, (step + 1) * batch_size)


def train_batches(
  split: Split,
  order: Order,
  batch_size: int,
  first_step: int,
  last_step: int,
  *,
  share: Share = WHOLE,
  steps_per_batch: int = 1,
  num_workers: int = 0,
) -> Iterator[Batch]:
  """The batches of steps `first_step` to `last_step` - 1.

  Every batch is full: it runs on into the next epoch where one ends.

  Args:
    split: the training images.
    order: of the stream.
    batch_size: examples in a step, over all processes.
    first_step: a multiple of `steps_per_batch`.
    last_step: a multiple of `steps_per_batch`.
    share: what of each step is made here.
    steps_per_batch: steps that are one batch here, one after another.
    num_workers: processes to make batches in, beside this one.
  """

  def load(number: int) -> Batch:
    steps = positions(number, steps_per_batch * batch_size)
    here = share.of(steps.reshape(steps_per_batch, batch_size)).ravel()
    batch = split.training_batch(order.examples(here), Draws(order.seed, here))
    return {**batch, 'mask': np.ones(len(here), bool)}

  return _iterate(
    split,
    load,
    first_step // steps_per_batch,
    last_step // steps_per_batch,
    num_workers,
  )


def eval_batches(
  split: Split, batch_size: int, share: Share = WHOLE
) -> Iterator[Batch]:
  """Every example once, in order; the last batch is padded and masked."""

  def load(number: int) -> Batch:
    here = share.of(positions(number, batch_size))
    mask = here < len(split)
    batch = split.evaluation_batch(here[mask])
    padding = len(here) - int(np.count_nonzero(mask))
    padded = {
      name: np.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))
      for name, array in batch.items()
    }
    return {**padded, 'mask': mask}

  return _iterate(split, load, 0, -(-len(split) // batch_size), num_workers=0)


def _iterate(
  split: Split,
  load: Callable[[int], Batch],
  first: int,
  last: int,
  num_workers: int,
) -> Iterator[Batch]:
  """Loads batch after batch, ahead of need where that takes time."""
  numbers: Any = grain.MapDataset.range(first, last)
  batches = numbers.map(load).to_iter_dataset(
    _COPYING if split.in_memory else _DECODING
  )
  if num_workers:
    # Grain reads its flags, which nobody has parsed.
    flags.FLAGS.mark_as_parsed()
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2),
      _live_as_long_as_parent,
    )
  iterator = iter(batches)
  try:
    yield from iterator
  finally:
    iterator.close()


def _live_as_long_as_parent(index: int, count: int) -> None:
  """Lets a run save first when both get a signal, and ends when it is gone."""
  del index, count
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent is not None

  def follow() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
