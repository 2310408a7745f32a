"""What checks measure, and the file and the table that hold it."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import record

from bn_repro.errors import UserError
from bn_repro.runtime import workdir

ROOT = Path(__file__).resolve().parent.parent.parent

# A network that compiles in a second, and trains in a call per step.
_QUICK = 'bn_mnist:mini'
_QUICK_OVERRIDES = (
  'steps_per_call=1',
  'log_every=20',
  'data.distorted_copies=0',
  'bn.population_batches=2',
)


class Settings(NamedTuple):
  """What all checks of a command share.

  Attributes:
    platform: 'gpu' or 'cpu', as JAX names the devices to check.
    out: folder for the results, the runs and their output.
    quick: whether to use a network and lengths that only show that the checks
      themselves work.
  """

  platform: str
  out: Path
  quick: bool

  @property
  def json(self) -> Path:
    """The file of outcomes."""
    return self.out / 'gpu_check.json'

  def config(self, spec: str) -> str:
    """The config to check in place of another one."""
    return _QUICK if self.quick else spec

  @property
  def overrides(self) -> tuple[str, ...]:
    """Overrides of that config."""
    return _QUICK_OVERRIDES if self.quick else ()

  def log(self, name: str) -> Path:
    """The output of a check."""
    return self.out / f'{name}.log'

  def runs(self, name: str) -> Path:
    """The folder for the runs of a check."""
    return self.out / 'runs' / name


@dataclasses.dataclass(frozen=True)
class Figure:
  """A number that a check measured, and what it must be.

  Attributes:
    name: what was measured.
    value: the number; NaN is outside all bounds.
    unit: empty for a ratio or a count.
    at_least: the lower bound; None for none.
    at_most: the upper bound; None for none.
    note: text that explains the number.
  """

  name: str
  value: float
  unit: str = ''
  at_least: float | None = None
  at_most: float | None = None
  note: str = ''

  @property
  def holds(self) -> bool:
    """Whether the number is within its bounds."""
    low = -math.inf if self.at_least is None else self.at_least
    high = math.inf if self.at_most is None else self.at_most
    has_bounds = (self.at_least, self.at_most) != (None, None)
    return low <= self.value <= high or not has_bounds

  def cells(self) -> list[str]:
    """The figure as cells of a table: name, number, bounds, verdict, note."""
    number = f'{self.value:,.0f}' if self.value >= 1e3 else f'{self.value:.3g}'
    bounds = [
      f'{words} {bound:.3g}'
      for words, bound in (
        ('at least', self.at_least),
        ('at most', self.at_most),
      )
      if bound is not None
    ]
    verdict = ('holds' if self.holds else 'FAILS') if bounds else ''
    value = f'{number} {self.unit}'.strip()
    return [self.name, value, ', '.join(bounds), verdict, self.note]


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What a check gave.

  Attributes:
    revision: git revision of the code.
    seconds: time that it took.
    figures: what it measured.
    error: why it ended early; empty if it did not.
  """

  revision: str
  seconds: float
  figures: Sequence[Figure]
  error: str

  @property
  def passed(self) -> bool:
    """Whether it ran to its end, and every figure is within its bounds."""
    return not self.error and all(figure.holds for figure in self.figures)

  def rows(self, name: str) -> list[list[str]]:
    """The cells of each figure, and of the error, behind the check's name."""
    rows = [[name, *figure.cells()] for figure in self.figures]
    if self.error:
      rows.append([name, 'ended early', '', '', 'FAILS', self.error])
    return rows


class Contents(NamedTuple):
  """The contents of the file of outcomes.

  Attributes:
    facts: the machine, and how it was checked.
    outcomes: by check.
  """

  facts: Mapping[str, Any]
  outcomes: dict[str, Outcome]


def read(path: Path) -> Contents:
  """Returns the contents of a file; none if it does not exist.

  Raises:
    UserError: if it is not a file of this module.
  """
  if not path.exists():
    return Contents({}, {})
  try:
    stored = json.loads(path.read_text())
    outcomes = {
      name: Outcome(**{**outcome, 'figures': [*map(_load, outcome['figures'])]})
      for name, outcome in stored['checks'].items()
    }
    return Contents(dict(stored['facts']), outcomes)
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise UserError(
      f'{path}: not a file of this command. Name another folder with --out.'
    ) from error


def _load(stored: Mapping[str, Any]) -> Figure:
  value = stored['value']
  return Figure(**{**stored, 'value': math.nan if value is None else value})


def _save(figure: Figure) -> dict[str, Any]:
  """Returns a figure for JSON, which has no infinity and no NaN."""
  value = figure.value if math.isfinite(figure.value) else None
  return {**dataclasses.asdict(figure), 'value': value}


def write(settings: Settings, contents: Contents) -> None:
  """Writes the file, and the table beside it."""
  checks = {
    name: {
      **dataclasses.asdict(outcome),
      'figures': [*map(_save, outcome.figures)],
    }
    for name, outcome in contents.outcomes.items()
  }
  stored = {'facts': contents.facts, 'checks': checks}
  settings.out.mkdir(parents=True, exist_ok=True)
  workdir.replace_file(settings.json, json.dumps(stored, indent=1) + '\n')
  workdir.replace_file(settings.json.with_suffix('.md'), _page(contents))


def add(
  settings: Settings,
  name: str,
  seconds: float,
  figures: Sequence[Figure],
  error: str = '',
) -> Outcome:
  """Adds what a check gave to the file, or replaces it; returns it."""
  from bn_repro.training import run_info

  contents = read(settings.json)
  revision = run_info.git_revision(lambda _: None)
  outcome = Outcome(revision, round(seconds, 1), figures, error)
  contents.outcomes[name] = outcome
  write(settings, contents)
  return outcome


def remove(settings: Settings, name: str) -> None:
  """Removes what a check gave from the file."""
  contents = read(settings.json)
  if contents.outcomes.pop(name, None) is not None:
    write(settings, contents)


def add_facts(settings: Settings, device: Mapping[str, Any]) -> None:
  """Records the machine in the file.

  Args:
    settings: of the command.
    device: facts about the device.

  Raises:
    UserError: if the file is of another machine, or of another way to check.
  """
  facts = {**_flags(settings), 'device': device, 'machine': record.machine()}
  contents = read(settings.json)
  if contents.facts not in ({}, facts):
    raise UserError(
      f'{settings.json}: measured on another machine, with other versions or '
      'with other flags. Name another folder with --out.'
    )
  write(settings, contents._replace(facts=facts))


def require_facts(settings: Settings) -> None:
  """Raises `UserError` if the file is missing, or of other flags."""
  facts, flags = read(settings.json).facts, _flags(settings)
  if {key: facts.get(key) for key in flags} != flags:
    raise UserError(
      f'{settings.json}: does not exist, or is of other flags. Run the command '
      'without a name, or run the check "machine" first.'
    )


def _flags(settings: Settings) -> dict[str, Any]:
  return {'platform': settings.platform, 'quick': settings.quick}


def _page(contents: Contents) -> str:
  """The outcomes as a page in Markdown."""
  passed = sum(outcome.passed for outcome in contents.outcomes.values())
  page = [
    f'{passed} of {len(contents.outcomes)} checks hold.',
    '',
    '| check | figure | measured | bound | verdict | |',
    '|---|---|---|---|---|---|',
  ]
  for name, outcome in contents.outcomes.items():
    page += [f'| {" | ".join(row)} |' for row in outcome.rows(name)]
  page += ['', f'```\n{json.dumps(contents.facts, indent=1)}\n```']
  return '\n'.join(page) + '\n'
