"""What the networks share: their outputs, and the layers without weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from bn_repro import parallel

Array = jax.Array

NONLINEARITIES = {'relu': nn.relu, 'sigmoid': nn.sigmoid}


class Logits(NamedTuple):
  """Outputs of the network, (batch, classes); `aux` in training with a head."""

  main: Array
  aux: Array | None


class NoNorm(nn.Module):
  """Stands where a network without batch normalisation has none."""

  use_running_average: bool

  @nn.compact
  def __call__(
    self, x: Array, *, max_pool: Callable[[Array], Array] | None = None
  ) -> Array:
    """Returns its input, pooled if asked."""
    return x if max_pool is None else max_pool(x)


class Dropout(nn.Module):
  """Dropout whose mask depends on an example's place in the global batch.

  Any number of devices therefore drops the same units.
  """

  rate: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Drops a share `rate` of the units, and scales up the others."""
    if self.rate == 0 or self.is_initializing():
      return x
    key = self.make_rng('dropout')
    keys = parallel.example_keys(key, x.shape[0])
    keep = jax.vmap(
      lambda k: jax.random.bernoulli(k, 1 - self.rate, x.shape[1:])
    )(keys)
    return jnp.where(keep, x / (1 - self.rate), 0)


def classifier(num_classes: int, dtype: Any) -> nn.Dense:
  """The last layer of a network, always with a bias."""
  return nn.Dense(
    num_classes,
    dtype=dtype,
    param_dtype=parameter_dtype(dtype),
    name='classifier',
  )


def compute_dtype(model: ConfigDict, platform: str | None = None) -> Any:
  """The type that `config.model.dtype` stands for.

  Args:
    model: the `model` sub-tree of a config.
    platform: cpu, gpu or tpu; None for the one there is.
  """
  if model.dtype != 'auto':
    return jnp.dtype(model.dtype)
  on_cpu = (platform or jax.default_backend()) == 'cpu'
  return jnp.dtype('float32' if on_cpu else 'bfloat16')


def parameter_dtype(dtype: Any) -> Any:
  """Parameters are float32 whatever the compute type, float64 with float64."""
  return jnp.promote_types(dtype, jnp.float32)
