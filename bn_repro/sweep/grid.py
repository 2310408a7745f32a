"""Loads a sweep's file and expands it into trials. Imports no JAX.

All mistakes in a sweep are found here, before the first trial starts, and
reported together.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import itertools
import math
from typing import Any

from ml_collections import ConfigDict

from bn_repro import config as config_lib
from bn_repro import config_fields
from bn_repro.errors import UserError
from bn_repro.sweep.sweep import (
  Base,
  Sweep,
  Trial,
  Value,
  read_config,
  trial_name,
)

DEFAULT_MODE = 'mini'

# Returns the config of a trial, given `base`: see `Sweep.trial`.
MakeConfig = Callable[[Callable[..., ConfigDict]], ConfigDict]


def load(
  spec: str,
  axes: Sequence[str] = (),
  config_spec: str = '',
  overrides: Sequence[str] = (),
) -> Sweep:
  """Loads a sweep and expands it into trials, each with a checked config.

  Args:
    spec: name of a shipped sweep or path of a sweep's file, optionally followed
      by `:mini` (the default) or `:full`.
    axes: values that replace those of an axis, such as 'seed=0,1,2'.
    config_spec: value of `--config`, if given: the config that `base()`
      returns, and whose folder `base(NAME)` looks in.
    overrides: values of `--config.KEY`, such as 'total_steps=100'. They apply
      to all trials, before the values of the axes.

  Raises:
    UserError: if anything is wrong, with a line for each problem.
  """
  sweep = config_lib.read_file(
    '--sweep',
    spec,
    DEFAULT_MODE,
    folder=config_lib.CONFIGS / 'sweeps',
    function='get_sweep',
    returns=Sweep,
  )
  problems = []
  for assignment in axes:
    axis, _, text = assignment.partition('=')
    try:
      sweep = _replace_axis(sweep, axis, text)
    except ValueError as error:
      problems.append(f'--sweep.{axis}: {error}')
  trials: tuple[Trial, ...] = ()
  try:
    trials = expand(
      sweep.axes,
      sweep.trial,
      config_lib.split_mode(spec)[1] or DEFAULT_MODE,
      defaults=sweep.defaults,
      config_spec=config_spec,
      overrides=overrides,
    )
  except UserError as error:
    problems += error.problems
  if problems:
    raise UserError(*problems)
  return dataclasses.replace(sweep, trials=trials)


def _replace_axis(sweep: Sweep, axis: str, text: str) -> Sweep:
  """Returns a sweep with other values of an axis, given as '0,1,2'.

  Raises:
    ValueError: if there is no such axis, or a value is not allowed.
  """
  if axis not in sweep.axes:
    raise ValueError(f'no such axis. The axes are {", ".join(sweep.axes)}.')
  values = tuple(_parse(part) for part in text.split(',') if part)
  if not values:
    raise ValueError(f'give it values, as --sweep.{axis}=1,2.')
  return dataclasses.replace(sweep, axes={**sweep.axes, axis: values})


def _parse(text: str) -> Value:
  for number_type in (int, float):
    try:
      value = number_type(text)
    except ValueError:
      continue
    if math.isfinite(value):
      return value
  return text


def expand(
  axes: Mapping[str, Sequence[Value]],
  make_config: Callable[..., ConfigDict],
  mode: str,
  *,
  defaults: Mapping[str, Any] | None = None,
  config_spec: str = '',
  overrides: Sequence[str] = (),
) -> tuple[Trial, ...]:
  """Returns a trial for each combination of values.

  The first axis changes fastest. With the nets as first axis, comparisons are
  complete early, and trials that start together compile different programs.

  Args:
    axes: the values of each axis, in the order of a trial's name.
    make_config: as `Sweep.trial`.
    mode: mode of the base configs, `mini` or `full`.
    defaults: as `Sweep.defaults`.
    config_spec: as for `load`.
    overrides: as for `load`.

  Raises:
    UserError: if anything is wrong, with a line for each problem.
  """
  if config_spec:
    name, own_mode = config_lib.split_mode(config_spec)
    config_spec = f'{name}:{own_mode or mode}'
    read_config(config_spec)
  assignments = [f'{key}={value}' for key, value in (defaults or {}).items()]
  assignments += overrides
  keys = list(dict.fromkeys(o.partition('=')[0] for o in overrides))
  num_examples: dict[str, int] = {}
  trials = []
  failed: dict[str, list[str]] = {}
  for combination in itertools.product(*reversed(list(axes.values()))):
    values = dict(zip(axes, reversed(combination), strict=True))
    make = functools.partial(_call, make_config, values)
    base = Base(config_spec or f':{mode}', assignments)
    try:
      trials.append(_trial(values, make, base, keys, num_examples))
    except UserError as error:
      for problem in error.problems:
        failed.setdefault(problem, []).append(trial_name(values))
  problems = _duplicates(trials)
  for problem, (first, *others) in failed.items():
    more = f' and {len(others)} more' if others else ''
    problems.append(f'{problem} (trial {first}{more})')
  if trials and config_spec not in {'', *(t.config_spec for t in trials)}:
    problems.append(
      f'--config={config_spec}: no trial starts from it: trial() names other '
      f'configs. Replace them with --sweep.AXIS, AXIS being '
      f'{" or ".join(axes)}.'
    )
  if problems:
    raise UserError(*problems)
  return tuple(trials)


def _duplicates(trials: Iterable[Trial]) -> list[str]:
  """Returns a line if trials share a name, or else if they share a config."""
  by_name: dict[str, list[str]] = {}
  by_config: dict[str, list[str]] = {}
  for trial in trials:
    by_name.setdefault(trial.name, []).append(trial.name)
    config = config_lib.to_json(trial.config)
    by_config.setdefault(config, []).append(trial.name)
  for groups, what in (
    (by_name, 'have the same name'),
    (by_config, 'are the same run'),
  ):
    for group in groups.values():
      if len(group) > 1:
        return [f'{len(group)} trials {what}: {", ".join(group)}.']
  return []


def _call(
  make_config: Callable[..., ConfigDict],
  values: Mapping[str, Value],
  base: Callable[..., ConfigDict],
) -> ConfigDict:
  """Calls `make_config`, and turns what it raises into a `UserError`."""
  try:
    with config_lib.shipped_package():
      return make_config(base, **values)
  except UserError:
    raise
  except Exception as error:
    message = ' '.join(str(error).split())
    raise UserError(f'trial(): {type(error).__name__}: {message}.') from error


def _trial(
  values: Mapping[str, Value],
  make: MakeConfig,
  base: Base,
  keys: Sequence[str],
  num_examples: dict[str, int],
) -> Trial:
  """Returns the trial of a combination of values.

  Args:
    values: value of each axis.
    make: returns the config of the trial, given the argument `base`.
    base: that argument.
    keys: fields that `--config.KEY` overrides.
    num_examples: training examples by `config.data`, to read each only once.

  Raises:
    UserError: if anything is wrong, with a line for each problem.
  """
  made = make(base)
  spec, fields = base.spec_of(made), config_fields.flatten(made)
  original = read_config(spec)
  before = config_fields.flatten(original)
  overrides = tuple(f'{k}={v}' for k, v in fields.items() if before.get(k) != v)
  # As `main` reads it.
  config = config_lib.override(original, overrides)
  axes = ' or '.join(f'--sweep.{axis}' for axis in values)
  problems = [
    f'--config.{key}: the sweep sets this field. Use {axes} instead.'
    for key in _ignored(keys, make, base, fields)
  ]
  if problems:
    raise UserError(*problems)
  data = str(config.data)
  if not config.total_steps and data not in num_examples:
    from bn_repro.data import datasets  # NumPy takes a moment.

    dataset = datasets.load_sizes(config)
    num_examples[data] = len(dataset.splits['train'])
  return Trial(
    name=trial_name(values),
    values=values,
    config_spec=spec,
    overrides=overrides,
    config=config,
    total_steps=config_lib.total_steps(config, num_examples.get(data, 0)),
  )


def _ignored(
  keys: Sequence[str],
  make: MakeConfig,
  base: Base,
  fields: Mapping[str, Any],
) -> list[str]:
  """Returns the keys whose values in the base do not affect the trial.

  Makes the config from a base in which these fields have other values, and
  compares it with `fields`, the trial's own.
  """

  def changed_base(name: str = '') -> ConfigDict:
    config = base(name)
    flat = config_fields.flatten(config)
    config.update_from_flattened_dict({k: _different(flat[k]) for k in keys})
    return config

  if not keys:
    return []
  try:
    changed = config_fields.flatten(make(changed_base))
  except UserError:
    # It refuses the other values, so it depends on them.
    return []
  return [key for key in keys if fields.get(key) == changed[key]]


def _different(value: Any) -> Any:
  """Another value of the same type."""
  if isinstance(value, bool):
    return not value
  return f'{value}-' if isinstance(value, str) else value + 1
