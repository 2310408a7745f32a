"""Compares times and rates that are measured in turns, in one run.

  python scripts/benchmark.py loop

A first round warms up. Results are medians over the rounds after it. A result
whose rounds differ by more than a tenth is marked as unreliable.

bn     Time of a BN layer, forward and forward + backward, over that of Flax's
       layer (with each of its two variances) and of PyTorch's, if installed.
step   Time of a training step of BN-Baseline in `mini` over that of the same
       network with Flax's BN, and over that of the network without BN.
torch  Time of such a step over that of PyTorch, in both of its memory formats,
       on one core and on two. Takes requirements-dev.txt.
tpu    Bytes of a step of BN-x5 at full width, compiled for the slice v5e:4x4
       and 32 images per chip: with our BN, with Flax's, and without BN. Has no
       rounds; takes 15 minutes of CPU time and requirements-tpu.txt.
loop   Images per second that `main` trains on between evaluations, over those
       of a loop that only calls its step, on one batch. BN-x5 in `mini`.
fig1   Time to train both networks of Fig. 1, 50,000 steps and 200 evaluations
       each, over the time of their steps alone in one `lax.scan`.
checkpoint
       Time for which a save stops the training loop, over the time of a step.
       BN-x5 at full width and 224 pixels, 8 images.
distortion
       Time to distort and normalize a batch, over the time of a step. BN-x5 and
       Inception at full width and 224 pixels, 8 images.
devices
       Accuracy of BN-x5 in `mini` and float32 on one fake CPU device and on
       eight, for three seeds. A round is 100 steps of training.
input  Training images of ImageNet's size per second of CPU time, over those of
       tf.data as in Flax's ImageNet example; also those of Pillow, and of
       decoding alone. PSNR of the images against antialiased bicubic resizing.
       Installs the environment of `scripts/prepare_imagenet.sh`. With --budget,
       only microseconds of CPU time of each part of our pipeline.
stream Seconds from a cold start to the first batch of 256 from a data set of
       ImageNet's length, and the growth of resident memory between batches
       1,000 and 10,000. The images are tiny, and take 3 GB of disk while it
       runs. It has no rounds.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import json
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Any

import benchmark_input
import compile_check
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# JAX is imported in functions, after `cli.set_up_jax`.
from bn_repro import cli, host
from bn_repro import config as config_lib
from bn_repro.data import datasets, imagenet_metadata
from bn_repro.errors import UserError
from bn_repro.runtime import backend
from bn_repro.runtime.preemption import Preemption
from bn_repro.runtime.workdir import Workdir, read_metrics
from bn_repro.tpu import slices

if TYPE_CHECKING:
  from bn_repro.training.experiment import Experiment

# Results of each candidate, one per round.
Results = Mapping[str, list[float]]

# The inputs of the BN layers of conv2_reduce, 3a and 4a at 224 pixels.
BN_SHAPES = ((32, 56, 56, 64), (32, 28, 28, 192), (32, 14, 14, 576))

# Overrides with which a config in `full` trains on generated images.
FULL_WIDTH = (
  'data.name=synthetic',
  'data.num_shards=1',
  'eval_split=test',
  'batch_size=8',
)

# Largest interquartile range of the rounds of a reliable figure, as a fraction
# of their median. Our choice.
MAX_SPREAD = 0.1

# Errors that are reported without a traceback.
FAILURES = (OSError, RuntimeError, subprocess.CalledProcessError, UserError)


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


def ratio(results: Results, above: str, below: str) -> float:
  """Returns the ratio of two candidates' medians."""
  return statistics.median(results[above]) / statistics.median(results[below])


def show_ratio(results: Results, above: str, below: str) -> None:
  """Prints the ratio of two candidates' medians, and its range over rounds."""
  by_round = [
    a / b for a, b in zip(results[above], results[below], strict=True)
  ]
  print(
    f'ratio={ratio(results, above, below):.3f} ({above} over {below}; medians; '
    f'by round {min(by_round):.3f} to {max(by_round):.3f}){doubt(by_round)}'
  )


def doubt(by_round: Sequence[float]) -> str:
  """Says that a figure is unreliable if its rounds differ too much."""
  if len(by_round) < 2:
    return ' UNRELIABLE: one round'
  low, middle, high = statistics.quantiles(by_round, n=4, method='inclusive')
  spread = (high - low) / middle
  if spread <= MAX_SPREAD:
    return ''
  return (
    f' UNRELIABLE: the interquartile range of the rounds is {spread:.0%} of '
    'their median. Is the machine idle?'
  )


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


def train(experiment: 'Experiment') -> list[dict[str, Any]]:
  """Trains in a temporary workdir; returns the lines of `metrics.jsonl`."""
  from bn_repro.training import train as train_lib

  with tempfile.TemporaryDirectory() as folder:
    workdir = Workdir(folder)
    workdir.claim()
    train_lib.train_and_evaluate(
      experiment.config, experiment.dataset, workdir, Preemption(), 'benchmark'
    )
    lines = read_metrics(workdir.metrics)
    workdir.release()
  return lines


def _jax_layer(
  layer: Any, x: Any, dy: Any, *, backward: bool
) -> Callable[[], Any]:
  """Creates a function that runs a linen layer, and its gradient given `dy`."""
  import jax

  variables = layer.init(jax.random.key(0), x)

  def forward(params: Any, x: Any) -> Any:
    y, updated = layer.apply(
      {**variables, 'params': params}, x, mutable=['batch_stats']
    )
    return (y * dy).sum() if backward else y, updated

  if backward:
    compiled = jax.jit(jax.grad(forward, argnums=(0, 1), has_aux=True))
  else:
    compiled = jax.jit(forward)
  return lambda: jax.block_until_ready(compiled(variables['params'], x))


def _torch_layer(x: Any, dy: Any, *, backward: bool) -> Callable[[], Any]:
  """Creates the same function for PyTorch's layer, which must be installed."""
  import torch

  layer = torch.nn.BatchNorm2d(x.shape[-1])
  images, gradient = (
    torch.tensor(np.array(array).transpose(0, 3, 1, 2)).contiguous()
    for array in (x, dy)
  )
  images.requires_grad_(backward)

  def call() -> None:
    y = layer(images)
    if backward:
      y.backward(gradient)

  return call


def bn(rounds: int) -> None:
  """Prints milliseconds of BN layers at three shapes, in float32."""
  backend.import_jax()
  backend.check_devices()
  import flax.linen as nn
  import jax
  import jax.numpy as jnp

  from bn_repro.models import batch_norm

  layers = {
    'ours': batch_norm.BatchNorm(use_running_average=False),
    'flax': nn.BatchNorm(use_running_average=False),
    'flax, two-pass': nn.BatchNorm(
      use_running_average=False, use_fast_variance=False
    ),
  }

  def milliseconds(call: Callable[[], Any]) -> float:
    return 1e3 * min(seconds(call) for _ in range(3))

  ratios: dict[str, list[float]] = {}
  for backward, shape in itertools.product((False, True), BN_SHAPES):
    x, dy = jax.random.normal(jax.random.key(1), (2, *shape), jnp.float32)
    calls = {
      name: _jax_layer(layer, x, dy, backward=backward)
      for name, layer in layers.items()
    }
    with contextlib.suppress(ImportError):
      calls['torch'] = _torch_layer(x, dy, backward=backward)
    what = 'forward + backward' if backward else 'forward'
    print(f'{what}, {"x".join(map(str, shape))}, ms')
    results = interleaved(
      {
        name: functools.partial(milliseconds, call)
        for name, call in calls.items()
      },
      rounds,
    )
    for name in calls:
      if name != 'ours':
        quotients = ratios.setdefault(f'{what}, {name}', [])
        quotients.append(ratio(results, 'ours', name))
  for name, values in ratios.items():
    each = ', '.join(f'{value:.2f}' for value in values)
    print(f'ratio={statistics.geometric_mean(values):.3f} ({name}: {each})')


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
  model = experiment.model.clone(norm=norm)
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


def step(rounds: int) -> None:
  """Prints milliseconds of a step in `mini` with our BN, Flax's, and none."""
  ours = create_experiment('bn_baseline:mini')
  from bn_repro import parallel
  from bn_repro.training import steps

  experiments = {
    'ours': ours,
    'flax': with_flax_norm(ours),
    'without': create_experiment('inception:mini'),
  }
  batch = next(ours.train_batches(0, 1))
  count = 30

  def timer(experiment: 'Experiment') -> Callable[[], float]:
    train_step = parallel.data_parallel(
      steps.create_train_step(
        experiment.model, experiment.optimizer, experiment.config
      ),
      experiment.mesh,
      donate_state=False,
    )
    measure = step_timer(experiment, train_step, batch, count)
    return lambda: 1e3 * measure() / count

  print('milliseconds per step')
  results = interleaved(
    {name: timer(experiment) for name, experiment in experiments.items()},
    rounds,
  )
  show_ratio(results, 'ours', 'flax')
  show_ratio(results, 'ours', 'without')


def tpu(rounds: int) -> None:
  """Prints the bytes of a step on TPU, by BN layer, as a table in Markdown."""
  del rounds
  tpu_slice = slices.parse_slice('v5e:4x4')
  compile_check.set_up_libtpu(tpu_slice.chip)
  images = f'batch_size={32 * tpu_slice.num_chips}'
  configs = {
    name: config_lib.load('bn_x5', (images, f'bn.enabled={enabled}'))
    for name, enabled in (('ours', True), ('flax', True), ('without', False))
  }
  cli.set_up_jax(configs['ours'])
  from bn_repro.tpu import cost, estimate

  devices = estimate.slice_devices(tpu_slice)
  columns = ('accessed', 'HBM', *cost.KINDS, 'memory', 'collectives')
  rows = []
  for name, config in configs.items():
    experiment = estimate.abstract_experiment(
      estimate.resolve(config, 'tpu'), devices
    )
    if name == 'flax':
      experiment = with_flax_norm(experiment)
    print(f'compiling: {name}', flush=True)
    found = estimate.from_compiled(
      experiment, lambda _: None, ['train_steps']
    ).steps['train_steps']
    num_bytes = (
      found.bytes_accessed,
      found.hbm_bytes,
      *(found.by_kind[kind] for kind in cost.KINDS),
      found.memory,
    )
    gigabytes = ' | '.join(f'{number / 1e9:.3f}' for number in num_bytes)
    rows.append(f'| {name} | {gigabytes} | {found.num_collectives} |')
  print('| GB per step and chip | ' + ' | '.join(columns) + ' |')
  print('|---' * (len(columns) + 1) + '|')
  print('\n'.join(rows))


def pytorch(rounds: int) -> None:
  """Prints milliseconds of a step in `mini`, ours and PyTorch's."""
  if importlib.util.find_spec('torch') is None:
    raise UserError(
      'PyTorch is not installed. Run: pip install -r requirements-dev.txt'
    )
  count = 30
  formats = ('contiguous', 'channels_last')
  for cores in range(1, min(2, host.num_cores()) + 1):
    with contextlib.ExitStack() as stack:
      processes = {
        name: stack.enter_context(
          start_peer('benchmark_torch.py', name, str(cores))
        )
        for name in ('ours', *formats)
      }
      cpu: dict[str, list[float]] = {name: [] for name in processes}

      def measure(
        name: str, processes: Any = processes, cpu: Any = cpu
      ) -> float:
        answer = ask(processes[name], str(count))
        cpu[name].append(1e3 * answer['cpu'] / count)
        return 1e3 * answer['wall'] / count

      print(f'milliseconds per step, cores: {cores}')
      results = interleaved(
        {name: functools.partial(measure, name) for name in processes}, rounds
      )
    # The call that warms up does not count.
    cpu_results = {name: values[1:] for name, values in cpu.items()}
    for what, figures in (('wall', results), ('CPU', cpu_results)):
      faster = min(formats, key=lambda name: statistics.median(figures[name]))
      print(f'{what} time, cores: {cores}:', end=' ')
      show_ratio(figures, 'ours', faster)


def loop(rounds: int) -> None:
  """Prints images per second of `main` and of its steps alone."""
  interval = 150
  experiment = create_experiment(
    'bn_x5:mini',
    f'total_steps={2 * interval}',
    f'log_every={interval}',
    f'eval_every={2 * interval}',
    f'checkpoint_every={2 * interval}',
    'bn.population_batches=1',
  )
  images = interval * experiment.config.batch_size
  measure = train_step_timer(experiment, interval)

  def rate_of_main() -> float:
    rates = [
      line['timing']['images_per_second']
      for line in train(experiment)
      if line['split'] == 'train'
    ]
    return rates[-1]  # The first interval includes the start.

  print('images per second')
  results = interleaved(
    {'bare': lambda: images / measure(), 'main': rate_of_main}, rounds
  )
  show_ratio(results, 'main', 'bare')


def fig1(rounds: int) -> None:
  """Prints seconds of both networks of Fig. 1, in `main` and in one scan."""
  experiments = [create_experiment(f'{n}:mini') for n in ('mnist', 'bn_mnist')]
  import jax

  from bn_repro import parallel
  from bn_repro.training import steps

  def scan_timer(experiment: 'Experiment') -> Callable[[], float]:
    config = experiment.config
    train_step = steps.create_train_step(
      experiment.model, experiment.optimizer, config
    )

    def all_steps(state: Any, batch: Any) -> Any:
      return jax.lax.scan(
        lambda state, _: train_step(state, batch),
        state,
        length=config.total_steps,
      )

    scan = parallel.data_parallel(
      all_steps, experiment.mesh, donate_state=False
    )
    return step_timer(experiment, scan, next(experiment.train_batches(0, 1)))

  scans = [scan_timer(experiment) for experiment in experiments]
  results = interleaved(
    {
      'bare': lambda: sum(measure() for measure in scans),
      'main': lambda: seconds(lambda: [train(e) for e in experiments]),
    },
    rounds,
  )
  show_ratio(results, 'main', 'bare')


def checkpoint(rounds: int) -> None:
  """Prints seconds for which a save stops the loop, and those of a step.

  Also those of reading a checkpoint, as the thread does that saves it, and the
  bytes per second of its checksums.
  """
  experiment = create_experiment('bn_x5', *FULL_WIDTH)
  import jax

  from bn_repro import parallel
  from bn_repro.training.checkpoint import Checkpoints, checksums

  state = parallel.replicate(experiment.mesh, experiment.initial_state())
  jax.block_until_ready(state)
  numbers = itertools.count()
  with (
    tempfile.TemporaryDirectory() as folder,
    Checkpoints(Path(folder) / 'checkpoints', keep=2) as checkpoints,
  ):

    def save() -> float:
      checkpoints.wait()
      step = next(numbers)
      at_step = state.replace(
        step=parallel.replicate(experiment.mesh, np.int32(step))
      )
      return seconds(lambda: checkpoints.save(step, at_step, {}))

    def read() -> float:
      checkpoints.wait()
      newest = checkpoints.steps()[-1]
      return seconds(lambda: checkpoints.restore(newest, state))

    results = interleaved(
      {
        'save': save,
        'read': read,
        'checksums': lambda: seconds(lambda: checksums(state)),
        'step': train_step_timer(experiment),
      },
      rounds,
    )
    checkpoints.wait()
  show_ratio(results, 'save', 'step')
  show_ratio(results, 'read', 'step')
  num_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
  rate = num_bytes / statistics.median(results['checksums'])
  print(f'checksums: {rate / 1e9:.2f} GB/s of {num_bytes / 1e6:.0f} MB')


def distortion(rounds: int) -> None:
  """Prints seconds of a step, and of its distortions alone."""
  for variant in ('bn_x5', 'inception'):
    experiment = create_experiment(variant, *FULL_WIDTH)
    candidates = {
      'distortion': _distortion_timer(experiment),
      'step': train_step_timer(experiment),
    }
    print(f'{variant}, seconds')
    results = interleaved(candidates, rounds)
    print(f'{variant}, {experiment.config.data.distortion}:', end=' ')
    show_ratio(results, 'distortion', 'step')


def _distortion_timer(experiment: 'Experiment') -> Callable[[], float]:
  """Creates a function that returns the seconds to distort a batch."""
  import jax

  from bn_repro import parallel
  from bn_repro.data import preprocess
  from bn_repro.training import steps

  def distort(position: tuple[Any, Any], batch: Any) -> Any:
    seed, step = position
    images = steps.distorted_images(
      batch['image'], seed, step, experiment.config.data.distortion
    )
    return parallel.gather(preprocess.normalize(images, experiment.model.dtype))

  mesh = experiment.mesh
  compiled = parallel.data_parallel(distort, mesh, donate_state=False)
  position = parallel.replicate(mesh, (np.uint32(0), np.int32(0)))
  batch = next(experiment.train_batches(0, 1))
  return lambda: seconds(
    lambda: jax.block_until_ready(compiled(position, batch))
  )


def devices(rounds: int) -> None:
  """Prints final accuracies with population statistics, and the difference."""
  config = 'bn_x5:mini'
  steps = min(100 * rounds, config_lib.load(config).total_steps)
  accuracies: dict[int, list[float]] = {1: [], 8: []}
  for seed in range(3):
    for number, found in accuracies.items():
      found.append(_accuracy(config, steps, seed, number))
    latest = ', '.join(f'{a[-1]:.4f} on {n}' for n, a in accuracies.items())
    print(f'seed {seed}, {steps} steps: {latest}', flush=True)
  one, eight = map(statistics.mean, accuracies.values())
  by_seed = [b - a for a, b in zip(*accuracies.values(), strict=True)]
  print(
    f'accuracy_difference={eight - one:+.4f} (mean on 8 devices, {eight:.4f}, '
    f'minus mean on 1, {one:.4f}; by seed {min(by_seed):+.4f} to '
    f'{max(by_seed):+.4f})'
  )


def _accuracy(config: str, steps: int, seed: int, num_devices: int) -> float:
  """Trains on fake CPU devices; returns the final accuracy on validation."""
  flags = f'--xla_force_host_platform_device_count={num_devices}'
  with tempfile.TemporaryDirectory() as workdir:
    arguments = [
      f'--config={config}',
      f'--workdir={workdir}',
      f'--config.seed={seed}',
      f'--config.total_steps={steps}',
      f'--config.eval_every={steps}',
      f'--config.checkpoint_every={steps}',
      '--config.model.dtype=float32',
    ]
    subprocess.run(
      [sys.executable, '-m', 'bn_repro.main', *arguments],
      cwd=ROOT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags},
      stdout=subprocess.DEVNULL,
      check=True,
    )
    (accuracy,) = (
      line['accuracy']
      for line in read_metrics(Path(workdir, 'metrics.jsonl'))
      if line['split'] == 'validation' and line['statistics'] == 'population'
    )
  return accuracy


def start_input(*arguments: str) -> subprocess.Popen[str]:
  """Starts `benchmark_input.py`, with TensorFlow if it needs it."""
  python = sys.executable
  if arguments[0] in ('tf.data', 'tfrecord'):
    python = f'{ROOT}/.venv-prepare/bin/python'
  return start_peer('benchmark_input.py', *arguments, python=python)


def start_peer(
  script: str, *arguments: str, python: str = sys.executable
) -> subprocess.Popen[str]:
  """Starts a script of this folder that answers lines with lines of JSON."""
  return subprocess.Popen(
    [python, f'{ROOT}/scripts/{script}', *arguments],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env={**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '3'},
    text=True,
  )


def read_answer(process: subprocess.Popen[str]) -> dict[str, float]:
  """Reads a line of JSON from a process of `start_peer`.

  Raises:
    RuntimeError: if the process exits instead.
  """
  assert process.stdout is not None
  line = process.stdout.readline()
  if not line:
    raise RuntimeError(f'{process.args!r} exited with {process.wait()}')
  return json.loads(line)


def ask(process: subprocess.Popen[str], question: str) -> dict[str, float]:
  """Sends a line to a process of `start_peer`; returns the answer."""
  print(question, file=process.stdin, flush=True)
  return read_answer(process)


def input_pipelines(rounds: int) -> None:
  """Prints images per second of CPU time and of wall time, and PSNRs."""
  subprocess.run(
    [
      'bash',
      '-c',
      'source scripts/environment.sh; '
      'use_environment requirements-prepare.txt .venv-prepare',
    ],
    cwd=ROOT,
    check=True,
  )
  with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
    benchmark_input.write_photographs(Path(folder))
    read_answer(stack.enter_context(start_input('tfrecord', folder)))
    pipelines = {
      name: stack.enter_context(start_input(name, folder))
      for name in benchmark_input.PIPELINES
    }
    wall: dict[str, list[float]] = {name: [] for name in pipelines}

    def measure(name: str) -> float:
      answer = ask(pipelines[name], '15')
      wall[name].append(answer['images'] / answer['wall'])
      return answer['images'] / answer['cpu']

    print('images per second of CPU time')
    results = interleaved(
      {name: functools.partial(measure, name) for name in pipelines}, rounds
    )
    reference = benchmark_input.antialiased_views(Path(folder))
    psnrs = {}
    for name in ('ours', 'tf.data', 'pillow'):
      ask(pipelines[name], 'views')
      views = np.load(f'{folder}/{name}.npy').astype(float)
      errors = np.mean((views - reference) ** 2, (1, 2, 3))
      psnrs[name] = float(np.mean(10 * np.log10(255**2 / errors)))
  for name in results:
    psnr = f'{psnrs[name]:.1f} dB' if name in psnrs else '-'
    print(
      f'{name:12}  {statistics.median(results[name]):7.0f} images/CPU-s  '
      f'{statistics.median(wall[name][1:]):7.0f} images/s  {psnr:>8}  '
      f'{ratio(results, name, "tf.data"):.2f} of tf.data'
    )
  show_ratio(results, 'ours', 'tf.data')
  show_ratio(results, 'ours', 'decode only')
  print(f'psnr={psnrs["ours"]:.1f} psnr_tfdata={psnrs["tf.data"]:.1f}')


def input_budget() -> None:
  """Prints microseconds per image of each part of our input pipeline."""
  with tempfile.TemporaryDirectory() as folder:
    benchmark_input.write_photographs(Path(folder))
    with start_input('ours', folder) as process:
      budget = ask(process, 'budget')
  rest = 2 * budget['all'] - sum(budget.values())
  print('microseconds of CPU time per image')
  for part, microseconds in {**budget, 'rest': rest}.items():
    print(f'{part:16}{microseconds:8.1f}')


def stream(rounds: int) -> None:
  """Prints seconds and bytes of a training stream of ImageNet's length."""
  del rounds
  count = imagenet_metadata.NUM_EXAMPLES
  with tempfile.TemporaryDirectory() as folder:
    print(f'writing {count["train"]:,} small images', flush=True)
    image = benchmark_input.tiny_image()
    benchmark_input.write_imagenet(
      Path(folder),
      itertools.repeat(image, count['train']),
      itertools.repeat(image, count['validation']),
      num_shards=1024,
    )
    start = time.perf_counter()
    with start_input('stream', folder, '10000') as process:
      without_python = read_answer(process)['first']
      to_first = time.perf_counter() - start
      print(
        f'first batch after {to_first:.1f} s, {without_python:.1f} s of them '
        'after starting Python',
        flush=True,
      )
      early, late = (read_answer(process)['bytes'] for _ in range(2))
  print(
    f'first_batch_seconds={to_first:.1f} resident_gb={late / 1e9:.2f} '
    f'growth={late / early - 1:.2%}'
  )


BENCHMARKS = {
  'bn': bn,
  'step': step,
  'torch': pytorch,
  'tpu': tpu,
  'loop': loop,
  'fig1': fig1,
  'checkpoint': checkpoint,
  'distortion': distortion,
  'devices': devices,
  'input': input_pipelines,
  'stream': stream,
}


def main() -> int:
  """Runs a benchmark; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('name', choices=BENCHMARKS)
  parser.add_argument(
    '--rounds',
    type=cli.positive,
    default=7,
    metavar='N',
    help='number of rounds (default: 7)',
  )
  parser.add_argument(
    '--budget',
    action='store_true',
    help='with input: only the parts of our pipeline',
  )
  flags = parser.parse_args()
  print(
    f'load {os.getloadavg()[0]:.1f} on {host.num_cores()} cores', flush=True
  )
  try:
    if flags.budget:
      if flags.name != 'input':
        raise UserError('--budget applies to input only')
      input_budget()
    else:
      BENCHMARKS[flags.name](flags.rounds)
  except FAILURES as error:
    print(f'error: {flags.name} was not measured: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(cli.run(main))
