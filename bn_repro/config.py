"""Configs: loading, overriding, checking and comparing. Imports no JAX.

A config file defines `get_config(mode)`, which returns a complete `ConfigDict`.
All mistakes in a config are found here, before JAX is imported, and reported
together. `config_fields` says what each field accepts.
"""

from collections.abc import Iterable, Iterator, Mapping
import contextlib
import difflib
import hashlib
import importlib.util
import inspect
import json
import math
import os
from pathlib import Path
import sys
import types
from typing import Any

from ml_collections import ConfigDict

from bn_repro import files
from bn_repro.config_fields import (
  BEFORE_FOLDS,
  CHANGEABLE,
  TYPE_NAMES,
  flatten,
  schema_errors,
  value_errors,
)
from bn_repro.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = (_PACKAGE / 'configs').is_dir()
# The shipped configs, inside the package in a wheel, beside it in a checkout.
CONFIGS = (_PACKAGE if _INSTALLED else _PACKAGE.parent) / 'configs'
# The checkout; None where the package is installed.
ROOT = None if _INSTALLED else _PACKAGE.parent

MODES = ('full', 'mini')

# Fields that were added after revision 3a68ec7, and the values that runs had
# before: see `upgrade` and `digest`.
ADDED_FIELDS = {
  'data.fold': 0,
  'data.normalization': 'symmetric',
  'data.evaluation_box': 'square',
  'bn.per_activation': False,
}


def load(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
  """Loads, overrides, checks and locks a config.

  Args:
    spec: name of a shipped config or path of a config file, optionally followed
      by `:mini` or `:full`, such as 'bn_x5:mini'.
    overrides: assignments such as 'optim.learning_rate=0.1'.

  Raises:
    UserError: if anything is wrong, with a line for each problem.
  """
  return override(read(spec), overrides)


def read(spec: str) -> ConfigDict:
  """Loads and locks a config without checking the values of its fields.

  Args:
    spec: value of `--config`, as in `load`.

  Raises:
    UserError: if there is no such config, or its fields are not the ones of
      `config_fields.FIELDS`.
  """
  config = read_file('--config', spec, default_mode='full')
  name, _ = split_mode(spec)
  errors = [f'{name}: config.{error}' for error in schema_errors(config)]
  if errors:
    raise UserError(*errors)
  return config.lock()


def override(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
  """Returns a checked, locked copy of a config with other values.

  Args:
    config: a config that `read` returned.
    overrides: assignments such as 'optim.learning_rate=0.1'.

  Raises:
    UserError: if anything is wrong, with a line for each problem.
  """
  config = config.copy_and_resolve_references()  # Stays locked.
  errors = [
    *apply_overrides(config, overrides),
    *(f'config.{error}' for error in value_errors(config)),
  ]
  if errors:
    raise UserError(*dict.fromkeys(errors))
  return config


def read_file(
  flag: str,
  spec: str,
  default_mode: str,
  *,
  folder: Path = CONFIGS,
  function: str = 'get_config',
  returns: type = ConfigDict,
) -> Any:
  """Returns what a function of a Python file returns for a mode, unchecked.

  Args:
    flag: command-line flag that has the value `spec`, for messages.
    spec: name or path as in `find_file`, optionally followed by `:mini` or
      `:full`.
    default_mode: mode where `spec` names none.
    folder: folder of the shipped files.
    function: name of the function, which takes the mode.
    returns: type that the function has to return.

  Raises:
    UserError: if there is no such file, or the function fails or returns
      something else.
  """
  name, mode = split_mode(spec)
  mode = mode or default_mode
  if mode not in MODES:
    raise UserError(
      f"{flag}={spec}: no mode '{mode}'. Modes are {' and '.join(MODES)}."
    )
  path = find_file(flag, name, folder)
  module_spec = importlib.util.spec_from_file_location('run_config', path)
  if module_spec is None or module_spec.loader is None:
    raise UserError(f'{flag}={name}: not a Python file.')
  module = importlib.util.module_from_spec(module_spec)
  try:
    with shipped_package():
      module_spec.loader.exec_module(module)
      get = getattr(module, function, None)
      if not callable(get) or not inspect.signature(get).parameters:
        raise UserError(f'{flag}={name}: the file defines no {function}(mode).')
      result = get(mode)
  except UserError:
    raise
  except Exception as error:
    # Some messages have several lines.
    message = ' '.join(str(error).split())
    raise UserError(
      f'{flag}={name}: {type(error).__name__} while loading it: {message}'
    ) from error
  if not isinstance(result, returns):
    raise UserError(
      f'{flag}={name}: {function}() must return a {returns.__name__}.'
    )
  return result


def split_mode(spec: str) -> tuple[str, str]:
  """Splits a value of `--config` or `--sweep` into a name or path, and a mode.

  Names of folders and files may contain colons. Without a mode, it is ''.
  """
  name, colon, mode = spec.rpartition(':')
  if not colon or os.sep in mode or mode.endswith('.py'):
    return spec, ''
  return name, mode


def find_file(flag: str, name: str, folder: Path = CONFIGS) -> Path:
  """Finds a shipped file by its name, or any file by its path.

  Args:
    flag: command-line flag that has the value `name`, for messages.
    name: name of a file in `folder` without its suffix, such as 'bn_x5' or
      'ensemble/dropout_5', or a path, which may be relative to the current
      folder.
    folder: folder of the shipped files.

  Raises:
    UserError: if there is neither, or the path is invalid. It lists the files
      beside a path, and the shipped ones for a name.
  """
  shipped = {
    str(path.relative_to(folder).with_suffix('')): path
    for part in (folder, folder / 'ensemble')
    for path in _python_files(part)
  }
  path = shipped.get(name) or files.expand(flag, name)
  if path.is_file():
    return path
  if os.sep in name or path.suffix == '.py':
    beside = ', '.join(map(str, _python_files(Path(name).parent)))
    hint = (
      f'There are: {beside}' if beside else f'Shipped: {", ".join(shipped)}'
    )
    raise UserError(f'{flag}={name}: no such file. {hint}.')
  raise UserError(
    f'{flag}={name}: neither a file nor a shipped name. Shipped are '
    f'{", ".join(shipped)}.'
  )


def _python_files(folder: Path) -> list[Path]:
  return sorted(
    path for path in folder.glob('*.py') if not path.name.startswith('_')
  )


@contextlib.contextmanager
def shipped_package() -> Iterator[None]:
  """Makes `from configs import ...` import shipped configs.

  The code of configs and sweeps runs in it, and imports configs that way. Any
  other package named `configs` is hidden meanwhile and restored afterwards.
  """
  others = _forget_configs()
  package = types.ModuleType('configs')
  package.__path__ = [str(CONFIGS)]
  sys.modules['configs'] = package
  try:
    yield
  finally:
    _forget_configs()
    sys.modules.update(others)


def _forget_configs() -> dict[str, types.ModuleType]:
  """Removes `configs` and its modules from the imported ones; returns them."""
  names = [name for name in sys.modules if name.partition('.')[0] == 'configs']
  return {name: sys.modules.pop(name) for name in names}


def apply_overrides(config: ConfigDict, overrides: Iterable[str]) -> list[str]:
  """Applies 'key=value' assignments; returns a line for each refused one."""
  errors = []
  fields = flatten(config)
  for assignment in overrides:
    key, separator, text = assignment.partition('=')
    if key not in fields:
      (nearest,) = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
      if key == 'data.stand_in':  # See `upgrade`.
        nearest = 'data.name=imagenet_stand_in'
      errors.append(f"--config.{key}: no such field. Did you mean '{nearest}'?")
      continue
    if not separator:
      errors.append(f'--config.{key}: give it a value, as --config.{key}=...')
      continue
    field_type = type(fields[key])
    try:
      value = _parse(text, field_type)
    except ValueError:
      errors.append(
        f"--config.{key}={text}: '{text}' is not {TYPE_NAMES[field_type]}."
      )
      continue
    with config.unlocked():
      config.update_from_flattened_dict({key: value})
  return errors


def _parse(text: str, field_type: type) -> Any:
  if field_type is bool:
    try:
      return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
    except KeyError:
      raise ValueError(text) from None
  return field_type(text)


def total_steps(config: ConfigDict, num_train_examples: int) -> int:
  """Returns the steps of the whole run, a multiple of `steps_per_call`.

  Args:
    config: a checked config.
    num_train_examples: examples per epoch.
  """
  if config.total_steps:
    return config.total_steps
  examples = config.total_epochs * num_train_examples
  number = config.steps_per_call
  return math.ceil(examples / (config.batch_size * number)) * number


def check_divides(config: ConfigDict, num_devices: int) -> None:
  """Checks that devices can share the batch and its BN groups evenly.

  Raises:
    UserError: if they cannot.
  """
  if config.batch_size % num_devices:
    counts = [n for n in range(1, num_devices) if config.batch_size % n == 0]
    next_one = -(-config.batch_size // num_devices) * num_devices
    raise UserError(
      f'config.batch_size={config.batch_size}: not a multiple of the '
      f'{num_devices} devices. Use one that is, such as {next_one}, or one '
      f'of {counts} devices.'
    )
  share, group = config.batch_size // num_devices, config.bn.virtual_batch_size
  is_alone = config.bn.statistics == 'device' and share == 1
  if is_alone and config.bn.per_activation:
    raise UserError(
      'config.bn.per_activation=True: needs two images on each device, or '
      'bn.statistics=global.'
    )
  if config.bn.statistics != 'group' or _groups_fit(share, group, num_devices):
    return
  sizes = [
    size
    for size in range(2, config.batch_size + 1)
    if config.batch_size % size == 0 and _groups_fit(share, size, num_devices)
  ]
  raise UserError(
    f'config.bn.virtual_batch_size={group}: must divide the {share} images of '
    f'each of {num_devices} devices, or be {share} times a divisor of '
    f'{num_devices}. Use one of {sizes}.'
  )


def _groups_fit(share: int, group: int, num_devices: int) -> bool:
  """Whether devices hold whole groups, or groups fill whole devices."""
  if group <= share:
    return share % group == 0
  return group % share == 0 and num_devices % (group // share) == 0


def to_json(config: ConfigDict) -> str:
  """Returns the content of `config.json`."""
  return json.dumps(config.to_dict(), indent=2) + '\n'


def upgrade(saved: Mapping[str, Any]) -> ConfigDict:
  """Converts the content of an older `config.json` to this version's fields.

  Up to revision 3a68ec7, imagenet2012 with `data.stand_in=true` was what is now
  the data set imagenet_stand_in. `digest` still includes the old field, and
  leaves out `ADDED_FIELDS` with their old values, so that runs of that revision
  resume, except those on mnist_5k.
  """
  config = ConfigDict(saved)
  fields = flatten(config)
  for name, value in _added_fields(fields).items():
    tree, _, field = name.rpartition('.')
    if name not in fields and tree in config:
      config[tree][field] = value
  if 'data.stand_in' in fields:
    if fields['data.stand_in'] and fields.get('data.name') == 'imagenet2012':
      config.data.name = 'imagenet_stand_in'
    del config.data.stand_in
  return config


def _added_fields(fields: Mapping[str, Any]) -> Mapping[str, Any]:
  """`ADDED_FIELDS` of a config, given its fields by dotted name."""
  if fields.get('data.name') == 'mnist_5k':
    return ADDED_FIELDS | {'data.fold': BEFORE_FOLDS}
  return ADDED_FIELDS


def from_json(saved: Mapping[str, Any], path: str) -> ConfigDict:
  """Checks and locks a config that a run has saved.

  Args:
    saved: content of `config.json`.
    path: path of that file, for messages.

  Raises:
    UserError: if it is not a config of this version.
  """
  config = upgrade(saved).lock()
  errors = schema_errors(config) or value_errors(config)
  if errors:
    raise UserError(*(f'{path}: {error}' for error in errors))
  return config


def digest(config: ConfigDict) -> str:
  """Returns 16 hexadecimal digits that identify what results depend on."""
  fields = flatten(config)
  added = _added_fields(fields)
  identity = {
    name: value
    for name, value in fields.items()
    if name not in CHANGEABLE and not (name in added and value == added[name])
  }
  # The fields of revision 3a68ec7: see `upgrade`.
  identity['data.stand_in'] = identity['data.name'] == 'imagenet_stand_in'
  if identity['data.stand_in']:
    identity['data.name'] = 'imagenet2012'
  text = json.dumps(identity, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(saved: Mapping[str, Any], config: ConfigDict) -> list[str]:
  """Lists the differences that a resumed run may not have: 'name: old -> new'.

  Args:
    saved: content of the `config.json` of the run.
    config: config to resume it with.
  """
  old = flatten(upgrade(saved))
  new = flatten(config)
  names = dict.fromkeys([*old, *new])
  return [
    f'{name}: {old.get(name, "(none)")} -> {new.get(name, "(none)")}'
    for name in names
    if name not in CHANGEABLE and old.get(name) != new.get(name)
  ]
