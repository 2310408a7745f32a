"""Estimates the cost of a config on devices that are not attached.

The steps of the run itself are compiled ahead of time, from shapes and types
alone. The compiler in `libtpu` compiles for a TPU slice without a TPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import math
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from bn_repro import parallel
from bn_repro.data import datasets
from bn_repro.models import factory
from bn_repro.runtime.progress import duration
from bn_repro.tpu import collectives, cost, slices
from bn_repro.tpu.cost import Cost
from bn_repro.training import steps as steps_lib
from bn_repro.training.experiment import Experiment, create_experiment
from bn_repro.training.steps import TrainState

# Steps of a `Experiment`, with their headings in the table.
STEPS = {
  'train_steps': 'training',
  'eval_step': 'evaluation',
  'statistics_step': 'statistics',
}


class DoesNotFitError(Exception):
  """The compiler needs more memory for a step than a chip has."""


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Estimated cost of a config.

  Attributes:
    batch_size: images in a step, over all devices.
    num_devices: number of devices.
    dtype: type in which the network computes.
    num_parameters: number of trained values.
    steps: cost on one device of each compiled step of the `Experiment`, by
      name.
    calls: number of calls of each step in a whole run.
  """

  batch_size: int
  num_devices: int
  dtype: str
  num_parameters: int
  steps: Mapping[str, Cost]
  calls: Mapping[str, int]

  @property
  def memory(self) -> int:
    """Bytes that a device needs for the largest of the steps."""
    return max(each.memory for each in self.steps.values())

  def min_seconds(self, chip: slices.Chip) -> dict[str, float]:
    """Returns a lower bound on the time of all calls of each step."""
    return {
      name: self.calls[name]
      * cost.min_step_seconds(step, chip, self.num_devices)
      for name, step in self.steps.items()
    }


def slice_devices(tpu_slice: slices.Slice) -> list[Any]:
  """Returns the chips of a slice as devices to compile for."""
  options: dict[str, Any] = {}
  if tpu_slice.topology == '1x1':
    options['chips_per_host_bounds'] = (1, 1, 1)
  if tpu_slice.chip.units_per_chip == 2:
    # Both cores of a chip form one device, as on a TPU VM.
    options['chip_config_name'] = 'megacore'
  return list(
    topologies.get_topology_desc(str(tpu_slice), 'tpu', **options).devices
  )


def resolve(config: ConfigDict, platform: str) -> ConfigDict:
  """Returns a config whose steps can be analysed for another platform.

  The dtype `auto` is resolved for the platform. A call makes one step, since
  XLA counts the body of a loop once; the memory of the images of a call's other
  steps is therefore left out.
  """
  resolved = config.copy_and_resolve_references()
  with resolved.unlocked():
    resolved.model.dtype = str(factory.compute_dtype(config.model, platform))
    resolved.steps_per_call = 1
  return resolved


def abstract_experiment(
  config: ConfigDict, devices: Sequence[Any]
) -> Experiment:
  """Returns the experiment of a config from `resolve`, without images."""
  return create_experiment(
    config, datasets.load_sizes(config), parallel.create_mesh(devices)
  )


def from_compiled(
  experiment: Experiment,
  log: Callable[[str], None],
  names: Sequence[str] = tuple(STEPS),
) -> Estimate:
  """Compiles steps of an experiment and returns their cost.

  Args:
    experiment: experiment from `abstract_experiment`.
    log: called with a line before each compilation.
    names: steps to compile.

  Raises:
    DoesNotFitError: if a step needs more memory than a chip has.
  """
  state = experiment.initial_state()
  steps = {}
  for name in [name for name in experiment.step_names() if name in names]:
    log(f'compiling {name} ...')
    lowered = experiment.lower(name, state)
    try:
      with without_cache():
        steps[name] = cost.from_compiled(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      raise DoesNotFitError(_out_of_memory(str(error))) from error
  return _estimate(experiment, state, steps)


def from_lowered(experiment: Experiment) -> Estimate:
  """Returns the cost of a training step before compilation, for any platform.

  Operations and bytes are those of the step as written, with nothing fused.
  Memory is that of the arrays that every compiled step has to hold.

  Args:
    experiment: experiment from `abstract_experiment`.
  """
  state = experiment.initial_state()
  lowered = experiment.lower('train_steps', state)
  analysis: Any = lowered.cost_analysis()
  counts = collectives.count_lowered(lowered.as_text())
  step = Cost(
    memory=_held_bytes(experiment, state),
    code=0,
    flops=analysis['flops'],
    bytes_accessed=analysis['bytes accessed'],
    by_kind={},
    num_collectives=sum(counts.values()),
    collective_bytes=collectives.total_bytes(counts),
  )
  return _estimate(experiment, state, {'train_steps': step})


def _held_bytes(experiment: Experiment, state: TrainState) -> int:
  """Returns the bytes of a device's state, batch and forward residuals."""
  batch = experiment.abstract_batch()
  residuals = jax.eval_shape(
    parallel.data_parallel(
      steps_lib.create_residuals(experiment.model, experiment.config),
      experiment.mesh,
      donate_state=False,
    ),
    state,
    batch,
  )
  # The residuals include the parameters.
  replicated = [*residuals, state.opt_state, state.batch_stats]
  return _num_bytes(batch) // experiment.mesh.devices.size + _num_bytes(
    replicated
  )


def _num_bytes(tree: Any) -> int:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _estimate(
  experiment: Experiment, state: TrainState, steps: Mapping[str, Cost]
) -> Estimate:
  return Estimate(
    batch_size=experiment.config.batch_size,
    num_devices=experiment.mesh.devices.size,
    dtype=experiment.config.model.dtype,
    num_parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    steps=steps,
    calls=_calls(experiment),
  )


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
  """Compiles without the cache, which cannot load TPU code without a TPU."""
  enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
  jax.config.update('jax_enable_compilation_cache', False)  # noqa: FBT003
  # JAX reads the setting only once, until the cache is reset.
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', enabled)
    compilation_cache.reset_cache()


def _out_of_memory(message: str) -> str:
  """Returns the line of the compiler's message that gives the sizes."""
  lines = [line for line in message.splitlines() if 'xceeded' in line]
  return (lines or message.splitlines())[0].strip()


def _calls(experiment: Experiment) -> dict[str, int]:
  """Returns how often a run calls each step, Algorithm 2 included."""
  config = experiment.config
  evaluations = math.ceil(experiment.total_steps / config.eval_every)
  population = config.bn.population_batches if config.bn.enabled else 0
  # An evaluation uses the moving and, if there are any, the population
  # statistics.
  passes = 2 if population else 1
  batches = math.ceil(
    len(experiment.dataset.splits[config.eval_split]) / config.batch_size
  )
  return {
    'train_steps': experiment.total_steps,
    'eval_step': evaluations * passes * batches,
    'statistics_step': evaluations * population,
  }


def largest_batch(
  fits: Callable[[int], bool], num_devices: int, start: int
) -> int:
  """Searches for the largest batch that fits.

  The images per device are doubled while they fit, or halved until they do, and
  finally multiplied by 1.5. The search costs few compilations and finds at
  least two thirds of the largest batch.

  Args:
    fits: returns whether a batch size fits.
    num_devices: number of devices, which share the batch evenly.
    start: images per device to begin with.

  Returns:
    The batch size, or 0 if no batch that was tried fits.
  """
  share = start
  while share and not fits(share * num_devices):
    share //= 2
  if not share:
    return 0
  if share == start:
    while fits(2 * share * num_devices):
      share *= 2
  between = share + share // 2
  if between > share and fits(between * num_devices):
    share = between
  return share * num_devices


def table(found: Estimate, chip: slices.Chip | None) -> list[str]:
  """Formats an estimate: a column for each step, in units of one device.

  Args:
    found: the estimate.
    chip: chip whose peak rates give lower bounds; None omits times.
  """
  steps = list(found.steps.values())
  rows: dict[str, list[float]] = {
    'memory, GB': [step.memory / 1e9 for step in steps],
    'operations, GFLOP': [step.flops / 1e9 for step in steps],
    'bytes accessed, GB': [step.bytes_accessed / 1e9 for step in steps],
  }
  if all(step.by_kind for step in steps):
    rows['  in HBM, GB'] = [step.hbm_bytes / 1e9 for step in steps]
    for kind in cost.KINDS:
      rows[f'    {kind}'] = [step.by_kind[kind] / 1e9 for step in steps]
  rows['collectives'] = [step.num_collectives for step in steps]
  rows['  bytes, MB'] = [step.collective_bytes / 1e6 for step in steps]
  if chip is not None:
    bounds = [cost.lower_bounds(s, chip, found.num_devices) for s in steps]
    for resource in bounds[0]:
      rows[f'lower bound, ms: {resource}'] = [1e3 * b[resource] for b in bounds]
  cells = {'per step and device': [STEPS[name] for name in found.steps]}
  cells |= {
    title: [_number(v) for v in values] for title, values in rows.items()
  }
  lines = [
    f'{title:<32}' + ''.join(f'{text:>12}' for text in texts)
    for title, texts in cells.items()
  ]
  if chip is not None:
    lines.append(_run_time(found, chip))
  return lines


def _number(value: float) -> str:
  return f'{value}' if isinstance(value, int) else f'{value:.3f}'


def _run_time(found: Estimate, chip: slices.Chip) -> str:
  seconds = found.min_seconds(chip)
  total = sum(seconds.values())
  parts = ', '.join(
    f'{found.calls[name]:,} x {name} {duration(each)}'
    for name, each in seconds.items()
  )
  return (
    f'whole run, lower bound: {duration(total)}, '
    f'{total / 3600 * found.num_devices:.0f} chip-hours ({parts})'
  )
