"""What a sweep is, and what its trials are."""

from collections.abc import Callable, Mapping
import dataclasses
import enum
from typing import Any, Protocol

from ml_collections import ConfigDict

Value = int | float | str


class Base(Protocol):
  """The argument `base` of `Sweep.trial`."""

  def __call__(self, name: str = '') -> ConfigDict:
    """Returns a copy of the config NAME, or of the one of `--config`.

    It has the mode of the sweep, and the values of `--config.KEY`.
    """


class TrialStatus(enum.StrEnum):
  """What a trial can be that the status of a run cannot express."""

  WAITING = 'waiting'
  # Another process holds the lock of the workdir.
  ELSEWHERE = 'runs elsewhere'
  NOT_STARTED = 'not started'
  # Done, without learning: see `claims.learns`.
  BELOW = 'below twice chance'


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
    config_json: the config, as `config.json` in a workdir holds it.
    total_steps: steps of the whole run.
  """

  name: str
  values: Mapping[str, Value]
  config_spec: str
  overrides: tuple[str, ...]
  config: ConfigDict
  config_json: str
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
    retries: times to restart a trial that fails without progress.
    trials: one for each combination of values; `grid.load` fills them in.
  """

  axes: dict[str, tuple[Value, ...]]
  trial: Callable[..., ConfigDict]
  x: str
  repeat: str
  defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
  retries: int = 1
  trials: tuple[Trial, ...] = ()

  @property
  def lines(self) -> tuple[str, ...]:
    """The axes whose combinations of values are the lines of the figure."""
    return tuple(a for a in self.axes if a not in (self.x, self.repeat))


def to_text(value: Value) -> str:
  """A value as names of trials and tables show it."""
  return f'{value:g}' if isinstance(value, float) else str(value)
