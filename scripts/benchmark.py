"""Measurements, each as ratios within one run: medians of interleaved rounds.

  python scripts/benchmark.py loop

loop: images per second of `main` in `mini` between evaluations, as a share of a
bare loop that calls the same compiled step on a batch already on the device.
"""

import argparse
import json
from pathlib import Path
import statistics
import sys
import tempfile
import time

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bn_repro import config as config_lib  # noqa: E402
from bn_repro import datasets  # noqa: E402
from bn_repro import main as main_lib  # noqa: E402


def loop(rounds: int) -> None:
  """Prints images per second of both loops, and the ratio of their medians."""
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
  main_lib.set_up_jax(config)
  import jax

  from bn_repro import parallel, train
  from bn_repro.interruption import Interruption
  from bn_repro.program import create_program
  from bn_repro.workdir import Workdir

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
    with tempfile.TemporaryDirectory() as folder:
      workdir = Workdir(folder)
      workdir.claim()
      train.train_and_evaluate(
        config, dataset, workdir, Interruption(), 'benchmark'
      )
      lines = [
        json.loads(line) for line in workdir.metrics.read_text().splitlines()
      ]
      workdir.release()
    # The second interval: the first has the start-up in it.
    return [
      line['timing']['images_per_second']
      for line in lines
      if line['split'] == 'train'
    ][-1]

  results: dict[str, list[float]] = {'bare': [], 'main': []}
  for number in range(rounds):
    results['bare'].append(bare())
    results['main'].append(ours())
    print(
      f'round {number + 1}: bare loop {results["bare"][-1]:.0f} images/s, '
      f'main {results["main"][-1]:.0f} images/s',
      flush=True,
    )
  bare_median, main_median = map(statistics.median, results.values())
  ratios = [
    a / b for a, b in zip(results['main'], results['bare'], strict=True)
  ]
  print(
    f'ratio={main_median / bare_median:.3f} (medians; by round '
    f'{min(ratios):.3f} to {max(ratios):.3f})'
  )


BENCHMARKS = {'loop': loop}


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
