"""Exact evaluation, and the population statistics of Algorithm 2."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import time
from typing import Any

import jax
import numpy as np

from bn_repro import parallel
from bn_repro.training import optimizer
from bn_repro.training.experiment import Experiment
from bn_repro.training.metrics import Sums, check_replaced
from bn_repro.training.steps import TrainState

# BN statistics: moving averages, or the population statistics of Algorithm 2.
MOVING = 'moving'
POPULATION = 'population'

# Fig. 1 (b, c) of the paper.
PERCENTILES = (15, 50, 85)


def statistics_modes(experiment: Experiment) -> tuple[str | None, ...]:
  """The BN statistics that a network is evaluated with; None without BN.

  Polyak averages of the parameters have no moving averages of their own.
  """
  bn = experiment.config.bn
  if not bn.enabled:
    return (None,)
  if experiment.config.optim.polyak_decay:
    return (POPULATION,)
  return (MOVING, POPULATION) if bn.population_batches else (MOVING,)


def evaluate(
  experiment: Experiment,
  state: TrainState,
  wanted: Mapping[str | None, Sequence[str]],
  check: Callable[[], None],
) -> Iterator[tuple[dict[str, Any], TrainState]]:
  """Evaluates a state on splits, every example once.

  Args:
    experiment: compiled or not.
    state: a training state, on the devices.
    wanted: the splits to evaluate, by mode of `statistics_modes`.
    check: called between batches; raises to stop.

  Yields:
    For each mode and split, a line of metrics, and the state of
    `inference_state`. The line has `step`, `split`, `statistics` (with BN), the
    means, `percentiles` of the probes (if the network has any), and `timing`,
    without the seconds of population statistics.

  Raises:
    RuntimeError: if the number of examples counted is wrong.
    UserError: if too many images could not be decoded.
  """
  for statistics, splits in wanted.items():
    if not splits:
      continue
    inference = inference_state(experiment, state, statistics, check)
    for split in splits:
      started = time.monotonic()
      sums, percentiles = evaluate_split(experiment, inference, split, check)
      line = {
        'step': int(state.step),
        'split': split,
        **({'statistics': statistics} if statistics else {}),
        **sums.means(),
        **({'percentiles': percentiles} if percentiles else {}),
        'timing': {'seconds': time.monotonic() - started},
      }
      yield line, inference


def inference_state(
  experiment: Experiment,
  state: TrainState,
  statistics: str | None,
  check: Callable[[], None],
) -> TrainState:
  """The state that inference uses with one of the `statistics_modes`.

  With Polyak averaging its parameters are the averaged ones.
  """
  averaged = optimizer.averaged_parameters(state.opt_state)
  if averaged is not None:
    state = state.replace(params=averaged)
  if statistics == POPULATION:
    state = _with_population_statistics(experiment, state, check)
  return state


def _with_population_statistics(
  experiment: Experiment, state: TrainState, check: Callable[[], None]
) -> TrainState:
  """Replaces the moving averages by E[x] and Var[x] of Algorithm 2.

  These are averages, in float64, of the means and unbiased variances of the
  first `bn.population_batches` batches of the training stream, with distortion
  and dropout as in training.
  """
  num_batches = experiment.config.bn.population_batches
  total = jax.tree.map(
    lambda x: np.zeros(x.shape, np.float64), state.batch_stats
  )
  for index, batch in enumerate(experiment.train_batches(0, num_batches)):
    check()
    statistics = experiment.steps.statistics_step(
      state.replace(step=parallel.replicate(experiment.mesh, np.int32(index))),
      batch,
    )
    total = jax.tree.map(np.add, total, jax.device_get(statistics))
  averages = jax.tree.map(
    lambda x, like: (x / num_batches).astype(like.dtype),
    total,
    state.batch_stats,
  )
  return state.replace(
    batch_stats=parallel.replicate(experiment.mesh, averages)
  )


def evaluate_split(
  experiment: Experiment,
  state: TrainState,
  split: str,
  check: Callable[[], None],
) -> tuple[Sums, dict[str, list[list[float]]]]:
  """Evaluates every example of a split, counting each once.

  Args:
    experiment: steps and data.
    state: parameters and statistics, from `inference_state`.
    split: name of a split.
    check: called between batches; raises to stop.

  Returns:
    The sums over all examples, and for each probe of the network, by name, one
    list per percentile of `PERCENTILES` with one number per unit.

  Raises:
    RuntimeError: if the number of examples counted is wrong.
    UserError: if too many images could not be decoded.
  """
  sums = Sums()
  probes = []
  pending = None
  for batch in experiment.eval_batches(split):
    check()
    # The sums of one batch are read while the next one runs.
    dispatched, probed = experiment.steps.eval_step(state, batch)
    if pending is not None:
      sums = sums.merge(pending.fetch())
    pending = dispatched
    probes.append(probed)
  if pending is not None:
    sums = sums.merge(pending.fetch())
  expected = len(experiment.dataset.splits[split])
  if sums.count != expected:
    raise RuntimeError(
      f'evaluation of {split} counted {sums.count} examples, not {expected}'
    )
  check_replaced(sums, experiment.config.data.max_replaced, f'{split} images')
  return sums, _percentiles(probes, expected)


def _percentiles(
  batches: Sequence[Mapping[str, Any]], num_examples: int
) -> dict[str, list[list[float]]]:
  """`PERCENTILES` of each probe; padding is at the end of the last batch."""
  found = {}
  for name in batches[0]:
    values = np.concatenate([np.asarray(probes[name]) for probes in batches])
    percentiles = np.percentile(values[:num_examples], PERCENTILES, axis=0)
    # Four digits are enough for a curve, and keep the lines short.
    found[name] = [[float(f'{x:.4g}') for x in row] for row in percentiles]
  return found
