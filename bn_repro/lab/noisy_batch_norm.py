"""BN whose outputs are disturbed by noise that is drawn anew at each step.

Santurkar et al. ("How Does Batch Normalization Help Optimization?", 2018) show
with it that a network can train well although the distributions of its
activations change all the time. In our reading of their definition, which like
its three constants is not checked against their code, each step draws for each
unit

  mu ~ U(-n_mu, n_mu) and sigma ~ U(1, n_sigma),

and then for each value y of this unit, which becomes s * y + m,

  m ~ U(mu - r, mu + r) and s ~ N(sigma, r^2).

The noise is not stationary, because each step has another mu and sigma.
"""

import flax.linen as nn
import jax

from bn_repro.models.batch_norm import BatchNorm

N_MU = 0.5
N_SIGMA = 1.25
R = 0.1


class NoisyBatchNorm(nn.Module):
  """`BatchNorm`, and in training the noise, from the random stream `noise`.

  Attributes:
    use_running_average: normalize with the running statistics, without noise.
  """

  use_running_average: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Normalizes and disturbs (batch, ..., units)."""
    y = BatchNorm(self.use_running_average)(x)
    if self.use_running_average or self.is_initializing():
      return y
    keys = jax.random.split(self.make_rng('noise'), 4)
    units = (1,) * (y.ndim - 1) + y.shape[-1:]
    mu = jax.random.uniform(keys[0], units, y.dtype, -N_MU, N_MU)
    sigma = jax.random.uniform(keys[1], units, y.dtype, 1, N_SIGMA)
    m = mu + jax.random.uniform(keys[2], y.shape, y.dtype, -R, R)
    s = sigma + R * jax.random.normal(keys[3], y.shape, y.dtype)
    return s * y + m
