"""Training of small networks on digits, at several learning rates.

Several experiments use it; it reads `steps`, `batch_size`, `learning_rate`,
`momentum` and `data.fold` of their configs.
"""

from collections.abc import Iterable, Mapping, Sequence
import functools
import time
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from ml_collections import ConfigDict
import numpy as np
import optax

from bn_repro.data import mnist
from bn_repro.errors import UserError
from bn_repro.lab.findings import Result
from bn_repro.models import factory
from bn_repro.models.mlp import Mlp
from bn_repro.report import drawing
from bn_repro.training.metrics import cross_entropy

# Evaluations of a training, evenly spaced, and factors of the rate. Our choice.
POINTS, FACTORS = 20, (0.1, 0.3, 1.0, 3.0, 10.0)


class Images(NamedTuple):
  """Images in [-1, 1], float32 (n, height, width, 1), and labels, (n,)."""

  images: Any
  labels: Any


def check(config: ConfigDict) -> None:
  """Checks the length of training.

  Raises:
    UserError: if it is not a multiple of `POINTS`.
  """
  if config.steps < POINTS or config.steps % POINTS:
    raise UserError(
      f'config.steps={config.steps}: must be a multiple of {POINTS}.'
    )


def tried(config: ConfigDict) -> list[float]:
  """The learning rates, of which the middle one is that of the config."""
  return [factor * config.learning_rate for factor in FACTORS]


def load_digits(data: ConfigDict) -> tuple[Images, Images]:
  """The training and the test digits of `mnist_5k`, given `config.data`."""
  splits: Mapping[str, Any] = mnist.load_mnist_5k(data).splits
  train, test = (
    Images(split.images / np.float32(127.5) - 1, split.labels)
    for split in (splits['train'], splits['test'])
  )
  return train, test


def sigmoids(model: ConfigDict, norm: Any, *, use_bias: bool) -> Mlp:
  """The network of section 4.1 with `model.depth` layers of `model.width`."""
  return Mlp(
    num_classes=10,
    features=(model.width,) * model.depth,
    dense=functools.partial(nn.Dense, use_bias=use_bias),
    norm=norm,
    nonlinearity=nn.sigmoid,
    dtype=model.dtype,
  )


def train(
  model: nn.Module,
  digits: tuple[Images, Images],
  config: ConfigDict,
  rates: Iterable[float],
  seed: int,
) -> tuple[list[list[float]], float]:
  """Trains a network with SGD, once at each learning rate.

  All start from the same weights, and see the same batches, which are drawn
  with replacement. Values that are not finite stay so; the accuracy is then
  that of guessing.

  Args:
    model: maps images to `models.layers.Logits`.
    digits: training and test images.
    config: see above.
    rates: learning rates.
    seed: seed of the weights and batches.

  Returns:
    The test accuracies at each rate, (rates, `POINTS`), and the CPU time of a
    step in milliseconds.
  """
  learn, test = digits
  shape = learn.images.shape[1:]
  variables = factory.initial_variables(model, shape, seed, 0.0, 1.0)
  order = np.random.default_rng(seed).integers(
    len(learn.labels),
    size=(POINTS, config.steps // POINTS, config.batch_size),
  )

  def run(
    variables: Any, order: Any, learn: Images, test: Images, rate: Any
  ) -> Any:
    optimizer = optax.sgd(rate, config.momentum)

    def loss(params: Any, statistics: Any, batch: Images) -> Any:
      logits, updated = model.apply(
        {'params': params, 'batch_stats': statistics},
        batch.images,
        train=True,
        mutable=['batch_stats'],
      )
      mean = cross_entropy(logits.main, batch.labels).mean()
      return mean, updated.get('batch_stats', {})

    def step(state: Any, indices: Any) -> Any:
      params, statistics, memory = state
      batch = jax.tree.map(lambda values: values[indices], learn)
      gradients, statistics = jax.grad(loss, has_aux=True)(
        params, statistics, batch
      )
      updates, memory = optimizer.update(gradients, memory)
      return (optax.apply_updates(params, updates), statistics, memory), None

    def interval(state: Any, indices: Any) -> Any:
      state, _ = jax.lax.scan(step, state, indices)
      found = {'params': state[0], 'batch_stats': state[1]}
      logits: Any = model.apply(found, test.images, train=False)
      return state, (logits.main.argmax(-1) == test.labels).mean()

    params, statistics = variables['params'], variables['batch_stats']
    state = params, statistics, optimizer.init(params)
    return jax.lax.scan(interval, state, order)[1]

  arguments = variables, order, learn, test
  compiled = jax.jit(run).lower(*arguments, 1.0).compile()
  start = time.process_time()
  accuracies = [compiled(*arguments, rate).tolist() for rate in rates]
  taken = time.process_time() - start
  return accuracies, 1000 * taken / (len(accuracies) * config.steps)


def speeds(curves: Sequence[Sequence[float]]) -> list[float]:
  """The speed of training at each rate: the mean accuracy of its course."""
  return [float(np.mean(curve)) for curve in curves]


def table(results: Sequence[Result]) -> str:
  """The medians over seeds of the speeds of training, by network and rate."""
  rates = results[0]['rates']
  lines = [f'| rate | {" | ".join(f"{rate:g}" for rate in rates)} |']
  lines.append('|---' * (len(rates) + 1) + '|')
  for name in results[0]['accuracy']:
    found = [speeds(result['accuracy'][name]) for result in results]
    cells = (f'{100 * speed:.1f} %' for speed in np.median(found, 0))
    lines.append(f'| {name} | {" | ".join(cells)} |')
  return ''.join(f'{line}\n' for line in lines)


def draw(axes: Any, results: Sequence[Result], names: Iterable[Any]) -> None:
  """Draws the speeds of training over the learning rate.

  Args:
    axes: axes to draw on.
    results: for each seed, `rates` and the `accuracy` of networks at each.
    names: the name in `drawing.styles` of each network.
  """
  networks = results[0]['accuracy']
  for network, style in zip(networks, drawing.styles(names), strict=True):
    values = np.transpose([speeds(r['accuracy'][network]) for r in results])
    x = results[0]['rates']
    drawing.draw_spread(axes, x, list(values), style, network)
  axes.axhline(0.1, label='chance', **drawing.REFERENCE)
  axes.set(xscale='log', xlabel='learning rate', ylabel='mean accuracy')
