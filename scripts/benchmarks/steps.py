"""A training step, against other layers and against PyTorch."""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import statistics
import time
from typing import TYPE_CHECKING, Any

import compile_check

from benchmarks import layers, measure, peers
from bn_repro import cli, host
from bn_repro import config as config_lib
from bn_repro.tpu import slices

if TYPE_CHECKING:
  from bn_repro.training.experiment import Experiment

# Steps between two readings of the clock.
NUM_STEPS = 30


def with_flax_norm(experiment: 'Experiment') -> 'Experiment':
  """The experiment with Flax's BN in the network and the training step."""
  import flax.linen as nn

  from bn_repro import parallel
  from bn_repro.training import steps

  class FlaxNorm(nn.BatchNorm):
    """Flax's layer, called as the networks call ours."""

    nonlinearity: Any = None

    def __call__(self, x: Any) -> Any:  # type: ignore[override]
      return self.nonlinearity(super().__call__(x))

  config = experiment.config
  norm = functools.partial(
    FlaxNorm,
    momentum=config.bn.momentum,
    epsilon=config.bn.epsilon,
    axis_name=parallel.AXIS,
    dtype=experiment.model.dtype,
  )
  model = experiment.model.clone(norm=norm, last_norm=norm)
  train_step = steps.create_train_step(model, experiment.optimizer, config)
  train_steps = parallel.data_parallel(
    steps.scan_steps(train_step),
    experiment.mesh,
    donate_state=True,
    batch_axis=1,
  )
  return dataclasses.replace(
    experiment,
    model=model,
    steps=experiment.steps._replace(train_steps=train_steps),
  )


def _with_each_norm() -> dict[str, 'Experiment']:
  """BN-Baseline in `mini` with our BN, with Flax's, and without BN."""
  ours = measure.create_experiment('bn_baseline:mini')
  return {
    'ours': ours,
    'Flax': with_flax_norm(ours),
    'without BN': measure.create_experiment('inception:mini'),
  }


def step(rounds: int) -> list[measure.Figure]:
  """Times a step in `mini` with our BN, with Flax's, and without BN."""
  experiments = _with_each_norm()
  from bn_repro import parallel
  from bn_repro.training import steps

  batch = next(experiments['ours'].train_batches(0, 1))

  def timer(experiment: 'Experiment') -> Callable[[], float]:
    train_step = parallel.data_parallel(
      steps.create_train_step(
        experiment.model, experiment.optimizer, experiment.config
      ),
      experiment.mesh,
      donate_state=False,
    )
    seconds = measure.step_timer(experiment, train_step, batch, NUM_STEPS)
    return lambda: 1e3 * seconds() / NUM_STEPS

  print('milliseconds per step')
  results = measure.interleaved(
    {name: timer(experiment) for name, experiment in experiments.items()},
    rounds,
  )
  return [
    measure.ratio(results, 'ours', 'Flax', "ours over Flax's layer"),
    measure.ratio(results, 'ours', 'without BN'),
  ]


def compile_step(rounds: int) -> list[measure.Figure]:
  """Times the compilation of such a step, without a cache."""
  import jax

  # Before anything is compiled; later it has no effect.
  jax.config.update('jax_enable_compilation_cache', False)  # noqa: FBT003
  experiments = _with_each_norm()

  def cpu_seconds(experiment: 'Experiment') -> float:
    state = experiment.initial_state()
    jax.clear_caches()
    start = time.process_time()
    experiment.lower('train_steps', state).compile()
    return time.process_time() - start

  print('seconds of CPU time')
  results = measure.interleaved(
    {
      name: functools.partial(cpu_seconds, experiment)
      for name, experiment in experiments.items()
    },
    rounds,
  )
  return [
    measure.ratio(results, 'ours', 'Flax', "ours over Flax's layer"),
    measure.ratio(results, 'ours', 'without BN'),
    measure.median('ours', results['ours'], 's of CPU time'),
  ]


def tpu(rounds: int) -> list[measure.Figure]:
  """Compiles the step of BN-x5 at full width for a slice, and counts bytes."""
  del rounds
  tpu_slice = slices.parse_slice('v5e:4x4')
  compile_check.set_up_libtpu(tpu_slice.chip)
  images = f'batch_size={32 * tpu_slice.num_chips}'
  configs = {
    name: config_lib.load('bn_x5', (images, f'bn.enabled={enabled}'))
    for name, enabled in (
      ('ours', True),
      ('Flax', True),
      ('without BN', False),
    )
  }
  cli.set_up_jax(configs['ours'])
  from bn_repro.tpu import cost, estimate

  devices = estimate.slice_devices(tpu_slice)
  figures = []
  for name, config in configs.items():
    experiment = estimate.abstract_experiment(
      estimate.resolve(config, 'tpu'), devices
    )
    if name == 'Flax':
      experiment = with_flax_norm(experiment)
    print(f'compiling: {name}', flush=True)
    found = estimate.from_compiled(
      experiment, lambda _: None, ['train_steps']
    ).steps['train_steps']
    num_bytes = {
      'accessed': found.bytes_accessed,
      'HBM': found.hbm_bytes,
      **{kind: found.by_kind[kind] for kind in cost.KINDS},
      'memory': found.memory,
    }
    figures += [
      *(
        measure.Figure(f'{name}: {what}', number / 1e9, 'GB')
        for what, number in num_bytes.items()
      ),
      measure.Figure(f'{name}: all-reduces', found.num_collectives),
    ]
  return figures


def torch(rounds: int) -> list[measure.Figure]:
  """Times a step in `mini`, ours and PyTorch's."""
  layers.import_torch()
  formats = ('contiguous', 'channels_last')
  figures = []
  for cores in range(1, min(2, host.num_cores()) + 1):
    with contextlib.ExitStack() as stack:
      processes = {
        name: stack.enter_context(
          peers.start('torch_steps.py', name, str(cores))
        )
        for name in ('ours', *formats)
      }
      cpu: dict[str, list[float]] = {name: [] for name in processes}

      def milliseconds(
        name: str, processes: Any = processes, cpu: Any = cpu
      ) -> float:
        answer = peers.ask(processes[name], str(NUM_STEPS))
        cpu[name].append(1e3 * answer['cpu'] / NUM_STEPS)
        return 1e3 * answer['wall'] / NUM_STEPS

      print(f'milliseconds per step, cores: {cores}')
      wall = measure.interleaved(
        {name: functools.partial(milliseconds, name) for name in processes},
        rounds,
      )
    # The call that warms up does not count.
    cpu = {name: values[1:] for name, values in cpu.items()}
    for what, times in (('wall', wall), ('CPU', cpu)):
      faster = min(formats, key=lambda name: statistics.median(times[name]))
      name = f'{what} time, cores: {cores}; ours over PyTorch, {faster}'
      figures.append(measure.ratio(times, 'ours', faster, name))
  return figures
