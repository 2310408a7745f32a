"""What runs have written, read back, put together by variant and judged."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import math
from pathlib import Path
import statistics
from typing import Any

from ml_collections import ConfigDict

from bn_repro import config as config_lib
from bn_repro import workdir as workdir_lib
from bn_repro.config import UserError

# The batch size that the paper's steps are of.
PAPER_BATCH_SIZE = 32
PARENT = 'inception'  # What speed is measured against.

_ENDED = (workdir_lib.DONE, workdir_lib.DIVERGED)
_CLASSES = {'imagenet2012': 1_000}  # All other data sets have 10.

Curve = Mapping[float, float]


@dataclasses.dataclass(frozen=True)
class Run:
  """One run, as far as it has come.

  Attributes:
    path: its workdir.
    variant: stem of its config file, or else the name of the workdir.
    config: the fields of its config by dotted name.
    facts: the content of `run.json`.
    status: the content of `status.json`.
    step: the last step that is known of.
    accuracy: validation accuracy by equivalent step, with population
      statistics where the run has them.
    moving: the same with moving averages; empty unless it is the lesser form.
    loss: training loss by equivalent step.
    test: accuracy on the test images, after the last step.
    num_evaluated: number of validation images.
  """

  path: Path
  variant: str
  config: Mapping[str, Any]
  facts: Mapping[str, Any]
  status: Mapping[str, Any]
  step: int
  accuracy: Curve
  moving: Curve
  loss: Curve
  test: float | None
  num_evaluated: int

  @property
  def ended(self) -> bool:
    """Whether nothing is to be expected of it any more."""
    return self.status.get('status') in _ENDED

  @property
  def diverged(self) -> bool:
    """Whether it left the finite numbers."""
    return self.status.get('status') == workdir_lib.DIVERGED

  @property
  def learning_rate(self) -> float:
    """The initial rate, as applied to its batches."""
    given = self.config['optim.learning_rate']
    scale = self.config['batch_size'] / PAPER_BATCH_SIZE
    return self.facts.get('applied_learning_rate', given * scale)

  def steps_to(self, target: float) -> float:
    """The first evaluated equivalent step at `target`; inf if there is none."""
    return min(
      (step for step, value in self.accuracy.items() if value >= target),
      default=math.inf,
    )


def read_run(path: Path) -> Run:
  """Reads a workdir.

  Raises:
    UserError: if something in it is not what a run writes.
  """
  try:
    config = config_lib.flatten(
      ConfigDict(workdir_lib.read_json(path / 'config.json'))
    )
    facts = workdir_lib.read_json(path / 'run.json') or {}
    status = workdir_lib.read_json(path / 'status.json') or {}
    lines = workdir_lib.read_metrics(path / 'metrics.jsonl')
    return _make_run(path, config, facts, status, lines)
  except (
    AttributeError,
    KeyError,
    OSError,
    TypeError,
    ValueError,
  ) as error:
    raise UserError(f'{path}: not what a run writes ({error!r}).') from error


def _make_run(
  path: Path,
  config: Mapping[str, Any],
  facts: Mapping[str, Any],
  status: Mapping[str, Any],
  lines: Sequence[Mapping[str, Any]],
) -> Run:
  scale = config['batch_size'] / PAPER_BATCH_SIZE
  # `eval_split` may be train; only lines of training have a learning rate.
  training = [line for line in lines if 'learning_rate' in line]
  others = [line for line in lines if 'learning_rate' not in line]
  evaluated = [line for line in others if line['split'] == config['eval_split']]
  test = [line for line in others if line['split'] == 'test']

  def curve(lines: Iterable[Mapping[str, Any]], key: str) -> Curve:
    return {line['step'] * scale: float(line[key]) for line in lines}

  preferred = _of_form(evaluated, 'population') or evaluated
  moving = _of_form(evaluated, 'moving') if preferred is not evaluated else []
  final = _of_form(test, 'population') or test
  return Run(
    path=path,
    variant=Path(facts.get('config_file', '').partition(':')[0]).stem
    or path.absolute().name,
    config={**config, 'data.name': str(config['data.name'])},
    facts=facts,
    status=status,
    step=max([status.get('step', 0), *(line['step'] for line in lines)]),
    accuracy=curve(preferred, 'accuracy'),
    moving=curve(moving, 'accuracy'),
    loss=curve(training, 'loss'),
    test=float(final[-1]['accuracy']) if final else None,
    num_evaluated=max((line['num_examples'] for line in evaluated), default=0),
  )


def _of_form(
  lines: Iterable[Mapping[str, Any]], form: str
) -> list[Mapping[str, Any]]:
  return [line for line in lines if line.get('statistics') == form]


def find(roots: Iterable[str]) -> list[Path]:
  """The workdirs that are at, in, or two levels below the given folders.

  Raises:
    UserError: if a folder is not there, or there is no run at all.
  """
  roots = list(roots)
  found: dict[Path, Path] = {}
  for root in roots:
    folder = Path(root).expanduser()
    if not folder.is_dir():
      raise UserError(f'--runs={root}: no such directory.')
    for pattern in ('config.json', '*/config.json', '*/*/config.json'):
      for path in sorted(folder.glob(pattern)):
        found.setdefault(path.parent.resolve(), path.parent)
  if not found:
    raise UserError(
      f'--runs={", ".join(roots)}: no run there (no config.json). Name a '
      'workdir, or a folder of workdirs.'
    )
  return list(found.values())


@dataclasses.dataclass(frozen=True)
class Variant:
  """Runs that differ in their seed alone.

  Attributes:
    name: stem of the config file.
    difference: what sets them apart from most runs of that config file.
    runs: all of them.
  """

  name: str
  difference: str
  runs: Sequence[Run]

  @property
  def counted(self) -> Sequence[Run]:
    """The runs that figures are taken from: those that ended, if any has."""
    return [run for run in self.runs if run.ended] or self.runs

  @property
  def ended(self) -> bool:
    """Whether there is a result to judge."""
    return any(run.ended for run in self.runs)

  def steps_to(self, target: float) -> list[float]:
    """Of each run counted."""
    return [run.steps_to(target) for run in self.counted]

  def best(self) -> list[float]:
    """The best validation accuracy of each run counted that has any."""
    return [max(run.accuracy.values()) for run in self.counted if run.accuracy]

  def median_curve(self) -> Curve:
    """The median over the runs, where more than half of them have a value."""
    steps = sorted({step for run in self.counted for step in run.accuracy})
    values = {
      step: [run.accuracy[step] for run in self.counted if step in run.accuracy]
      for step in steps
    }
    return {
      step: statistics.median(there)
      for step, there in values.items()
      if 2 * len(there) > len(self.counted)
    }


@dataclasses.dataclass(frozen=True)
class Results:
  """All runs on one data set; those of `variants` are plain ones first."""

  data: str
  variants: Sequence[Variant]

  def plain(self, name: str) -> Variant | None:
    """The runs of a config file that are as most of them are."""
    return next((v for v in self.variants if v.name == name), None)

  @property
  def target(self) -> float | None:
    """The best accuracy that Inception ended with; the median over seeds.

    Of two medians the lower, so that the median run of Inception reaches it.
    """
    parent = self.plain(PARENT)
    if parent is None or not parent.ended or not parent.best():
      return None
    return statistics.median_low(parent.best())


def group(runs: Iterable[Run], order: Sequence[str]) -> list[Results]:
  """Puts runs together by data set and variant; `order` names what is first."""
  sets: dict[str, dict[str, list[Run]]] = {}
  for run in runs:
    by_name = sets.setdefault(run.config['data.name'], {})
    by_name.setdefault(run.variant, []).append(run)
  return [
    Results(
      data,
      [
        variant
        for name in [*order, *sorted(by_name.keys() - set(order))]
        for variant in _split(name, by_name.get(name, []))
      ],
    )
    for data, by_name in sorted(sets.items())
  ]


def _split(name: str, runs: Iterable[Run]) -> list[Variant]:
  """Separates runs of one config file whose overrides differ."""
  alike: dict[str, list[Run]] = {}
  for run in runs:
    alike.setdefault(repr(sorted(_identity(run).items())), []).append(run)
  groups = sorted(alike.values(), key=len, reverse=True)
  if not groups:
    return []
  usual = _identity(groups[0][0])
  return [
    Variant(
      name,
      ', '.join(
        f'{key}={value}'
        for key, value in _identity(group[0]).items()
        if usual.get(key) != value
      ),
      group,
    )
    for group in groups
  ]


def _identity(run: Run) -> dict[str, Any]:
  ignored = ('seed', *config_lib.CHANGEABLE)
  return {k: v for k, v in run.config.items() if k not in ignored}


# What a claim compares: a number of a variant, None where there is none yet.
Measure = Callable[[Results, Variant], float | None]


def steps(results: Results, variant: Variant) -> float | None:
  """Median steps to the target."""
  if results.target is None:
    return None
  return statistics.median(variant.steps_to(results.target))


def best(results: Results, variant: Variant) -> float:
  """Median best accuracy."""
  del results
  return statistics.median(variant.best() or [0.0])


def lasting(results: Results, variant: Variant) -> float:
  """Median best accuracy; 0 for what diverged."""
  del results
  return statistics.median(
    0.0 if run.diverged else max(run.accuracy.values(), default=0.0)
    for run in variant.counted
  )


def over_chance(results: Results, variant: Variant) -> float:
  """Median best accuracy, in multiples of a guess's."""
  return best(results, variant) * _CLASSES.get(results.data, 10)
