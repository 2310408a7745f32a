"""What a sweep has found: a table of its trials, and what follows from it.

Seeds that repeat a setting are taken together. Nothing but the setting that is
best on validation images is looked up on test images.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
import csv
import dataclasses
import io
import math
from pathlib import Path
import statistics
from typing import Any

from bn_repro import paper
from bn_repro.errors import UserError
from bn_repro.report import claims
from bn_repro.report import runs as runs_lib
from bn_repro.report.runs import Spread
from bn_repro.runtime import workdir as workdir_lib
from bn_repro.sweep.grid import Sweep, Trial, Value, text

NOT_STARTED = 'not started'
# Of a trial that is done and has not learnt: see `ledger.learns`.
BELOW = 'below twice chance'


@dataclasses.dataclass(frozen=True)
class Result:
  """How a trial has come out.

  Attributes:
    name: of the trial.
    values: by axis.
    status: as in `status.json`, or not started.
    step: the furthest.
    total_steps: of the whole run.
    best: `Run.best`; None if it was never evaluated.
    last: the mean of the last evaluations, likewise.
    learns: whether it has left chance.
    steps_to_target: steps of 32 images to the accuracy of the reference; None
      if it never got there.
  """

  name: str
  values: Mapping[str, Value]
  status: str
  step: int
  total_steps: int
  best: float | None
  last: float | None
  learns: bool
  steps_to_target: float | None

  @property
  def ended(self) -> bool:
    """Whether it has come to its end, be it by diverging."""
    return self.status in workdir_lib.ENDED

  @property
  def usable(self) -> bool:
    """Whether it trained to its end, and has learnt."""
    return self.status == workdir_lib.Status.DONE and self.learns


@dataclasses.dataclass(frozen=True)
class Setting:
  """Trials that differ in nothing but the repeated axis."""

  line: tuple[Value, ...]
  x: Value
  results: Sequence[Result]

  @property
  def usable(self) -> bool:
    """Whether all of its trials are."""
    return all(result.usable for result in self.results)

  @property
  def mean(self) -> float:
    """The mean of their best accuracies; minus infinity if one did not end."""
    if any(
      r.status != workdir_lib.Status.DONE or r.best is None
      for r in self.results
    ):
      return -math.inf
    return statistics.fmean(r.best or 0.0 for r in self.results)

  def best(self) -> Spread:
    """Their best accuracies."""
    return Spread([r.best for r in self.results], never=-math.inf, word='–')

  def steps_to_target(self) -> Spread:
    """Their steps to the target."""
    return Spread([result.steps_to_target for result in self.results])


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The results of a sweep.

  Attributes:
    sweep: what was run.
    results: in the order of the names of the axes' values.
    targets: by value of the repeated axis: the best accuracy of the first
      setting, to which steps are counted.
    chance: accuracy of guessing.
    eval_split: what accuracies are of.
    folder: where the trials are.
  """

  sweep: Sweep
  results: Sequence[Result]
  targets: Mapping[Value, float | None]
  chance: float
  eval_split: str
  folder: Path

  def lines(self) -> dict[tuple[Value, ...], list[Setting]]:
    """The settings of each line of the picture, in the order of x."""
    sweep = self.sweep
    found: dict[tuple[Value, ...], dict[Value, list[Result]]] = {}
    for result in self.results:
      line = tuple(result.values[axis.name] for axis in sweep.lines)
      found.setdefault(line, {}).setdefault(result.values[sweep.x], []).append(
        result
      )
    order = list(sweep.axis(sweep.x).values)
    if self.is_numeric:
      order.sort()
    return {
      line: [Setting(line, x, by_x[x]) for x in order if x in by_x]
      for line, by_x in found.items()
    }

  def label(self, line: tuple[Value, ...]) -> str:
    """A line's name."""
    return ', '.join(
      paper.label(value)
      if isinstance(value, str)
      else f'{axis.name} {text(value)}'
      for axis, value in zip(self.sweep.lines, line, strict=True)
    )

  @property
  def is_numeric(self) -> bool:
    """Whether x is a quantity, of which there are ranges."""
    return all(
      not isinstance(x, str) and x > 0
      for x in self.sweep.axis(self.sweep.x).values
    )


def read(sweep: Sweep, folder: Path, endings: Mapping[str, str]) -> Comparison:
  """Reads what the trials of a sweep have written.

  Args:
    sweep: what was run.
    folder: where the trials are.
    endings: states of trials, by name, that the runner knows better than their
      `status.json`: failed before they wrote one.

  Raises:
    UserError: if a file of theirs is damaged, or there is none.
  """
  rank = {
    axis.name: {value: i for i, value in enumerate(axis.values)}
    for axis in sweep.axes
  }
  trials = sorted(
    sweep.trials,
    key=lambda trial: [rank[name][trial.values[name]] for name in rank],
  )
  first = {axis.name: axis.values[0] for axis in sweep.axes}
  targets: dict[Value, float | None] = {}
  found = []
  run = None
  # The first of each line and x come first, and with them the targets. One run
  # at a time: a sweep may have a thousand.
  for trial in trials:
    if not (folder / trial.name / 'config.json').exists():
      found.append(_not_started(trial))
      continue
    run = runs_lib.read_run(folder / trial.name)
    repeat = trial.values[sweep.repeat]
    if trial.values == first | {sweep.repeat: repeat}:
      targets[repeat] = run.best() if run.ended and claims.learns(run) else None
    target = targets.get(repeat)
    found.append(
      Result(
        name=trial.name,
        values=trial.values,
        status=endings.get(trial.name, run.status.get('status', NOT_STARTED)),
        step=run.step,
        total_steps=trial.total_steps,
        best=run.best(),
        last=run.last(),
        learns=claims.learns(run),
        steps_to_target=None if target is None else run.steps_to(target),
      )
    )
  if run is None:
    raise UserError(f'{folder}: no trial of this sweep has been started.')
  return Comparison(
    sweep=sweep,
    results=found,
    targets=targets,
    chance=run.chance,
    eval_split=run.config['eval_split'],
    folder=folder,
  )


def _not_started(trial: Trial) -> Result:
  return Result(
    name=trial.name,
    values=trial.values,
    status=NOT_STARTED,
    step=0,
    total_steps=trial.total_steps,
    best=None,
    last=None,
    learns=False,
    steps_to_target=None,
  )


def table(comparison: Comparison) -> str:
  """`trials.csv`: a row a trial. Nothing in it depends on clock or machine."""
  axes = [axis.name for axis in comparison.sweep.axes]
  split = comparison.eval_split
  file = io.StringIO()
  writer = csv.writer(file, lineterminator='\n')
  writer.writerow(
    [
      'trial',
      *axes,
      'status',
      'step',
      'total_steps',
      f'best_{split}_accuracy',
      f'last_{split}_accuracy',
      'equivalent_steps_to_target',
      'learns',
    ]
  )
  for r in comparison.results:
    writer.writerow(
      [
        r.name,
        *(text(r.values[name]) for name in axes),
        r.status,
        r.step,
        r.total_steps,
        *('' if v is None else v for v in (r.best, r.last, r.steps_to_target)),
        r.learns,
      ]
    )
  return file.getvalue()


def usable_range(settings: Sequence[Setting]) -> list[Value]:
  """The widest run of neighbouring values of x at which all trials learn.

  Args:
    settings: of a line, in the order of x.
  """
  runs: list[list[Any]] = [[]]
  for setting in settings:
    if setting.usable:
      runs[-1].append(setting.x)
    else:
      runs.append([])
  return max(runs, key=lambda run: run[-1] / run[0] if run else 0.0)


def conclusions(comparison: Comparison) -> list[str]:
  """What follows, a line each."""
  found = []
  if comparison.is_numeric:
    found += _ranges(comparison)
  found.append(_best(comparison))
  unfinished = [r.name for r in comparison.results if not r.ended]
  if unfinished:
    found.append(
      f'Not ended: {len(unfinished)} of {len(comparison.results)} trials, '
      f'{", ".join(unfinished[:3])}{" ..." if unfinished[3:] else ""}.'
    )
  return found


def _ranges(comparison: Comparison) -> list[str]:
  """How wide each line's range of usable values is, and by what factor."""
  x = comparison.sweep.x
  values: list[Any] = sorted(comparison.sweep.axis(x).values)
  found = []
  first: tuple[str, float] | None = None
  for line, settings in comparison.lines().items():
    label, usable = comparison.label(line), usable_range(settings)
    missing = sum(not r.ended for s in settings for r in s.results)
    if missing:
      found.append(f'{label}: {missing} trials have not ended.')
      first = first or (label, 0.0)
      continue
    if not usable:
      found.append(f'{label}: learns at no {x}.')
      first = first or (label, 0.0)
      continue
    low: Any = usable[0]
    high: Any = usable[-1]
    width = high / low
    # Where the sweep ends, the range may not.
    ends = [
      text(end) + ('*' if end in (values[0], values[-1]) else '')
      for end in (low, high)
    ]
    where = ' to '.join(ends) if width > 1 else f'{ends[0]} alone'
    sentence = f'{label}: learns with {x} {where}, a factor of {width:.3g}'
    if first is None:
      first = label, width
    elif first[1]:
      ratio = width / first[1]
      sentence += (
        f'; {ratio:.3g} times the range of {first[0]}'
        if not math.isclose(ratio, 1)
        else f'; no wider than {first[0]}'
      )
    found.append(f'{sentence}.')
  if any('*' in sentence for sentence in found):
    found.append('(*) An end of the sweep, beyond which nothing was tried.')
  return found


def _best(comparison: Comparison) -> str:
  """The best setting by validation, and its accuracy on test images."""
  settings = [s for line in comparison.lines().values() for s in line]
  best = max(settings, key=lambda setting: setting.mean)
  if best.mean == -math.inf:
    return 'Best: no setting has all of its trials done.'
  names = [result.name for result in best.results]
  where = ', '.join(
    f'{axis.name} {text(value)}'
    for axis, value in zip(
      (*comparison.sweep.lines, comparison.sweep.axis(comparison.sweep.x)),
      (*best.line, best.x),
      strict=True,
    )
  )
  said = (
    f'Best on {comparison.eval_split} images: {where}, {100 * best.mean:.2f} % '
    f'(mean of {len(names)})'
  )
  if comparison.eval_split != 'validation':
    return f'{said}. There are no others to measure it on.'
  runs = [runs_lib.read_run(comparison.folder / name) for name in names]
  accuracies = [run.test_accuracy() for run in runs]
  if None in accuracies:
    return f'{said}. It was not evaluated on test images.'
  mean = statistics.fmean(value or 0.0 for value in accuracies)
  return f'{said}; on the test images {100 * mean:.2f} %.'


def summary(comparison: Comparison) -> str:
  """`summary.md`: a row a setting, and the conclusions."""
  sweep = comparison.sweep
  heads = [
    *(axis.name for axis in sweep.lines),
    sweep.x,
    'runs',
    f'best {comparison.eval_split} accuracy, %',
    'steps of 32 to the target',
    'state',
  ]
  rows = [heads, ['---'] * len(heads)]
  for line, settings in comparison.lines().items():
    for setting in settings:
      states = Counter(map(state, setting.results))
      several = len(states) > 1
      row = [
        *map(text, line),
        text(setting.x),
        str(len(setting.results)),
        setting.best().show(lambda value: f'{100 * value:.1f}'),
        setting.steps_to_target().show('{:,.0f}'.format),
        ', '.join(f'{n} {s}' if several else s for s, n in states.items()),
      ]
      rows.append(row)
  targets = ', '.join(
    f'{text(repeat)}: {"none" if target is None else f"{100 * target:.1f} %"}'
    for repeat, target in comparison.targets.items()
  )
  first = comparison.results[0]
  notes = [
    f'![{sweep.x}](sweep.png)',
    '\n'.join(f'| {" | ".join(row)} |' for row in rows),
    f'Best is the best mean of {runs_lib.WINDOW} evaluations in a row; the '
    f'lower median, and the range over {sweep.repeat}. A trial learns that '
    'gets to twice chance.',
    f'The target is the best of the first setting ({first.name} and its '
    f'like), by {sweep.repeat}: {targets}.',
    '\n'.join(f'- {line}' for line in conclusions(comparison)),
  ]
  return '\n\n'.join(notes) + '\n'


def state(result: Result) -> str:
  """How a trial ended, in words."""
  if result.status == workdir_lib.Status.DIVERGED:
    return f'diverged at step {result.step}'
  if result.status == workdir_lib.Status.DONE and not result.learns:
    return BELOW
  return result.status
