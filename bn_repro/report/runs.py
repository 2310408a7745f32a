"""Runs read from their workdirs, and grouped for comparison.

A `Group` holds the runs of one variant and setting, one for each repetition: a
seed and a fold of the data. A `Section` holds the groups that can be compared
with each other.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
import dataclasses
import math
from pathlib import Path
import statistics
from typing import Any, NamedTuple

from ml_collections import ConfigDict
import numpy as np

from bn_repro import config as config_lib
from bn_repro import config_fields, numerics, paper
from bn_repro.errors import UserError
from bn_repro.runtime import workdir as workdir_lib

# BN statistics of the evaluations to report, most preferred first. Networks
# without BN have None.
STATISTICS = ('population', None, 'moving')

# The best accuracy of a run is its highest mean over this many consecutive
# evaluations, because a single evaluation is noisy (our choice). A run with
# fewer has none, and is not compared by it.
WINDOW = 5

# What `Spread.show` writes.
SPREAD_NOTE = (
  'Values are medians over seeds, of two seeds the mean, with the range in '
  'parentheses.'
)

# Fields in which runs of one setting may differ. Best accuracies depend on the
# length of a run and on how often it is evaluated, so these are not among them.
INCIDENTAL = {'seed', 'data.fold', *config_fields.CHANGEABLE} - {
  'total_steps',
  'total_epochs',
  'eval_every',
}

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

Point = tuple[float, float]

# The files of a workdir that the report reads.
_FILES = ('config.json', 'run.json', 'status.json', 'metrics.jsonl')


class Repetition(NamedTuple):
  """What distinguishes the runs of one variant and setting.

  Attributes:
    seed: `seed` of the config.
    fold: `data.fold` of the config.
  """

  seed: int
  fold: int

  def __str__(self) -> str:
    fold = f' (fold {self.fold})' if self.fold > 0 else ''
    return f'{self.seed}{fold}'


@dataclasses.dataclass(frozen=True)
class Run:
  """A run.

  Attributes:
    folder: directory that contains the workdir.
    name: name of the workdir.
    variant: name of the config file, such as 'bn_x5'.
    config: content of `config.json`.
    facts: content of `run.json`.
    status: content of `status.json`.
    lines: lines of `metrics.jsonl`.
  """

  folder: Path
  name: str
  variant: str
  config: Mapping[str, Any]
  facts: Mapping[str, Any]
  status: Mapping[str, Any]
  lines: Sequence[Mapping[str, Any]]

  @property
  def step(self) -> int:
    """Last recorded step."""
    steps = [line['step'] for line in self.lines]
    return max([self.status.get('step', 0), *steps])

  @property
  def equivalent(self) -> float:
    """Steps of 32 images, the paper's unit, in one step of this run."""
    return self.config['batch_size'] / paper.BATCH_SIZE

  @property
  def ended(self) -> bool:
    """Whether the run is done or diverged."""
    return self.status.get('status') in workdir_lib.ENDED

  @property
  def repetition(self) -> Repetition:
    """Seed and fold of the config."""
    return Repetition(self.config['seed'], self.config['data']['fold'])

  @property
  def numerics(self) -> str | None:
    """Digest of the results of the code that made the run.

    None if `run.json` is older than `bn_repro/numerics.py`. All digests, if
    code of other results has resumed the run.
    """
    starts = [*self.facts.get('earlier_starts', ()), self.facts]
    # A start from step 0 leaves nothing of those before.
    fresh = [i for i, start in enumerate(starts) if not start.get('start_step')]
    starts = starts[max(fresh, default=0) :]
    digests = dict.fromkeys(start.get('numerics') for start in starts)
    if None in digests and len(digests) == 1:
      return None
    return ', then '.join(digest or 'unknown' for digest in digests)

  @property
  def place(self) -> str:
    """Folder and name, for messages."""
    return f'{self.folder.name}/{self.name}'

  @property
  def state(self) -> str:
    """Status for readers, such as 'diverged at step 7: loss is nan'."""
    status = self.status.get('status', 'not started')
    if status == workdir_lib.Status.DONE:
      return status
    reason = self.status.get('reason')
    return f'{status} at step {self.step}' + (f': {reason}' if reason else '')

  @property
  def learning_rate(self) -> float:
    """Initial learning rate of the config, for batch size 32."""
    return self.config['optim']['learning_rate']

  @property
  def num_classes(self) -> int:
    """Number of classes of the data set.

    The `run.json` of revision 3a68ec7 and before does not have it. There,
    ImageNet and its stand-in have 1,000 classes, all other data sets 10.
    """
    is_imagenet = self.config['data']['name'].startswith('imagenet')
    return self.facts.get('num_classes', 1000 if is_imagenet else 10)

  @property
  def chance(self) -> float:
    """Accuracy of random guessing."""
    return 1 / self.num_classes

  def setting(self) -> dict[str, Any]:
    """Config fields by dotted name, without the `INCIDENTAL` ones.

    A run from before there were folds has the field `data.fold`: its number of
    test digits is another.
    """
    fields = config_fields.flatten(ConfigDict(self.config))
    return {
      name: value
      for name, value in fields.items()
      if name not in INCIDENTAL or value == config_fields.BEFORE_FOLDS
    }

  def curve(
    self, split: str, metric: str, statistics: str | None
  ) -> list[Point]:
    """`metric` over steps of 32 images."""
    return [
      (line['step'] * self.equivalent, line[metric])
      for line in self._lines_of(split, statistics)
    ]

  def evaluations(self, split: str | None = None) -> list[Mapping[str, Any]]:
    """Evaluations with the most preferred of the available `STATISTICS`.

    Args:
      split: evaluated split; `eval_split` of the config if None.
    """
    split = split or self.config['eval_split']
    available = (self._lines_of(split, form) for form in STATISTICS)
    return next(filter(None, available), [])

  def _lines_of(
    self, split: str, statistics: str | None
  ) -> list[Mapping[str, Any]]:
    return [
      line
      for line in self.lines
      if line['split'] == split and line.get('statistics') == statistics
    ]

  def accuracies(self, split: str | None = None) -> list[float]:
    """Accuracies of the `evaluations`."""
    return [line['accuracy'] for line in self.evaluations(split)]

  def best(self) -> float | None:
    """Highest mean accuracy of `WINDOW` consecutive evaluations.

    None with fewer evaluations.
    """
    values = self.accuracies()
    windows = range(len(values) - WINDOW + 1)
    # `mean` rounds once: that of equal values is the value, which the run then
    # reaches. `fmean` may exceed it.
    means = (statistics.mean(values[i : i + WINDOW]) for i in windows)
    return max(means, default=None)

  @property
  def is_comparable(self) -> bool:
    """Whether it has a best accuracy, or diverged before, which is a result."""
    status = self.status.get('status')
    return self.best() is not None or status == workdir_lib.Status.DIVERGED

  def mean_of_last(self, count: int = WINDOW) -> float | None:
    """Mean accuracy of the last `count` evaluations; None with fewer."""
    values = self.accuracies()[-count:]
    return statistics.fmean(values) if len(values) == count else None

  def test_accuracy(self) -> float | None:
    """Test accuracy after the last step of a run that has ended, or None."""
    for line in self.evaluations('test'):
      if self.ended and line['step'] == self.step:
        return line['accuracy']
    return None

  def steps_to(self, target: float) -> float | None:
    """Steps of 32 images to the first evaluation with accuracy `target`."""
    for line in self.evaluations():
      if line['accuracy'] >= target:
        return line['step'] * self.equivalent
    return None

  def probed(self) -> list[Mapping[str, Any]]:
    """The `evaluations` that record percentiles; of published runs, a few."""
    return [line for line in self.evaluations() if 'percentiles' in line]

  def percentiles(self, probe: str) -> np.ndarray | None:
    """Percentiles of a probe, (probed evaluations, percentiles, units).

    None if the evaluations do not record any.
    """
    lines = self.probed()
    if not lines:
      return None
    return np.array([line['percentiles'][probe] for line in lines])


def read_runs(folders: Iterable[str]) -> tuple[list[Run], list[str]]:
  """Reads all runs in some folders.

  Args:
    folders: paths of workdirs, or of folders up to two levels above workdirs.

  Returns:
    The runs, and a message for each run that cannot be read.

  Raises:
    UserError: if there is no readable run.
  """
  runs, problems = [], []
  seen: set[Path] = set()
  for folder in folders:
    # In a workdir that has lost one of these files, the others are left.
    workdirs = dict.fromkeys(
      path.parent
      for depth in ('', '*/', '*/*/')
      for path in sorted(Path(folder).glob(f'{depth}*.json*'))
      if path.name in _FILES
    )
    if not workdirs:
      problems.append(
        f'--runs={folder}: contains no run (no config.json). Name a workdir, '
        'or a folder of workdirs.'
      )
    for workdir in workdirs:
      if workdir.resolve() in seen:
        continue
      seen.add(workdir.resolve())
      try:
        runs.append(read_run(workdir))
      except KeyError as error:
        problems.append(f'{workdir}: cannot be read ({error} is missing).')
      except UserError as error:
        problems += (f'{workdir}: left out. {text}' for text in error.problems)
      except (TypeError, AttributeError, ValueError, ArithmeticError) as error:
        problems.append(f'{workdir}: cannot be read ({error}).')
  if not runs:
    raise UserError(*problems)
  return runs, problems


def read_run(workdir: Path) -> Run:
  """Reads a run.

  Raises:
    UserError: if a file is missing or damaged.
    KeyError: if the config or a line of metrics lacks an entry.
  """
  for name in _FILES:
    # A run that has just started has no metrics.
    if name != 'metrics.jsonl' and not (workdir / name).is_file():
      raise UserError(f'{workdir / name}: missing. Restore it from a copy.')
  config, facts, status = (
    workdir_lib.read_json(workdir / name) or {} for name in _FILES[:3]
  )
  metrics = workdir / 'metrics.jsonl'
  workdir_lib.check_metrics(metrics, status.get('metrics'))
  config_file = facts.get('config_file', workdir.name)
  run = Run(
    folder=workdir.resolve().parent,
    name=workdir.name,
    variant=Path(config_lib.split_mode(config_file)[0]).stem,
    config=config_lib.upgrade(config).to_dict(),
    facts=facts,
    status=status,
    lines=workdir_lib.read_metrics(metrics),
  )
  recorded = status.get('metrics')
  if recorded and run.ended and len(run.lines) > recorded['lines']:
    raise UserError(
      f'{metrics}: has {len(run.lines)} lines, and the run ended with '
      f'{recorded["lines"]}. Restore it from a copy.'
    )
  # Access every entry once: an incomplete run must fail here, where the caller
  # can name it, and not in the middle of a page.
  _ = run.setting(), run.best(), run.test_accuracy(), run.steps_to(0.0)
  _ = run.chance, run.step, run.config['model']['name']
  _ = run.curve('train', 'loss', None)
  return run


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


def sections(runs: Iterable[Run]) -> tuple[list[Section], list[str]]:
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
