"""Trains a network from a config file; the same command resumes.

Everything that can be wrong with a command is found before JAX is imported.
"""

import argparse
from collections.abc import Sequence
import logging
import os
from pathlib import Path
import sys
import traceback
from typing import Any

from ml_collections import ConfigDict

from bn_repro import config as config_lib
from bn_repro import datasets
from bn_repro import workdir as workdir_lib
from bn_repro.config import UserError
from bn_repro.interruption import Interruption

EXIT_CODES = {
  workdir_lib.DONE: 0,
  workdir_lib.FAILED: 1,
  workdir_lib.DIVERGED: 3,
  workdir_lib.PREEMPTED: 75,
}

_DESCRIPTION = """\
Train one of the paper's networks. The same command goes on from the newest
checkpoint, bit for bit; on a finished run it says so and changes nothing.
"""

_EPILOG = """\
configs:
  inception  bn_baseline  bn_x5  bn_x30  bn_x5_sigmoid, the controls
  inception_x5  inception_sigmoid, and Fig. 1's mnist  bn_mnist. In each, full
  (the default) is the paper's experiment and mini takes minutes on a CPU.

examples:
  python -m bn_repro.main --config=configs/bn_x5.py:mini --workdir=runs/bn_x5
  python -m bn_repro.main --config=configs/bn_x5.py:mini --workdir=runs/slow \\
    --config.optim.learning_rate=0.05 --config.total_steps=1000
  python -m bn_repro.main --config=configs/bn_x5.py:mini --workdir=runs/shirt \\
    --config.data.name=fashion_mnist

writes into the workdir:
  config.json  run.json  metrics.jsonl  status.json  checkpoints/

exit code:
  0 done; 75 stopped by SIGTERM or Ctrl-C and saved, run it again; 1 failed;
  3 diverged, which is a result.

Every field of a config stands, explained, in configs/inception.py.
"""


def parse_arguments(
  argv: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[argparse.Namespace, list[str]]:
  """Parses flags; returns them and the `key=value` of each `--config.key`.

  Raises:
    UserError: for an argument that is no flag.
  """
  # `--config.key value` is taken as `--config.key=value`.
  joined: list[str] = []
  for argument in argv:
    if joined and joined[-1].startswith('--config.') and '=' not in joined[-1]:
      joined[-1] += f'={argument}'
    else:
      joined.append(argument)
  overrides = [a for a in joined if a.startswith('--config.')]
  known = parser.parse_args([a for a in joined if a not in overrides])
  return known, [a.removeprefix('--config.') for a in overrides]


class Parser(argparse.ArgumentParser):
  """An argument parser whose complaints are `UserError`s."""

  def error(self, message: str):  # noqa: ANN201
    """Raises instead of printing the usage and exiting with 2."""
    raise UserError(f'{message}. Try --help.')


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds `--config` and a word about `--config.KEY`."""
  parser.add_argument(
    '--config',
    required=True,
    metavar='FILE[:MODE]',
    help='config file, and full (the default) or mini',
  )
  parser.add_argument(
    '--config.KEY',
    dest='ignored',
    metavar='VALUE',
    help='replaces a field of the config, such as --config.seed=1',
  )


def report_errors(problems: Sequence[str]) -> int:
  """Prints a line a problem on standard error; returns the exit code."""
  for problem in problems:
    print(f'error: {problem}', file=sys.stderr)
  return EXIT_CODES[workdir_lib.FAILED]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  interruption = Interruption()
  interruption.listen()
  parser = Parser(
    prog='python -m bn_repro.main',
    description=_DESCRIPTION,
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add_config_arguments(parser)
  parser.add_argument(
    '--workdir',
    required=True,
    metavar='DIR',
    help='directory of this run; created if it is not there',
  )
  try:
    flags, overrides = parse_arguments(
      sys.argv[1:] if argv is None else argv, parser
    )
    config = config_lib.load(flags.config, overrides)
    workdir = workdir_lib.Workdir(flags.workdir)
    workdir.check(config)
    dataset = datasets.check(config)
    ended = _already_ended(workdir, config, dataset)
    if ended is not None:
      return ended
    workdir.claim()
  except UserError as error:
    return report_errors(error.problems)
  try:
    status = _train(config, dataset, workdir, interruption, flags.config)
  except UserError as error:
    workdir.release()
    return report_errors(error.problems)
  except Exception as error:
    if isinstance(error, OSError):  # A disk that is full, a file that is gone.
      return report_errors([str(error)])
    traceback.print_exc()
    return EXIT_CODES[workdir_lib.FAILED]
  return EXIT_CODES[status]


def _already_ended(
  workdir: workdir_lib.Workdir, config: ConfigDict, dataset: datasets.Dataset
) -> int | None:
  """The exit code of a run that has nothing left to do, having said so."""
  status = workdir.status()
  name, step = status.get('status'), status.get('step')
  if name == workdir_lib.DONE and step == config_lib.total_steps(
    config, len(dataset.splits['train'])
  ):
    print(f'{workdir.path}: this run is done, at step {step}.')
  elif name == workdir_lib.DIVERGED:
    print(
      f'{workdir.path}: this run has diverged ({status["reason"]}) and would '
      'again. Use another workdir for another attempt.'
    )
  else:
    return None
  return EXIT_CODES[name]


def _train(
  config: ConfigDict,
  dataset: datasets.Dataset,
  workdir: workdir_lib.Workdir,
  interruption: Interruption,
  config_file: str,
) -> str:
  """Sets JAX up and trains; returns the status."""
  set_up_jax(config)
  from bn_repro import train

  return train.train_and_evaluate(
    config, dataset, workdir, interruption, config_file
  )


def set_up_jax(config: ConfigDict) -> None:
  """Imports JAX and sets what has to be set before its first computation.

  Programs that were compiled once are read from the disk: from
  `JAX_COMPILATION_CACHE_DIR`, or ~/.cache/bn_repro if it is not set.
  """
  import jax

  if config.model.dtype == 'float64':
    jax.config.update('jax_enable_x64', True)  # noqa: FBT003
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = Path('~/.cache/bn_repro').expanduser()
    jax.config.update('jax_compilation_cache_dir', str(cache))
  # What Orbax logs is raised as well, or is as intended here.
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  sys.unraisablehook = _report_unless_of_a_closed_loop


def _report_unless_of_a_closed_loop(unraisable: Any) -> None:
  """Reports what cannot be raised, but for the echoes of a failed save.

  The save raises its error once. Each write that was under way then finds its
  event loop closed, and its thread would print that, hundreds of times.
  """
  error = unraisable.exc_value
  if not (
    isinstance(error, RuntimeError) and str(error) == 'Event loop is closed'
  ):
    sys.__unraisablehook__(unraisable)


if __name__ == '__main__':
  exit_code = main()
  sys.stdout.flush()
  sys.stderr.flush()
  # A compilation, or a save that failed, may be left behind in its thread;
  # nothing waits for them.
  os._exit(exit_code)
