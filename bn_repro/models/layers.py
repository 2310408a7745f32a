"""Layers and types that the networks share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from bn_repro import parallel
from bn_repro.models.batch_norm import identity

Array = jax.Array
ModuleDef = Callable[..., Any]

NONLINEARITIES = {'relu': nn.relu, 'sigmoid': nn.sigmoid}


class Logits(NamedTuple):
  """Outputs of a network, (batch, classes); `aux` with a head, in training."""

  main: Array
  aux: Array | None


class NoNorm(nn.Module):
  """Takes the place of the normalization in a network without BN."""

  use_running_average: bool
  nonlinearity: Callable[[Array], Array] = identity

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Applies the nonlinearity alone."""
    return self.nonlinearity(x)


class Dropout(nn.Module):
  """Dropout with a mask that depends on the position in the global batch.

  The same units are therefore dropped on any number of devices.
  """

  rate: float

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Sets a fraction `rate` of the units to zero and scales up the rest."""
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
  """The dtype of the parameters: float32, or float64 with float64."""
  return jnp.promote_types(dtype, jnp.float32)
