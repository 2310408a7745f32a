"""Compares times and rates that are measured in turns, in one run.

  python scripts/benchmark.py loop
  python scripts/benchmark.py all --json=FILE

A first round warms up. Results are medians over the rounds after it. They are
marked as unreliable if the rounds differ by more than a tenth, or if other
programs use the machine when the benchmark starts. The second command takes an
hour on two cores. docs/performance.md shows what it writes.

bn     Time of a BN layer, forward and forward + backward, over that of Flax's
       layer (with each of its two variances) and of PyTorch's. Takes
       requirements-dev.txt.
step   Time of a training step of BN-Baseline in `mini` over that of the same
       network with Flax's BN, and over that of the network without BN.
compile
       CPU time to compile such a step without a cache, over those of the same
       networks.
torch  Time of such a step over that of PyTorch, in both of its memory formats,
       on one core and on two. Takes requirements-dev.txt.
tpu    Bytes of a step of BN-x5 at full width, compiled for the slice v5e:4x4
       and 32 images per chip: with our BN, with Flax's, and without BN. Has no
       rounds; takes 15 minutes of CPU time and requirements-tpu.txt.
loop   Images per second that `main` trains on between evaluations, over those
       of a loop that only calls its step, on one batch. BN-x5 in `mini`.
bucket Images per second between checkpoints of a run of BN-x5 in `mini` whose
       workdir is in a bucket, with 200 ms for each request, over those of a
       local one; and the same of the time for which checkpoints stop training.
       Takes requirements-tpu.txt.
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
from collections.abc import Callable, Sequence
import dataclasses
from pathlib import Path
import subprocess
import sys

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# JAX is imported in functions, after `cli.set_up_jax`.
from benchmarks import inputs, layers, measure, record, steps, training

from bn_repro import cli, files
from bn_repro.errors import UserError
from bn_repro.runtime import backend

# What `all` runs, in this order.
BENCHMARKS: dict[str, Callable[[int], list[measure.Figure]]] = {
  'bn': layers.bn,
  'step': steps.step,
  'compile': steps.compile_step,
  'torch': steps.torch,
  'input': inputs.rates,
  'loop': training.loop,
  'bucket': training.bucket,
  'fig1': training.fig1,
  'checkpoint': training.checkpoint,
  'distortion': training.distortion,
  'devices': training.devices,
  'stream': inputs.stream,
  'tpu': steps.tpu,
}

# Errors that are reported without a traceback.
FAILURES = (OSError, RuntimeError, subprocess.CalledProcessError, UserError)

# Their figures do not depend on the clock.
UNTIMED = ('devices', 'tpu')

# Largest share of the CPUs in use of a machine that counts as idle. Our choice.
MAX_BUSY = 0.1


def share_in_use() -> float:
  """Returns the share of the CPUs that is in use, over two seconds."""
  return psutil.cpu_percent(interval=2) / 100


def run_one(name: str, rounds: int, json: Path | None) -> None:
  """Runs a benchmark, prints its figures, and writes them."""
  busy = share_in_use()
  print(f'{name}: {busy:.0%} of the CPUs are in use', flush=True)
  backend.import_jax()
  if json is not None:
    record.read(json)
  is_unreliable = busy > MAX_BUSY and name not in UNTIMED
  if is_unreliable:
    print('warning: the machine is busy: the figures are unreliable')
  figures = BENCHMARKS[name](rounds)
  if is_unreliable:
    figures = [
      dataclasses.replace(figure, doubt=figure.doubt or 'the machine was busy')
      if figure.low is not None
      else figure
      for figure in figures
    ]
  for figure in figures:
    print(figure)
  if json is not None:
    record.add(json, name, figures, rounds, busy)
  if name == 'input':
    print(inputs.last_line(figures))


def run_all(rounds: int, json: Path) -> int:
  """Runs each benchmark in a process of its own; returns the exit code."""
  record.read(json)
  missing = []
  for number, name in enumerate(BENCHMARKS, start=1):
    print(f'{number} of {len(BENCHMARKS)}: {name}', flush=True)
    command = [__file__, name, f'--rounds={rounds}', f'--json={json}']
    if subprocess.run([sys.executable, *command], check=False).returncode:
      missing.append(name)
  if missing:
    print(f'error: not measured: {", ".join(missing)}', file=sys.stderr)
  return 1 if missing else 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns the exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('name', choices=(*BENCHMARKS, 'all'))
  parser.add_argument(
    '--rounds',
    type=cli.positive,
    default=7,
    metavar='N',
    help='number of rounds (default: 7)',
  )
  files.add_path_argument(
    parser,
    '--json',
    metavar='FILE',
    help='file to which the figures are added, whatever else it contains',
  )
  parser.add_argument(
    '--budget',
    action='store_true',
    help='with input: only the parts of our pipeline',
  )
  flags = parser.parse_args(argv)
  if flags.budget and flags.name != 'input':
    raise UserError('--budget applies to input only')
  if flags.name == 'all' and flags.json is None:
    raise UserError('all takes --json=FILE')
  try:
    if flags.budget:
      inputs.budget()
    elif flags.name == 'all':
      return run_all(flags.rounds, flags.json)
    else:
      run_one(flags.name, flags.rounds, flags.json)
  except FAILURES as error:
    print(f'error: {flags.name} was not measured: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(cli.run(main))
