"""What the commands share: flags, error messages, and the set-up of JAX."""

import argparse
from collections.abc import Callable, Sequence
import logging
import os
from pathlib import Path
import re
import sys
from typing import Any

from ml_collections import ConfigDict

from bn_repro import config as config_lib
from bn_repro import files
from bn_repro.errors import UserError
from bn_repro.runtime import backend, streams, workdir


def run(main: Callable[[], int]) -> int:
  """Runs a command in this process, whose standard streams may fail.

  Args:
    main: runs the command; returns its exit code.

  Returns:
    The exit code: 1 if the output of a command is its result, and cannot be
    written.
  """
  streams.guard()
  try:
    try:
      return main()
    finally:
      sys.stdout.flush()
  except UserError as error:
    return report_user_error(error)
  except KeyboardInterrupt:
    return report_errors(['stopped'])


def parse_arguments(
  argv: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[argparse.Namespace, list[str]]:
  """Parses the flags of a command, among them any `--config.KEY=VALUE`.

  Args:
    argv: arguments of the command.
    parser: a parser with the flag of `add_override_argument`.

  Returns:
    The flags, and the overrides as 'KEY=VALUE'.

  Raises:
    UserError: if a flag is unknown, missing, or has a wrong value or none.
  """
  flags = parser.parse_args(_keys_as_values(argv, '--config.', 'KEY'))
  return flags, [*flags.overrides]


def parse_sweep_arguments(
  argv: Sequence[str], parser: argparse.ArgumentParser
) -> tuple[argparse.Namespace, list[str], list[str]]:
  """Parses the same, and any `--sweep.AXIS=VALUES`.

  Args:
    argv: arguments of the command.
    parser: a parser with the flags of `add_sweep_arguments` too.

  Returns:
    The flags, the axes as 'AXIS=VALUES', and the overrides as 'KEY=VALUE'.

  Raises:
    UserError: if a flag is unknown, missing, or has a wrong value or none.
  """
  argv = _keys_as_values(argv, '--sweep.', 'AXIS')
  flags, overrides = parse_arguments(argv, parser)
  return flags, flags.axes, overrides


def _keys_as_values(
  argv: Sequence[str], prefix: str, placeholder: str
) -> list[str]:
  """Turns '--config.seed=1' into '--config.KEY=seed=1', a flag of the parser.

  The argument stays in its place, so that the parser does not take the one
  behind it for the value of the flag before it.
  """
  arguments = []
  remaining = iter(argv)
  for argument in remaining:
    if argument.startswith(prefix):
      if '=' not in argument:
        value = next(remaining, '--')
        if value.startswith('--'):
          raise UserError(
            f'{argument} needs a value. Give it as {argument}=VALUE.'
          )
        argument = f'{argument}={value}'
      argument = f'{prefix}{placeholder}={argument.removeprefix(prefix)}'
    arguments.append(argument)
  return arguments


class Parser(argparse.ArgumentParser):
  """An argument parser that raises `UserError`."""

  def error(self, message: str):  # noqa: ANN201
    """Raises instead of printing the usage and exiting with 2."""
    # As the user gave it; see `_keys_as_values`.
    message = re.sub(r'(--config|--sweep)\.(KEY|AXIS)=', r'\1.', message)
    raise UserError(f'{message}. Try --help.')


def positive(text: str) -> int:
  """Converts an argument to an integer of at least 1.

  Raises:
    ArgumentTypeError: if it is not one.
  """
  if not text.isdecimal() or not int(text):
    raise argparse.ArgumentTypeError(
      f"'{text}' is not a whole number of at least 1"
    )
  return int(text)


def _spec_type(name: str) -> Callable[[str], str]:
  """Returns the type of an argument that is a name or path, and a mode."""

  def check(text: str) -> str:
    files.check_path(name, text)
    return text

  return check


def add_config_arguments(
  parser: argparse.ArgumentParser, *, required: bool = True
) -> None:
  """Adds `--config`, and the help of `--config.KEY`."""
  parser.add_argument(
    '--config',
    required=required,
    type=_spec_type('--config'),
    metavar='CONFIG[:MODE]',
    help='name of a config or path of a config file; full (default) or mini',
  )
  add_override_argument(parser)


def add_override_argument(parser: argparse.ArgumentParser) -> None:
  """Adds the help of `--config.KEY`."""
  parser.add_argument(
    '--config.KEY',
    dest='overrides',
    action='append',
    default=[],
    metavar='VALUE',
    help='override a field of the config, such as --config.seed=1',
  )


def add_sweep_arguments(
  parser: argparse.ArgumentParser, *, required: bool
) -> None:
  """Adds `--sweep`, and the help of `--sweep.AXIS`."""
  parser.add_argument(
    '--sweep',
    required=required,
    type=_spec_type('--sweep'),
    metavar='SWEEP[:MODE]',
    help='name of a sweep or path of its file; mini (default) or full',
  )
  parser.add_argument(
    '--sweep.AXIS',
    dest='axes',
    action='append',
    default=[],
    metavar='VALUES',
    help='override the values of an axis, such as --sweep.seed=0,1,2',
  )


def add_model_argument(parser: argparse.ArgumentParser) -> None:
  """Adds `--model`, a trained network."""
  files.add_path_argument(
    parser,
    '--model',
    required=True,
    in_bucket=True,
    metavar='MODEL',
    help='workdir of a run, or a model file; also in a bucket',
  )


def write_output(path: Path, content: str | bytes) -> None:
  """Writes a file that the user asked for, atomically.

  Raises:
    UserError: if it cannot be written.
  """
  try:
    workdir.replace_file(path, content)
  except OSError as error:
    raise UserError(f'{path}: cannot be written ({error.strerror}).') from error


def read_config(workdir_path: Path) -> ConfigDict:
  """Reads the config of a run.

  Args:
    workdir_path: directory of the run.

  Raises:
    UserError: if the directory holds no run, or its config is not valid.
  """
  path = workdir_path / 'config.json'
  saved = workdir.read_json(path)
  if saved is None:
    raise UserError(
      f'--workdir={workdir_path}: contains no run (no config.json).'
    )
  return config_lib.from_json(saved, str(path))


def describe_length(
  total_steps: int, batch_size: int, num_examples: int | None
) -> str:
  """Describes the length of a run: '500 steps of 32: 16,000 images'.

  Args:
    total_steps: steps of the run.
    batch_size: images per step.
    num_examples: images per epoch, to add the number of epochs; or None.
  """
  images = total_steps * batch_size
  epochs = f', {images / num_examples:,.1f} epochs' if num_examples else ''
  return f'{total_steps:,} steps of {batch_size}: {images:,} images{epochs}'


def report_user_error(error: UserError) -> int:
  """Prints an error to standard error; returns the exit code that it has."""
  report_errors(error.problems)
  return error.exit_code


def report_errors(problems: Sequence[str]) -> int:
  """Prints each problem to standard error; returns the exit code."""
  for problem in problems:
    print(f'error: {problem}', file=sys.stderr)
  return workdir.EXIT_CODES[workdir.Status.FAILED]


def set_up_jax(config: ConfigDict) -> None:
  """Imports JAX, configures it, and starts its devices.

  Compiled programs are cached on disk, in `JAX_COMPILATION_CACHE_DIR` or, if
  that is not set, in `files.cache`.

  Raises:
    UserError: if JAX cannot start, or has settings that the commands do not
      support.
  """
  backend.import_jax()
  backend.check_settings()
  import jax

  if config.model.dtype == 'float64':
    jax.config.update('jax_enable_x64', True)  # noqa: FBT003
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = files.cache('compiled')
    if cache.is_absolute():  # Otherwise there is no home folder.
      jax.config.update('jax_compilation_cache_dir', str(cache))
  # Orbax logs errors that it also raises, and warns of what is intended here.
  logging.getLogger('absl').setLevel(logging.CRITICAL)
  sys.unraisablehook = _ignore_closed_event_loops
  backend.check_devices()


def _ignore_closed_event_loops(unraisable: Any) -> None:
  """Reports exceptions that cannot be raised, except after a failed save.

  The save itself raises its error. Then each write in progress finds its event
  loop closed, and its thread would report that, hundreds of times.
  """
  error = unraisable.exc_value
  if not (
    isinstance(error, RuntimeError) and str(error) == 'Event loop is closed'
  ):
    sys.__unraisablehook__(unraisable)
