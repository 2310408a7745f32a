"""The MNIST network of section 4.1: three hidden layers of 100 sigmoids."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
from ml_collections import ConfigDict

from bn_repro.models.layers import (
  NONLINEARITIES,
  Array,
  Logits,
  ModuleDef,
  classifier,
)

HIDDEN_LAYERS = 3
HIDDEN_UNITS = 100

# Fig. 1 (b, c): the inputs of the last hidden layer's nonlinearity.
PROBE = 'last_hidden_input'


class Mlp(nn.Module):
  """Fully connected: y = g(BN(Wu)), or g(Wu + b), three times, then classes.

  The inputs of the last hidden nonlinearities are stored under `PROBE` in the
  collection `probes`, if it is mutable.

  Attributes:
    num_classes: number of logits.
    features: number of units of each hidden layer.
    dense: fully connected layer, with or without a bias.
    norm: normalization; called with `use_running_average`.
    nonlinearity: applied after every normalization.
    dtype: compute dtype.
  """

  num_classes: int
  features: tuple[int, ...]
  dense: ModuleDef
  norm: ModuleDef
  nonlinearity: Callable[[Array], Array]
  dtype: Any

  @nn.compact
  def __call__(self, images: Array, *, train: bool) -> Logits:
    """Logits of (batch, height, width, channels) images in [-1, 1]."""
    # The paper's pixels are 0 and 1.
    x = (images.astype(self.dtype) + 1) / 2
    x = x.reshape(x.shape[0], -1)
    for number, features in enumerate(self.features, start=1):
      x = self.dense(features, name=f'hidden{number}')(x)
      x = self.norm(use_running_average=not train, name=f'hidden{number}_bn')(x)
      if number == len(self.features):
        self.sow('probes', PROBE, x)
      x = self.nonlinearity(x)
    return Logits(classifier(self.num_classes, self.dtype)(x), None)


def create(
  model: ConfigDict,
  num_classes: int,
  dense: ModuleDef,
  norm: ModuleDef,
  last_norm: ModuleDef,
  dtype: Any,
) -> Mlp:
  """Builds the network of `config.model` around a dense layer and a norm.

  `last_norm` is not used: all statistics of this network are per activation.
  """
  del last_norm
  return Mlp(
    num_classes=num_classes,
    features=(round(HIDDEN_UNITS * model.width),) * HIDDEN_LAYERS,
    dense=dense,
    norm=norm,
    nonlinearity=NONLINEARITIES[model.nonlinearity],
    dtype=dtype,
  )
