"""Compares the trials of a sweep: a table, a summary, and conclusions.

Trials that differ only in the repeated axis, such as the seed, form a setting.
Settings are ranked on validation images. The accuracy on test images is
reported for the best one only.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
import csv
import dataclasses
import functools
import io
import math
from pathlib import Path
import statistics
from typing import Any

from bn_repro import files, paper
from bn_repro.errors import UserError
from bn_repro.report import claims
from bn_repro.report import runs as runs_lib
from bn_repro.report.runs import WINDOW
from bn_repro.report.sections import Spread, never, statistic
from bn_repro.report.verdicts import ENOUGH_SEEDS, UNDECIDED, Estimate
from bn_repro.runtime.workdir import ENDED, Status, replace_file
from bn_repro.sweep.sweep import Sweep, Trial, TrialStatus, Value, to_text


@dataclasses.dataclass(frozen=True)
class Result:
  """The result of a trial.

  Attributes:
    trial: the trial.
    status: status of the run, or `NOT_STARTED`.
    step: last step.
    best: `Run.best`, or None.
    mean_of_last: `Run.mean_of_last`, or None.
    test: `Run.test_accuracy`, which no choice may depend on.
    learns: `claims.learns`; None if the run is not comparable.
    steps_to_target: steps of 32 images to the target accuracy; None if the run
      never reaches it.
  """

  trial: Trial
  status: str
  step: int = 0
  best: float | None = None
  mean_of_last: float | None = None
  test: float | None = None
  learns: bool | None = None
  steps_to_target: float | None = None

  @property
  def ended(self) -> bool:
    """Whether the run is done or has diverged."""
    return self.status in ENDED

  @property
  def outcome(self) -> str:
    """The status; `BELOW` or `TOO_FEW` for a run that is done."""
    if self.status == Status.DONE and not self.learns:
      return TrialStatus.TOO_FEW if self.learns is None else TrialStatus.BELOW
    return self.status


@dataclasses.dataclass(frozen=True)
class Setting:
  """The results of trials that differ only in the repeated axis."""

  x: Value
  results: Sequence[Result]

  @property
  def usable(self) -> bool:
    """Whether all of its trials are done and learn."""
    return all(result.outcome == Status.DONE for result in self.results)

  @property
  def best(self) -> float:
    """Median of the best accuracies; -infinity unless all trials have one."""
    values = [r.best for r in self.results if r.status == Status.DONE]
    found = [value for value in values if value is not None]
    complete = len(found) == len(self.results)
    return statistics.median(found) if complete else -math.inf

  @property
  def steps_to_target(self) -> list[float | None]:
    """The steps to the target."""
    return [result.steps_to_target for result in self.results]


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
  """

  sweep: Sweep
  results: Sequence[Result]
  targets: Mapping[Value, float | None]
  chance: float
  eval_split: str

  @property
  def has_targets(self) -> bool:
    """Whether the first setting learns, for each value of the repeated axis."""
    return bool(self.targets) and None not in self.targets.values()

  @functools.cached_property
  def lines(self) -> dict[tuple[Value, ...], list[Setting]]:
    """The settings of each line of the figure, in the order of x."""
    sweep = self.sweep
    found: dict[tuple[Value, ...], dict[Value, list[Result]]] = {}
    for result in self.results:
      values = result.trial.values
      by_x = found.setdefault(tuple(values[axis] for axis in sweep.lines), {})
      by_x.setdefault(values[sweep.x], []).append(result)
    order: list[Any] = list(sweep.axes[sweep.x])
    if sweep.is_numeric:
      order.sort()
    return {
      line: [Setting(x, by_x[x]) for x in order] for line, by_x in found.items()
    }

  def label(self, line: tuple[Value, ...]) -> str:
    """Name of a line."""
    return label_of(dict(zip(self.sweep.lines, line, strict=True)))


def label_of(values: Mapping[str, Value]) -> str:
  """Name of what has some values, by axis, for readers."""
  return ', '.join(
    paper.label(value) if isinstance(value, str) else f'{axis} {to_text(value)}'
    for axis, value in values.items()
  )


def read(sweep: Sweep, folder: Path, failed: Collection[str]) -> Comparison:
  """Reads what the trials of a sweep have written.

  Args:
    sweep: the sweep.
    folder: directory of the sweep.
    failed: names of trials that have failed, of which some have not written a
      `status.json`.

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
    ending = Status.FAILED if trial.name in failed else None
    if not (folder / trial.name / 'config.json').exists():
      results.append(Result(trial, ending or TrialStatus.NOT_STARTED))
      continue
    run = runs_lib.read_run(folder / trial.name)
    repeat = trial.values[sweep.repeat]
    if trial.values == {**first, sweep.repeat: repeat}:
      targets[repeat] = claims.accuracy_to_match(run) if run.ended else None
    target = targets.get(repeat)
    results.append(
      Result(
        trial,
        ending or run.status.get('status', TrialStatus.NOT_STARTED),
        step=run.step,
        best=run.best(),
        mean_of_last=run.mean_of_last(),
        test=run.test_accuracy(),
        learns=claims.learns(run) if run.is_comparable else None,
        steps_to_target=None if target is None else run.steps_to(target),
      )
    )
  if run is None:
    raise UserError(
      f'{files.as_given(folder)}: no trial of this sweep has been started.'
    )
  eval_split = run.config['eval_split']
  return Comparison(sweep, results, targets, run.chance, eval_split)


def write(comparison: Comparison, folder: Path) -> None:
  """Writes `sweep.RESULTS` into a folder, which is created."""
  from bn_repro.sweep import figures  # Matplotlib takes a second.

  folder.mkdir(parents=True, exist_ok=True)
  replace_file(folder / 'trials.csv', table(comparison))
  replace_file(folder / 'summary.md', summary(comparison))
  figures.sweep(comparison, folder, 'sweep')


def table(comparison: Comparison) -> str:
  """`trials.csv`: one row per trial, independent of time and machine."""
  split = comparison.eval_split
  rows = [
    {
      'trial': result.trial.name,
      **{axis: to_text(v) for axis, v in result.trial.values.items()},
      'status': result.status,
      'step': result.step,
      'total_steps': result.trial.total_steps,
      f'best_mean_of_{WINDOW}_{split}_accuracy': result.best,
      f'mean_of_last_{WINDOW}_{split}_accuracy': result.mean_of_last,
      'equivalent_steps_to_target': result.steps_to_target,
      'learns': result.learns,
    }
    for result in comparison.results
  ]
  file = io.StringIO()
  writer = csv.DictWriter(file, rows[0], lineterminator='\n')
  writer.writeheader()
  writer.writerows(rows)
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
  found = _ranges(comparison) if comparison.sweep.is_numeric else []
  found += _differences(comparison)
  found.append(_best(comparison))
  unfinished = [r.trial.name for r in comparison.results if not r.ended]
  if unfinished:
    found.append(
      f'Not ended: {len(unfinished)} of {len(comparison.results)} trials, '
      f'{", ".join(unfinished[:3])}{" ..." if unfinished[3:] else ""}.'
    )
  return found


def _ranges(comparison: Comparison) -> list[str]:
  """The range of usable values of each line, relative to the first line's."""
  x = comparison.sweep.x
  found = []
  first: tuple[str, float] | None = None
  for line, settings in comparison.lines.items():
    label, usable = comparison.label(line), usable_range(settings)
    results = [result for setting in settings for result in setting.results]
    missing = sum(not r.ended for r in results)
    too_few = sum(r.outcome == TrialStatus.TOO_FEW for r in results)
    if missing or too_few or not usable:
      found.append(
        f'{label}: {missing} trials have not ended.'
        if missing
        else f'{label}: {too_few} trials have fewer than {WINDOW} evaluations.'
        if too_few
        else f'{label}: learns at no {x}.'
      )
      first = first or (label, 0.0)
      continue
    low: Any = usable[0]
    high: Any = usable[-1]
    width = high / low
    # The range may extend beyond an end of the sweep.
    ends = [
      to_text(end) + ('*' if end in (settings[0].x, settings[-1].x) else '')
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


def _differences(comparison: Comparison) -> list[str]:
  """What `Sweep.compared_with` asks for, a sentence for each reference."""
  sweep = comparison.sweep
  found = []
  for settings in comparison.lines.values():
    by_x = {setting.x: setting for setting in settings}
    for name in dict.fromkeys(sweep.compared_with.values()):
      parts = [
        f'{to_text(setting.x)} {_difference(setting, by_x[name])}'
        for setting in settings
        if sweep.compared_with.get(setting.x) == name and name in by_x
      ]
      if parts:
        found.append(
          f'Best accuracy beside {to_text(name)}, for each {sweep.repeat}: '
          f'{"; ".join(parts)}.'
        )
  return found


def _difference(setting: Setting, reference: Setting) -> str:
  """By how much the best accuracies of a setting differ from another's."""
  pairs = zip(setting.results, reference.results, strict=True)
  difference = Estimate(
    [
      a.best - b.best
      for a, b in pairs
      if a.best is not None and b.best is not None
    ]
  )
  if len(difference.values) < ENOUGH_SEEDS:
    return f'{UNDECIDED} (fewer than five values)'
  interval = f'({claims.POINTS.interval(*difference.interval)})'
  if difference.verdict(0.0) == UNDECIDED:
    return f'{UNDECIDED} {interval}'
  return f'{claims.POINTS.phrase(difference.median)} {interval}'


def _best(comparison: Comparison) -> str:
  """The best setting by validation, and its accuracy on test images."""
  sweep, split = comparison.sweep, comparison.eval_split
  best = max(
    (setting for line in comparison.lines.values() for setting in line),
    key=lambda setting: setting.best,
  )
  if best.best == -math.inf:
    return (
      'Best: no setting has all of its trials done, with '
      f'{WINDOW} evaluations or more.'
    )
  values = best.results[0].trial.values
  where = ', '.join(
    f'{axis} {to_text(values[axis])}' for axis in (*sweep.lines, sweep.x)
  )
  over = statistic(len(best.results))
  sentence = f'Best on {split} images: {where}, {100 * best.best:.2f} %' + (
    f' ({over})' if over else ''
  )
  if split != 'validation':
    return f'{sentence}. No other images remain to evaluate it on.'
  accuracies = [r.test for r in best.results if r.test is not None]
  if len(accuracies) < len(best.results):
    return f'{sentence}. It was not evaluated on test images.'
  test = statistics.median(accuracies)
  return (
    f'{sentence}; after the last step, on the test images {100 * test:.2f} %.'
  )


def _states(setting: Setting) -> str:
  """The outcomes of a setting's trials, counted if they differ."""
  outcomes = Counter(
    f'{result.outcome} at step {result.step}'
    if result.outcome == Status.DIVERGED
    else result.outcome
    for result in setting.results
  )
  if len(outcomes) == 1:
    return next(iter(outcomes))
  return ', '.join(f'{number} {state}' for state, number in outcomes.items())


def summary(comparison: Comparison) -> str:
  """`summary.md`: one row per setting, and the conclusions."""
  sweep = comparison.sweep
  over = statistic(len(sweep.axes[sweep.repeat]))
  of_runs = f', {over}' if over else ''
  heads = [
    *sweep.lines,
    sweep.x,
    'runs',
    f'best {comparison.eval_split} accuracy, %{of_runs}',
    f'steps of 32 to the target{of_runs}',
    'state',
  ]
  rows = [heads, ['---'] * len(heads)]
  for line, settings in comparison.lines.items():
    for setting in settings:
      best = [result.best for result in setting.results]
      ended = [result.ended for result in setting.results]
      not_reached = never(ended) if comparison.has_targets else '–'
      rows.append(
        [
          *map(to_text, (*line, setting.x)),
          str(len(setting.results)),
          Spread(best, -math.inf, '–').show(lambda v: f'{100 * v:.1f}'),
          Spread(setting.steps_to_target, word=not_reached).show(
            '{:,.0f}'.format
          ),
          _states(setting),
        ]
      )
  values = over and (
    f' Values are the {over} over {sweep.repeat}, with the range in '
    'parentheses.'
  )
  targets = ', '.join(
    f'{to_text(repeat)}: '
    + ('none' if target is None else f'{100 * target:.1f} %')
    for repeat, target in comparison.targets.items()
  )
  parts = [
    f'![{sweep.x}](sweep.png)',
    '\n'.join(f'| {" | ".join(row)} |' for row in rows),
    f'Best accuracy: the highest mean of {WINDOW} consecutive evaluations; a '
    'trial with fewer has none. A trial learns if its best accuracy is at '
    f'least twice that of chance.{values}',
    f'Target: the best accuracy of the first setting '
    f'({comparison.results[0].trial.name} and the same with other values of '
    f'{sweep.repeat}), by {sweep.repeat}: {targets}.',
    '\n'.join(f'- {line}' for line in conclusions(comparison)),
  ]
  return '\n\n'.join(parts) + '\n'
