"""Accuracy of a network with each kind of statistics that inference may use."""

from collections.abc import Iterable, Mapping, Sequence
import functools
from typing import Any

import jax
import numpy as np

from bn_repro.data.split import Batch, Split
from bn_repro.lab.small_network import SmallNetwork, batches


def accuracies(
  network: SmallNetwork,
  variables: Any,
  splits: Mapping[str, Split],
  seed: int,
  size: int,
  counts: Sequence[int],
) -> list[float]:
  """Percentages of test images that are classified correctly.

  Args:
    network: the network.
    variables: its parameters and moving averages.
    splits: the splits `train` and `test`.
    seed: seed of the order of images.
    size: number of images in a batch.
    counts: numbers of training images, for population statistics.

  Returns:
    The percentages with moving averages, with the statistics of groups of test
    images, and with population statistics over each count.
  """

  def test(variables: Any, *, train: bool = False) -> float:
    data = batches(splits['test'], seed, size, len(splits['test']))
    found = [_forward(network, variables, b, train=train)[0] for b in data]
    return 100 * float(np.mean(jax.device_get(found)))

  def population(count: int) -> Any:
    data = batches(splits['train'], seed, min(count, size), count)
    # Fewer images than a group are a group.
    used = network.clone(group=min(count, network.group))
    return with_population_statistics(used, variables, data)

  return [
    test(variables),
    test(variables, train=True),
    *(test(population(count)) for count in counts),
  ]


def with_population_statistics(
  network: SmallNetwork, variables: Any, data: Iterable[Batch]
) -> Any:
  """Replaces moving averages by E[x] and Var[x] of Algorithm 2.

  These are averages of the means and unbiased variances of groups, in float64,
  as in `bn_repro.training.evaluation`.
  """
  found = [_forward(network, variables, b, train=True)[1] for b in data]
  averages = jax.tree.map(
    lambda *x: np.mean(x, 0, np.float64).astype(x[0].dtype),
    *jax.device_get(found),
  )
  return {**variables, 'batch_stats': averages}


@functools.partial(jax.jit, static_argnums=0, static_argnames='train')
def _forward(
  network: SmallNetwork, variables: Any, batch: Batch, *, train: bool
) -> tuple[jax.Array, Any]:
  """Where the answers are right, and the statistics.

  With `train`, statistics are those of groups of this batch: its "moving
  averages" have momentum 0. They are not kept.
  """
  logits, updated = network.clone(momentum=0.0).apply(
    variables, batch['image'], train=train, mutable=['batch_stats']
  )
  return logits.argmax(-1) == batch['label'], updated['batch_stats']
