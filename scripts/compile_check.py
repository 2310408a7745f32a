r"""Proves that a config compiles and fits devices that are not there.

  python scripts/compile_check.py --config=configs/bn_x30.py \
    --topology=v5e:4x4 --batch_size=512

Compiles the real steps of training and evaluation for a TPU slice, without a
TPU, and prints what a chip needs and has, where the bytes go, what the chips
send one another, and how long a run will take at the least. The full network
takes some ten minutes of two cores and 4 GB. It takes requirements-tpu.txt.

  python scripts/compile_check.py --config=configs/bn_x30.py \
    --topology=v5e:2x4 --find_batch_size

tries larger batches until a training step does not fit, a compilation each, and
then checks the largest that does.

  python scripts/compile_check.py --config=configs/bn_x5.py:mini \
    --platform=cpu --num_devices=8

does the same for CPU devices. Of GPUs (--platform=gpu) there is no compiler
that works without one: the figures are those that do not depend on it.

exit code:
  0 it compiles and fits; 1 it does not, or something was wrong.
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

from bn_repro import cli
from bn_repro import config as config_lib
from bn_repro.errors import UserError
from bn_repro.tpu import cost, slices

ASSUMPTIONS = (
  'A chip computes and moves data at its peak rates, both at once; messages '
  'come on top; nothing waits for images. Expect '
  f'{cost.SLOWER[0]} to {cost.SLOWER[1]} times as long. Bytes include what '
  'pads the tiles that a TPU keeps arrays in.'
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  arguments = sys.argv[1:] if argv is None else argv
  parser = cli.Parser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  cli.add_config_arguments(parser)
  parser.add_argument(
    '--platform',
    choices=('tpu', 'cpu', 'gpu'),
    default='tpu',
    help='what to compile for (tpu)',
  )
  parser.add_argument(
    '--topology', metavar='V:AxB', help='TPU slice, such as v5e:4x4'
  )
  parser.add_argument(
    '--num_devices', type=int, metavar='N', help='CPU devices, or GPUs'
  )
  parser.add_argument(
    '--batch_size', type=int, metavar='N', help="in place of the config's"
  )
  parser.add_argument(
    '--find_batch_size',
    action='store_true',
    help='find the largest batch that fits (TPU)',
  )
  parser.add_argument(
    '--json', type=Path, metavar='FILE', help='also write all figures'
  )
  try:
    flags, overrides = cli.parse_arguments(arguments, parser)
    if flags.batch_size is not None:
      overrides.append(f'batch_size={flags.batch_size}')
    _check_writable(flags.json)
    flags.command = ['python', 'scripts/compile_check.py', *arguments]
    check = {'tpu': _check_tpu, 'cpu': _check_cpu, 'gpu': _check_gpu}
    return check[flags.platform](flags, overrides)
  except UserError as error:
    return cli.report_errors(error.problems)


def _check_writable(path: Path | None) -> None:
  """Finds out before anything is compiled."""
  if path is None:
    return
  target = path if path.exists() else path.parent
  if path.is_dir() or not os.access(target, os.W_OK):
    raise UserError(
      f'--json={path}: cannot be written. Name a file in a folder that is '
      'there.'
    )


def _check_tpu(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
  """Compiles for a slice, with `libtpu`."""
  if flags.topology is None or flags.num_devices is not None:
    raise UserError('--platform=tpu takes --topology, such as v5e:4x4.')
  tpu_slice = slices.parse_slice(flags.topology)
  config = config_lib.load(flags.config, overrides)
  if config.model.dtype == 'float64':
    raise UserError(
      'config.model.dtype=float64: a TPU has none. Use auto, or --platform=cpu.'
    )
  if flags.find_batch_size:
    # Where the search begins: an even share of the batch.
    with config.unlocked():
      share = max(config.batch_size // tpu_slice.num_chips, 1)
      config.batch_size = share * tpu_slice.num_chips
  config_lib.check_divides(config, tpu_slice.num_chips)
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      'compiling for a TPU takes libtpu, on Linux: '
      'pip install -r requirements-tpu.txt'
    )
  if tpu_slice.chip.name == 'v6e':
    _take_large_stack()
  # Another process may have it open as well; and there is no TPU to ask.
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ['TPU_WORKER_HOSTNAMES'] = 'localhost'
  os.environ['JAX_PLATFORMS'] = 'cpu'
  cli.set_up_jax(config)
  from bn_repro.tpu import estimate

  devices = estimate.slice_devices(tpu_slice)
  config = estimate.resolve(config, 'tpu')
  if flags.find_batch_size:
    with config.unlocked():
      config.batch_size = _find_batch_size(config, devices, tpu_slice.chip)
  program = estimate.abstract_program(config, devices)
  try:
    found = estimate.of_program(program, _say)
  except estimate.DoesNotFit as error:
    print(f'does not fit {tpu_slice}: {error}')
    return 1
  print(f'\n{flags.config} on {tpu_slice}: {_what(program, found, "chip")}')
  for line in estimate.table(found, tpu_slice.chip):
    print(line)
  print(ASSUMPTIONS)
  _write_json(flags, program, found, tpu_slice)
  fits = found.memory <= tpu_slice.chip.memory
  print(
    f'{"fits" if fits else "does not fit"}: {_memory(found, tpu_slice.chip)}'
  )
  return 0 if fits else 1


def _take_large_stack() -> None:
  """Starts again with the stack that the compiler for v6e takes."""
  soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
  if soft == resource.RLIM_INFINITY:
    return
  if hard != resource.RLIM_INFINITY:
    raise UserError('compiling for v6e takes an unlimited stack: ulimit -s.')
  resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
  os.execv(sys.executable, sys.orig_argv)


def _find_batch_size(
  config: Any, devices: Sequence[Any], chip: slices.Chip
) -> int:
  """The largest batch whose training step fits."""
  from bn_repro.tpu import estimate

  num_chips = len(devices)
  fitting = [0]

  def why_not(batch_size: int) -> str:
    trial = config.copy_and_resolve_references()
    with trial.unlocked():
      trial.batch_size = batch_size
    try:
      program = estimate.abstract_program(trial, devices)
      found = estimate.of_program(program, _say, names=('train_steps',))
    # Groups of BN allow some batches only.
    except (UserError, estimate.DoesNotFit) as error:
      return str(error)
    return '' if found.memory <= chip.memory else _memory(found, chip)

  def fits(batch_size: int) -> bool:
    _say(f'does a batch of {batch_size} fit?')
    if reason := why_not(batch_size):
      _say(f'{batch_size} images do not: {reason}')
      return False
    fitting.append(batch_size)
    return True

  try:
    estimate.largest_batch(fits, num_chips, config.batch_size // num_chips)
  finally:
    # Also if the search ends early: it may have taken hours.
    best = max(fitting)
    if best:
      print(
        f'largest batch, of those tried, whose training step fits: {best}, '
        f'{best // num_chips} a chip'
      )
  if not best:
    raise UserError('no batch that was tried fits.')
  return best


def _memory(found: Any, chip: slices.Chip) -> str:
  return f'{found.memory / 1e9:.2f} GB a chip of {chip.memory / 1e9:.1f} GB'


def _check_cpu(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
  """Compiles for CPU devices, as many as asked for."""
  config, devices = _cpu_devices(flags, overrides)
  from bn_repro.tpu import estimate

  config = estimate.resolve(config, 'cpu')
  program = estimate.abstract_program(config, devices)
  found = estimate.of_program(program, _say)
  print(f'\n{flags.config} on CPU: {_what(program, found, "device")}')
  for line in estimate.table(found, None):
    print(line)
  _write_json(flags, program, found, None)
  return 0


def _check_gpu(flags: argparse.Namespace, overrides: Sequence[str]) -> int:
  """Says of GPUs what does not depend on their compiler."""
  config, devices = _cpu_devices(flags, overrides)
  from bn_repro.tpu import estimate

  config = estimate.resolve(config, 'gpu')
  program = estimate.abstract_program(config, devices)
  found = estimate.without_compiling(program)
  print(
    f'\n{flags.config} on GPUs, from the program before compilation (nothing '
    f'here was compiled or run for a GPU): {_what(program, found, "GPU")}'
  )
  for line in estimate.table(found, None):
    print(line)
  print(
    'Memory is that of the state, the batch and what the forward pass keeps '
    'for the backward pass; a compiler needs less, or some more for its own '
    'purposes. Bytes would be more than a GPU moves, which fuses operations.'
  )
  _write_json(flags, program, found, None)
  return 0


def _cpu_devices(
  flags: argparse.Namespace, overrides: Sequence[str]
) -> tuple[Any, Sequence[Any]]:
  """The config, and so many devices of the CPU."""
  if flags.topology is not None or flags.find_batch_size:
    raise UserError(
      f'--platform={flags.platform}: --topology and --find_batch_size are for '
      'TPUs; give --num_devices.'
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


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _what(program: Any, found: Any, device: str) -> str:
  share = found.batch_size // found.num_devices
  plural = '' if found.num_devices == 1 else 's'
  length = cli.describe_length(
    program.total_steps, found.batch_size, len(program.dataset.splits['train'])
  )
  return (
    f'{found.num_devices} {device}{plural}, {found.batch_size} images a step, '
    f'{share} a {device}, {found.dtype}, {found.num_parameters:,} parameters\n'
    f'{length}'
  )


def _write_json(
  flags: argparse.Namespace,
  program: Any,
  found: Any,
  tpu_slice: slices.Slice | None,
) -> None:
  """Writes the figures, with when, of what and by what they were made."""
  if flags.json is None:
    return
  from bn_repro.training import run_info

  facts = {
    'config': flags.config,
    'topology': str(tpu_slice) if tpu_slice else flags.platform,
    'command': shlex.join(flags.command),
    'resolved_config': program.config.to_dict(),
    'git_revision': run_info.git_revision(),
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
  sys.exit(main())
