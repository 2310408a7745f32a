"""The whitening that section 2 asks for, and BN replaces."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Whitening(nn.Module):
  """Whitening of the units of a layer, then scale and shift as in BN.

  Section 2: (x - E[x]) Cov[x]^(-1/2), over the batch. The root is the symmetric
  one (ZCA), from the eigenvectors of the covariance, through which JAX
  differentiates. Their derivatives divide by the differences of eigenvalues, so
  that there is none where two are equal.

  Attributes:
    use_running_average: not used; the statistics are always those of the batch.
    epsilon: constant added to the eigenvalues. A batch with no more examples
      than units has a singular covariance.
  """

  use_running_average: bool
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Whitens `x`, (batch, units)."""
    gamma = self.param('scale', nn.initializers.ones, x.shape[-1:], x.dtype)
    beta = self.param('bias', nn.initializers.zeros, x.shape[-1:], x.dtype)
    centered = x - x.mean(0, keepdims=True)
    values, vectors = jnp.linalg.eigh(centered.T @ centered / x.shape[0])
    root = vectors * (values + self.epsilon)[None] ** -0.5 @ vectors.T
    return gamma[None] * (centered @ root) + beta[None]
