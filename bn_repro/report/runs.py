"""What runs have written, read back and put in order. Imports no JAX."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import math
from pathlib import Path
import statistics
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from bn_repro import config as config_lib
from bn_repro import config_fields, paper
from bn_repro.errors import UserError
from bn_repro.runtime import workdir as workdir_lib

# Forms of BN statistics in the order in which a run's results are quoted.
PREFERRED = ('population', None, 'moving')

# A net's best is the best mean of so many evaluations in a row: single ones
# are luck (our choice).
WINDOW = 5

# Runs of one config that differ in nothing but these are runs of one setting.
# How long a run is and where it is evaluated decides what is best in it.
INCIDENTAL = {'seed', *config_fields.CHANGEABLE} - {
  'total_steps',
  'total_epochs',
  'eval_every',
}

# What may differ between the variants; in the rest runs have to be alike to be
# compared.
OF_VARIANTS = ('data.shuffle', 'data.distortion', 'model.', 'bn.', 'optim.')

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Run:
  """One run.

  Attributes:
    folder: the directory that its workdir stands in.
    name: of its workdir.
    variant: the config it was started from, such as 'bn_x5'.
    config: the resolved config.
    facts: `run.json`.
    status: `status.json`.
    lines: `metrics.jsonl`.
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
    """The last step that is known of."""
    steps = [line['step'] for line in self.lines]
    return max([self.status.get('step', 0), *steps])

  @property
  def equivalent(self) -> float:
    """Steps on the paper's axis (images / 32) that one of this run's is."""
    return self.config['batch_size'] / paper.BATCH_SIZE

  @property
  def ended(self) -> bool:
    """Whether it has come to its end, be it by diverging."""
    return self.status.get('status') in workdir_lib.ENDED

  @property
  def chance(self) -> float:
    """Accuracy of guessing."""
    return 1 / (1000 if self.config['data']['name'] == 'imagenet2012' else 10)

  def fields(self) -> dict[str, Any]:
    """The config by dotted name."""
    return config_fields.flatten(ConfigDict(self.config))

  def setting(self) -> dict[str, Any]:
    """The fields that are not `INCIDENTAL`."""
    return {
      name: value
      for name, value in self.fields().items()
      if name not in INCIDENTAL
    }

  def curve(self, split: str, metric: str, form: str | None) -> list[Point]:
    """`metric` over equivalent steps (images seen / 32)."""
    return [
      (line['step'] * self.equivalent, line[metric])
      for line in self.lines
      if line['split'] == split and line.get('statistics') == form
    ]

  def quoted_lines(self, split: str | None = None) -> list[Mapping[str, Any]]:
    """Evaluations of a split, `eval_split` by default, in the form to quote."""
    split = split or self.config['eval_split']
    for form in PREFERRED:
      lines = [
        line
        for line in self.lines
        if line['split'] == split and line.get('statistics') == form
      ]
      if lines:
        return lines
    return []

  def accuracies(self, split: str | None = None) -> list[float]:
    """Accuracies of the `quoted_lines`."""
    return [line['accuracy'] for line in self.quoted_lines(split)]

  def best(self) -> float | None:
    """The best mean of `WINDOW` successive evaluations, or of all if fewer."""
    values = self.accuracies()
    windows = range(max(len(values) - WINDOW, 0) + 1)
    # Rounded once: the mean of equal values is no larger than they are.
    means = (statistics.fmean(values[i : i + WINDOW]) for i in windows)
    return max(means) if values else None

  def last(self, count: int = WINDOW) -> float | None:
    """The mean of the last evaluations."""
    values = self.accuracies()[-count:]
    return statistics.fmean(values) if values else None

  def test_accuracy(self) -> float | None:
    """Accuracy on the test images, which are evaluated after the last step."""
    values = self.accuracies('test')
    return values[-1] if values and self.ended else None

  def steps_to(self, target: float) -> float | None:
    """The first evaluated step with at least this accuracy, in steps of 32."""
    for line in self.quoted_lines():
      if line['accuracy'] >= target:
        return line['step'] * self.equivalent
    return None

  def percentiles(self, probe: str) -> np.ndarray | None:
    """Percentiles of a probe, (evaluations, percentiles, units)."""
    lines = self.quoted_lines()
    if not lines or 'percentiles' not in lines[0]:
      return None
    return np.array([line['percentiles'][probe] for line in lines])


def read_runs(folders: Iterable[str]) -> tuple[list[Run], list[str]]:
  """Reads every run in some folders, or folders of folders.

  Returns:
    The runs, and a line for each one that could not be read.

  Raises:
    UserError: if there is no run at all.
  """
  runs, problems = [], []
  seen: set[Path] = set()
  for folder in folders:
    workdirs = [
      path.parent
      for pattern in ('config.json', '*/config.json', '*/*/config.json')
      for path in sorted(Path(folder).glob(pattern))
    ]
    if not workdirs:
      problems.append(f'--runs={folder}: no run there (no config.json).')
    for workdir in workdirs:
      if workdir.resolve() in seen:
        continue
      seen.add(workdir.resolve())
      try:
        runs.append(read_run(workdir))
      except KeyError as error:
        problems.append(f'{workdir}: cannot be read (it has no {error}).')
      except (UserError, TypeError, AttributeError) as error:
        problems.append(f'{workdir}: cannot be read ({error}).')
  if not runs:
    raise UserError(*problems)
  return runs, problems


def read_run(workdir: Path) -> Run:
  """Reads a run.

  Raises:
    UserError: if a file of it is damaged.
    KeyError: if it lacks something.
  """
  facts = workdir_lib.read_json(workdir / 'run.json') or {}
  config_file = facts.get('config_file', workdir.name)
  run = Run(
    folder=workdir.resolve().parent,
    name=workdir.name,
    variant=Path(config_file.partition(':')[0]).stem,
    config=config_lib.upgrade(
      workdir_lib.read_json(workdir / 'config.json')
    ).to_dict(),
    facts=facts,
    status=workdir_lib.read_json(workdir / 'status.json') or {},
    lines=workdir_lib.read_metrics(workdir / 'metrics.jsonl'),
  )
  # Read once here, so that a run that lacks something is named, not half shown.
  _ = run.setting(), run.best(), run.test_accuracy(), run.steps_to(0.0)
  _ = run.config['data']['name'], run.config['model']['name']
  _ = run.curve('train', 'loss', None)
  return run


def lower_median(values: Sequence[float]) -> float:
  """The median, the lower one of two: a value that a run has."""
  return sorted(values)[(len(values) - 1) // 2]


@dataclasses.dataclass(frozen=True)
class Spread:
  """Values of several seeds.

  Attributes:
    values: one a seed; None for a seed that never got there.
    never: what None counts as: the longest time, or the smallest factor.
    word: for it.
  """

  values: Sequence[float | None]
  never: float = math.inf
  word: str = 'never'

  @property
  def _sorted(self) -> list[float]:
    return sorted(self.never if v is None else v for v in self.values)

  def show(self, one: Callable[[float], str]) -> str:
    """The median, and the range if there are several, as `one` writes them.

    The median is one that a seed has, the lower one of two.
    """

    def each(value: float) -> str:
      return one(value) if math.isfinite(value) else self.word

    if not self.values:
      return '–'
    ends = each(self._sorted[0]), each(self._sorted[-1])
    middle = each(lower_median(self._sorted))
    if len(self.values) == 1:
      return middle
    return f'{middle} ({ends[0]} to {ends[1]})'


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs of one variant and setting, one a seed."""

  variant: str
  runs: Sequence[Run]

  def spread(self, measure: Any) -> Spread:
    """`measure(run)` of each run."""
    return Spread([measure(run) for run in self.runs])


@dataclasses.dataclass(frozen=True)
class Section:
  """Runs that can be compared: of one folder, network and data set.

  Attributes:
    folder: the directory.
    data_name: their data set.
    network: `model.name` of their configs.
    groups: in the order of the paper, unknown variants last.
  """

  folder: Path
  data_name: str
  network: str
  groups: Sequence[Group]

  @property
  def runs(self) -> list[Run]:
    """All runs."""
    return [run for group in self.groups for run in group.runs]

  @property
  def title(self) -> str:
    """Name of the folder, and of the data set if that says more."""
    name = self.folder.name
    return name if name == self.data_name else f'{name} ({self.data_name})'

  def settings_of(self, variant: str) -> list[Group]:
    """The groups of a variant."""
    return [group for group in self.groups if group.variant == variant]

  @property
  def is_sweep(self) -> bool:
    """Whether a variant was run in several settings."""
    return len({group.variant for group in self.groups}) < len(self.groups)

  def varying(self, group: Group) -> set[str]:
    """The fields in which a group differs from others of its variant."""
    mine = group.runs[0].setting()
    others = [g.runs[0].setting() for g in self.settings_of(group.variant)]
    return {
      name
      for name in mine
      if any(other.get(name) != mine[name] for other in others)
    }

  def what_varies(self, group: Group) -> str:
    """What tells a group from others, such as 'model.width=0.25'."""
    mine, names = group.runs[0].setting(), self.varying(group)
    return ', '.join(f'{n}={_short(mine[n])}' for n in mine if n in names)

  def not_shared(self) -> list[str]:
    """Fields that make runs hard to compare and are not the same for all."""
    found = []
    settings = [group.runs[0].setting() for group in self.groups]
    for name in dict.fromkeys(name for setting in settings for name in setting):
      values = dict.fromkeys(setting.get(name) for setting in settings)
      shared = not name.startswith(OF_VARIANTS) or name == 'model.width'
      if shared and len(values) > 1:
        found.append(f'{name} ({", ".join(map(_short, values))})')
    return found


def _short(value: Any) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)


def sections(
  runs: Iterable[Run], order: Sequence[str]
) -> tuple[list[Section], list[str]]:
  """Puts runs into sections, and their variants into the given order.

  Returns:
    The sections, and a line for each run that another one says the same as.
  """
  rank = {variant: number for number, variant in enumerate(order)}
  # By section, by variant and setting, by seed.
  found: dict[tuple[Path, str, str], dict[str, dict[int, Run]]] = {}
  problems = []
  for run in runs:
    config = run.config
    key = (run.folder, config['data']['name'], config['model']['name'])
    setting = f'{run.variant} {sorted(run.setting().items())}'
    by_seed = found.setdefault(key, {}).setdefault(setting, {})
    first = by_seed.setdefault(config['seed'], run)
    if first is not run:
      problems.append(
        f'{run.folder / run.name}: left out, the same config and seed as '
        f'{first.folder / first.name}.'
      )
  put_in_order = [
    Section(
      *key,
      sorted(
        (
          Group(runs[min(runs)].variant, [runs[seed] for seed in sorted(runs)])
          for runs in by_setting.values()
        ),
        key=lambda group: (
          rank.get(group.variant, len(rank)),
          group.variant,
          group.runs[0].config['optim']['learning_rate'],
        ),
      ),
    )
    for key, by_setting in found.items()
  ]
  return put_in_order, problems
