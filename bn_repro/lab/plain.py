"""Networks of weights, nonlinearities and BN alone, on digits."""

from collections.abc import Callable, Iterator, Sequence
import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from bn_repro.data import mnist
from bn_repro.errors import UserError
from bn_repro.models.batch_norm import BatchNorm
from bn_repro.training.metrics import cross_entropy

NUM_DIGITS = 4000  # The training images of mnist_5k.
INPUTS, CLASSES = 28 * 28, 10
# Examples whose Jacobians are computed. Our choice.
_NUM_EXAMPLES = 8

# Of each layer, (inputs, outputs).
Weights = Sequence[Any]
# Images, float32 (batch, INPUTS), and their labels.
Batch = tuple[Any, Any]


class Network(NamedTuple):
  """Layers x -> BN(g(x) W), and a last one without BN.

  Attributes:
    g: the nonlinearity.
    has_norm: whether there is BN, without scale and shift.
  """

  g: Callable[[jax.Array], jax.Array]
  has_norm: bool

  def layer(self, w: jax.Array, x: jax.Array) -> jax.Array:
    """Maps (batch, inputs) to (batch, outputs)."""
    x = self.g(x) @ w
    if not self.has_norm:
      return x
    norm = BatchNorm(use_running_average=False, use_scale=False, use_bias=False)
    return norm.apply({}, x, mutable=True)[0]  # Drops running averages.

  def loss(self, weights: Weights, batch: Batch) -> jax.Array:
    """The mean cross-entropy of a batch."""
    x, labels = batch
    for w in weights[:-1]:
      x = self.layer(w, x)
    return cross_entropy(self.g(x) @ weights[-1], labels).mean()


NETWORKS = {
  'BN, relu': Network(jax.nn.relu, has_norm=True),
  'no BN, relu': Network(jax.nn.relu, has_norm=False),
  'BN, sigmoid': Network(jax.nn.sigmoid, has_norm=True),
  'no BN, sigmoid': Network(jax.nn.sigmoid, has_norm=False),
}


def check(config: ConfigDict) -> None:
  """Checks that networks can be trained, and have gradients.

  Raises:
    UserError: if not.
  """
  if config.model.dtype not in ('float32', 'float64'):
    raise UserError('config.model.dtype: must be float32 or float64.')
  if not 3 <= config.batch_size <= NUM_DIGITS:
    raise UserError(
      f'config.batch_size={config.batch_size}: must be 3 to {NUM_DIGITS}, all '
      'digits. BN makes two values 1 and -1, and gradients 0.'
    )
  if config.model.depth < 2 or config.model.width < 8:
    raise UserError(
      'config: model.depth must be at least 2, and model.width 8, as all ReLUs '
      'of a narrow layer may be 0.'
    )


@functools.partial(jax.jit, static_argnums=0)
def jacobians(network: Network, w: jax.Array, x: jax.Array) -> jax.Array:
  """Jacobians of a layer: of each example's outputs by its own inputs.

  Args:
    network: the network.
    w: weights of the layer, (inputs, outputs).
    x: inputs, (batch, inputs). Those of the other examples stay.

  Returns:
    (examples, outputs, inputs), for the first examples of the batch.
  """

  def outputs(own: jax.Array, example: jax.Array) -> jax.Array:
    return network.layer(w, x.at[example].set(own))[example]

  examples = jnp.arange(min(len(x), _NUM_EXAMPLES))
  return jax.vmap(jax.jacrev(outputs))(x[examples], examples)


@functools.partial(jax.jit, static_argnums=0)
def sgd_step(
  network: Network, weights: Weights, rate: Any, batch: Batch
) -> Weights:
  """The weights after a step of gradient descent."""
  gradients = jax.grad(network.loss)(weights, batch)
  return [w - rate * g for w, g in zip(weights, gradients, strict=True)]


def initial_weights(model: ConfigDict, seed: int) -> Weights:
  """He's weights between digits, `depth` + 1 hidden layers, and classes."""
  sizes = [INPUTS, *[model.width] * (model.depth + 1), CLASSES]
  rng = np.random.default_rng(seed)
  return [
    rng.normal(scale=(2 / n) ** 0.5, size=(n, m)).astype(model.dtype)
    for n, m in itertools.pairwise(sizes)
  ]


def batches(seed: int, batch_size: int) -> Iterator[Batch]:
  """Endless batches of different digits."""
  digits: Any = mnist.load_mnist_5k(ConfigDict({'fold': 0})).splits['train']
  images = digits.images.reshape(len(digits), INPUTS) / np.float32(255)
  rng = np.random.default_rng([seed, 1])  # Not that of the weights.
  while True:
    drawn = rng.choice(len(images), batch_size, replace=False)
    yield images[drawn], digits.labels[drawn]


def train(
  config: ConfigDict,
  network: Network,
  weights: Weights,
  batches: Iterator[Batch],
) -> Weights:
  """The weights after `steps` steps at the rate `learning_rate`.

  Raises:
    UserError: if the network diverges.
  """
  for batch in itertools.islice(batches, config.steps):
    weights = sgd_step(network, weights, config.learning_rate, batch)
  if not all(np.isfinite(w).all() for w in weights):
    raise UserError(
      f'config.learning_rate={config.learning_rate}: the network has diverged. '
      'Use a lower one.'
    )
  return weights
