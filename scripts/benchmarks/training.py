"""The training loop, checkpoints and distortions."""

from collections.abc import Callable, Iterator
import contextlib
import functools
import itertools
import os
from pathlib import Path
import statistics
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import measure
from bn_repro import config as config_lib
from bn_repro import files
from bn_repro.runtime.preemption import Preemption
from bn_repro.runtime.workdir import Workdir, read_metrics

if TYPE_CHECKING:
  from bn_repro.training.experiment import Experiment

ROOT = Path(__file__).resolve().parent.parent.parent


# Delay of a request to a bucket, in seconds, and steps of a run there, of which
# there are two uploads or more. Our choice.
_DELAY = 0.2
_BUCKET_STEPS = 2400

# Serves a bucket in which each request takes longer, until its input ends.
_BUCKET = """
import sys
sys.path.insert(0, sys.argv[1])
import bucket_proxy, bucket_server
server = bucket_server.Server()
server.store.buckets = {'bucket': {}}
proxy = bucket_proxy.Proxy(server.server_address)
proxy.rule = bucket_proxy.always(('delay', float(sys.argv[2])))
print(proxy.server_address[1], flush=True)
sys.stdin.read()
"""


def train(
  experiment: 'Experiment', *, in_bucket: bool = False
) -> list[dict[str, Any]]:
  """Trains in a temporary workdir; returns the lines of `metrics.jsonl`.

  Args:
    experiment: what to train.
    in_bucket: whether the workdir is in the bucket of `_serve_bucket`.
  """
  from bn_repro.training import train as train_lib

  with tempfile.TemporaryDirectory() as folder:
    place = files.Place('bucket', f'runs/{Path(folder).name}')
    workdir = Workdir(files.local_path(place) if in_bucket else folder)
    workdir.claim()
    train_lib.train_and_evaluate(
      experiment.config, experiment.dataset, workdir, Preemption(), 'benchmark'
    )
    lines = read_metrics(workdir.metrics)
    workdir.release()
  return lines


def loop(rounds: int) -> list[measure.Figure]:
  """Counts images per second of `main` and of its steps alone."""
  interval = 150
  experiment = measure.create_experiment(
    'bn_x5:mini',
    f'total_steps={2 * interval}',
    f'log_every={interval}',
    f'eval_every={2 * interval}',
    f'checkpoint_every={2 * interval}',
    'bn.population_batches=1',
  )
  images = interval * experiment.config.batch_size
  time_of_steps = measure.train_step_timer(experiment, interval)

  def rate_of_main() -> float:
    rates = [
      line['timing']['images_per_second']
      for line in train(experiment)
      if line['split'] == 'train'
    ]
    return rates[-1]  # The first interval includes the start.

  print('images per second')
  results = measure.interleaved(
    {'steps alone': lambda: images / time_of_steps(), 'main': rate_of_main},
    rounds,
  )
  return [measure.ratio(results, 'main', 'steps alone')]


@contextlib.contextmanager
def _serve_bucket() -> Iterator[None]:
  """Serves `gs://bucket`, slowly, to this process."""
  server = subprocess.Popen(
    [sys.executable, '-c', _BUCKET, str(ROOT / 'tests'), str(_DELAY)],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert server.stdout is not None
  with tempfile.TemporaryDirectory() as cache, server:
    os.environ['STORAGE_EMULATOR_HOST'] = (
      f'http://127.0.0.1:{server.stdout.readline().strip()}'
    )
    os.environ['XDG_CACHE_HOME'] = cache
    yield
    server.communicate()


def bucket(rounds: int) -> list[measure.Figure]:
  """Compares the loop with a workdir in a bucket with that in a local one."""
  experiment = measure.create_experiment(
    'bn_x5:mini',
    f'total_steps={_BUCKET_STEPS}',
    'log_every=100',
    f'eval_every={_BUCKET_STEPS}',
    'checkpoint_every=200',
    'bn.population_batches=1',
  )
  there, here = 'in a bucket', 'local'
  shares: dict[str, list[float]] = {there: [], here: []}

  def rate(name: str) -> float:
    # The first interval includes the start, the last one the evaluation.
    timings = [
      line['timing']
      for line in train(experiment, in_bucket=name == there)
      if line['split'] == 'train'
    ][1:-1]
    shares[name].append(
      statistics.fmean(timing['shares']['checkpoint'] for timing in timings)
    )
    return statistics.fmean(timing['images_per_second'] for timing in timings)

  with _serve_bucket():
    print('images per second between checkpoints')
    rates = measure.interleaved(
      {each: functools.partial(rate, each) for each in (there, here)}, rounds
    )
  # Without the round that warms up.
  shares = {each: of_round[-rounds:] for each, of_round in shares.items()}
  return [
    measure.ratio(rates, there, here, 'speed in a bucket over local'),
    measure.ratio(shares, there, here, 'time of saves in a bucket over local'),
  ]


def fig1(rounds: int) -> list[measure.Figure]:
  """Times training of both networks of Fig. 1, in `main` and in one scan."""
  experiments = [
    measure.create_experiment(f'{name}:mini') for name in ('mnist', 'bn_mnist')
  ]
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
    return measure.step_timer(
      experiment, scan, next(experiment.train_batches(0, 1))
    )

  scans = [scan_timer(experiment) for experiment in experiments]
  results = measure.interleaved(
    {
      'steps alone': lambda: sum(measure() for measure in scans),
      'main': lambda: measure.seconds(lambda: [train(e) for e in experiments]),
    },
    rounds,
  )
  return [measure.ratio(results, 'main', 'steps alone')]


def checkpoint(rounds: int) -> list[measure.Figure]:
  """Times how long a save stops the loop, and a step.

  Also the reading of a checkpoint, as the thread does that saves it, and the
  checksums.
  """
  experiment = measure.create_experiment('bn_x5', *measure.FULL_WIDTH)
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
      return measure.seconds(lambda: checkpoints.save(step, at_step, {}))

    def read() -> float:
      checkpoints.wait()
      newest = checkpoints.steps()[-1]
      return measure.seconds(lambda: checkpoints.restore(newest, state))

    results = measure.interleaved(
      {
        'save': save,
        'read': read,
        'checksums': lambda: measure.seconds(lambda: checksums(state)),
        'step': measure.train_step_timer(experiment),
      },
      rounds,
    )
    checkpoints.wait()
  num_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
  rates = [num_bytes / 1e9 / duration for duration in results['checksums']]
  return [
    measure.ratio(results, 'save', 'step'),
    measure.ratio(results, 'read', 'step'),
    measure.median('checksums', rates, 'GB/s'),
  ]


def distortion(rounds: int) -> list[measure.Figure]:
  """Times a step, and its distortions alone."""
  figures = []
  for variant in ('bn_x5', 'inception'):
    experiment = measure.create_experiment(variant, *measure.FULL_WIDTH)
    candidates = {
      'distortion': _distortion_timer(experiment),
      'step': measure.train_step_timer(experiment),
    }
    print(f'{variant}, seconds')
    results = measure.interleaved(candidates, rounds)
    name = (
      f'{variant}, data.distortion={experiment.config.data.distortion}; '
      'distortion over step'
    )
    figures.append(measure.ratio(results, 'distortion', 'step', name))
  return figures


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
    return parallel.gather(
      preprocess.normalize(
        images, experiment.model.dtype, experiment.config.data.normalization
      )
    )

  mesh = experiment.mesh
  compiled = parallel.data_parallel(distort, mesh, donate_state=False)
  position = parallel.replicate(mesh, (np.uint32(0), np.int32(0)))
  batch = next(experiment.train_batches(0, 1))
  return lambda: measure.seconds(
    lambda: jax.block_until_ready(compiled(position, batch))
  )


def devices(rounds: int) -> list[measure.Figure]:
  """Compares final accuracies with population statistics."""
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
  return [
    measure.Figure(
      f'mean accuracy on 8 devices, {eight:.4f}, minus that on 1, {one:.4f}',
      eight - one,
      'of 1',
      min(by_seed),
      max(by_seed),
    )
  ]


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
