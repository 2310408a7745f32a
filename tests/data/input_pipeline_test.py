"""The order of examples, and batches of arrays in memory."""

import numpy as np
import pytest

from bn_repro.data.input_pipeline import (
  ExampleOrder,
  eval_batches,
  positions,
  train_batches,
)
from bn_repro.data.split import ArraySplit

REGIMES = ('none', 'within_shard', 'global')


def order(shuffle, num_examples=103, num_shards=5, seed=0):
  return ExampleOrder(
    num_examples, num_shards=num_shards, shuffle=shuffle, seed=seed
  )


def epoch(shuffle, number, **kwargs):
  """The examples of an epoch."""
  each = order(shuffle, **kwargs)
  n = each.num_examples
  return each.examples(np.arange(number * n, (number + 1) * n))


@pytest.mark.parametrize('shuffle', REGIMES)
def test_each_epoch_is_a_permutation_of_its_own(shuffle):
  first, second = epoch(shuffle, 0), epoch(shuffle, 1)
  for examples in (first, second, epoch(shuffle, 7)):
    np.testing.assert_array_equal(np.sort(examples), np.arange(103))
  assert (first != second).any()
  assert (first != epoch(shuffle, 0, seed=1)).any()


def shards_of(examples):
  """An epoch, cut where the shard changes."""
  starts = np.linspace(0, 103, 6).astype(int)
  shard = np.searchsorted(starts, examples, side='right') - 1
  cuts = np.flatnonzero(np.diff(shard)) + 1
  return np.split(examples, cuts)


def test_none_keeps_the_order_within_a_shard():
  runs = shards_of(epoch('none', 3))
  assert len(runs) == 5
  for run in runs:
    np.testing.assert_array_equal(run, np.arange(run[0], run[0] + len(run)))


def test_within_shard_mixes_within_a_shard_alone():
  runs = shards_of(epoch('within_shard', 3))
  assert len(runs) == 5
  assert all((np.diff(run) != 1).any() for run in runs)


def test_global_mixes_all():
  assert len(shards_of(epoch('global', 3))) > 50


@pytest.mark.parametrize('shuffle', REGIMES)
def test_arithmetic_on_the_step(shuffle):
  """Steps may be asked for in any order; two batches of 16 are one of 32."""
  forwards, backwards = order(shuffle), order(shuffle)
  expected = [forwards.examples(positions(step, 16)) for step in range(40)]
  for step in reversed(range(40)):
    np.testing.assert_array_equal(
      backwards.examples(positions(step, 16)), expected[step]
    )
  np.testing.assert_array_equal(
    order(shuffle).examples(positions(9, 32)), np.concatenate(expected[18:20])
  )


def split(n):
  images = np.arange(n, dtype=np.uint8).reshape(n, 1, 1, 1)
  return ArraySplit(images, np.arange(n, dtype=np.int32))


def test_stream_resumes_at_any_step():
  data, each = split(103), order('within_shard')
  whole = list(train_batches(data, each, 16, 0, 30))
  rest = list(train_batches(data, each, 16, 17, 30))
  assert len(whole) == 30
  for a, b in zip(whole[17:], rest, strict=True):
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])
  assert all(batch['mask'].all() for batch in whole)


@pytest.mark.parametrize('n', [1, 31, 32, 33, 100])
def test_evaluation_has_every_example_once(n):
  batches = list(eval_batches(split(n), 32))
  assert all(batch['image'].shape == (32, 1, 1, 1) for batch in batches)
  seen = np.concatenate([b['label'][b['mask']] for b in batches])
  np.testing.assert_array_equal(seen, np.arange(n))
