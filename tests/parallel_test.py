"""The mesh, and what all devices or processes are asked."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from bn_repro import parallel
from bn_repro.runtime.preemption import (
  AgreedPreemption,
  Preempted,
  Preemption,
)


def test_devices_of_a_process_stand_together(monkeypatch):
  """In whatever order they are listed."""
  listed = [
    SimpleNamespace(process_index=p, id=i)
    for i, p in ((3, 1), (0, 0), (2, 0), (1, 1))
  ]
  monkeypatch.setattr(jax, 'devices', lambda: listed)
  monkeypatch.setattr(parallel, 'Mesh', lambda devices, *_, **__: devices)
  mesh = parallel.create_mesh()
  assert [(d.process_index, d.id) for d in mesh] == [
    (0, 0),
    (0, 2),
    (1, 1),
    (1, 3),
  ]


def replicas(copies):
  """A replicated array whose copies may differ, which JAX does not notice."""
  mesh = parallel.create_mesh()
  sharding = parallel.NamedSharding(mesh, parallel.PartitionSpec())
  return jax.make_array_from_single_device_arrays(
    copies[0].shape,
    sharding,
    [
      jax.device_put(copy, device)
      for copy, device in zip(copies, mesh.devices.flat, strict=True)
    ],
  )


@pytest.mark.parametrize('dtype', [np.float32, np.int32, jax.numpy.bfloat16])
@pytest.mark.parametrize(
  'change',
  [
    'one value',
    'one bit',
    'sign of zero',
    'two signs',
    'all signs',
    'two values',
    'two rows',
    None,
  ],
)
def test_replicas_that_differ_are_named(change, dtype):
  array = np.arange(1000).astype(dtype).reshape(10, 100)
  other = array.copy()
  if change == 'one value':
    other[0, 5] += 1
  elif change == 'one bit':
    other.view(np.uint8)[7, 3] ^= 1
  elif change == 'two signs':
    other[[2, 5], [3, 7]] *= -1
  elif change == 'all signs':
    other = -other
  elif change == 'two values':
    other[[2, 5], [3, 7]] = other[[5, 2], [7, 3]]
  elif change == 'two rows':
    other[[2, 3]] = other[[3, 2]]
  elif change == 'sign of zero':
    other.view(np.uint8).reshape(-1)[other.itemsize - 1] ^= 0x80
  tree = {
    'same': replicas([array] * 8),
    'params': {'kernel': replicas([array] * 6 + [other] + [array])},
  }
  check = parallel.create_replica_check(parallel.create_mesh())
  assert check(tree) == ([] if change is None else ['params/kernel'])


@pytest.mark.parametrize('num_processes', [1, 2])
def test_replicate(num_processes, monkeypatch):
  """Each way of placing them gives every device all bits, and the types."""
  monkeypatch.setattr(jax, 'process_count', lambda: num_processes)
  mesh = parallel.create_mesh()
  tree = {
    'a': np.array([-0.0, np.nan, 1.5], np.float32),
    'b': (np.int32(7), np.arange(6).astype(jax.numpy.bfloat16).reshape(2, 3)),
  }
  placed = parallel.replicate(mesh, tree)
  again = parallel.replicate(mesh, placed)
  for result in (placed, again):
    assert jax.tree.structure(result) == jax.tree.structure(tree)
    for x, like in zip(
      jax.tree.leaves(result), jax.tree.leaves(tree), strict=True
    ):
      assert x.is_fully_replicated and x.dtype == like.dtype
      copies = [np.asarray(shard.data) for shard in x.addressable_shards]
      assert [copy.tobytes() for copy in copies] == [like.tobytes()] * 8
      assert copies[0].shape == like.shape


def test_replica_check_in_float64(x64):
  array = np.arange(100.0)
  other = array.copy()
  other[3] = np.nextafter(other[3], 4)
  check = parallel.create_replica_check(parallel.create_mesh())
  assert check([replicas([array] * 8)]) == []
  assert check([replicas([array] * 7 + [other])]) == ['0']


def test_maximum():
  maximum = parallel.create_maximum(parallel.create_mesh())
  assert [int(maximum(n)) for n in (0, 15, 2)] == [0, 15, 2]


def test_an_agreed_interruption_comes_one_question_later():
  """From this process or another: `maximum` speaks for all."""
  own = Preemption()
  elsewhere = iter([0, 0, 15, 0, 0])
  asked = []

  def maximum(number):
    asked.append(number)
    return max(number, next(elsewhere))

  agreed = AgreedPreemption(own, maximum)
  for _ in range(3):
    agreed.check()
  with pytest.raises(Preempted, match='SIGTERM'):
    agreed.check()
  assert asked == [0, 0, 0, 0]
  assert agreed.run(lambda: 7) == 7
