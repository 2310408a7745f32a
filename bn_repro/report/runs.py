"""Runs read from their workdirs."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from pathlib import Path
import statistics
from typing import Any, NamedTuple

from ml_collections import ConfigDict
import numpy as np

from bn_repro import config as config_lib
from bn_repro import config_fields, files, paper
from bn_repro.errors import UserError
from bn_repro.runtime import mirror
from bn_repro.runtime import workdir as workdir_lib

# BN statistics of the evaluations to report, most preferred first. Networks
# without BN have None.
STATISTICS = ('population', None, 'moving')

# The best accuracy of a run is its highest mean over this many consecutive
# evaluations, because a single evaluation is noisy (our choice). A run with
# fewer has none, and is not compared by it.
WINDOW = 5

# Fields in which runs of one setting may differ. Best accuracies depend on the
# length of a run and on how often it is evaluated, so these are not among them.
INCIDENTAL = {'seed', 'data.fold', *config_fields.CHANGEABLE} - {
  'total_steps',
  'total_epochs',
  'eval_every',
}

Point = tuple[float, float]

# The files of a workdir that the report reads.
_FILES = ('config.json', 'run.json', 'status.json', 'metrics.jsonl')
# The same in folders of workdirs, and probabilities.
_PATTERNS = (*(f'*{name}' for name in _FILES), '*.npz')


def fetch(folder: Path) -> Path:
  """Downloads what the report reads of a workdir or a folder of workdirs.

  Returns:
    The folder to read; `folder` itself if it is not in a bucket.

  Raises:
    OSError, TemporaryError, UserError: as `mirror.fetch`.
  """
  return mirror.fetch(folder, _PATTERNS)


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
    given = Path(folder)
    root = fetch(given)
    # In a workdir that has lost one of these files, the others are left.
    workdirs = dict.fromkeys(
      path.parent
      for depth in ('', '*/', '*/*/')
      for path in sorted(root.glob(f'{depth}*.json*'))
      if path.name in _FILES
    )
    if not workdirs:
      problems.append(
        f'--runs={files.as_given(given)}: contains no run (no '
        'config.json). Name a workdir, or a folder of workdirs.'
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
