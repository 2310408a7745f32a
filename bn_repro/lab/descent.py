"""Gradient descent of a deep network with and without BN, step by step."""

from collections.abc import Iterator, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from bn_repro.data import datasets, preprocess
from bn_repro.data.input_pipeline import ExampleOrder, positions
from bn_repro.data.split import Batch, Dataset
from bn_repro.errors import UserError
from bn_repro.lab.noisy_batch_norm import NoisyBatchNorm
from bn_repro.lab.smoothness import Gradient
from bn_repro.models import factory
from bn_repro.models.batch_norm import BatchNorm
from bn_repro.models.layers import NoNorm
from bn_repro.models.mlp import Mlp
from bn_repro.training.metrics import cross_entropy

_DATA = ('mnist_5k', 'mnist', 'fashion_mnist')

# BN's mean subtraction cancels a bias (section 3.2).
_NO_BIAS = functools.partial(nn.Dense, use_bias=False)
NETWORKS: Mapping[str, tuple[Any, Any]] = {
  'no BN': (nn.Dense, NoNorm),
  'BN': (_NO_BIAS, BatchNorm),
  'noisy BN': (_NO_BIAS, NoisyBatchNorm),
}


class Step(NamedTuple):
  """A step of training.

  Attributes:
    number: of steps before it.
    gradient: loss of its batch, and gradient, as a function of the weights.
    w: the weights.
    loss: the loss at `w`.
    updated: the weights after the step.
    layers: the modules of each layer, the one with a kernel first.
  """

  number: int
  gradient: Gradient
  w: Any
  loss: float
  updated: Any
  layers: Sequence[Sequence[str]]


def check(config: ConfigDict) -> None:
  """Checks that the networks of a config can be trained.

  Raises:
    UserError: if they cannot, or the data are missing.
  """
  if config.batch_size < 2:
    raise UserError('config.batch_size=1: one example has no variance.')
  _load(config.data)


def _load(data: ConfigDict) -> Dataset:
  if data.name not in _DATA:
    raise UserError(
      f'config.data.name={data.name}: must be one of {", ".join(_DATA)}.'
    )
  return datasets.find(data.name).load(data)


def descend(
  config: ConfigDict, name: str, learning_rate: float, seed: int
) -> Iterator[Step]:
  """Trains a network by SGD; yields every `config.measure_every`-th step.

  Networks have the same initial weights and the same batches.

  Args:
    config: config of the experiment.
    name: one of `NETWORKS`.
    learning_rate: of SGD, without momentum or decay.
    seed: seed of weights, batches and noise.

  Raises:
    UserError: if the network diverges.
  """
  data = _load(config.data)
  train = data.splits['train']
  dense, norm = NETWORKS[name]
  network = Mlp(
    num_classes=data.num_classes,
    features=(config.model.width,) * config.model.depth,
    dense=dense,
    norm=norm,
    nonlinearity=nn.relu,
    dtype=factory.compute_dtype(config.model),
  )
  variables = factory.initial_variables(
    network, train.image_shape, seed, init_std=0, init_scale=1
  )
  w = variables['params']
  hidden = [f'hidden{n}' for n in range(1, config.model.depth + 1)]
  layers = [
    [module for module in (layer, f'{layer}_bn') if module in w]
    for layer in (*hidden, 'classifier')
  ]
  order = ExampleOrder(len(train), num_shards=1, shuffle='global', seed=seed)
  for number in range(config.total_steps):
    examples = order.examples(positions(number, config.batch_size))
    gradient = functools.partial(
      _gradient,
      network,
      variables['batch_stats'],
      train.evaluation_batch(examples),
      jax.random.fold_in(jax.random.key(seed), number),
    )
    loss, g = gradient(w)
    if not jnp.isfinite(loss):
      raise UserError(
        f'config.learning_rate={learning_rate}: the network with {name} '
        f'diverges at step {number}. Use a lower rate.'
      )
    updated = optax.tree.add_scale(w, -learning_rate, g)
    if number % config.measure_every == 0:
      yield Step(number, gradient, w, float(loss), updated, layers)
    w = updated


@functools.partial(jax.jit, static_argnums=0)
def _gradient(
  network: Mlp, batch_stats: Any, batch: Batch, key: jax.Array, w: Any
) -> tuple[jax.Array, Any]:
  """The loss in training, and its gradient; keeps no running statistics."""

  def loss(w: Any) -> jax.Array:
    logits, _ = network.apply(
      {'params': w, 'batch_stats': batch_stats},
      preprocess.normalize(batch['image'], network.dtype, 'symmetric'),
      train=True,
      mutable=['batch_stats'],
      rngs={'noise': key},
    )
    return cross_entropy(logits.main, batch['label']).mean()

  return jax.value_and_grad(loss)(w)
