"""The mesh, and all collectives except those of batch normalization.

A step runs on each device under `jax.shard_map`, with the state replicated and
the batch split along `AXIS`; a single device is a mesh of one. Checking of
varying manual axes is off (`check_vma=False`). Gradients taken inside are then
those of the loss of this device, plus the contributions of its examples to the
losses of other devices through shared BN statistics; one explicit `mean` turns
them into the gradients of the mean loss. (With checking on, JAX has already
summed them, and averaging them again would make them too large by the number of
devices.)
"""

from collections.abc import Callable, Sequence
import os
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

AXIS = 'data'


def create_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A one-dimensional mesh of the given devices, by default all devices.

  The devices of a process are adjacent: each process loads one contiguous part
  of every batch.
  """
  if devices is None:
    devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
  return Mesh(
    np.asarray(devices), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,)
  )


def replicate(mesh: Mesh, tree: Any) -> Any:
  """Places a copy of every array on every device."""
  sharding = NamedSharding(mesh, PartitionSpec())
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)

  # Each process places its own copy: `device_put` would compare the arrays of
  # all processes, and NaN is not equal to itself.
  def place(x: Any) -> jax.Array:
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)

  return jax.tree.map(place, tree)


def _batch_spec(batch_axis: int) -> PartitionSpec:
  return PartitionSpec(*(None,) * batch_axis, AXIS)


def shard_batch(mesh: Mesh, batch: Any, batch_axis: int = 0) -> Any:
  """Splits the batch axis of the arrays of this process over the devices."""
  sharding = NamedSharding(mesh, _batch_spec(batch_axis))
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def replicate_abstract(mesh: Mesh, tree: Any) -> Any:
  """Shapes, dtypes and shardings of a tree placed by `replicate`."""
  return _place_abstract(tree, NamedSharding(mesh, PartitionSpec()))


def shard_abstract(mesh: Mesh, batch: Any, batch_axis: int) -> Any:
  """Shapes, dtypes and shardings of a global batch placed by `shard_batch`."""
  return _place_abstract(batch, NamedSharding(mesh, _batch_spec(batch_axis)))


def _place_abstract(tree: Any, sharding: NamedSharding) -> Any:
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def data_parallel(
  fn: Callable[..., Any],
  mesh: Mesh,
  *,
  donate_state: bool,
  batch_axis: int = 0,
) -> Callable[..., Any]:
  """Jits `fn(state, batch)` to run on each device with its part of the batch.

  Args:
    fn: pure function of a replicated state and a sharded batch; its results
      must be equal on all devices.
    mesh: the devices.
    donate_state: reuse the buffers of the state for the results.
    batch_axis: the axis of the arrays of the batch that is split.
  """
  sharded = jax.shard_map(
    fn,
    mesh=mesh,
    in_specs=(PartitionSpec(), _batch_spec(batch_axis)),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  return jax.jit(
    sharded,
    donate_argnums=(0,) if donate_state else (),
    compiler_options=_compiler_options(mesh),
  )


def _compiler_options(mesh: Mesh) -> dict[str, Any] | None:
  """Lets LLVM optimize less on CPUs, unless XLA_FLAGS sets its level.

  Its passes beyond level 2 take a tenth of the compiler's time, and make no
  step faster. Measured by us, for Inception in `mini`.
  """
  option = 'xla_backend_optimization_level'
  is_cpu = mesh.devices.flat[0].platform == 'cpu'
  if not is_cpu or option in os.environ.get('XLA_FLAGS', ''):
    return None
  return {option: 2}


def create_maximum(mesh: Mesh) -> Callable[[int], jax.Array]:
  """Creates a function that returns the maximum of a number over processes.

  The function is asynchronous, and every process must call it.
  """
  largest = jax.jit(
    jax.shard_map(
      lambda x: lax.pmax(x[0], AXIS),
      mesh=mesh,
      in_specs=PartitionSpec(AXIS),
      out_specs=PartitionSpec(),
      check_vma=False,
    )
  )

  def maximum(number: int) -> jax.Array:
    local = np.full(mesh.local_mesh.devices.size, number, np.int32)
    return largest(shard_batch(mesh, local))

  return maximum


def create_replica_check(mesh: Mesh) -> Callable[[Any], list[str]]:
  """Creates a function that names the arrays whose replicas differ.

  The function compares digests of all bits of each replica, and every process
  must call it.
  """

  def digest(x: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(x, f'uint{8 * min(x.dtype.itemsize, 4)}')
    words = bits.ravel().astype(jnp.uint32)
    # Words are mixed with their positions by the finalizer of MurmurHash3. A
    # plain or weighted sum would not notice an even number of flipped signs.
    # 2^32 / golden ratio spreads the positions.
    words += lax.iota(jnp.uint32, words.size) * np.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
      words = (words ^ (words >> shift)) * np.uint32(factor)
    return words.sum(dtype=jnp.uint32)

  def digests(tree: Any) -> jax.Array:
    own = jnp.stack([digest(x) for x in jax.tree.leaves(tree)])
    return lax.all_gather(own, AXIS)

  of_all_devices = jax.jit(
    jax.shard_map(
      digests,
      mesh=mesh,
      in_specs=PartitionSpec(),
      out_specs=PartitionSpec(),
      check_vma=False,
    )
  )

  def check(tree: Any) -> list[str]:
    found = np.asarray(of_all_devices(tree))
    differs = (found != found[0]).any(0)
    return [
      name
      for name, wrong in zip(named_leaves(tree), differs, strict=True)
      if wrong
    ]

  return check


def named_leaves(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by path, such as 'params/conv1/conv/kernel'."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def mean(tree: Any) -> Any:
  """Average over devices; call inside a `data_parallel` function."""
  return tree if lax.axis_size(AXIS) == 1 else lax.pmean(tree, AXIS)


def total(tree: Any) -> Any:
  """Sum over devices; call inside a `data_parallel` function."""
  return tree if lax.axis_size(AXIS) == 1 else lax.psum(tree, AXIS)


def gather(tree: Any) -> Any:
  """All devices' examples, in order; call inside a `data_parallel` function."""
  return jax.tree.map(lambda x: lax.all_gather(x, AXIS, tiled=True), tree)


def example_keys(key: jax.Array, num_examples: int) -> jax.Array:
  """A random key for each example of this device, by its global position.

  An example gets the same key on any number of devices.
  """
  first = lax.axis_index(AXIS) * num_examples
  positions = first + jnp.arange(num_examples)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
