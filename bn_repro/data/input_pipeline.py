"""Batches, in an order that is a function of (seed, step, batch size).

Epochs follow one another in an endless stream of examples. Step k takes the
`batch_size` examples from position k * batch_size. Which example is at a
position, and how it is cropped, is computed from the position and never stored:
a run resumes at any step, on any number of hosts, threads or worker processes.
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

from bn_repro.data.crops import CropRandomness
from bn_repro.data.split import Batch, Split

# Gathering a batch from memory takes 30 microseconds. A thread for that would
# take a core from the training step.
_COPYING = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
# Each of these threads waits for a batch that the decoding threads work on. Two
# keep those busy. The buffer is small because batches are large.
_DECODING = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True)
class HostShard:
  """The part of every batch that one process makes.

  Attributes:
    index: index of the process.
    count: number of processes, which make equal parts.
  """

  index: int
  count: int

  def of(self, positions: np.ndarray) -> np.ndarray:
    """Returns this part of the last axis."""
    size = positions.shape[-1] // self.count
    return positions[..., self.index * size : (self.index + 1) * size]


WHOLE_BATCH = HostShard(0, 1)


class ExampleOrder:
  """The training example at each position of the stream.

  The permutation of one epoch, the last one asked for, is kept in memory.

  Attributes:
    num_examples: length of an epoch.
    seed: seed of all permutations.
  """

  def __init__(
    self, num_examples: int, *, num_shards: int, shuffle: str, seed: int
  ):
    """Initializes the order.

    Args:
      num_examples: length of an epoch.
      num_shards: number of shards, contiguous and of equal length up to one.
      shuffle: what each epoch permutes: `none` the shards, `within_shard` the
        shards and the examples within each, `global` all examples.
      seed: seed of all permutations.
    """
    if shuffle == 'global':
      num_shards = 1
    self.num_examples = num_examples
    bounds = np.linspace(0, num_examples, num_shards + 1).astype(np.int64)
    self._shard_of = np.repeat(np.arange(num_shards), np.diff(bounds))
    self._num_shards = num_shards
    self._within = shuffle != 'none'
    self.seed = seed
    self._kept: tuple[int, np.ndarray] | None = None

  def examples(self, positions: np.ndarray) -> np.ndarray:
    """Returns the indices of the examples at positions of the stream.

    Args:
      positions: int64 (n,).

    Returns:
      int64 (n,).
    """
    epochs, offsets = np.divmod(positions, self.num_examples)
    examples = np.empty_like(positions)
    for epoch in np.unique(epochs):
      in_epoch = epochs == epoch
      examples[in_epoch] = self._permutation(int(epoch))[offsets[in_epoch]]
    return examples

  def _permutation(self, epoch: int) -> np.ndarray:
    # Threads share this object: the attribute is read once and written once.
    kept = self._kept
    if kept is None or kept[0] != epoch:
      kept = self._kept = (epoch, self._permute(epoch))
    return kept[1]

  def _permute(self, epoch: int) -> np.ndarray:
    """Sorts by a random number per shard, then by one per example.

    NumPy guarantees that the raw output of Philox never changes.
    """
    random = np.random.Philox(np.random.SeedSequence((self.seed, epoch)))
    of_shard = random.random_raw(self._num_shards)[self._shard_of]
    if not self._within:
      return np.argsort(of_shard, kind='stable')
    return np.lexsort((random.random_raw(self.num_examples), of_shard))


def create_order(config: ConfigDict, num_examples: int) -> ExampleOrder:
  """Creates the order of a config's training examples."""
  return ExampleOrder(
    num_examples,
    num_shards=config.data.num_shards,
    shuffle=config.data.shuffle,
    seed=config.seed,
  )


def positions(step: int, batch_size: int) -> np.ndarray:
  """Returns the positions of a step's examples, int64 (batch_size,)."""
  return np.arange(step * batch_size, (step + 1) * batch_size)


def train_batches(
  split: Split,
  order: ExampleOrder,
  batch_size: int,
  first_step: int,
  last_step: int,
  *,
  host_shard: HostShard = WHOLE_BATCH,
  steps_per_batch: int = 1,
  num_workers: int = 0,
) -> Iterator[Batch]:
  """Yields the training batches of steps `first_step` to `last_step` - 1.

  Every batch is full: at the end of an epoch it continues in the next one.

  Args:
    split: the training images.
    order: order of the training examples.
    batch_size: number of examples of a step, over all processes.
    first_step: first step, a multiple of `steps_per_batch`.
    last_step: step after the last one, a multiple of `steps_per_batch`.
    host_shard: part of each step's examples that this process makes.
    steps_per_batch: number of consecutive steps whose examples form one batch.
    num_workers: number of worker processes; 0 makes batches in this process.
  """

  def load(number: int) -> Batch:
    of_steps = positions(number, steps_per_batch * batch_size)
    here = host_shard.of(of_steps.reshape(steps_per_batch, batch_size)).ravel()
    return split.training_batch(
      order.examples(here), CropRandomness(order.seed, here)
    )

  return _iterate(
    split,
    load,
    first_step // steps_per_batch,
    last_step // steps_per_batch,
    num_workers,
  )


def eval_batches(
  split: Split, batch_size: int, host_shard: HostShard = WHOLE_BATCH
) -> Iterator[Batch]:
  """Yields every example once, in order; padding of the last batch is masked.

  Args:
    split: the images to evaluate.
    batch_size: number of examples of a batch, over all processes.
    host_shard: part of each batch that this process makes.
  """

  def load(number: int) -> Batch:
    here = host_shard.of(positions(number, batch_size))
    batch = split.evaluation_batch(here[here < len(split)])
    padding = len(here) - len(batch['label'])

    def pad(array: Any) -> np.ndarray:
      return np.pad(array, [(0, padding)] + [(0, 0)] * (array.ndim - 1))

    padded: Any = {name: pad(array) for name, array in batch.items()}
    return padded

  return _iterate(split, load, 0, -(-len(split) // batch_size), num_workers=0)


def _iterate(
  split: Split,
  load: Callable[[int], Batch],
  first: int,
  last: int,
  num_workers: int,
) -> Iterator[Batch]:
  """Yields `load(first)` to `load(last - 1)`; decoded images are prefetched."""
  numbers: Any = grain.MapDataset.range(first, last)
  batches = numbers.map(load).to_iter_dataset(
    _COPYING if split.in_memory else _DECODING
  )
  if num_workers:
    # Grain reads absl flags, which no command here parses.
    flags.FLAGS.mark_as_parsed()
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=2),
      _follow_parent,
    )
  iterator = iter(batches)
  try:
    yield from iterator
  finally:
    iterator.close()


def _follow_parent(index: int, count: int) -> None:
  """Makes a worker process ignore signals and exit when its parent is gone.

  A signal to the whole process group must leave the workers alive while the
  parent saves a checkpoint.
  """
  del index, count
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent is not None

  def exit_after_parent() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=exit_after_parent, daemon=True).start()
