r"""Checks that a config compiles for, and fits, devices that are not attached.

Examples:
  python scripts/compile_check.py --config=configs/bn_x30.py \
    --topology=v5e:4x4 --batch_size=512

    Compiles the training and evaluation steps for a TPU slice, without a TPU.
    Prints the memory that a chip needs, the bytes it moves, its collectives,
    and a lower bound on the time of the run. The full network takes about ten
    minutes on two cores, 4 GB of memory, and requirements-tpu.txt.

  python scripts/compile_check.py --config=configs/bn_x30.py \
    --topology=v5e:2x4 --find_batch_size

    Compiles training steps of larger batches until one does not fit, then
    checks the largest batch that did.

  python scripts/compile_check.py --config=configs/bn_x5.py:mini \
    --platform=cpu --num_devices=8

    Compiles for CPU devices. With --platform=gpu nothing is compiled: the
    figures are those of the program before compilation.

Exit codes:
  0  the config compiles and fits
  1  it does not, or the command is invalid
"""

import argparse
from collections.abc import Sequence
import dataclasses
import datetime
from importlib import metadata
import importlib.util
import json
import os
from pathlib import Path
import resource
import shlex
import sys
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bn_repro import cli, files
from bn_repro import config as config_lib
from bn_repro.errors import UserError
from bn_repro.tpu import cost, slices

ASSUMPTIONS = (
  'Lower bounds assume that a chip computes and moves data at its peak rates, '
  'both at once; collectives add to that, and input is never waited for. '
  f'Expect {cost.EXPECTED_FACTORS[0]} to {cost.EXPECTED_FACTORS[1]} times as '
  'long. Bytes include the padding of TPU tiles.'
)
GPU_NOTES = (
  'Memory counts the state, the batch, and the residuals that the forward pass '
  'keeps for the backward pass; a compiled step may need less, or additional '
  'temporary arrays. A GPU accesses fewer bytes, since it fuses operations.'
)


def _create_parser() -> argparse.ArgumentParser:
  parser = cli.Parser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  cli.add_config_arguments(parser)
  add = parser.add_argument
  add(
    '--platform',
    choices=('tpu', 'cpu', 'gpu'),
    default='tpu',
    help='platform to compile for (default: tpu)',
  )
  add('--topology', metavar='V:AxB', help='TPU slice, such as v5e:4x4')
  add(
    '--num_devices',
    type=int,
    metavar='N',
    help='number of CPU devices or GPUs (default: 1)',
  )
  add(
    '--batch_size',
    type=int,
    metavar='N',
    help='same as --config.batch_size=N',
  )
  add(
    '--find_batch_size',
    action='store_true',
    help='search for the largest batch that fits (TPU only)',
  )
  files.add_path_argument(
    parser,
    '--json',
    metavar='FILE',
    help='also write all figures to FILE, such as --json=cost.json',
  )
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  arguments = sys.argv[1:] if argv is None else argv
  try:
    flags, overrides = cli.parse_arguments(arguments, _create_parser())
    if flags.batch_size is not None:
      overrides.append(f'batch_size={flags.batch_size}')
    _check_writable(flags.json)
    flags.command = ['python', 'scripts/compile_check.py', *arguments]
    check = {'tpu': _check_tpu, 'cpu': _check_cpu, 'gpu': _check_gpu}
    return check[flags.platform](flags, overrides)
  except UserError as error:
    return cli.report_user_error(error)


def _check_writable(path: Path | None) -> None:
  """Raises before the compilation if its figures could not be written."""
  if path is None:
    return
  target = path if path.exists() else path.parent
  if path.is_dir() or not os.access(target, os.W_OK):
    raise UserError(
      f'--json={path}: cannot be written. Name a file in an existing folder.'
    )


def _check_tpu(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
  """Compiles for a TPU slice, with `libtpu`."""
  tpu_slice, config = _tpu_config(flags, overrides)
  set_up_libtpu(tpu_slice.chip)
  cli.set_up_jax(config)
  from bn_repro.tpu import estimate

  devices = estimate.slice_devices(tpu_slice)
  config = estimate.resolve(config, 'tpu')
  if flags.find_batch_size:
    with config.unlocked():
      config.batch_size = _find_batch_size(config, devices, tpu_slice.chip)
  experiment = estimate.abstract_experiment(config, devices)
  try:
    found = estimate.from_compiled(experiment, _log)
  except estimate.DoesNotFitError as error:
    print(f'does not fit {tpu_slice}: {error}')
    return 1
  print(
    f'\n{flags.config} on {tpu_slice}: {_summary(experiment, found, "chip")}'
  )
  print('\n'.join(estimate.table(found, tpu_slice.chip)))
  print(ASSUMPTIONS)
  _write_json(flags, experiment, found, tpu_slice)
  fits = found.memory <= tpu_slice.chip.memory
  verdict = 'fits' if fits else 'does not fit'
  print(f'{verdict}: {_memory(found, tpu_slice.chip)}')
  return 0 if fits else 1


def _tpu_config(
  flags: argparse.Namespace, overrides: Sequence[str]
) -> tuple[slices.Slice, Any]:
  """Returns the slice, and the config checked for its chips."""
  if flags.topology is None or flags.num_devices is not None:
    raise UserError(
      '--platform=tpu takes --topology, such as v5e:4x4, and no --num_devices.'
    )
  tpu_slice = slices.parse_slice(flags.topology)
  config = config_lib.load(flags.config, overrides)
  if config.model.dtype == 'float64':
    raise UserError(
      'config.model.dtype=float64: a TPU has no float64. Use auto, or '
      '--platform=cpu.'
    )
  if flags.find_batch_size:
    # The search starts at an even share of the batch.
    with config.unlocked():
      share = max(config.batch_size // tpu_slice.num_chips, 1)
      config.batch_size = share * tpu_slice.num_chips
  config_lib.check_divides(config, tpu_slice.num_chips)
  return tpu_slice, config


def set_up_libtpu(chip: slices.Chip) -> None:
  """Prepares the process for the compiler in `libtpu`."""
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      'compiling for a TPU takes libtpu, on Linux. Install it with: '
      'pip install -r requirements-tpu.txt'
    )
  if chip.name == 'v6e':
    _raise_stack_limit()
  # Other processes may use libtpu too, and no metadata server of a TPU answers.
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
  os.environ['JAX_PLATFORMS'] = 'cpu'


def _raise_stack_limit() -> None:
  """Restarts the process with the stack that the compiler for v6e needs."""
  soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
  if soft == resource.RLIM_INFINITY:
    return
  if hard != resource.RLIM_INFINITY:
    raise UserError(
      'compiling for v6e takes an unlimited stack. Run as a user who may set '
      'it: ulimit -s unlimited'
    )
  resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
  os.execv(sys.executable, sys.orig_argv)


def _find_batch_size(
  config: Any, devices: Sequence[Any], chip: slices.Chip
) -> int:
  """Returns the largest batch tried whose training step fits."""
  from bn_repro.tpu import estimate

  num_chips = len(devices)
  best = 0

  def why_not(batch_size: int) -> str:
    trial = config.copy_and_resolve_references()
    with trial.unlocked():
      trial.batch_size = batch_size
    try:
      experiment = estimate.abstract_experiment(trial, devices)
      found = estimate.from_compiled(experiment, _log, names=('train_steps',))
    # A UserError: groups of BN do not allow every batch size.
    except (UserError, estimate.DoesNotFitError) as error:
      return str(error)
    return '' if found.memory <= chip.memory else _memory(found, chip)

  def fits(batch_size: int) -> bool:
    nonlocal best
    _log(f'trying a batch of {batch_size}')
    if reason := why_not(batch_size):
      _log(f'a batch of {batch_size} does not fit: {reason}')
      return False
    best = max(best, batch_size)
    return True

  try:
    estimate.largest_batch(fits, num_chips, config.batch_size // num_chips)
  finally:
    # Printed also when the search, which may take hours, is interrupted.
    if best:
      print(
        f'largest batch tried whose training step fits: {best}, '
        f'{best // num_chips} per chip'
      )
  if not best:
    raise UserError(
      'no batch that was tried fits. Use a slice of chips with more memory, or '
      'a smaller network.'
    )
  return best


def _memory(found: Any, chip: slices.Chip) -> str:
  return f'{found.memory / 1e9:.2f} of {chip.memory / 1e9:.1f} GB per chip'


def _check_cpu(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
  """Compiles for CPU devices."""
  config, devices = _cpu_devices(flags, overrides)
  from bn_repro.tpu import estimate

  experiment = estimate.abstract_experiment(
    estimate.resolve(config, 'cpu'), devices
  )
  found = estimate.from_compiled(experiment, _log)
  print(f'\n{flags.config} on CPU: {_summary(experiment, found, "device")}')
  print('\n'.join(estimate.table(found, None)))
  _write_json(flags, experiment, found, None)
  return 0


def _check_gpu(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
  """Analyses the program for GPUs, whose compiler requires a GPU."""
  config, devices = _cpu_devices(flags, overrides)
  from bn_repro.tpu import estimate

  experiment = estimate.abstract_experiment(
    estimate.resolve(config, 'gpu'), devices
  )
  found = estimate.from_lowered(experiment)
  print(
    f'\n{flags.config} on GPUs, before compilation (nothing was compiled or '
    f'run for a GPU): {_summary(experiment, found, "GPU")}'
  )
  print('\n'.join(estimate.table(found, None)))
  print(GPU_NOTES)
  _write_json(flags, experiment, found, None)
  return 0


def _cpu_devices(
  flags: argparse.Namespace, overrides: Sequence[str]
) -> tuple[Any, Sequence[Any]]:
  """Returns the config and as many CPU devices as asked for."""
  if flags.topology is not None or flags.find_batch_size:
    raise UserError(
      f'--platform={flags.platform}: --topology and --find_batch_size apply to '
      'TPUs only; give --num_devices.'
    )
  num_devices = 1 if flags.num_devices is None else flags.num_devices
  if num_devices < 1:
    raise UserError(f'--num_devices={num_devices}: must be at least 1.')
  config = config_lib.load(flags.config, overrides)
  config_lib.check_divides(config, num_devices)
  os.environ['XLA_FLAGS'] = (
    f'--xla_force_host_platform_device_count={num_devices}'
  )
  os.environ['JAX_PLATFORMS'] = 'cpu'
  cli.set_up_jax(config)
  import jax

  return config, jax.devices()


def _log(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _summary(experiment: Any, found: Any, device: str) -> str:
  plural = '' if found.num_devices == 1 else 's'
  share = found.batch_size // found.num_devices
  length = cli.describe_length(
    experiment.total_steps,
    found.batch_size,
    len(experiment.dataset.splits['train']),
  )
  return (
    f'{found.num_devices} {device}{plural}, batch {found.batch_size} '
    f'({share} per {device}), {found.dtype}, {found.num_parameters:,} '
    f'parameters\n{length}'
  )


def _write_json(
  flags: argparse.Namespace,
  experiment: Any,
  found: Any,
  tpu_slice: slices.Slice | None,
) -> None:
  """Writes the figures, and the command, config and versions behind them."""
  if flags.json is None:
    return
  from bn_repro.training import run_info

  facts = {
    'config': flags.config,
    'topology': str(tpu_slice) if tpu_slice else flags.platform,
    'command': shlex.join(flags.command),
    'resolved_config': experiment.config.to_dict(),
    'git_revision': run_info.git_revision(print),
    'date': datetime.date.today().isoformat(),
    'versions': run_info.versions(),
    'libtpu': metadata.version('libtpu') if tpu_slice else None,
    **dataclasses.asdict(found),
  }
  try:
    flags.json.write_text(json.dumps(facts, indent=2) + '\n')
  except OSError as error:
    raise UserError(f'--json={flags.json}: {error.strerror}.') from error


if __name__ == '__main__':
  sys.exit(cli.run(main))
