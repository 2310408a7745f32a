"""What a config will cost on devices that are not there, from its compilation.

The real steps are compiled ahead of time, for shapes and types alone: on a TPU
slice by the compiler of `libtpu`, which takes no TPU.
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
from bn_repro.tpu import collectives, cost, slices
from bn_repro.tpu.cost import Cost
from bn_repro.training import steps as steps_lib
from bn_repro.training.experiment import Experiment, create_experiment
from bn_repro.training.steps import TrainState

STEPS = ('train_steps', 'eval_step', 'statistics_step')


class DoesNotFit(Exception):
  """A program that the compiler finds too large for the memory of a chip."""


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a config costs.

  Attributes:
    batch_size: images in a step, over all devices.
    num_devices: of the mesh.
    dtype: in which the network computes.
    num_parameters: trained values.
    steps: the cost of each compiled step on one device, by its name in
      `Experiment`.
    calls: how often a whole run calls each.
  """

  batch_size: int
  num_devices: int
  dtype: str
  num_parameters: int
  steps: Mapping[str, Cost]
  calls: Mapping[str, int]

  @property
  def memory(self) -> int:
    """Bytes that a device needs, for the largest of the steps."""
    return max(each.memory for each in self.steps.values())

  def hours(self, chip: slices.Chip) -> dict[str, float]:
    """Hours at the least that a whole run spends in each kind of step."""
    return {
      name: self.calls[name]
      * cost.least_step_seconds(self.steps[name], chip, self.num_devices)
      / 3600
      for name in self.steps
    }


def slice_devices(tpu_slice: slices.Slice) -> list[Any]:
  """The chips of a slice, to compile for."""
  options: dict[str, Any] = {}
  if tpu_slice.topology == '1x1':
    options['chips_per_host_bounds'] = (1, 1, 1)
  if tpu_slice.chip.units == 2:
    # Both cores of a chip as one device, as a TPU VM has them.
    options['chip_config_name'] = 'megacore'
  return list(
    topologies.get_topology_desc(str(tpu_slice), 'tpu', **options).devices
  )


def resolve(config: ConfigDict, platform: str) -> ConfigDict:
  """The config whose steps are looked at one by one on another platform.

  `auto` types are decided. A call is of one step: XLA counts the body of a loop
  once, however often it runs. What is left out is the room for the images of a
  call's other steps.
  """
  resolved = config.copy_and_resolve_references()
  with resolved.unlocked():
    resolved.model.dtype = str(factory.compute_dtype(config.model, platform))
    resolved.steps_per_call = 1
  return resolved


def abstract_program(config: ConfigDict, devices: Sequence[Any]) -> Experiment:
  """The program of a config from `resolve`, with no data to train on."""
  return create_experiment(
    config, datasets.load_sizes(config), parallel.create_mesh(devices)
  )


def of_program(
  program: Experiment,
  say: Callable[[str], None],
  names: Sequence[str] = STEPS,
) -> Estimate:
  """Compiles steps of a program and reads what they cost.

  Args:
    program: from `abstract_program`.
    say: is told what is being compiled.
    names: of the steps to compile.

  Raises:
    DoesNotFit: if a step needs more memory than a chip has.
  """
  state = program.initial_state()
  lowered = program.lower(state)
  steps = {}
  for name in [name for name in lowered if name in names]:
    say(f'compiling {name} ...')
    try:
      with without_cache():
        steps[name] = cost.of_compiled(lowered[name].compile())
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      raise DoesNotFit(_what_exceeds(str(error))) from error
  return _estimate(program, state, steps)


def without_compiling(program: Experiment) -> Estimate:
  """What can be said of a training step on any platform, before its compiler.

  Operations and bytes are those of the program as it is written, in which
  nothing is fused; memory that of the arrays that a step cannot do without.
  """
  state = program.initial_state()
  lowered = program.lower(state)['train_steps']
  analysis: Any = lowered.cost_analysis()
  messages = collectives.of_lowered(lowered.as_text())
  return _estimate(
    program,
    state,
    {
      'train_steps': Cost(
        memory=_held_bytes(program, state),
        code=0,
        flops=analysis['flops'],
        bytes_accessed=analysis['bytes accessed'],
        by_kind={},
        num_collectives=sum(messages.values()),
        collective_bytes=collectives.total_bytes(messages),
      )
    },
  )


def _held_bytes(program: Experiment, state: TrainState) -> int:
  """Bytes of a device's state, batch, and residuals of the forward pass."""
  batch = program.abstract_batch()
  kept = jax.eval_shape(
    parallel.data_parallel(
      steps_lib.create_residuals(program.model, program.config),
      program.mesh,
      donate_state=False,
    ),
    state,
    batch,
  )
  shared = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch))
  # The parameters are among what is kept.
  held = [*kept, state.opt_state, state.batch_stats]
  return shared // program.mesh.devices.size + sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(held)
  )


def _estimate(
  program: Experiment, state: TrainState, steps: Mapping[str, Cost]
) -> Estimate:
  return Estimate(
    batch_size=program.config.batch_size,
    num_devices=program.mesh.devices.size,
    dtype=program.config.model.dtype,
    num_parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    steps=steps,
    calls=_calls(program),
  )


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
  """Compiles anew: what is compiled for a TPU cannot be loaded without one."""
  enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
  jax.config.update('jax_enable_compilation_cache', False)  # noqa: FBT003
  # JAX asks the setting once.
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update('jax_enable_compilation_cache', enabled)
    compilation_cache.reset_cache()


def _what_exceeds(message: str) -> str:
  """The sentence of the compiler's message that has the figures."""
  lines = [line for line in message.splitlines() if 'xceeded' in line]
  return (lines or message.splitlines())[0].strip()


def _calls(program: Experiment) -> dict[str, int]:
  """How often a run calls each step, evaluations and Algorithm 2 included."""
  config = program.config
  evaluations = math.ceil(program.total_steps / config.eval_every)
  population = config.bn.population_batches if config.bn.enabled else 0
  forms = 2 if population else 1
  batches = math.ceil(
    len(program.dataset.splits[config.eval_split]) / config.batch_size
  )
  return {
    'train_steps': program.total_steps,
    'eval_step': evaluations * forms * batches,
    'statistics_step': evaluations * population,
  }


def largest_batch(
  fits: Callable[[int], bool], num_devices: int, start: int
) -> int:
  """The largest batch that fits: a device's share doubled, then once halved.

  Each trial is a compilation, so that it is found to a quarter of itself.

  Args:
    fits: whether a batch does.
    num_devices: over which it is shared evenly.
    start: a share of a device to begin with.

  Returns:
    The batch; 0 if not even one image a device fits.
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
  """The estimate as text: a column a step, for one device.

  Args:
    found: the estimate.
    chip: whose peak rates give the least time; None leaves time out.
  """
  headings = {
    'train_steps': 'training',
    'eval_step': 'evaluation',
    'statistics_step': 'statistics',
  }
  steps = list(found.steps.values())
  rows: dict[str, list[float]] = {
    'memory, GB': [step.memory / 1e9 for step in steps],
    'operations, GFLOP': [step.flops / 1e9 for step in steps],
    'bytes, GB': [step.bytes_accessed / 1e9 for step in steps],
  }
  if all(step.by_kind for step in steps):
    rows['of main memory, GB'] = [step.main_memory / 1e9 for step in steps]
    for kind in cost.KINDS:
      rows[f'  {kind}'] = [step.by_kind[kind] / 1e9 for step in steps]
  rows['messages'] = [step.num_collectives for step in steps]
  rows['  bytes, MB'] = [step.collective_bytes / 1e6 for step in steps]
  if chip is not None:
    times = [cost.least_seconds(s, chip, found.num_devices) for s in steps]
    for part in cost.PARTS:
      rows[f'at the least, ms: {part}'] = [1e3 * each[part] for each in times]
  lines = [
    f'{"a step, a device":<28}'
    + ''.join(f'{headings[name]:>12}' for name in found.steps)
  ]
  lines += [
    f'{title:<28}' + ''.join(f'{_number(value):>12}' for value in values)
    for title, values in rows.items()
  ]
  if chip is not None:
    lines.append(_duration(found, chip))
  return lines


def _number(value: float) -> str:
  return f'{value}' if isinstance(value, int) else f'{value:.3f}'


def _duration(found: Estimate, chip: slices.Chip) -> str:
  hours = found.hours(chip)
  total = sum(hours.values())
  parts = ', '.join(
    f'{found.calls[name]:,} x {name} {hours[name]:.1f}' for name in hours
  )
  return (
    f'the whole run, at the least: {total:.1f} hours, '
    f'{total * found.num_devices:.0f} chip-hours ({parts})'
  )
