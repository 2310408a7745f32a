"""A network of convolutions that takes its norm as an argument."""

import functools
from typing import Any

import flax.linen as nn
import jax

from bn_repro.models.inception import ConvUnit
from bn_repro.models.layers import Logits, NoNorm, classifier


class ConvNetwork(nn.Module):
  """Convolutions of 3x3 with stride 2, the mean over locations, and classes.

  Attributes:
    depth: number of convolutions.
    width: number of their channels.
    norm: normalization before each ReLU; called with `use_running_average` and
      `nonlinearity`. With `NoNorm`, convolutions have a bias.
    dtype: compute dtype.
  """

  depth: int
  width: int
  norm: Any
  dtype: Any

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> Logits:
    """Logits of (batch, height, width, channels) images in [-1, 1]."""
    x, use_bias = images.astype(self.dtype), self.norm is NoNorm
    for _ in range(self.depth):
      x = ConvUnit(
        self.width,
        kernel=3,
        conv=functools.partial(nn.Conv, use_bias=use_bias, dtype=self.dtype),
        norm=functools.partial(self.norm, use_running_average=not train),
        nonlinearity=nn.relu,
        strides=2,
      )(x)
    return Logits(classifier(10, self.dtype)(x.mean((1, 2))), None)
