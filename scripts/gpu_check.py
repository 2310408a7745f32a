"""Checks and measures what this project computes on a GPU.

  python scripts/gpu_check.py --out=results/gpu
  python scripts/gpu_check.py --out=runs/gpu --platform=cpu --quick

The first command runs all checks, each in a process of its own, and writes
gpu_check.json and the table gpu_check.md into the folder. It uses one GPU, the
first or that of CUDA_VISIBLE_DEVICES. Checks that have held are not run again:
the same command resumes after an interruption, and tries again what failed.
results/gpu/README.md says what must hold, why, and how to bring the packages to
a machine without network. The second command tries the checks themselves, on a
CPU and a small network.

machine      The GPU, and the versions of its runtime and of the packages.
batch_norm   BN and its gradients in float32 and bfloat16 against float64 on the
             CPU, in each form of statistics, and with large means.
step         A training step of BN-x5 in `mini` against float64 on the CPU.
bfloat16     Losses of 200 steps in bfloat16 against those in float32.
determinism  Two runs, and one that is stopped and resumed, with
             XLA_FLAGS=--xla_gpu_deterministic_ops=true: equal bit for bit?
trace        A run that writes a trace.
speed_bfloat16, speed_float32
             Images per second and memory of a training step of BN-Baseline at
             full width and 224 pixels, with 32 to 256 images.
variants     Trains all variants in `mini` to their ends.

Exit codes:
  0  all checks hold
  1  one does not, or the command is invalid
"""

import argparse
from collections.abc import Callable, Sequence
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
import traceback
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# JAX starts in the processes of checks only: its first process on a GPU takes
# most of the memory.
from gpu_checks import device, outcomes, precision, speed, training

from bn_repro import cli, files
from bn_repro.runtime.progress import duration

CHECKS: dict[str, Callable[[outcomes.Settings], Sequence[outcomes.Figure]]] = {
  'batch_norm': precision.batch_norm,
  'step': precision.step,
  'bfloat16': training.bfloat16,
  'determinism': training.determinism,
  'trace': training.trace,
  'speed_bfloat16': speed.bfloat16,
  'speed_float32': speed.float32,
  'variants': training.variants,
}
# What every other check relies on; it has no figures.
MACHINE = 'machine'


def run_one(name: str, settings: outcomes.Settings) -> int:
  """Runs a check in this process and records it; returns the exit code."""
  if name == MACHINE:
    outcomes.add_facts(settings, device.facts(settings.platform))
    return 0
  outcomes.require_facts(settings)
  started, figures, error = time.monotonic(), [], ''
  try:
    figures = list(CHECKS[name](settings))
  except Exception as exception:  # The others go on; this one says why.
    traceback.print_exc()
    reason = ' '.join(str(exception).split())[:300]
    error = f'{type(exception).__name__}: {reason}'
  seconds = time.monotonic() - started
  outcome = outcomes.add(settings, name, seconds, figures, error)
  return 0 if outcome.passed else 1


def run_in_child(
  name: str, settings: outcomes.Settings, output: IO[str] | None = None
) -> int:
  """Runs a check in a process of its own; returns its exit code.

  Args:
    name: the check.
    settings: of the command.
    output: file for its output; None for that of this process.
  """
  command = [
    *(sys.executable, __file__, name),
    f'--out={settings.out}',
    f'--platform={settings.platform}',
    *(['--quick'] if settings.quick else []),
  ]
  child = subprocess.Popen(
    command, stdout=output, stderr=output, start_new_session=True
  )
  try:
    return child.wait()
  finally:
    if child.poll() is None:  # This process is interrupted.
      os.killpg(child.pid, signal.SIGKILL)
      child.wait()


def run_all(settings: outcomes.Settings) -> int:
  """Runs the checks that have not held yet; returns the exit code."""
  if code := run_in_child(MACHINE, settings):
    return code
  found = outcomes.read(settings.json).outcomes
  waiting = [
    name for name in CHECKS if name not in found or not found[name].passed
  ]
  start = time.monotonic()
  for done, name in enumerate(waiting):
    position = f'check {done + 1} of {len(waiting)}'
    if done:
      taken = (time.monotonic() - start) / done
      position += f', ETA {duration(taken * (len(waiting) - done))}'
    print(f'{name}: {position}; output in {settings.log(name)}', flush=True)
    outcomes.remove(settings, name)
    with settings.log(name).open('w') as log:
      code = run_in_child(name, settings, log)
    outcome = outcomes.read(settings.json).outcomes.get(name)
    if outcome is None:  # Killed, or aborted by XLA.
      reason = f'exit code {code}, see {settings.log(name)}'
      outcome = outcomes.add(settings, name, 0, [], reason)
    for _, *cells in outcome.rows(name):
      print('  ' + '  '.join(filter(None, cells)))
  found = outcomes.read(settings.json).outcomes
  failed = [name for name in CHECKS if not found[name].passed]
  print(f'wrote {settings.json} and {settings.json.with_suffix(".md")}')
  if failed:
    return cli.report_errors([f'these checks failed: {", ".join(failed)}'])
  print('all checks hold')
  return 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = cli.Parser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    'name',
    nargs='?',
    choices=(MACHINE, *CHECKS),
    metavar='NAME',
    help='run only this check, in this process (default: all)',
  )
  files.add_path_argument(
    parser, '--out', required=True, metavar='DIR', help='folder for the results'
  )
  parser.add_argument(
    '--platform',
    choices=tuple(device.PLATFORMS),
    default='gpu',
    help='device to check (default: gpu, which is an NVIDIA GPU)',
  )
  parser.add_argument(
    '--quick',
    action='store_true',
    help='small networks and few steps, to try the checks themselves',
  )
  flags = parser.parse_args(argv)
  settings = outcomes.Settings(flags.platform, flags.out, flags.quick)
  os.environ['JAX_PLATFORMS'] = device.PLATFORMS[settings.platform]
  # One GPU: the first of those that the environment names, as SLURM does.
  named = os.environ.get('CUDA_VISIBLE_DEVICES', '0')
  os.environ['CUDA_VISIBLE_DEVICES'] = named.partition(',')[0]
  # SIGTERM ends a check as Ctrl-C does, and what it has started.
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    if flags.name is None:
      return run_all(settings)
    return run_one(flags.name, settings)
  except OSError as error:
    return cli.report_errors([str(error)])


if __name__ == '__main__':
  sys.exit(cli.run(main))
