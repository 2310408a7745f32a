"""Compares the trials of a sweep: a table, a summary, and conclusions.

Trials that differ only in the repeated axis, such as the seed, form a setting.
Settings are ranked on validation images. Only the best one is then evaluated on
test images.
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
from bn_repro.report.runs import Run, Spread
from bn_repro.runtime import workdir as workdir_lib
from bn_repro.sweep.sweep import Sweep, Trial, TrialStatus, Value, to_text


@dataclasses.dataclass(frozen=True)
class Result:
  """The result of a trial.

  Attributes:
    name: name of the trial.
    values: value of each axis.
    total_steps: steps of the whole run.
    status: status of the run, or `NOT_STARTED`.
    step: last step.
    best: `Run.best`; None without an evaluation.
    last: `Run.last`; None without an evaluation.
    learns: whether accuracy exceeds chance, as `claims.learns` defines it.
    steps_to_target: steps of 32 images to the target accuracy; None if the run
      never reaches it.
  """

  name: str
  values: Mapping[str, Value]
  total_steps: int
  status: str = TrialStatus.NOT_STARTED
  step: int = 0
  best: float | None = None
  last: float | None = None
  learns: bool = False
  steps_to_target: float | None = None

  @property
  def ended(self) -> bool:
    """Whether the run is done or has diverged."""
    return self.status in workdir_lib.ENDED

  @property
  def usable(self) -> bool:
    """Whether the run is done and learns."""
    return self.status == workdir_lib.Status.DONE and self.learns

  @property
  def outcome(self) -> str:
    """The status in words, with the step at which the run diverged."""
    if self.status == workdir_lib.Status.DIVERGED:
      return f'diverged at step {self.step}'
    if self.status == workdir_lib.Status.DONE and not self.learns:
      return TrialStatus.BELOW
    return self.status


@dataclasses.dataclass(frozen=True)
class Setting:
  """The results of trials that differ only in the repeated axis."""

  line: tuple[Value, ...]
  x: Value
  results: Sequence[Result]

  @property
  def usable(self) -> bool:
    """Whether all of its trials are usable."""
    return all(result.usable for result in self.results)

  @property
  def mean(self) -> float:
    """Mean of the best accuracies; -infinity unless all trials are done."""
    best = [r.best for r in self.results if r.status == workdir_lib.Status.DONE]
    if len(best) < len(self.results) or None in best:
      return -math.inf
    return statistics.fmean(value or 0.0 for value in best)

  def best(self) -> Spread:
    """The best accuracies."""
    return Spread([r.best for r in self.results], never=-math.inf, word='–')

  def steps_to_target(self) -> Spread:
    """The steps to the target."""
    return Spread([result.steps_to_target for result in self.results])


@dataclasses.dataclass(frozen=True)
class Comparison:
  """The results of a sweep.

  Attributes:
    sweep: the sweep.
    results: one result for each trial, in the order of the axes' values.
    targets: target accuracy for each value of the repeated axis: the best of
      the first setting, or None if that did not learn.
    chance: accuracy of guessing.
    eval_split: split that accuracies refer to.
    folder: directory of the sweep.
  """

  sweep: Sweep
  results: Sequence[Result]
  targets: Mapping[Value, float | None]
  chance: float
  eval_split: str
  folder: Path

  def lines(self) -> dict[tuple[Value, ...], list[Setting]]:
    """The settings of each line of the figure, in the order of x."""
    sweep = self.sweep
    found: dict[tuple[Value, ...], dict[Value, list[Result]]] = {}
    for result in self.results:
      line = tuple(result.values[axis] for axis in sweep.lines)
      by_x = found.setdefault(line, {})
      by_x.setdefault(result.values[sweep.x], []).append(result)
    order: list[Any] = list(sweep.axes[sweep.x])
    if self.is_numeric:
      order.sort()
    return {
      line: [Setting(line, x, by_x[x]) for x in order if x in by_x]
      for line, by_x in found.items()
    }

  def label(self, line: tuple[Value, ...]) -> str:
    """Name of a line."""
    return ', '.join(
      paper.label(value)
      if isinstance(value, str)
      else f'{axis} {to_text(value)}'
      for axis, value in zip(self.sweep.lines, line, strict=True)
    )

  @property
  def is_numeric(self) -> bool:
    """Whether all values of x are positive numbers, which have ranges."""
    return all(
      not isinstance(x, str) and x > 0 for x in self.sweep.axes[self.sweep.x]
    )


def read(sweep: Sweep, folder: Path, endings: Mapping[str, str]) -> Comparison:
  """Reads what the trials of a sweep have written.

  Args:
    sweep: the sweep.
    folder: directory of the sweep.
    endings: statuses by name of trial that replace those of `status.json`, for
      trials that failed before they wrote one.

  Raises:
    UserError: if a file of a run is damaged, or no trial has started.
  """
  trials = sorted(
    sweep.trials,
    key=lambda t: [sweep.axes[a].index(t.values[a]) for a in sweep.axes],
  )
  first = {axis: values[0] for axis, values in sweep.axes.items()}
  targets: dict[Value, float | None] = {}
  results = []
  run = None
  # The order puts the first setting, and with it the targets, first. One run is
  # in memory at a time, as a sweep may have a thousand.
  for trial in trials:
    if not (folder / trial.name / 'config.json').exists():
      results.append(Result(trial.name, trial.values, trial.total_steps))
      continue
    run = runs_lib.read_run(folder / trial.name)
    repeat = trial.values[sweep.repeat]
    if trial.values == {**first, sweep.repeat: repeat}:
      targets[repeat] = run.best() if run.ended and claims.learns(run) else None
    results.append(
      _result(trial, run, endings.get(trial.name), targets.get(repeat))
    )
  if run is None:
    raise UserError(f'{folder}: no trial of this sweep has been started.')
  return Comparison(
    sweep=sweep,
    results=results,
    targets=targets,
    chance=run.chance,
    eval_split=run.config['eval_split'],
    folder=folder,
  )


def _result(
  trial: Trial, run: Run, ending: str | None, target: float | None
) -> Result:
  return Result(
    name=trial.name,
    values=trial.values,
    total_steps=trial.total_steps,
    status=ending or run.status.get('status', TrialStatus.NOT_STARTED),
    step=run.step,
    best=run.best(),
    last=run.last(),
    learns=claims.learns(run),
    steps_to_target=None if target is None else run.steps_to(target),
  )


def table(comparison: Comparison) -> str:
  """`trials.csv`: one row per trial, independent of time and machine."""
  axes = list(comparison.sweep.axes)
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
        *(to_text(r.values[axis]) for axis in axes),
        r.status,
        r.step,
        r.total_steps,
        *('' if v is None else v for v in (r.best, r.last, r.steps_to_target)),
        r.learns,
      ]
    )
  return file.getvalue()


def usable_range(settings: Sequence[Setting]) -> list[Value]:
  """The successive values of x with usable settings whose ratio is largest.

  Args:
    settings: the settings of a line, in the order of x.
  """
  ranges: list[list[Any]] = [[]]
  for setting in settings:
    if setting.usable:
      ranges[-1].append(setting.x)
    else:
      ranges.append([])
  return max(ranges, key=lambda xs: xs[-1] / xs[0] if xs else 0.0)


def conclusions(comparison: Comparison) -> list[str]:
  """What the results show, one sentence per line."""
  found = _ranges(comparison) if comparison.is_numeric else []
  found.append(_best(comparison))
  unfinished = [r.name for r in comparison.results if not r.ended]
  if unfinished:
    found.append(
      f'Not ended: {len(unfinished)} of {len(comparison.results)} trials, '
      f'{", ".join(unfinished[:3])}{" ..." if unfinished[3:] else ""}.'
    )
  return found


def _ranges(comparison: Comparison) -> list[str]:
  """The range of usable values of each line, relative to the first line's."""
  x = comparison.sweep.x
  values: list[Any] = sorted(comparison.sweep.axes[x])
  found = []
  first: tuple[str, float] | None = None
  for line, settings in comparison.lines().items():
    label, usable = comparison.label(line), usable_range(settings)
    missing = sum(not r.ended for s in settings for r in s.results)
    if missing or not usable:
      found.append(
        f'{label}: {missing} trials have not ended.'
        if missing
        else f'{label}: learns at no {x}.'
      )
      first = first or (label, 0.0)
      continue
    low: Any = usable[0]
    high: Any = usable[-1]
    width = high / low
    # The range may extend beyond an end of the sweep.
    ends = [
      to_text(end) + ('*' if end in (values[0], values[-1]) else '')
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
  sweep = comparison.sweep
  settings = [s for line in comparison.lines().values() for s in line]
  best = max(settings, key=lambda setting: setting.mean)
  if best.mean == -math.inf:
    return 'Best: no setting has all of its trials done.'
  names = [result.name for result in best.results]
  where = ', '.join(
    f'{axis} {to_text(value)}'
    for axis, value in zip(
      (*sweep.lines, sweep.x), (*best.line, best.x), strict=True
    )
  )
  sentence = (
    f'Best on {comparison.eval_split} images: {where}, {100 * best.mean:.2f} % '
    f'(mean of {len(names)})'
  )
  if comparison.eval_split != 'validation':
    return f'{sentence}. No other images remain to evaluate it on.'
  runs = [runs_lib.read_run(comparison.folder / name) for name in names]
  accuracies = [run.test_accuracy() for run in runs]
  if None in accuracies:
    return f'{sentence}. It was not evaluated on test images.'
  mean = statistics.fmean(value or 0.0 for value in accuracies)
  return f'{sentence}; on the test images {100 * mean:.2f} %.'


def summary(comparison: Comparison) -> str:
  """`summary.md`: one row per setting, and the conclusions."""
  sweep = comparison.sweep
  heads = [
    *sweep.lines,
    sweep.x,
    'runs',
    f'best {comparison.eval_split} accuracy, %',
    'steps of 32 to the target',
    'state',
  ]
  rows = [heads, ['---'] * len(heads)]
  for line, settings in comparison.lines().items():
    for setting in settings:
      outcomes = Counter(result.outcome for result in setting.results)
      several = len(outcomes) > 1
      rows.append(
        [
          *map(to_text, line),
          to_text(setting.x),
          str(len(setting.results)),
          setting.best().show(lambda value: f'{100 * value:.1f}'),
          setting.steps_to_target().show('{:,.0f}'.format),
          ', '.join(f'{n} {o}' if several else o for o, n in outcomes.items()),
        ]
      )
  targets = ', '.join(
    f'{to_text(repeat)}: '
    + ('none' if target is None else f'{100 * target:.1f} %')
    for repeat, target in comparison.targets.items()
  )
  parts = [
    f'![{sweep.x}](sweep.png)',
    '\n'.join(f'| {" | ".join(row)} |' for row in rows),
    f'Best accuracy: the highest mean of {runs_lib.WINDOW} successive '
    f'evaluations; the lower median over {sweep.repeat}, and the range. A '
    'trial learns if it reaches twice the accuracy of chance.',
    f'Target: the best accuracy of the first setting '
    f'({comparison.results[0].name} and the same with other values of '
    f'{sweep.repeat}), by {sweep.repeat}: {targets}.',
    '\n'.join(f'- {line}' for line in conclusions(comparison)),
  ]
  return '\n\n'.join(parts) + '\n'
