"""Configs: loading, overriding, checking, comparing. Imports nothing heavy.

A config is a Python file with `get_config(mode)` that returns a complete
`ConfigDict`. Every mistake in one is found here, before JAX is imported, and
all of them are reported at once.
"""

from collections.abc import Callable, Iterable, Mapping
import difflib
import hashlib
import importlib.util
import inspect
import json
import math
import os
from pathlib import Path
import sys
from typing import Any

from ml_collections import ConfigDict

from bn_repro.errors import UserError
from bn_repro.models import inception_table

# The checkout.
ROOT = Path(__file__).resolve().parent.parent

MODES = ('full', 'mini')

# What a resumed run may change: nothing that its past steps depended on.
CHANGEABLE = (
  'total_steps',
  'total_epochs',
  'log_every',
  'eval_every',
  'checkpoint_every',
  'checkpoints_to_keep',
  'stuck_after',
  'tensorboard',
  'profile_steps',
  'profile_first_step',
  'data.data_dir',
  'data.num_threads',
  'data.num_workers',
  'data.max_replaced',
)


def load(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
  """Loads, overrides, checks and locks a config.

  Args:
    spec: path of a config file, with `:mini` or `:full` after it if wanted.
    overrides: assignments such as 'optim.learning_rate=0.1'.

  Raises:
    UserError: with every problem that was found.
  """
  return override(read(spec), overrides)


def read(spec: str) -> ConfigDict:
  """Loads and locks a config as its file has it, its values not checked.

  Raises:
    UserError: if there is none, or it lacks fields, or has others.
  """
  config = read_file('--config', spec, default_mode='full')
  path, _, _ = spec.partition(':')
  problems = [f'{path}: config.{problem}' for problem in _misfits(config)]
  if problems:
    raise UserError(*problems)
  return config.lock()


def override(config: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
  """A config with other values, checked and locked; the given one stays.

  Args:
    config: from `read`.
    overrides: assignments such as 'optim.learning_rate=0.1'.

  Raises:
    UserError: with every problem that was found.
  """
  # Locked, as it was.
  config = config.copy_and_resolve_references()
  problems = [
    *_override(config, overrides),
    *(f'config.{problem}' for problem in _problems(config)),
  ]
  if problems:
    raise UserError(*dict.fromkeys(problems))
  return config


def read_file(flag: str, spec: str, default_mode: str) -> ConfigDict:
  """What `get_config(mode)` of a Python file returns, not checked.

  Args:
    flag: that names the file, for complaints.
    spec: path of the file, with `:mini` or `:full` after it if wanted.
    default_mode: where it is not.

  Raises:
    UserError: if there is no such file, or it does not return a config.
  """
  path, _, mode = spec.partition(':')
  mode = mode or default_mode
  if mode not in MODES:
    raise UserError(
      f"{flag}={spec}: no mode '{mode}'. Modes are {' and '.join(MODES)}."
    )
  if not os.path.isfile(path):
    folder = os.path.dirname(path) or '.'
    there = []
    if os.path.isdir(folder):
      there = sorted(
        os.path.join(folder, name)
        for name in os.listdir(folder)
        if name.endswith('.py') and not name.startswith('_')
      )
    hint = f' There are: {", ".join(there)}.' if there else ''
    raise UserError(f'{flag}={path}: no such file.{hint}')
  # Config files import one another as `configs.NAME`, wherever they are
  # started from.
  if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
  module_spec = importlib.util.spec_from_file_location('run_config', path)
  if module_spec is None or module_spec.loader is None:
    raise UserError(f'{flag}={path}: not a Python file.')
  module = importlib.util.module_from_spec(module_spec)
  try:
    module_spec.loader.exec_module(module)
    function = getattr(module, 'get_config', None)
    if not callable(function) or not inspect.signature(function).parameters:
      raise UserError(f'{flag}={path}: the file defines no get_config(mode).')
    config = function(mode)
  except UserError:
    raise
  except Exception as error:
    # Some messages have several lines.
    message = ' '.join(str(error).split())
    raise UserError(
      f'{flag}={path}: {type(error).__name__} while loading it: {message}'
    ) from error
  if not isinstance(config, ConfigDict):
    raise UserError(f'{flag}={path}: get_config() must return a ConfigDict.')
  return config


def flatten(config: ConfigDict) -> dict[str, Any]:
  """The fields by dotted name, in the order of the file."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict):
      flat |= {f'{key}.{name}': leaf for name, leaf in flatten(value).items()}
    else:
      flat[key] = value
  return flat


def _override(config: ConfigDict, overrides: Iterable[str]) -> list[str]:
  """Applies 'key=value' assignments; returns what was wrong with them."""
  problems = []
  fields = flatten(config)
  for assignment in overrides:
    key, separator, text = assignment.partition('=')
    if key not in fields:
      nearest = difflib.get_close_matches(key, fields, n=1, cutoff=0.0)
      problems.append(
        f"--config.{key}: no such field. Did you mean '{nearest[0]}'?"
      )
      continue
    if not separator:
      problems.append(f'--config.{key}: give it a value, as --config.{key}=...')
      continue
    try:
      value = _parse(text, type(fields[key]))
    except ValueError:
      problems.append(
        f"--config.{key}={text}: '{text}' is not {KINDS[type(fields[key])]}."
      )
      continue
    with config.unlocked():
      config.update_from_flattened_dict({key: value})
  return problems


def _parse(text: str, kind: type) -> Any:
  if kind is bool:
    try:
      return {'true': True, '1': True, 'false': False, '0': False}[text.lower()]
    except KeyError:
      raise ValueError(text) from None
  return kind(text)


KINDS = {
  bool: 'true or false',
  int: 'a whole number',
  float: 'a number',
  str: 'a text',
}


# A rule takes a value and returns what it must be, or None if it is.
Rule = Callable[[Any], str | None]


def _one_of(*choices: str) -> Rule:
  return lambda value: (
    None if value in choices else f'must be one of {", ".join(choices)}'
  )


def _at_least(least: float) -> Rule:
  return lambda value: None if value >= least else f'must be at least {least}'


def _above(bound: float) -> Rule:
  return lambda value: (
    None if value > bound else f'must be greater than {bound}'
  )


def _share(value: float) -> str | None:
  return None if 0 <= value < 1 else 'must be at least 0 and below 1'


def _anything(value: Any) -> str | None:
  del value
  return None


def _width(value: float) -> str | None:
  least = inception_table.smallest_width()
  if value > least:
    return None
  return (
    'leaves a branch of the network without channels; '
    f'it must be greater than {least:g}'
  )


# The type of each field, and what its value must be.
RULES: Mapping[str, tuple[type, Rule]] = {
  'seed': (
    int,
    lambda value: (
      None if 0 <= value < 2**32 else 'must be at least 0 and below 2^32'
    ),
  ),
  'batch_size': (int, _at_least(1)),
  'steps_per_call': (int, _at_least(1)),
  'total_steps': (int, _at_least(0)),
  'total_epochs': (float, _at_least(0)),
  'log_every': (int, _at_least(1)),
  'eval_every': (int, _at_least(1)),
  'checkpoint_every': (int, _at_least(1)),
  'checkpoints_to_keep': (int, _at_least(1)),
  'eval_split': (str, _one_of('train', 'validation', 'test')),
  'stuck_after': (float, _at_least(0)),
  'tensorboard': (bool, _anything),
  'profile_steps': (int, _at_least(0)),
  'profile_first_step': (int, _at_least(0)),
  'divergence_loss': (float, _above(0)),
  'init_from': (str, _anything),
  'data.name': (
    str,
    _one_of(
      'mnist_5k',
      'mnist',
      'fashion_mnist',
      'imagenet2012',
      'imagenet_stand_in',
      'synthetic',
    ),
  ),
  'data.data_dir': (str, _anything),
  'data.image_size': (int, _at_least(1)),
  'data.holdout': (int, _at_least(0)),
  'data.shuffle': (str, _one_of('none', 'within_shard', 'global')),
  'data.num_shards': (int, _at_least(1)),
  'data.distorted_copies': (int, _at_least(0)),
  'data.binarize': (bool, _anything),
  'data.distortion': (str, _one_of('none', 'reduced', 'full')),
  'data.num_threads': (int, _at_least(0)),
  'data.num_workers': (int, _at_least(0)),
  'data.max_replaced': (float, _share),
  'model.name': (str, _one_of('inception', 'mlp')),
  'model.init_std': (float, _at_least(0)),
  'model.init_scale': (float, _above(0)),
  'model.reading': (str, _one_of('576', '608')),
  'model.stem': (str, _one_of('separable', 'plain')),
  'model.stem_kernel': (
    int,
    lambda value: None if value >= 1 and value % 2 else 'must be an odd number',
  ),
  'model.stem_pool': (bool, _anything),
  'model.padding': (str, _one_of('same', 'torch')),
  'model.width': (float, _width),
  'model.nonlinearity': (str, _one_of('relu', 'sigmoid')),
  'model.lrn': (bool, _anything),
  'model.dropout_rate': (float, _share),
  'model.aux_head': (bool, _anything),
  'model.aux_loss_weight': (float, _at_least(0)),
  'model.dtype': (str, _one_of('auto', 'float32', 'bfloat16', 'float64')),
  'bn.enabled': (bool, _anything),
  'bn.statistics': (str, _one_of('global', 'device', 'group')),
  'bn.virtual_batch_size': (int, _at_least(1)),
  'bn.momentum': (float, _share),
  'bn.epsilon': (float, _above(0)),
  'bn.population_batches': (int, _at_least(0)),
  'optim.learning_rate': (float, _above(0)),
  'optim.momentum': (float, _share),
  'optim.weight_decay': (float, _at_least(0)),
  'optim.decay_rate': (
    float,
    lambda value: (
      None if 0 < value <= 1 else 'must be greater than 0 and at most 1'
    ),
  ),
  'optim.decay_epochs': (float, _above(0)),
  'optim.polyak_decay': (float, _share),
}


def _misfits(config: ConfigDict) -> list[str]:
  """Fields that are missing, unknown or of a wrong type."""
  fields = flatten(config)
  missing = [f'{name}: the field is missing.' for name in RULES.keys() - fields]
  unknown = [f'{name}: no such field.' for name in fields.keys() - RULES]
  return sorted(missing + unknown) or [
    f'{name}={fields[name]}: must be {KINDS[kind]}.'
    for name, (kind, _) in RULES.items()
    if type(fields[name]) is not kind
  ]


def _problems(config: ConfigDict) -> list[str]:
  """What is out of range, or does not go together; each begins with a field.

  The config has the fields of `RULES`, and their types.
  """
  problems = []
  for name, value in flatten(config).items():
    complaint = (
      'must be a finite number'
      if isinstance(value, float) and not math.isfinite(value)
      else RULES[name][1](value)
    )
    if complaint:
      problems.append(f'{name}={value}: {complaint}.')
  if problems:
    return problems
  if bool(config.total_steps) == bool(config.total_epochs):
    problems.append(
      f'total_steps={config.total_steps} and config.total_epochs='
      f'{config.total_epochs}: set one of them; the other must be 0.'
    )
  problems += _uneven_calls(config) + _network_problems(config)
  problems += _data_problems(config)
  if config.bn.statistics == 'group' and (
    config.bn.virtual_batch_size > config.batch_size
    or config.batch_size % config.bn.virtual_batch_size
  ):
    problems.append(
      f'bn.virtual_batch_size={config.bn.virtual_batch_size}: must divide '
      f'config.batch_size={config.batch_size}.'
    )
  averaged = config.bn.enabled and config.optim.polyak_decay
  if averaged and not config.bn.population_batches:
    problems.append(
      'bn.population_batches=0: averaged parameters need statistics of their '
      'own; set it, or config.optim.polyak_decay=0.'
    )
  return problems


def _uneven_calls(config: ConfigDict) -> list[str]:
  """Intervals that would end in the middle of a call of several steps."""
  number = config.steps_per_call
  return [
    f'{name}={config[name]}: must be a multiple of config.steps_per_call='
    f'{number}.'
    for name in ('total_steps', 'log_every', 'eval_every', 'checkpoint_every')
    if config[name] % number
  ]


def _data_problems(config: ConfigDict) -> list[str]:
  """What cannot be done to the images of a data set."""
  if config.data.name not in ('imagenet2012', 'imagenet_stand_in'):
    return []
  return [
    f'data.{name}={config.data[name]}: takes images in memory, and '
    f'{config.data.name} is read from the disk; leave it off.'
    for name in ('distorted_copies', 'binarize')
    if config.data[name]
  ]


def _network_problems(config: ConfigDict) -> list[str]:
  """What the network cannot do with its images, or does not have."""
  if config.model.name == 'inception':
    least = inception_table.MIN_IMAGE_SIZE
    if config.data.image_size >= least:
      return []
    return [
      f'data.image_size={config.data.image_size}: is too small for the '
      f'network, which takes {least} pixels and up.'
    ]
  fields = {
    'lrn': config.model.lrn,
    'aux_head': config.model.aux_head,
    'dropout_rate': config.model.dropout_rate,
  }
  problems = [
    f'model.{name}={value}: the network mlp has none; leave it off.'
    for name, value in fields.items()
    if value
  ]
  if config.data.distortion != 'none':
    problems.append(
      f'data.distortion={config.data.distortion}: the network mlp takes images '
      'as they are; set it to none.'
    )
  return problems


def total_steps(config: ConfigDict, num_train_examples: int) -> int:
  """Steps of the whole run, a multiple of `steps_per_call`."""
  if config.total_steps:
    return config.total_steps
  examples = config.total_epochs * num_train_examples
  number = config.steps_per_call
  return math.ceil(examples / (config.batch_size * number)) * number


def check_divides(config: ConfigDict, num_devices: int) -> None:
  """Sees that the devices can share the batch, and its BN groups, evenly.

  Raises:
    UserError: if they cannot.
  """
  if config.batch_size % num_devices:
    counts = [n for n in range(1, num_devices) if config.batch_size % n == 0]
    next_one = -(-config.batch_size // num_devices) * num_devices
    raise UserError(
      f'config.batch_size={config.batch_size}: not a multiple of the '
      f'{num_devices} devices. Use one that is, such as {next_one}, or one of '
      f'{counts} devices.'
    )
  share, group = config.batch_size // num_devices, config.bn.virtual_batch_size
  if config.bn.statistics != 'group' or _groups_fit(share, group, num_devices):
    return
  sizes = [
    size
    for size in range(2, config.batch_size + 1)
    if config.batch_size % size == 0 and _groups_fit(share, size, num_devices)
  ]
  raise UserError(
    f'config.bn.virtual_batch_size={group}: must divide the {share} images of '
    f'each of {num_devices} devices, or be those of so many devices that '
    f'divide all. Use one of {sizes}.'
  )


def _groups_fit(share: int, group: int, num_devices: int) -> bool:
  """Whether groups lie within devices, or devices within groups."""
  if group <= share:
    return share % group == 0
  return group % share == 0 and num_devices % (group // share) == 0


def to_json(config: ConfigDict) -> str:
  """The resolved config as it is written to a workdir."""
  return json.dumps(config.to_dict(), indent=2) + '\n'


def from_json(saved: Mapping[str, Any], path: str) -> ConfigDict:
  """The config of a workdir, as read back from `path`, checked and locked.

  Raises:
    UserError: if it is not one of this version's configs.
  """
  config = ConfigDict(saved).lock()
  problems = _misfits(config) or _problems(config)
  if problems:
    raise UserError(*(f'{path}: {problem}' for problem in problems))
  return config


def digest(config: ConfigDict) -> str:
  """A short digest of all that a run's results depend on."""
  identity = {
    name: value
    for name, value in flatten(config).items()
    if name not in CHANGEABLE
  }
  text = json.dumps(identity, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def differences(saved: Mapping[str, Any], config: ConfigDict) -> list[str]:
  """Fields that a resumed run may not change but has, as 'name: old -> new'.

  Args:
    saved: a config as read back from `config.json`.
    config: the config of the new start.
  """
  old = flatten(ConfigDict(saved))
  new = flatten(config)
  names = dict.fromkeys([*old, *new])
  return [
    f'{name}: {old.get(name, "(none)")} -> {new.get(name, "(none)")}'
    for name in names
    if name not in CHANGEABLE and old.get(name) != new.get(name)
  ]
