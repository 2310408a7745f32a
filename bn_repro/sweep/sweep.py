"""What a sweep is, and what its trials are. Sweep files import this module."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import enum
import functools
import os
import re
from typing import Any

from ml_collections import ConfigDict

from bn_repro import config as config_lib
from bn_repro.errors import UserError

Value = int | float | str

# Characters that need no quotes in file names, shells and spreadsheets.
_PLAIN = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.+-]*')

# `read` locks what it returns, so that trials can share it.
read_config = functools.cache(config_lib.read)


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run of a sweep.

  Attributes:
    name: name of its directory, made of the values.
    values: value of each axis.
    config_spec: value of `--config`.
    overrides: values of `--config.KEY`, as 'KEY=VALUE': the fields in which the
      config differs from the file of `config_spec`.
    config: the config.
    total_steps: steps of the whole run.
  """

  name: str
  values: Mapping[str, Value]
  config_spec: str
  overrides: tuple[str, ...]
  config: ConfigDict
  total_steps: int

  @property
  def images(self) -> int:
    """Images that the run trains on, counted each time they are seen."""
    return self.total_steps * self.config.batch_size


@dataclasses.dataclass(frozen=True)
class Sweep:
  """Runs to compare: `get_sweep(mode)` of a sweep's file returns one.

  `configs/sweeps/lr_multipliers.py` explains each field with an example.

  Attributes:
    axes: the values of each axis. Other values are compared with the first.
    trial: function of `base` and of a value of each axis, by name. It returns a
      config that it got from `base(NAME)`, with the fields that these values
      determine assigned to it. `base()` is the config of `--config`.
    x: axis on the x-axis of the figure.
    repeat: axis whose values repeat a setting, such as the seed.
    defaults: fields of all base configs, by dotted name. `--config.KEY` takes
      precedence.
    compared_with: for values of x, another value whose best accuracies theirs
      are compared with, for each value of `repeat`.
    trials: one for each combination of values; `grid.load` fills them in.

  Raises:
    TypeError: if `axes` or `defaults` is not a dict.
    ValueError: if `x` or `repeat` is not an axis, or an axis has no values or
      values that cannot be parts of file names.
  """

  axes: dict[str, tuple[Value, ...]]
  trial: Callable[..., ConfigDict]
  x: str
  repeat: str
  defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
  compared_with: Mapping[Value, Value] = dataclasses.field(default_factory=dict)
  trials: tuple[Trial, ...] = ()

  def __post_init__(self) -> None:
    for field in ('axes', 'defaults'):
      if not isinstance(getattr(self, field), dict):
        raise TypeError(f'{field}: must be a dict.')
    for field in ('x', 'repeat'):
      if getattr(self, field) not in self.axes:
        raise ValueError(
          f'{field}={getattr(self, field)}: no such axis. The axes are '
          f'{", ".join(self.axes)}.'
        )
    if self.x == self.repeat:
      raise ValueError(f'x={self.x}: is also `repeat`. Name two axes.')
    for axis, values in self.axes.items():
      if not isinstance(values, tuple) or not values:
        raise ValueError(f'axis {axis}: must be a tuple of one or more values.')
      for value in values:
        if not _PLAIN.fullmatch(trial_name({axis: value})):
          raise ValueError(
            f'axis {axis}: {value!r} becomes a part of file names. Use a '
            'number, or letters, digits and ._+-'
          )

  @property
  def lines(self) -> tuple[str, ...]:
    """The axes whose combinations of values are the lines of the figure."""
    return tuple(a for a in self.axes if a not in (self.x, self.repeat))

  @property
  def is_numeric(self) -> bool:
    """Whether all values of x are positive numbers, which have ranges."""
    return all(not isinstance(x, str) and x > 0 for x in self.axes[self.x])


def trial_name(values: Mapping[str, Value]) -> str:
  """Name of a trial: texts as they are, numbers after the name of the axis."""
  return '_'.join(
    value if isinstance(value, str) else f'{axis}{to_text(value)}'
    for axis, value in values.items()
  )


def to_text(value: Value) -> str:
  """A value as names of trials and tables show it."""
  return f'{value:g}' if isinstance(value, float) else str(value)


class Base:
  """The argument `base` of `Sweep.trial`, for one trial."""

  def __init__(self, config_spec: str, overrides: Sequence[str]):
    """Initializes the argument.

    Args:
      config_spec: value of `--config` with a mode, or only ':' and a mode.
      overrides: assignments to fields of each config, such as 'seed=1'.
    """
    self._config_spec = config_spec
    self._overrides = overrides
    self._returned: list[tuple[ConfigDict, str]] = []

  def __call__(self, name: str = '') -> ConfigDict:
    """Returns a copy of a config, to assign to its fields.

    It has the mode of the sweep, and the values of `--config.KEY`.

    Args:
      name: name of a config in the folder of `--config`, or of a shipped one.
        If empty, the config is that of `--config`.

    Raises:
      UserError: if there is no such config, or an override is invalid.
    """
    path, mode = config_lib.split_mode(self._config_spec)
    if not name and not path:
      raise UserError('--config: this sweep needs one to start from.')
    if name and path.endswith('.py'):
      path = os.path.join(os.path.dirname(path), f'{name}.py')
    elif name:
      path = name
    spec = f'{path}:{mode}'
    config = config_lib.override(read_config(spec), self._overrides)
    self._returned.append((config, spec))
    return config

  def spec_of(self, config: ConfigDict) -> str:
    """Returns the value of `--config` that a returned config was loaded from.

    Raises:
      UserError: if this object has not returned it.
    """
    for returned, spec in self._returned:
      if returned is config:
        return spec
    raise UserError('trial(): must return a config that it got from base().')


# The files that compare the trials of a sweep.
RESULTS = ('trials.csv', 'summary.md', 'sweep.png')


class TrialStatus(enum.StrEnum):
  """States of a trial that are not a `Status` of its run."""

  WAITING = 'waiting'
  # Another process holds the lock of the workdir.
  ELSEWHERE = 'runs elsewhere'
  NOT_STARTED = 'not started'
  # Done, without learning: see `claims.learns`.
  BELOW = 'below twice chance'
  # Done, without the evaluations that `Run.best` needs.
  TOO_FEW = 'too few evaluations'
