"""A small convolutional network, normalized over groups, and its training."""

from collections.abc import Iterator, Mapping
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import optax

from bn_repro.data import input_pipeline, preprocess
from bn_repro.data.split import Batch, Split
from bn_repro.lab.batch_renorm import BatchRenorm
from bn_repro.models.batch_norm import BatchNorm
from bn_repro.models.layers import classifier
from bn_repro.training.metrics import cross_entropy

BN, RENORM = 'BN', 'Batch Renorm'

# Our choice. Each layer halves the sides of its input: an image of 28x28 pixels
# leaves 4x4 values per feature to the statistics of the last layer.
_FEATURES = (16, 32, 64)
_MOMENTUM = optax.trace(decay=0.9)


class SmallNetwork(nn.Module):
  """Convolutions, each with a norm and a ReLU, and a classifier.

  Attributes:
    norm: `BN` or `RENORM`.
    group: number of images that share statistics in training.
    momentum: share of the old value in moving averages.
    dtype: compute dtype.
  """

  norm: str
  group: int
  momentum: float
  dtype: str

  @nn.compact
  def __call__(self, images: Any, *, train: bool, progress: Any = 1.0) -> Any:
    """Logits of uint8 images (batch, height, width, channels).

    With `train`, the statistics are those of groups. In the course of the
    training, from `progress` 0 to 1, Batch Renorm turns from BN into Ioffe's.
    """
    norm: Any = BatchNorm
    if self.norm == RENORM:
      r_max, d_max = 1 + 2 * progress, 5 * progress
      norm = functools.partial(BatchRenorm, r_max=r_max, d_max=d_max)
    x = preprocess.normalize(images, self.dtype, 'symmetric')
    for number, features in enumerate(_FEATURES):
      x = nn.Conv(features, (3, 3), 2, use_bias=False, dtype=self.dtype)(x)
      x = norm(
        virtual_batch_size=self.group,
        use_running_average=not train,
        momentum=self.momentum,
        dtype=self.dtype,
        nonlinearity=nn.relu,
        name=f'norm{number}',
      )(x)
    return classifier(10, self.dtype)(x.mean((1, 2)))


def batches(split: Split, seed: int, size: int, count: int) -> Iterator[Batch]:
  """Full batches of the first `count` images in a random order, or fewer."""
  order = input_pipeline.ExampleOrder(
    len(split), num_shards=1, shuffle='global', seed=seed
  )
  return input_pipeline.train_batches(split, order, size, 0, count // size)


def train(
  network: SmallNetwork,
  config: ConfigDict,
  splits: Mapping[str, Split],
  seed: int,
  size: int,
) -> Iterator[Any]:
  """Trains with SGD, at a rate that falls to 0 as a cosine.

  Args:
    network: the network.
    config: `epochs`, `marks`, and `learning_rate` for batches of `batch_size`.
    splits: the split `train`.
    seed: seed of the initial weights and of the order of images.
    size: number of images in a batch; the rate is proportional to it.

  Yields:
    The variables at `config.marks` times, equally spaced, the last at the end.
  """
  split = splits['train']
  count = int(config.epochs * len(split))
  steps = count // size
  rate = config.learning_rate * size / config.batch_size
  image = np.zeros((1, *split.image_shape), np.uint8)
  variables = network.init(jax.random.key(seed), image, train=True)
  state = variables, _MOMENTUM.init(variables['params'])
  for step, batch in enumerate(batches(split, seed, size, count)):
    state = _update(network, state, batch, rate, step / steps)
    if (step + 1) * config.marks // steps > step * config.marks // steps:
      yield state[0]


@functools.partial(jax.jit, static_argnums=0)
def _update(
  network: SmallNetwork, state: Any, batch: Batch, rate: Any, progress: Any
) -> Any:
  """Variables and momentum after a step."""
  variables, momentum = state

  def loss(params: Any) -> tuple[jax.Array, Any]:
    logits, updated = network.apply(
      {**variables, 'params': params},
      batch['image'],
      train=True,
      progress=progress,
      mutable=['batch_stats'],
    )
    return cross_entropy(logits, batch['label']).mean(), updated

  gradients, updated = jax.grad(loss, has_aux=True)(variables['params'])
  directions, momentum = _MOMENTUM.update(gradients, momentum)
  rate = -rate * (1 + jnp.cos(jnp.pi * progress)) / 2
  updates = jax.tree.map(lambda direction: rate * direction, directions)
  params = optax.apply_updates(variables['params'], updates)
  return {'params': params, **updated}, momentum
