"""The mesh, and every collective of the program but those inside BN.

A step runs on each device under `jax.shard_map`, with the state replicated and
the batch split along `AXIS`; one device is a mesh of one. Varying-manual-axes
checking is off (`check_vma=False`): gradients taken inside are then those of
this device's own loss, plus what its examples contribute to other devices'
losses through shared BN statistics, and one explicit `mean` makes them the
gradients of the mean loss. (With checking on they arrive already summed, and
averaging them once more would make them too large by the number of devices.)
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

AXIS = 'data'


def create_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A one-dimensional mesh of the given devices, by default all of them."""
  devices = jax.devices() if devices is None else devices
  return Mesh(
    np.asarray(devices), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,)
  )


def replicate(mesh: Mesh, tree: Any) -> Any:
  """Places a copy of every array on every device."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def _split(batch_axis: int) -> PartitionSpec:
  return PartitionSpec(*(None,) * batch_axis, AXIS)


def shard_batch(mesh: Mesh, batch: Any, batch_axis: int = 0) -> Any:
  """Splits an axis of this process's arrays over the devices."""
  sharding = NamedSharding(mesh, _split(batch_axis))
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, x), batch
  )


def data_parallel(
  fn: Callable[..., Any],
  mesh: Mesh,
  *,
  donate_state: bool,
  batch_axis: int = 0,
) -> Callable[..., Any]:
  """Compiles `fn(state, batch)` to run on each device's share of the batch.

  Args:
    fn: pure function of a replicated state and a sharded batch; everything it
      returns must be equal on all devices.
    mesh: the devices.
    donate_state: reuse the state's buffers for what is returned.
    batch_axis: the axis of the batch's arrays that is split.
  """
  sharded = jax.shard_map(
    fn,
    mesh=mesh,
    in_specs=(PartitionSpec(), _split(batch_axis)),
    out_specs=PartitionSpec(),
    check_vma=False,
  )
  return jax.jit(sharded, donate_argnums=(0,) if donate_state else ())


def mean(tree: Any) -> Any:
  """Average over devices; call inside a `data_parallel` function."""
  return lax.pmean(tree, AXIS)


def total(tree: Any) -> Any:
  """Sum over devices; call inside a `data_parallel` function."""
  return lax.psum(tree, AXIS)


def gather(tree: Any) -> Any:
  """All devices' examples, in order; call inside a `data_parallel` function."""
  return jax.tree.map(lambda x: lax.all_gather(x, AXIS, tiled=True), tree)


def example_keys(key: jax.Array, num_examples: int) -> jax.Array:
  """A random key for each example of this device, by its global position.

  The same example gets the same key on any number of devices.
  """
  first = lax.axis_index(AXIS) * num_examples
  positions = first + jnp.arange(num_examples)
  return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)
