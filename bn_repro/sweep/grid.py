"""Sweeps: what varies between runs, as a config, and the trials that makes.

A sweep is a Python file like `configs/sweeps/lr_multipliers.py`, which explains
its fields. Every mistake in one is found here, before the first trial, and all
of them are reported at once. Imports no JAX.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import itertools
import math
import os
from pathlib import Path
import re
import sys
from typing import Any, TypeVar

from ml_collections import ConfigDict

from bn_repro import config as config_lib
from bn_repro.errors import UserError
from bn_repro.sweep import runner as runner_lib

DEFAULT_MODE = 'mini'

_FIELDS = {
  'config': str,
  'overrides': tuple,
  'axes': ConfigDict,
  'x': str,
  'repeat': str,
  'retries': int,
}
# What a folder, a shell and a spreadsheet take as it is.
_PLAIN = re.compile(r'[A-Za-z0-9][A-Za-z0-9.+-]*')
_ASSIGNMENT = re.compile(r'(?P<key>[\w.]+)(?P<operator>[*/]?)=(?P<value>.*)')

# Each file once; what it returns is locked.
_read = functools.cache(config_lib.read)

Value = int | float | str
T = TypeVar('T')


@dataclasses.dataclass(frozen=True)
class Axis:
  """One thing that varies.

  Attributes:
    name: in names of trials and columns of the table.
    values: the first is what the others are held against.
    assignments: what each value sets, by its text.
  """

  name: str
  values: tuple[Value, ...]
  assignments: Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run of a sweep.

  Attributes:
    name: of its directory: what varies.
    values: by axis.
    config_spec: of `--config`.
    overrides: of `--config.KEY`, with all multiples worked out.
    fingerprint: of its config.
    batch_size: images in a step.
    total_steps: of the whole run.
  """

  name: str
  values: Mapping[str, Value]
  config_spec: str
  overrides: tuple[str, ...]
  fingerprint: str
  batch_size: int
  total_steps: int

  @property
  def images(self) -> int:
    """That it trains on, each as often as it is seen."""
    return self.total_steps * self.batch_size

  def config(self) -> ConfigDict:
    """Its config, made again: a thousand of them take some room."""
    return config_lib.override(_read(self.config_spec), self.overrides)

  def in_folder(self, folder: Path) -> runner_lib.Trial:
    """What runs it in a sweep's directory: the ordinary command."""
    workdir = folder / self.name
    return runner_lib.Trial(
      name=self.name,
      workdir=workdir,
      command=[
        *(sys.executable, '-m', 'bn_repro.main'),
        f'--config={self.config_spec}',
        f'--workdir={workdir}',
        *(f'--config.{override}' for override in self.overrides),
      ],
      images=self.images,
      total_steps=self.total_steps,
    )


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Runs to be compared.

  Attributes:
    axes: what varies.
    trials: in the order in which they are to be run.
    x: name of the axis below the picture.
    repeat: name of the axis whose values repeat a setting.
    retries: how often a trial that failed is started again.
  """

  axes: tuple[Axis, ...]
  trials: tuple[Trial, ...]
  x: str
  repeat: str
  retries: int

  def axis(self, name: str) -> Axis:
    """An axis by its name."""
    (found,) = [axis for axis in self.axes if axis.name == name]
    return found

  @property
  def lines(self) -> tuple[Axis, ...]:
    """The axes whose combinations are the lines of the picture."""
    return tuple(a for a in self.axes if a.name not in (self.x, self.repeat))


def load(
  spec: str,
  overrides: Sequence[str] = (),
  config_spec: str = '',
  config_overrides: Sequence[str] = (),
) -> Sweep:
  """Loads a sweep and expands it into trials, each with a checked config.

  Args:
    spec: path of a sweep's file, with `:mini` (the default) or `:full` after it
      if wanted.
    overrides: assignments of values to axes, such as 'seed=0,1,2'.
    config_spec: the base config in place of the sweep's, if any; in its mode
      if it names none.
    config_overrides: assignments to fields of it, for all trials; they come
      before what the axes set.

  Raises:
    UserError: with every problem that was found.
  """
  sweep = config_lib.read_file(
    '--sweep', spec, DEFAULT_MODE, folder=config_lib.CONFIGS / 'sweeps'
  )
  path, _, mode = spec.partition(':')
  if config_spec and ':' not in config_spec:
    config_spec += f':{mode or DEFAULT_MODE}'
  problems = [f'{path}: sweep.{problem}' for problem in _misfits(sweep)]
  if problems:
    raise UserError(*problems)
  axes = [
    Axis(name, tuple(map(_plain, axis['values'])), _assignments(axis))
    for name, axis in sweep.axes.items()
  ]
  axes, problems = _override(axes, overrides, sweep)
  problems += _axis_problems(sweep, axes, config_overrides)
  # A ConfigDict has no order of its own. As in names: lines, x, repeat.
  axes.sort(key=lambda axis: (axis.name == sweep.repeat, axis.name == sweep.x))
  # What the file names lies in the repository, wherever one calls from.
  own = os.path.relpath(config_lib.CONFIGS.parent / sweep.config)
  expansion = Expansion(
    config_spec or own, (*sweep.overrides, *config_overrides)
  )
  found = _Problems()
  # No trial may start from it.
  found.attempt('', expansion.base)
  if problems:
    # What all trials are overridden with can be told all the same.
    found.attempt('', lambda: expansion.trial((), {}))
    raise UserError(*problems, *found.lines())
  trials = [
    trial
    for values in _combinations(axes)
    for trial in [
      found.attempt(
        _name(axes, values), functools.partial(expansion.trial, axes, values)
      )
    ]
    if trial is not None
  ]
  problems = [
    *found.lines(),
    *_clashes(trials),
    *_unused_base(config_spec, axes, trials),
  ]
  if problems:
    raise UserError(*problems)
  return Sweep(
    axes=tuple(axes),
    trials=tuple(trials),
    x=sweep.x,
    repeat=sweep.repeat,
    retries=sweep.retries,
  )


def _combinations(axes: Sequence[Axis]) -> Iterator[dict[str, Value]]:
  """All combinations of values, in the order in which they are to be run.

  Lines change fastest: comparisons are whole early, and trials that start
  together compile different programs.

  Args:
    axes: the lines, then x, then the one that repeats settings.
  """
  outermost_first = [axes[-1], axes[-2], *axes[:-2]]
  names = [axis.name for axis in outermost_first]
  for values in itertools.product(*(axis.values for axis in outermost_first)):
    yield dict(zip(names, values, strict=True))


def _unused_base(
  config_spec: str, axes: Sequence[Axis], trials: Sequence[Trial]
) -> list[str]:
  """A complaint where the base that is asked for is that of no trial."""
  if not config_spec or any(t.config_spec == config_spec for t in trials):
    return []
  setting = ' and '.join(axis.name for axis in axes if _names_configs(axis))
  return [
    f'--config={config_spec}: no trial would start from it, for the axis '
    f'{setting} names their configs. Use --sweep.{setting}=...'
  ]


def _misfits(sweep: ConfigDict) -> list[str]:
  """Fields that are missing, unknown or of a wrong type."""
  problems = [
    f'{name}: the field is missing.' for name in _FIELDS if name not in sweep
  ]
  problems += [
    f'{name}: no such field.' for name in sweep if name not in _FIELDS
  ]
  problems += [
    f'{name}: must be a {kind.__name__}.'
    for name, kind in _FIELDS.items()
    if name in sweep and not isinstance(sweep[name], kind)
  ]
  if problems:
    return problems
  if not all(isinstance(override, str) for override in sweep.overrides):
    problems.append('overrides: must hold texts.')
  for name, axis in sweep.axes.items():
    if not isinstance(axis, ConfigDict) or set(axis) != {'values', 'set'}:
      problems.append(f'axes.{name}: must have `values` and `set`.')
    elif not isinstance(axis['values'], tuple) or not isinstance(
      axis.set, tuple | ConfigDict
    ):
      problems.append(
        f'axes.{name}: `values` must be a tuple, `set` a tuple or a ConfigDict.'
      )
    elif not all(
      isinstance(_plain(value), Value) and not isinstance(value, bool)
      for value in axis['values']
    ):
      problems.append(f'axes.{name}: values must be numbers or texts.')
    elif not all(
      isinstance(assignment, str)
      for assignments in _assignments(axis).values()
      for assignment in assignments
    ):
      problems.append(f'axes.{name}: `set` must hold texts.')
    elif not _PLAIN.fullmatch(name.replace('_', '-')):
      problems.append(f'axes.{name}: use letters, digits and _ for a name.')
  return problems


def _plain(value: Any) -> Any:
  """Python's number for one of NumPy's."""
  return value.item() if hasattr(value, 'item') else value


def fingerprint(config_json: str) -> str:
  """What tells whole configs apart, as they are written to workdirs."""
  return hashlib.sha256(config_json.encode()).hexdigest()


def text(value: Value) -> str:
  """A value as it stands in names and on the command line."""
  return f'{value:g}' if isinstance(value, float) else str(value)


def _name(axes: Sequence[Axis], values: Mapping[str, Value]) -> str:
  """The name of a trial: texts as they are, numbers after their axis."""
  return '_'.join(
    text(values[axis.name])
    if isinstance(values[axis.name], str)
    else f'{axis.name}{text(values[axis.name])}'
    for axis in axes
  )


def _names_configs(axis: Axis) -> bool:
  return any(
    assignment.startswith('config=')
    for assignments in axis.assignments.values()
    for assignment in assignments
  )


def _assignments(axis: ConfigDict) -> dict[str, tuple[str, ...]]:
  if isinstance(axis.set, ConfigDict):
    return {
      name: (values,) if isinstance(values, str) else tuple(values)
      for name, values in axis.set.items()
    }
  return {'{}': tuple(axis.set)}


def assigned(axis: Axis, value: Value) -> tuple[str, ...]:
  """What a value of an axis sets."""
  if '{}' in axis.assignments:
    exact = value if isinstance(value, str) else repr(value)
    return tuple(a.replace('{}', exact) for a in axis.assignments['{}'])
  return axis.assignments[text(value)]


def _override(
  axes: Sequence[Axis], overrides: Iterable[str], sweep: ConfigDict
) -> tuple[list[Axis], list[str]]:
  """The axes with values from the command line, and what is wrong with them."""
  by_name = {axis.name: axis for axis in axes}
  problems = []
  for assignment in overrides:
    name, separator, values = assignment.partition('=')
    if name == 'retries' and values.isdecimal():
      sweep.retries = int(values)
    elif name not in by_name:
      problems.append(
        f'--sweep.{name}: no such axis. There are {", ".join(by_name)}, and '
        'retries, a whole number.'
      )
    elif not separator:
      problems.append(f'--sweep.{name}: give it values, as --sweep.{name}=1,2.')
    else:
      by_name[name] = dataclasses.replace(
        by_name[name],
        values=tuple(_parse(one) for one in values.split(',') if one),
      )
  return list(by_name.values()), problems


def _parse(one: str) -> Value:
  for kind in (int, float):
    try:
      value = kind(one)
    except ValueError:
      continue
    if math.isfinite(value):
      return value
  return one


def _axis_problems(
  sweep: ConfigDict, axes: Sequence[Axis], config_overrides: Sequence[str]
) -> list[str]:
  """Axes that name nothing, or clash with the rest of a sweep."""
  problems = []
  names = [axis.name for axis in axes]
  for field in ('x', 'repeat'):
    if sweep[field] not in names:
      problems.append(
        f'sweep.{field}={sweep[field]}: no such axis. There are '
        f'{", ".join(names)}.'
      )
  if sweep.x == sweep.repeat:
    problems.append(f'sweep.x={sweep.x}: is sweep.repeat as well.')
  if sweep.retries < 0:
    problems.append(f'sweep.retries={sweep.retries}: must be at least 0.')
  fixed = {override.partition('=')[0] for override in config_overrides}
  for axis in axes:
    if not axis.values:
      problems.append(f'sweep.axes.{axis.name}: has no values.')
    for value in dict.fromkeys(axis.values):
      if isinstance(value, str) and not _PLAIN.fullmatch(
        value.replace('_', '-')
      ):
        problems.append(
          f"sweep.axes.{axis.name}: '{value}' becomes a part of the names of "
          'folders. Use letters, digits, and ._+-.'
        )
      elif '{}' not in axis.assignments and text(value) not in axis.assignments:
        problems.append(
          f"sweep.axes.{axis.name}: no value '{value}'. There are "
          f'{", ".join(axis.assignments)}.'
        )
    replaced = {
      match['key']
      for assignments in axis.assignments.values()
      for match in map(_ASSIGNMENT.fullmatch, assignments)
      if match and not match['operator']
    }
    problems += [
      f'--config.{key}: the axis {axis.name} sets it. Use '
      f'--sweep.{axis.name}=...'
      for key in sorted(fixed & replaced)
    ]
  return problems


def _clashes(trials: Sequence[Trial]) -> list[str]:
  """Trials of one name, or trials that would be the same run."""
  for what, key in (
    ('have one name', lambda trial: trial.name),
    ('are the same run', lambda trial: trial.fingerprint),
  ):
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
      groups.setdefault(key(trial), []).append(trial)
    same = [group for group in groups.values() if len(group) > 1]
    if same:
      names = ', '.join(trial.name for trial in same[0])
      more = f' So do {len(same) - 1} more groups.' if same[1:] else ''
      return [f'{len(same[0])} trials {what}: {names}.{more}']
  return []


class _Problems:
  """What is wrong, and with which trials."""

  def __init__(self) -> None:
    self._trials: dict[str, list[str]] = {}

  def attempt(self, name: str, work: Callable[[], T]) -> T | None:
    """What some work for a trial returns; None if it found problems."""
    try:
      return work()
    except UserError as error:
      for problem in error.problems:
        self._trials.setdefault(problem, []).append(name)
      return None

  def lines(self) -> list[str]:
    """A line for each problem; those of no trial in particular name none."""
    lines = []
    for problem, (first, *others) in self._trials.items():
      more = f' and {len(others)} more' if others else ''
      lines.append(f'{problem} (trial {first}{more})' if first else problem)
    return lines


class Expansion:
  """Makes trials of values."""

  def __init__(self, config_spec: str, overrides: Sequence[str]):
    """Takes what all trials start from.

    Args:
      config_spec: of the base config.
      overrides: assignments for all.
    """
    self._spec = config_spec
    self._overrides = overrides
    self._num_examples: dict[str, int] = {}

  def base(self, file: str = '') -> tuple[str, ConfigDict]:
    """The base, or the config of a file beside it, in its mode; and its spec.

    Raises:
      UserError: if there is none.
    """
    path, colon, mode = self._spec.partition(':')
    if file:
      path = os.path.join(os.path.dirname(path), f'{file}.py')
    spec = f'{path}{colon}{mode}'
    return spec, _read(spec)

  def trial(self, axes: Sequence[Axis], values: Mapping[str, Value]) -> Trial:
    """The trial of a combination of values.

    Raises:
      UserError: with every problem that it has.
    """
    file, assignments = '', list(self._overrides)
    for axis in axes:
      for assignment in assigned(axis, values[axis.name]):
        key, _, value = assignment.partition('=')
        if key == 'config':
          file = value
        else:
          assignments.append(assignment)
    spec, base = self.base(file)
    overrides = _worked_out(base, assignments)
    config = config_lib.override(base, overrides)
    return Trial(
      name=_name(axes, values),
      values=values,
      config_spec=spec,
      overrides=tuple(overrides),
      fingerprint=fingerprint(config_lib.to_json(config)),
      batch_size=config.batch_size,
      total_steps=config_lib.total_steps(config, self._train_images(config)),
    )

  def _train_images(self, config: ConfigDict) -> int:
    """Training images, which only a duration in epochs asks for."""
    if config.total_steps:
      return 0
    from bn_repro.data import datasets  # NumPy takes a moment.

    key = str(config.data)
    if key not in self._num_examples:
      dataset = datasets.load_sizes(config)
      self._num_examples[key] = len(dataset.splits['train'])
    return self._num_examples[key]


def _worked_out(base: ConfigDict, assignments: Iterable[str]) -> list[str]:
  """Plain assignments, the last one for each field, in place of multiples.

  Raises:
    UserError: for what is no assignment, or cannot be multiplied.
  """
  fields = config_lib.flatten(base)
  found: dict[str, str] = {}
  problems = []
  for assignment in assignments:
    match = _ASSIGNMENT.fullmatch(assignment)
    if match is None:
      problems.append(f"'{assignment}': write it as key=value.")
      continue
    key, operator, value = match['key'], match['operator'], match['value']
    if operator:
      try:
        value = _multiple(fields.get(key), found.get(key), operator, value)
      except ValueError as error:
        problems.append(f'config.{assignment}: {error}.')
        continue
    found[key] = value
  if problems:
    raise UserError(*problems)
  return [f'{key}={value}' for key, value in found.items()]


def _multiple(base: Any, found: str | None, operator: str, by: str) -> str:
  """A number times or over another, as text.

  Args:
    base: the value of the field in the base config; None if it has none.
    found: what it has been set to since.
    operator: * or /.
    by: the factor.

  Raises:
    ValueError: if it cannot be had.
  """
  if base is None:
    raise ValueError('no such field')
  old = base if found is None else found
  try:
    number, factor = float(old), float(by)
    result = number * factor if operator == '*' else number / factor
  except (ValueError, ZeroDivisionError):
    raise ValueError(f'{old} cannot be multiplied or divided by it') from None
  if isinstance(base, float):
    return repr(result)
  if not result.is_integer():
    raise ValueError(f'{old} becomes {result:g}, which is no whole number')
  return str(int(result))
