"""Group and layer normalization, with the interface of `BatchNorm`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from bn_repro.models.batch_norm import identity


class GroupNorm(nn.Module):
  """Group normalization (Wu & He, 2018) and the nonlinearity after it.

  Mean and variance are those of one example, over all locations and the
  channels of a group. One group is layer normalization (Ba et al., 2016), as Wu
  and He apply it to convolutions.

  Attributes:
    num_groups: number of groups of neighboring channels, of equal size.
    use_running_average: not used; training and inference are the same.
    epsilon: constant added to the variance.
    dtype: dtype of the result; None infers it from the input and parameters.
    nonlinearity: elementwise function that is applied to the result.
  """

  num_groups: int
  use_running_average: bool
  epsilon: float = 1e-5
  dtype: Any = None
  nonlinearity: Callable[[jax.Array], jax.Array] = identity

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalizes `x`, (batch, ..., channels); returns the same shape."""
    norm = nn.GroupNorm(
      self.num_groups,
      epsilon=self.epsilon,
      dtype=self.dtype,
      # E[x^2] - E[x]^2 loses the variance where |mean| >> std.
      use_fast_variance=False,
    )
    return self.nonlinearity(norm(x))
