"""Measurements, each as ratios within one run: medians of interleaved rounds.

  python scripts/benchmark.py loop

loop   images per second of `main` in `mini` between evaluations, as a share of
       a bare loop that calls the same compiled step on a batch already on the
       device.
fig1   time of both nets of Fig. 1, 50,000 steps and 200 evaluations each, over
       that of the bare steps in one `lax.scan`.
bn     time of a BN layer, forward and forward + backward, beside those of flax
       (both of its variances) and, where it is installed, of PyTorch.
step   time of a whole step of BN-Baseline in `mini` beside the same network
       with flax's BN, and without BN.
"""

import argparse
from collections.abc import Callable, Mapping
import functools
from pathlib import Path
import statistics
import sys
import tempfile
import time
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bn_repro import command_line, datasets  # noqa: E402
from bn_repro import config as config_lib  # noqa: E402

# The sizes of conv2_reduce, 3a and 4a at 224 pixels.
BN_SHAPES = ((32, 56, 56, 64), (32, 28, 28, 192), (32, 14, 14, 576))


def seconds(function: Callable[[], Any]) -> float:
  """How long a call takes."""
  start = time.perf_counter()
  function()
  return time.perf_counter() - start


def interleaved(
  candidates: Mapping[str, Callable[[], float]], rounds: int
) -> dict[str, list[float]]:
  """What each candidate returns in each round, after one round to warm up."""
  for candidate in candidates.values():
    candidate()
  results: dict[str, list[float]] = {name: [] for name in candidates}
  for number in range(rounds):
    for name, candidate in candidates.items():
      results[name].append(candidate())
    latest = ', '.join(f'{n} {r[-1]:.4g}' for n, r in results.items())
    print(f'round {number + 1}: {latest}', flush=True)
  return results


def ratio(results: Mapping[str, list[float]], above: str, below: str) -> float:
  """The ratio of two candidates' medians."""
  return statistics.median(results[above]) / statistics.median(results[below])


def show_ratio(
  results: Mapping[str, list[float]], above: str, below: str
) -> None:
  """Prints the ratio of the medians, and its range over rounds."""
  by_round = [
    a / b for a, b in zip(results[above], results[below], strict=True)
  ]
  print(
    f'ratio={ratio(results, above, below):.3f} ({above} over {below}; medians; '
    f'by round {min(by_round):.3f} to {max(by_round):.3f})'
  )


def train(config: Any, dataset: datasets.Dataset) -> list[dict[str, Any]]:
  """Runs the trainer in a workdir of its own; returns its lines."""
  from bn_repro import train as train_lib
  from bn_repro.interruption import Interruption
  from bn_repro.workdir import Workdir, read_metrics

  with tempfile.TemporaryDirectory() as folder:
    workdir = Workdir(folder)
    workdir.claim()
    train_lib.train_and_evaluate(
      config, dataset, workdir, Interruption(), 'benchmark'
    )
    lines = read_metrics(workdir.metrics)
    workdir.release()
  return lines


def loop(rounds: int) -> None:
  """Images per second of both loops, and the ratio of their medians."""
  steps = 300
  config = config_lib.load(
    str(ROOT / 'configs/bn_x5.py:mini'),
    (
      f'total_steps={steps}',
      f'log_every={steps // 2}',
      f'eval_every={steps}',
      f'checkpoint_every={steps}',
      'bn.population_batches=1',
    ),
  )
  dataset = datasets.check(config)
  command_line.set_up_jax(config)
  import jax

  from bn_repro import parallel
  from bn_repro.program import create_program

  program = create_program(config, dataset)
  state = program.initial_state()
  program = program.compile(state)
  batches = next(program.stacked_batches(0, 1))

  def bare() -> float:
    device_state = parallel.replicate(program.mesh, state)
    device_state, _ = program.train_steps(device_state, batches)
    jax.block_until_ready(device_state)
    start = time.perf_counter()
    for _ in range(steps // 2):
      device_state, _ = program.train_steps(device_state, batches)
    jax.block_until_ready(device_state)
    return steps // 2 * config.batch_size / (time.perf_counter() - start)

  def ours() -> float:
    # The second interval: the first has the start-up in it.
    return [
      line['timing']['images_per_second']
      for line in train(config, dataset)
      if line['split'] == 'train'
    ][-1]

  print('images per second')
  results = interleaved({'bare': bare, 'main': ours}, rounds)
  show_ratio(results, 'main', 'bare')


def fig1(rounds: int) -> None:
  """Seconds of both nets of Fig. 1 in the trainer, and in one scan each."""
  configs = [
    config_lib.load(f'{ROOT}/configs/{name}.py:mini')
    for name in ('mnist', 'bn_mnist')
  ]
  dataset = datasets.check(configs[0])
  command_line.set_up_jax(configs[0])
  import jax

  from bn_repro import optim, parallel, steps
  from bn_repro.program import create_program

  def bare_steps(config: Any) -> Callable[[], Any]:
    program = create_program(config, dataset)
    optimizer = optim.create_optimizer(
      config.optim, config.batch_size, program.schedule
    )
    step = steps.create_train_step(program.model, optimizer, config)

    def all_steps(state: Any, batch: Any) -> Any:
      return jax.lax.scan(
        lambda state, _: step(state, batch),
        state,
        length=config.total_steps,
      )

    run = parallel.data_parallel(all_steps, program.mesh, donate_state=False)
    state = parallel.replicate(program.mesh, program.initial_state())
    batch = next(program.train_batches(0, 1))
    return lambda: jax.block_until_ready(run(state, batch))

  bare = [bare_steps(config) for config in configs]
  results = interleaved(
    {
      'bare': lambda: sum(seconds(run) for run in bare),
      'main': lambda: sum(
        seconds(functools.partial(train, config, dataset)) for config in configs
      ),
    },
    rounds,
  )
  show_ratio(results, 'main', 'bare')


def bn(rounds: int) -> None:
  """Milliseconds of a BN layer at three shapes, float32."""
  import flax.linen as nn
  import jax
  import jax.numpy as jnp

  from bn_repro import batch_norm

  layers = {
    'ours': batch_norm.BatchNorm(use_running_average=False),
    'flax': nn.BatchNorm(use_running_average=False),
    'flax, two-pass': nn.BatchNorm(
      use_running_average=False, use_fast_variance=False
    ),
  }

  def of_jax(layer: Any, x: Any, dy: Any, *, backward: bool) -> Any:
    variables = layer.init(jax.random.key(0), x)

    def forward(params: Any, x: Any) -> Any:
      y, updated = layer.apply(
        {**variables, 'params': params}, x, mutable=['batch_stats']
      )
      return (y * dy).sum() if backward else y, updated

    function = (
      jax.grad(forward, argnums=(0, 1), has_aux=True) if backward else forward
    )
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(variables['params'], x))

  def of_torch(x: Any, dy: Any, *, backward: bool) -> Any:
    import torch

    layer = torch.nn.BatchNorm2d(x.shape[-1])
    images = torch.tensor(x.transpose(0, 3, 1, 2)).contiguous()
    gradient = torch.tensor(dy.transpose(0, 3, 1, 2)).contiguous()
    images.requires_grad_(backward)

    def call() -> None:
      y = layer(images)
      if backward:
        y.backward(gradient)

    return call

  ratios: dict[str, list[float]] = {}
  for backward in (False, True):
    for shape in BN_SHAPES:
      key = jax.random.key(1)
      x, dy = jax.random.normal(key, (2, *shape), jnp.float32)
      calls = {
        name: of_jax(layer, x, dy, backward=backward)
        for name, layer in layers.items()
      }
      try:
        import numpy as np

        calls['torch'] = of_torch(np.array(x), np.array(dy), backward=backward)
      except ImportError:
        pass

      def milliseconds(call: Callable[[], Any]) -> float:
        return 1e3 * min(seconds(call) for _ in range(3))

      what = 'forward + backward' if backward else 'forward'
      print(f'{what}, {"x".join(map(str, shape))}, ms')
      results = interleaved(
        {
          name: functools.partial(milliseconds, call)
          for name, call in calls.items()
        },
        rounds,
      )
      for name in results:
        if name != 'ours':
          ratios.setdefault(f'{what}, {name}', []).append(
            ratio(results, 'ours', name)
          )
  for name, values in ratios.items():
    each = ', '.join(f'{value:.2f}' for value in values)
    print(f'ratio={statistics.geometric_mean(values):.3f} ({name}: {each})')


def step(rounds: int) -> None:
  """Milliseconds of a step in `mini`: our BN, flax's, none."""
  config = config_lib.load(str(ROOT / 'configs/bn_baseline.py:mini'))
  dataset = datasets.check(config)
  command_line.set_up_jax(config)
  import flax.linen as nn
  import jax

  from bn_repro import networks, optim, parallel, steps
  from bn_repro.program import create_program

  program = create_program(config, dataset)
  batch = next(program.train_batches(0, 1))
  plain = config_lib.load(str(ROOT / 'configs/inception.py:mini'))
  model = program.model
  models = {
    'ours': (config, model),
    'flax': (
      config,
      model.clone(
        norm=functools.partial(
          nn.BatchNorm,
          momentum=config.bn.momentum,
          epsilon=config.bn.epsilon,
          axis_name=parallel.AXIS,
        )
      ),
    ),
    'without': (plain, create_program(plain, dataset).model),
  }

  def create(config: Any, model: Any) -> Callable[[], float]:
    optimizer = optim.create_optimizer(
      config.optim, config.batch_size, program.schedule
    )
    variables = networks.initial_variables(
      model, dataset.image_shape, seed=0, init_std=0.0
    )
    state = steps.TrainState(
      step=0, seed=0, opt_state=optimizer.init(variables['params']), **variables
    )
    state = parallel.replicate(program.mesh, state)
    run = parallel.data_parallel(
      steps.create_train_step(model, optimizer, config),
      program.mesh,
      donate_state=False,
    )

    def milliseconds() -> float:
      current = state
      start = time.perf_counter()
      for _ in range(30):
        current, _ = run(current, batch)
      jax.block_until_ready(current)
      return 1e3 * (time.perf_counter() - start) / 30

    return milliseconds

  print('milliseconds a step')
  results = interleaved(
    {name: create(*parts) for name, parts in models.items()}, rounds
  )
  show_ratio(results, 'ours', 'flax')
  show_ratio(results, 'ours', 'without')


BENCHMARKS = {'loop': loop, 'fig1': fig1, 'bn': bn, 'step': step}


def main() -> int:
  """Runs the benchmark that is named."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('name', choices=BENCHMARKS)
  parser.add_argument('--rounds', type=int, default=7)
  flags = parser.parse_args()
  BENCHMARKS[flags.name](flags.rounds)
  return 0


if __name__ == '__main__':
  sys.exit(main())
