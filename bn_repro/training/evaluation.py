"""Exact evaluation, and the population statistics of Algorithm 2."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bn_repro import parallel
from bn_repro.training import optimizer
from bn_repro.training.experiment import Program
from bn_repro.training.metrics import Sums, check_replaced
from bn_repro.training.steps import TrainState

MOVING = 'moving'
POPULATION = 'population'

# Fig. 1 (b, c) of the paper.
PERCENTILES = (15, 50, 85)


def forms(program: Program) -> tuple[str | None, ...]:
  """The forms in which a network is evaluated, by its BN statistics.

  Without BN there are none to tell apart. Polyak averages of the parameters
  have no moving averages of their own.
  """
  bn = program.config.bn
  if not bn.enabled:
    return (None,)
  if program.config.optim.polyak_decay:
    return (POPULATION,)
  return (MOVING, POPULATION) if bn.population_batches else (MOVING,)


def inference_state(
  program: Program,
  state: TrainState,
  statistics: str | None,
  check: Callable[[], None],
) -> TrainState:
  """The parameters and statistics that inference uses in one of the `forms`.

  With Polyak averaging these are the averaged parameters.
  """
  averaged = optimizer.averaged_parameters(state.opt_state)
  if averaged is not None:
    state = state.replace(params=averaged)
  if statistics == POPULATION:
    state = _with_population_statistics(program, state, check)
  return state


def _with_population_statistics(
  program: Program, state: TrainState, check: Callable[[], None]
) -> TrainState:
  """Replaces the statistics by E[x] and Var[x] of Algorithm 2.

  They are averages, in float64, of the means and unbiased variances of the
  first batches of the training stream, distorted and dropped out as in
  training.
  """
  num_batches = program.config.bn.population_batches
  total = jax.tree.map(
    lambda x: np.zeros(x.shape, np.float64), state.batch_stats
  )
  for index, batch in enumerate(program.train_batches(0, num_batches)):
    check()
    statistics = program.statistics_step(
      state.replace(step=parallel.replicate(program.mesh, np.int32(index))),
      batch,
    )
    total = jax.tree.map(np.add, total, jax.device_get(statistics))
  averages = jax.tree.map(
    lambda x, like: (x / num_batches).astype(like.dtype),
    total,
    state.batch_stats,
  )
  return state.replace(batch_stats=parallel.replicate(program.mesh, averages))


def evaluate(
  program: Program, state: TrainState, split: str, check: Callable[[], None]
) -> tuple[Sums, dict[str, list[list[float]]]]:
  """Goes over every example of a split, each counted once.

  Args:
    program: compiled steps and data.
    state: parameters and statistics, from `inference_state`.
    split: name of a split.
    check: called between batches; raises to stop.

  Returns:
    The sums over all examples, and the `PERCENTILES` over them of each value
    that the network probes: by name, a list a percentile, a number a unit.

  Raises:
    RuntimeError: if another number of examples was counted than there are.
    UserError: if too many of them could not be decoded.
  """
  sums = Sums()
  probes = []
  pending = None
  for batch in program.eval_batches(split):
    check()
    # The sums of a batch are read while the next one runs.
    dispatched, probed = program.eval_step(state, batch)
    if pending is not None:
      sums = sums.merge(pending.fetch())
    pending = dispatched
    probes.append(probed)
  if pending is not None:
    sums = sums.merge(pending.fetch())
  expected = len(program.dataset.splits[split])
  if sums.count != expected:
    raise RuntimeError(
      f'evaluation of {split} counted {sums.count} examples, not {expected}'
    )
  check_replaced(sums, program.config.data.max_replaced, f'{split} images')
  return sums, _percentiles(probes, expected)


def _percentiles(
  batches: Sequence[Mapping[str, Any]], num_examples: int
) -> dict[str, list[list[float]]]:
  """`PERCENTILES` of each probe; what pads the last batch stands at the end."""
  found = {}
  for name in batches[0]:
    values = np.concatenate([np.asarray(probes[name]) for probes in batches])
    percentiles = np.percentile(values[:num_examples], PERCENTILES, axis=0)
    # Four digits are plenty for a curve, and keep the lines short.
    found[name] = [[float(f'{x:.4g}') for x in row] for row in percentiles]
  return found
