"""What the networks share: their outputs, and the layers without weights."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

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
  def __call__(self, x: Array) -> Array:
    """Returns its input."""
    return x


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


def parameter_dtype(dtype: Any) -> Any:
  """Parameters are float32 whatever the compute type, float64 with float64."""
  return jnp.promote_types(dtype, jnp.float32)
