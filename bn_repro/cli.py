"""What the commands share: flags, complaints, and setting JAX up."""

import argparse
from collections.abc import Sequence
import logging
import os
from pathlib import Path
import sys
from typing import Any

from ml_collections import ConfigDict

from bn_repro import config as config_lib
from bn_repro.errors import UserError
from bn_repro.runtime import processes, workdir


def parse_arguments(
  argv: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[argparse.Namespace, list[str]]:
  """Parses flags; returns them and the `key=value` of each `--config.key`.

  Raises:
    UserError: for an argument that is no flag.
  """
  rest, overrides = _take_overrides(argv, '--config.')
  return parser.parse_args(rest), overrides


def parse_sweep_arguments(
  argv: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[argparse.Namespace, list[str], list[str]]:
  """The same with the `axis=values` of each `--sweep.axis`, in the middle.

  Raises:
    UserError: for an argument that is no flag.
  """
  rest, axes = _take_overrides(argv, '--sweep.')
  flags, overrides = parse_arguments(rest, parser)
  return flags, axes, overrides


def _take_overrides(
  argv: Sequence[str], prefix: str
) -> tuple[list[str], list[str]]:
  """Parts arguments from the `key=value` of those with a prefix."""
  # `--config.key value` is taken as `--config.key=value`.
  joined: list[str] = []
  for argument in argv:
    if joined and joined[-1].startswith(prefix) and '=' not in joined[-1]:
      joined[-1] += f'={argument}'
    else:
      joined.append(argument)
  return (
    [a for a in joined if not a.startswith(prefix)],
    [a.removeprefix(prefix) for a in joined if a.startswith(prefix)],
  )


class Parser(argparse.ArgumentParser):
  """An argument parser whose complaints are `UserError`s."""

  def error(self, message: str):  # noqa: ANN201
    """Raises instead of printing the usage and exiting with 2."""
    raise UserError(f'{message}. Try --help.')


def positive(text: str) -> int:
  """The type of an argument that is a whole number from 1.

  Raises:
    ArgumentTypeError: if it is none.
  """
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1")
  return int(text)


def add_config_arguments(
  parser: argparse.ArgumentParser, *, required: bool = True
) -> None:
  """Adds `--config` and a word about `--config.KEY`."""
  parser.add_argument(
    '--config',
    required=required,
    metavar='FILE[:MODE]',
    help='config file, and full (the default) or mini',
  )
  parser.add_argument(
    '--config.KEY',
    dest='ignored',
    metavar='VALUE',
    help='replaces a field of the config, such as --config.seed=1',
  )


def add_sweep_arguments(
  parser: argparse.ArgumentParser, *, required: bool
) -> None:
  """Adds `--sweep` and a word about `--sweep.AXIS`."""
  parser.add_argument(
    '--sweep', required=required, metavar='FILE[:MODE]', help='file of a sweep'
  )
  parser.add_argument(
    '--sweep.AXIS',
    dest='ignored_axis',
    metavar='VALUES',
    help="replaces an axis's values, such as --sweep.seed=0,1,2",
  )


def read_config(workdir_path: str) -> ConfigDict:
  """The config of a run.

  Raises:
    UserError: if there is none.
  """
  path = Path(workdir_path) / 'config.json'
  saved = workdir.read_json(path)
  if saved is None:
    raise UserError(f'--workdir={workdir_path}: no run there (no config.json).')
  return config_lib.from_json(saved, str(path))


def duration(
  total_steps: int, batch_size: int, num_examples: int | None
) -> str:
  """How much a run trains, in words.

  Args:
    total_steps: of the run.
    batch_size: images in a step.
    num_examples: in an epoch, if that is known.
  """
  images = total_steps * batch_size
  epochs = f', {images / num_examples:,.1f} epochs' if num_examples else ''
  return f'{total_steps:,} steps of {batch_size}: {images:,} images{epochs}'


def report_errors(problems: Sequence[str]) -> int:
  """Prints a line a problem on standard error; returns the exit code."""
  for problem in problems:
    print(f'error: {problem}', file=sys.stderr)
  return workdir.EXIT_CODES[workdir.Status.FAILED]


def set_up_jax(config: ConfigDict) -> None:
  """Imports JAX and sets what has to be set before its first computation.

  Programs that were compiled once are read from the disk: from
  `JAX_COMPILATION_CACHE_DIR`, or ~/.cache/bn_repro if it is not set.
  """
  processes.hide_missing_tpu()
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
