"""Runs grouped for comparison, and what is wrong with some of them.

A `Group` holds the runs of one variant and setting, one for each repetition: a
seed and a fold of the data. A `Section` holds the groups that can be compared
with each other.
"""

from collections.abc import Callable, Iterable, Sequence, Set
import dataclasses
import math
from pathlib import Path
import statistics
from typing import Any

from bn_repro import numerics, paper
from bn_repro.report.runs import Repetition, Run

# What `Spread.show` writes.
SPREAD_NOTE = (
  'Values are medians over seeds, of two seeds the mean, with the range in '
  'parentheses.'
)

# Prefixes of the fields in which compared variants may differ. As in the paper,
# their runs are not equally long.
VARIANT_FIELDS = (
  'total_steps',
  'data.shuffle',
  'data.distortion',
  'model.',
  'bn.',
  'optim.',
)

# Names of data sets for readers, by `data.name`.
DATA_NAMES = {
  'mnist_5k': 'MNIST, 5,000 digits',
  'mnist': 'MNIST',
  'fashion_mnist': 'Fashion-MNIST',
  'imagenet2012': 'ImageNet',
}


def statistic(count: int) -> str:
  """Name of the median of `count` values, which of two is the mean.

  Empty for a single value.
  """
  if count == 1:
    return ''
  return 'mean of 2' if count == 2 else f'median of {count}'


def never(ended: Iterable[bool]) -> str:
  """Text for a target that a run has not reached, given which have ended."""
  return 'never' if all(ended) else 'not yet'


@dataclasses.dataclass(frozen=True)
class Spread:
  """Values of several seeds.

  Attributes:
    values: one value for each seed; None if the seed never reached the target.
    never: infinity that ranks None: positive if lower values are better,
      negative if higher values are better.
    word: text shown for None.
  """

  values: Sequence[float | None]
  never: float = math.inf
  word: str = 'never'

  def show(self, one: Callable[[float], str]) -> str:
    """Formats the median, with the range if the values differ.

    Of an even number of values, the median is the mean of the two in the
    middle, and `word` if one of these is None.

    Args:
      one: formats a single value.
    """
    if not self.values:
      return '–'
    ranked = sorted(self.never if v is None else v for v in self.values)
    middle, low, high = (
      one(value) if math.isfinite(value) else self.word
      for value in (statistics.median(ranked), ranked[0], ranked[-1])
    )
    return middle if low == high else f'{middle} ({low} to {high})'


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs of one variant and setting, one for each repetition."""

  variant: str
  runs: Sequence[Run]

  def spread(self, measure: Callable[[Run], float | None]) -> Spread:
    """The values of `measure(run)`; None is a missing value."""
    return Spread([measure(run) for run in self.runs], word='–')

  @property
  def never(self) -> str:
    """Text for a target that a run has not reached."""
    return never(run.ended for run in self.runs)


@dataclasses.dataclass(frozen=True)
class Section:
  """Runs that can be compared: of one folder, data set and network.

  Attributes:
    folder: directory that contains the workdirs.
    data_name: `data.name` of the configs.
    network: `model.name` of the configs.
    groups: groups in the order of `PAPER`, then of name and learning rate.
    name: name of the folder, after those of folders above it if needed to tell
      it from the folders of other sections.
  """

  folder: Path
  data_name: str
  network: str
  groups: Sequence[Group]
  name: str

  @property
  def runs(self) -> list[Run]:
    """All runs."""
    return [run for group in self.groups for run in group.runs]

  @property
  def data_label(self) -> str:
    """Name of the data set for readers."""
    return DATA_NAMES.get(self.data_name, self.data_name)

  @property
  def variants(self) -> list[str]:
    """The variants, in the order of the groups."""
    return list(dict.fromkeys(group.variant for group in self.groups))

  def settings_of(self, variant: str) -> list[Group]:
    """The groups of a variant."""
    return [group for group in self.groups if group.variant == variant]

  def by_seed(self, *variants: str) -> dict[Repetition, list[list[Run]]]:
    """For each seed and fold, a list of runs for each of some variants."""
    runs = [
      [run for group in self.settings_of(variant) for run in group.runs]
      for variant in variants
    ]
    repetitions = {run.repetition for of_variant in runs for run in of_variant}
    return {
      one: [[run for run in rs if run.repetition == one] for rs in runs]
      for one in sorted(repetitions)
    }

  @property
  def is_sweep(self) -> bool:
    """Whether a variant has several settings."""
    return len(self.variants) < len(self.groups)

  def is_sweep_of(self, variants: Iterable[str]) -> bool:
    """Whether each of some variants has several settings."""
    return all(len(self.settings_of(variant)) > 1 for variant in variants)

  def varying(self, group: Group) -> list[str]:
    """Fields in which a group differs from others of its variant."""
    mine = group.runs[0].setting()
    others = [g.runs[0].setting() for g in self.settings_of(group.variant)]
    return [
      name
      for name in mine
      if any(other.get(name) != mine[name] for other in others)
    ]

  def label(self, group: Group, *, without: str = '') -> str:
    """Name of a group, such as 'BN-x5, optim.learning_rate=0.1'.

    The fields are those that vary between the groups of the variant.

    Args:
      group: the group.
      without: name of a field to leave out.
    """
    setting = group.runs[0].setting()
    fields = [
      f'{name}={show_value(setting[name])}'
      for name in self.varying(group)
      if name != without
    ]
    return ', '.join([paper.label(group.variant), *fields])

  def mismatches(self) -> list[str]:
    """Fields that should be equal for a fair comparison, and are not."""
    found = []
    settings = [group.runs[0].setting() for group in self.groups]
    for name in dict.fromkeys(name for setting in settings for name in setting):
      values = dict.fromkeys(setting.get(name) for setting in settings)
      if len(values) > 1 and not may_differ(name):
        found.append(f'{name} ({", ".join(map(show_value, values))})')
    return found


def may_differ(name: str) -> bool:
  """Whether compared variants may differ in a field: see `variants.changed`."""
  return name.startswith(VARIANT_FIELDS) and name != 'model.width'


def show_value(value: Any) -> str:
  """Formats the value of a field."""
  return f'{value:g}' if isinstance(value, float) else str(value)


def group(runs: Iterable[Run]) -> tuple[list[Section], list[str]]:
  """Groups runs into sections.

  Returns:
    The sections, and a message for each run that is unfinished or left out:
    because it repeats the config, seed and fold of another, is unfinished
    beside others that have ended, or has another setting than most runs of its
    variant.
  """
  # Runs by section, by variant and setting, by repetition.
  found: dict[tuple[Path, str, str], dict[str, dict[Repetition, Run]]] = {}
  problems = []
  for run in runs:
    config = run.config
    key = (run.folder, config['data']['name'], config['model']['name'])
    setting = f'{run.variant} {sorted(run.setting().items())}'
    repetitions = found.setdefault(key, {}).setdefault(setting, {})
    first = repetitions.setdefault(run.repetition, run)
    if first is not run:
      problems.append(
        f'{run.place}: left out, because {first.place} has the same config, '
        'seed and fold.'
      )
  names = _names({folder for folder, *_ in found})
  result = []
  for key, by_setting in found.items():
    groups = []
    for repetitions in by_setting.values():
      group = _ended(
        [repetitions[one] for one in sorted(repetitions)], problems
      )
      groups.append(Group(group[0].variant, group))
    groups = sorted(_usual(groups, problems), key=_place)
    problems += (
      f'{run.place}: shown, not judged, because it is unfinished: {run.state}.'
      for group in groups
      for run in group.runs
      if not run.ended
    )
    result.append(Section(*key, groups, names[key[0]]))
  return result, problems


def _names(folders: Set[Path]) -> dict[Path, str]:
  """As many of the last parts of each path as make all of them distinct."""
  names = {folder: folder.name for folder in folders}
  depth = 1
  while len(set(names.values())) < len(folders):
    depth += 1
    names = {folder: '/'.join(folder.parts[-depth:]) for folder in folders}
  return names


def _ended(runs: Sequence[Run], problems: list[str]) -> Sequence[Run]:
  """Those runs of a group that have ended; all if none has.

  Adds a message for each that is left out to `problems`.
  """
  ended = [run for run in runs if run.ended]
  if not ended:
    return runs
  problems += (
    f'{run.place}: left out, because it is unfinished: {run.state}.'
    for run in runs
    if not run.ended
  )
  return ended


def _usual(groups: Sequence[Group], problems: list[str]) -> list[Group]:
  """The groups without those of runs that have an unusual setting.

  That is a setting with fewer than half as many seeds as another one of the
  variant (our choice): not a value of a sweep, but a stray run. Adds a message
  for each to `problems`.
  """
  usual = []
  for group in groups:
    largest = max(
      (other for other in groups if other.variant == group.variant),
      key=lambda other: len(other.runs),
    )
    if 2 * len(group.runs) >= len(largest.runs):
      usual.append(group)
      continue
    theirs = largest.runs[0].setting()
    fields = ', '.join(
      f'{name} {show_value(value)}, not {show_value(theirs.get(name))}'
      for name, value in group.runs[0].setting().items()
      if value != theirs.get(name)
    )
    problems += (
      f'{run.place}: left out, because its setting is not that of the '
      f'{len(largest.runs)} runs beside it: {fields}.'
      for run in group.runs
    )
  return usual


# Runs that a message names; it counts the others. Our choice.
_NAMED = 3


def other_numerics(sections: Iterable[Section]) -> list[str]:
  """A message for the runs of a section that other code made.

  That is code whose results differ from those of this code, see
  `bn_repro/numerics.py`. The message names the first few runs.
  """
  expected = numerics.digest()
  messages = []
  for section in sections:
    others: dict[str | None, list[str]] = {}
    for run in section.runs:
      if run.numerics != expected:
        others.setdefault(run.numerics, []).append(run.name)
    for digest, names in others.items():
      more = len(names) - _NAMED
      named = ', '.join(names[:_NAMED]) + (f' and {more} more' * (more > 0))
      messages.append(
        f'{section.name}: {len(names)} of {len(section.runs)} runs were made '
        f'by other numerics ({digest or "not recorded"}) than those of this '
        f'code ({expected}), which may give other results: {named}. Train them '
        'again.'
      )
  return messages


def _place(group: Group) -> tuple[int, str, float]:
  """Sort key of a group in its section."""
  known = [*paper.PAPER, *paper.ENSEMBLE]
  rank = known.index(group.variant) if group.variant in known else len(known)
  return rank, group.variant, group.runs[0].learning_rate
