"""Group and layer normalization, where a network takes its norm."""

from collections.abc import Callable

import flax.linen as nn
import jax

from bn_repro.models.batch_norm import identity


class GroupNorm(nn.Module):
  """Group normalization (Wu & He, 2018) and the nonlinearity after it.

  Mean and variance are those of one example, over all locations and the
  channels of a group. One group is layer normalization (Ba et al., 2016), as Wu
  and He apply it to convolutions.

  Attributes:
    use_running_average: not used; training and inference are the same.
    nonlinearity: applied to the result.
    num_groups: number of groups of neighboring channels.
    epsilon: constant added to the variance.
  """

  use_running_average: bool
  nonlinearity: Callable[[jax.Array], jax.Array] = identity
  num_groups: int = 1
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalizes `x`, (batch, ..., channels)."""
    norm = nn.GroupNorm(self.num_groups, epsilon=self.epsilon)
    return self.nonlinearity(norm(x))
