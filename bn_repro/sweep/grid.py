"""Loads a sweep's file and expands it into trials. Imports no JAX.

All mistakes in a sweep are found here, before the first trial starts, and
reported together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import inspect
import itertools
import math
import os
import re
from typing import Any

from ml_collections import ConfigDict

from bn_repro import config as config_lib
from bn_repro.errors import UserError
from bn_repro.sweep.sweep import Sweep, Trial, Value, to_text

DEFAULT_MODE = 'mini'

# Characters that need no quotes in file names, shells and spreadsheets.
_PLAIN = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.+-]*')

# `read` locks what it returns, so that trials can share it.
_read = functools.cache(config_lib.read)


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
  path, _, mode = spec.partition(':')
  problems = [f'{path}: {error}' for error in _sweep_errors(sweep)]
  if problems:
    raise UserError(*problems)
  sweep, problems = _replace_axes(sweep, axes)
  trials: tuple[Trial, ...] = ()
  try:
    trials = expand(
      sweep.axes,
      sweep.trial,
      mode or DEFAULT_MODE,
      defaults=sweep.defaults,
      config_spec=config_spec,
      overrides=overrides,
    )
  except UserError as error:
    problems += error.problems
  if problems:
    raise UserError(*problems)
  return dataclasses.replace(sweep, trials=trials)


def _sweep_errors(sweep: Sweep) -> list[str]:
  """Returns a line for each mistake in the fields of a sweep's file."""
  types = {'axes': dict, 'x': str, 'repeat': str, 'defaults': dict}
  errors = [
    f'{field}: must be a {field_type.__name__}.'
    for field, field_type in types.items()
    if not isinstance(getattr(sweep, field), field_type)
  ]
  if errors:
    return errors
  for field in ('x', 'repeat'):
    if getattr(sweep, field) not in sweep.axes:
      errors.append(
        f'{field}={getattr(sweep, field)}: no such axis. The axes are '
        f'{", ".join(sweep.axes)}.'
      )
  if sweep.x == sweep.repeat:
    errors.append(f'x={sweep.x}: is also `repeat`. Name two axes.')
  if type(sweep.retries) is not int or sweep.retries < 0:
    errors.append(f'retries={sweep.retries}: must be a whole number from 0.')
  for name, values in sweep.axes.items():
    errors += _axis_errors(name, values)
  try:
    inspect.signature(sweep.trial).bind('base', **dict.fromkeys(sweep.axes))
  except TypeError:
    arguments = ', '.join(['base', *sweep.axes])
    errors.append(f'trial: must be a function of {arguments}.')
  return errors


def _axis_errors(name: str, values: Sequence[Any]) -> list[str]:
  """Returns a line for each mistake in an axis of a file or command line."""
  if not _PLAIN.fullmatch(name):
    return [f'axis {name}: use letters, digits and _ in its name.']
  if not isinstance(values, tuple):
    return [f'axis {name}: must be a tuple of values.']
  if not values:
    return [f'axis {name}: has no values.']
  return [
    f'axis {name}: {value!r} becomes a part of file names. Use a number, or '
    'letters, digits and ._+-'
    for value in map(_to_python, values)
    if isinstance(value, bool)
    or not isinstance(value, Value)
    or (isinstance(value, str) and not _PLAIN.fullmatch(value))
  ]


def _to_python(value: Any) -> Any:
  """Python's number for a NumPy scalar; other values unchanged."""
  return value.item() if hasattr(value, 'item') else value


def _replace_axes(
  sweep: Sweep, assignments: Sequence[str]
) -> tuple[Sweep, list[str]]:
  """Applies the values of `--sweep.AXIS`; refused ones leave the axis as is.

  Returns:
    The sweep, its axes in the order of names and columns: lines, x, repeat.
    A line for each refused assignment.
  """
  axes = {
    name: tuple(map(_to_python, sweep.axes[name]))
    for name in (*sweep.lines, sweep.x, sweep.repeat)
  }
  retries, errors = sweep.retries, []
  for assignment in assignments:
    name, separator, text = assignment.partition('=')
    if name == 'retries' and text.isdecimal():
      retries = int(text)
    elif name not in axes:
      errors.append(
        f'--sweep.{name}: no such axis. The axes are {", ".join(axes)}; '
        '--sweep.retries takes a whole number.'
      )
    elif not separator:
      errors.append(f'--sweep.{name}: give it values, as --sweep.{name}=1,2.')
    else:
      values = tuple(_parse(part) for part in text.split(',') if part)
      found = _axis_errors(name, values)
      errors += [f'--sweep.{name}={text}: {error}' for error in found]
      axes[name] = axes[name] if found else values
  return dataclasses.replace(sweep, axes=axes, retries=retries), errors


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
  if config_spec and ':' not in config_spec:
    config_spec += f':{mode}'
  problems: list[str] = []
  if config_spec:
    try:
      _read(config_spec)
    except UserError as error:
      problems += error.problems
  expander = _Expander(
    make_config,
    config_spec if config_spec and not problems else f':{mode}',
    [f'{key}={value}' for key, value in (defaults or {}).items()],
    overrides,
  )
  trials = []
  failed: dict[str, list[str]] = {}
  for values in _combinations(axes):
    name = _name(values)
    try:
      trials.append(expander.trial(name, values))
    except UserError as error:
      for problem in error.problems:
        failed.setdefault(problem, []).append(name)
  problems += _with_trials(failed)
  problems += _duplicates(trials)
  if trials and config_spec not in {'', *(t.config_spec for t in trials)}:
    problems.append(
      f'--config={config_spec}: no trial starts from it: trial() names other '
      f'configs. Replace them with --sweep.AXIS, AXIS being '
      f'{" or ".join(axes)}.'
    )
  if problems:
    raise UserError(*problems)
  return tuple(trials)


def _with_trials(failed: Mapping[str, Sequence[str]]) -> list[str]:
  """Returns a line for each problem, with the names of its trials."""
  lines = []
  for problem, (first, *others) in failed.items():
    more = f' and {len(others)} more' if others else ''
    lines.append(f'{problem} (trial {first}{more})')
  return lines


def _combinations(
  axes: Mapping[str, Sequence[Value]],
) -> Iterator[dict[str, Value]]:
  outermost_first = [axes[name] for name in reversed(list(axes))]
  for values in itertools.product(*outermost_first):
    yield dict(zip(axes, reversed(values), strict=True))


def _name(values: Mapping[str, Value]) -> str:
  """Name of a trial: texts as they are, numbers after the name of the axis."""
  return '_'.join(
    value if isinstance(value, str) else f'{axis}{to_text(value)}'
    for axis, value in values.items()
  )


def _duplicates(trials: Sequence[Trial]) -> list[str]:
  """Returns a line if trials share a name, or else if they share a config."""
  for what, key in (
    ('have the same name', lambda trial: trial.name),
    ('are the same run', lambda trial: trial.config_json),
  ):
    groups: dict[str, list[str]] = {}
    for trial in trials:
      groups.setdefault(key(trial), []).append(trial.name)
    same = [names for names in groups.values() if len(names) > 1]
    if same:
      more = f' So do {len(same) - 1} more groups.' if same[1:] else ''
      return [f'{len(same[0])} trials {what}: {", ".join(same[0])}.{more}']
  return []


class _Base:
  """The argument `base` of `Sweep.trial`, for one trial.

  Attributes:
    errors: a line for each mistake in the overrides.
  """

  def __init__(
    self, spec: str, overrides: Sequence[str], changed: Sequence[str] = ()
  ):
    """Initialises the argument.

    Args:
      spec: value of `--config` with a mode, or only ':' and a mode.
      overrides: assignments to fields of each config.
      changed: fields to set to an arbitrary other value.
    """
    self.errors: list[str] = []
    self._spec = spec
    self._overrides = overrides
    self._changed = changed
    self._specs: list[tuple[ConfigDict, str]] = []

  def __call__(self, name: str = '') -> ConfigDict:
    """Returns a config to change: `name`, or without it that of `--config`."""
    path, _, mode = self._spec.partition(':')
    if not name and not path:
      raise UserError('--config: this sweep needs one to start from.')
    if name and path.endswith('.py'):
      path = os.path.join(os.path.dirname(path), f'{name}.py')
    elif name:
      path = name
    spec = f'{path}:{mode}'
    config = _read(spec)
    try:
      config = config_lib.override(config, self._overrides)
    except UserError as error:
      self.errors += error.problems
      # Continues without the overrides, to report the errors of the trial too.
      config = config.copy_and_resolve_references()
    for key in self._changed:
      value = config_lib.flatten(config).get(key)
      if value is not None:
        config.update_from_flattened_dict({key: _different(value)})
    self._specs.append((config, spec))
    return config

  def spec_of(self, config: ConfigDict) -> str:
    """The value of `--config` that a config was loaded from.

    Raises:
      UserError: if this base did not load it.
    """
    for loaded, spec in self._specs:
      if loaded is config:
        return spec
    raise UserError('trial(): must return a config that it got from base().')


def _different(value: Any) -> Any:
  """Another value of the same type."""
  if isinstance(value, bool):
    return not value
  return f'{value}-' if isinstance(value, str) else 2 * value + 1


class _Expander:
  """Makes trials from values of axes; the arguments are those of `expand`."""

  def __init__(
    self,
    make_config: Callable[..., ConfigDict],
    spec: str,
    defaults: Sequence[str],
    overrides: Sequence[str],
  ):
    self._make_config = make_config
    self._spec = spec
    self._overrides = [*defaults, *overrides]
    self._keys = list(dict.fromkeys(o.partition('=')[0] for o in overrides))
    self._num_train_examples: dict[str, int] = {}

  def trial(self, name: str, values: Mapping[str, Value]) -> Trial:
    """Returns the trial of a combination of values.

    Raises:
      UserError: if anything is wrong, with a line for each problem.
    """
    base = _Base(self._spec, self._overrides)
    made = self._call(base, values)
    spec = base.spec_of(made)
    plain, fields = _read(spec), config_lib.flatten(made)
    before = config_lib.flatten(plain)
    overrides = [
      f'{key}={value}'
      for key, value in fields.items()
      if key not in before or before[key] != value
    ]
    errors = [*base.errors, *self._ineffective(values, fields)]
    try:
      # As `main` reads it.
      config = config_lib.override(plain, overrides)
    except UserError as error:
      errors += error.problems
    if errors:
      raise UserError(*dict.fromkeys(errors))
    return Trial(
      name=name,
      values=values,
      config_spec=spec,
      overrides=tuple(overrides),
      config=config,
      config_json=config_lib.to_json(config),
      total_steps=config_lib.total_steps(config, self._train_examples(config)),
    )

  def _call(self, base: _Base, values: Mapping[str, Value]) -> ConfigDict:
    """Calls `make_config`, and turns what it raises into `UserError`s."""
    try:
      return self._make_config(base, **values)
    except UserError:
      raise
    except Exception as error:
      message = ' '.join(str(error).split())
      raise UserError(
        *base.errors, f'trial(): {type(error).__name__}: {message}.'
      ) from error

  def _ineffective(
    self, values: Mapping[str, Value], fields: Mapping[str, Any]
  ) -> list[str]:
    """Returns a line for each override that the trial's config ignores.

    Changes the overridden fields of the base. A field that nevertheless has the
    same value in the trial is set by `trial`, whatever the override.
    """
    if not self._keys:
      return []
    base = _Base(self._spec, self._overrides, self._keys)
    try:
      others = config_lib.flatten(self._call(base, values))
    except UserError:
      # `trial` refuses the changed value, so it depends on the field.
      return []
    return [
      f'--config.{key}: the sweep sets this field. Use '
      f'{" or ".join(f"--sweep.{axis}" for axis in values)} instead.'
      for key in self._keys
      if key in fields and fields[key] == others[key]
    ]

  def _train_examples(self, config: ConfigDict) -> int:
    """Size of the training split; 0 if the duration does not depend on it."""
    if config.total_steps:
      return 0
    from bn_repro.data import datasets  # NumPy takes a moment.

    key = str(config.data)
    if key not in self._num_train_examples:
      dataset = datasets.load_sizes(config)
      self._num_train_examples[key] = len(dataset.splits['train'])
    return self._num_train_examples[key]
