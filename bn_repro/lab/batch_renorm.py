"""Batch Renormalization (Ioffe, 2017), with the interface of `BatchNorm`.

Training and inference should normalize alike. With mu and sigma of the moving
averages, inference gives

  (x - mu) / sigma = xhat * r + d
  r = sigma_B / sigma
  d = (mu_B - mu) / sigma

where xhat = (x - mu_B) / sigma_B comes from the batch. In training, r and d are
constants for the gradients, and r is limited to [1 / r_max, r_max] and d to
[-d_max, d_max]. With r_max = 1 and d_max = 0 this is batch normalization.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp

from bn_repro.models import batch_norm

Array = jax.Array


class BatchRenorm(nn.Module):
  """Batch renormalization over groups of examples, per feature.

  The variables are those of `BatchNorm`, and so is inference. Ioffe averages
  sigma_B; here the unbiased variance is averaged, as in `BatchNorm`, so that
  moving averages and population statistics can take each other's place.

  Attributes:
    r_max: limit of r, at least 1; a number or a scalar array.
    d_max: limit of d, at least 0; likewise.
    virtual_batch_size: number of examples that share statistics; it divides the
      batch.
    use_running_average: normalize with the running statistics (inference).
    momentum: weight of the old running average.
    epsilon: constant added to the variance.
    dtype: dtype of the result; None infers it from the input and parameters.
    nonlinearity: elementwise function that is applied to the result.
  """

  r_max: Any
  d_max: Any
  virtual_batch_size: int
  use_running_average: bool | None = None
  momentum: float = 0.99
  epsilon: float = 1e-5
  dtype: Any = None
  nonlinearity: Callable[[Array], Array] = batch_norm.identity

  @nn.compact
  def __call__(
    self,
    x: Array,
    use_running_average: bool | None = None,  # noqa: FBT001 As in Flax.
  ) -> Array:
    """Normalizes `x`, (batch, ..., features); returns the same shape."""
    inference = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    new = x.shape[-1:], jnp.float32
    running_mean = self.variable('batch_stats', 'mean', jnp.zeros, *new)
    running_var = self.variable('batch_stats', 'var', jnp.ones, *new)
    gamma = self.param('scale', nn.initializers.ones, *new)
    beta = self.param('bias', nn.initializers.zeros, *new)
    dtype = nn.dtypes.canonicalize_dtype(x, gamma, dtype=self.dtype)

    single = inference or self.is_initializing()
    size = len(x) if single else self.virtual_batch_size
    groups = x.reshape(-1, size, *x.shape[1:])
    groups = groups.astype(jnp.promote_types(dtype, gamma.dtype))
    # Of the rank of `groups`, the variables broadcast against it.
    gamma, beta, mu, var = (
      v.reshape((1,) * x.ndim + v.shape)
      for v in (gamma, beta, running_mean.value, running_var.value)
    )
    if not inference:
      sharing = batch_norm.Sharing(tuple(range(1, x.ndim)))
      batch_mu, batch_var, m = batch_norm.batch_moments(
        groups, mu, None, sharing, one_reduction=True
      )
      inverse_std = lax.rsqrt(var + self.epsilon)
      r = jnp.sqrt(batch_var + self.epsilon) * inverse_std
      d = (batch_mu - mu) * inverse_std
      r = lax.stop_gradient(jnp.clip(r, 1 / self.r_max, self.r_max))
      d = lax.stop_gradient(jnp.clip(d, -self.d_max, self.d_max))
      # gamma * (xhat * r + d) + beta
      gamma, beta, mu, var = gamma * r, gamma * d + beta, batch_mu, batch_var
      if not self.is_initializing():
        unbiased = batch_norm.unbiased_variance(var, m)
        for running, found in ((running_mean, mu), (running_var, unbiased)):
          running.value = batch_norm.moving_average(
            running.value, found, jnp.ones_like(found, bool), self.momentum
          )
    y = batch_norm.normalize(groups, gamma, beta, mu, var, self.epsilon)
    return self.nonlinearity(y).astype(dtype).reshape(x.shape)
