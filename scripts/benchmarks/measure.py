"""Measures candidates in turns, and compares them."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import statistics
import time
from typing import TYPE_CHECKING, Any

# JAX is imported in functions, after `cli.set_up_jax`.
from bn_repro import cli
from bn_repro import config as config_lib
from bn_repro.data import datasets

if TYPE_CHECKING:
  from bn_repro.training.experiment import Experiment

# Results of each candidate, one per round.
Results = Mapping[str, list[float]]

# Largest interquartile range of the rounds of a reliable figure, as a fraction
# of their median. Our choice.
MAX_SPREAD = 0.1

# Overrides with which a config in `full` trains on generated images.
FULL_WIDTH = (
  'data.name=synthetic',
  'data.num_shards=1',
  'eval_split=test',
  'batch_size=8',
)


@dataclasses.dataclass(frozen=True)
class Figure:
  """A number that a benchmark measured.

  Attributes:
    name: what was measured.
    value: the median, if it was measured in rounds.
    unit: empty for a ratio.
    low: the smallest of the rounds; None without rounds.
    high: the largest of the rounds; None without rounds.
    doubt: why the figure is unreliable; empty if it is not.
  """

  name: str
  value: float
  unit: str = ''
  low: float | None = None
  high: float | None = None
  doubt: str = ''

  def __str__(self) -> str:
    """Returns the line that `benchmark.py` prints."""
    text = f'{self.name}: {self.value:.4g}'
    if self.unit:
      text += f' {self.unit}'
    if self.low is not None:
      text += f' (by round {self.low:.4g} to {self.high:.4g})'
    if self.doubt:
      text += f' UNRELIABLE: {self.doubt}'
    return text


def in_rounds(
  name: str, value: float, by_round: Sequence[float], unit: str = ''
) -> Figure:
  """Creates a figure that was measured in rounds, with a doubt if they differ.

  Args:
    name: what was measured.
    value: the figure.
    by_round: what each round alone gives.
    unit: empty for a ratio.
  """
  return Figure(
    name, value, unit, min(by_round), max(by_round), _doubt(by_round)
  )


def _doubt(by_round: Sequence[float]) -> str:
  if len(by_round) < 2:
    return 'one round'
  low, middle, high = statistics.quantiles(by_round, n=4, method='inclusive')
  spread = (high - low) / middle
  if spread <= MAX_SPREAD:
    return ''
  return (
    f'the interquartile range of the rounds is {spread:.0%} of their median; '
    'is the machine idle?'
  )


def median(name: str, by_round: Sequence[float], unit: str) -> Figure:
  """Returns the median of a candidate's rounds."""
  return in_rounds(name, statistics.median(by_round), by_round, unit)


def ratio(results: Results, above: str, below: str, name: str = '') -> Figure:
  """Returns the ratio of two candidates' medians.

  Args:
    results: of both candidates.
    above: the candidate above the line.
    below: the candidate below it.
    name: of the figure; the candidates' names if empty.
  """
  by_round = [
    a / b for a, b in zip(results[above], results[below], strict=True)
  ]
  medians = (statistics.median(results[each]) for each in (above, below))
  name = name or f'{above} over {below}'
  return in_rounds(name, next(medians) / next(medians), by_round)


def seconds(function: Callable[[], Any]) -> float:
  """Returns the duration of a call."""
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


def interleaved(
  candidates: Mapping[str, Callable[[], float]], rounds: int
) -> Results:
  """Calls each candidate once per round, after one call to warm up."""
  for candidate in candidates.values():
    candidate()
  results: dict[str, list[float]] = {name: [] for name in candidates}
  for number in range(rounds):
    for name, candidate in candidates.items():
      results[name].append(candidate())
    latest = ', '.join(f'{n} {r[-1]:.4g}' for n, r in results.items())
    print(f'round {number + 1}: {latest}', flush=True)
  return results


def create_experiment(spec: str, *overrides: str) -> 'Experiment':
  """Sets up JAX, and creates the experiment of a config with overrides."""
  config = config_lib.load(spec, overrides)
  dataset = datasets.check(config)
  cli.set_up_jax(config)
  from bn_repro.training import experiment

  return experiment.create_experiment(config, dataset)


def step_timer(
  experiment: 'Experiment',
  step: Callable[..., Any],
  batch: Any,
  count: int = 1,
) -> Callable[[], float]:
  """Creates a function that returns the seconds of `count` successive steps.

  Every call of the function starts from the initial state.

  Args:
    experiment: the experiment of the step.
    step: `(state, batch) -> (state, sums)`.
    batch: argument of every step, on the devices.
    count: number of steps.
  """
  import jax

  from bn_repro import parallel

  initial_state = experiment.initial_state()

  def measure() -> float:
    state = parallel.replicate(experiment.mesh, initial_state)
    jax.block_until_ready(state)
    start = time.perf_counter()
    for _ in range(count):
      state, _ = step(state, batch)
    jax.block_until_ready(state)
    return time.perf_counter() - start

  return measure


def train_step_timer(
  experiment: 'Experiment', count: int = 1
) -> Callable[[], float]:
  """Creates a `step_timer` for the step that `main` calls."""
  batches = next(experiment.stacked_batches(0, 1))
  return step_timer(experiment, experiment.steps.train_steps, batches, count)
