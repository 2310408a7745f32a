"""The paper's claims, each checked against runs.

A claim is measured separately for each seed, on networks with the same initial
weights, and holds if it holds for every seed. The maximum accuracy that the
paper speaks of is `Run.best` here.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import NamedTuple

import numpy as np

from bn_repro import paper
from bn_repro.report.runs import (
  SPREAD_NOTE,
  WINDOW,
  Repetition,
  Run,
  Section,
  Spread,
)
from bn_repro.runtime import workdir

# Verdicts.
HOLDS = 'holds'
FAILS = 'does not hold here'
NOT_RUN = 'not run'
AMBIGUOUS = 'several settings'
# A gain that is no larger than the differences between networks.
UNDECIDED = 'undecided'

# How to read the ledger.
NOTE = (
  'Each claim is measured separately for each seed, and holds if it holds for '
  f'every seed. {SPREAD_NOTE}'
)

# Accuracy to reach in Fig. 1, for which section 4.1 gives no number (our
# choice).
FIG_1_TARGET = 0.9
FIG_1_PROBE = 'last_hidden_input'
# Number of evaluations, of 200, that count as the end of Fig. 1 (our choice).
FIG_1_LAST = 20


class Measurement(NamedTuple):
  """A claim measured on the runs of one seed.

  Attributes:
    holds: whether the claim holds.
    value: measured value; None if a network never reaches the target.
    is_lower_bound: whether the true value may be larger, because a run or a
      sweep is too short to tell.
    note: remark to add to the value.
  """

  holds: bool
  value: float | None
  is_lower_bound: bool = False
  note: str = ''


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the ledger.

  Attributes:
    claim: text of the claim.
    verdict: one of the verdicts above.
    ours: measured value, with the range over seeds.
    paper: the paper's value.
    section: title of the section of the runs.
    seeds: seeds of the runs.
  """

  claim: str
  verdict: str
  ours: str
  paper: str
  section: str
  seeds: str


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim of the paper.

  Attributes:
    text: the claim, as a sentence.
    paper: the paper's value.
    variants: variants that the claim compares.
    measure: function of the runs of one seed, with an argument for each
      variant: its run, or for a sweep the list of its runs.
    show: formats a measured value.
    unit: text after the values.
    missing: text for a value of None.
    min_evaluations: minimum number of evaluations of a run that is done; that
      of `Run.best`, unless the claim is measured otherwise.
    min_settings: minimum number of settings of each variant; more than 1 for
      a claim about sweeps.
  """

  text: str
  paper: str
  variants: tuple[str, ...]
  measure: Callable[..., Measurement]
  show: Callable[[float], str]
  unit: str = ''
  missing: str = 'never'
  min_evaluations: int = WINDOW
  min_settings: int = 1

  def row(
    self,
    verdict: str,
    ours: str = '',
    section: str = '',
    seeds: Sequence[Repetition] = (),
  ) -> Row:
    """The claim's row in the ledger."""
    names = ', '.join(map(str, seeds))
    return Row(self.text, verdict, ours, self.paper, section, names)

  def judge(self, section: Section) -> Row | None:
    """Checks the claim; None if the section lacks settings that it needs."""
    counts = [len(section.settings_of(variant)) for variant in self.variants]
    if min(counts) < self.min_settings:
      return None
    if self.min_settings == 1 and max(counts) > 1:
      return self.row(AMBIGUOUS, section=section.title)
    excluded, measured = [], {}
    for seed, runs in section.by_seed(*self.variants).items():
      reason = self._incomplete(runs)
      if reason:
        excluded.append(f'seed {seed} excluded: {reason}')
      else:
        measured[seed] = self._measure(runs)
    if not measured:
      return self.row(NOT_RUN, '; '.join(excluded), section.title)
    parts = [self._value(list(measured.values()))]
    count = sum(one.holds for one in measured.values())
    if 0 < count < len(measured):
      parts.append(f'holds for {count} of {len(measured)} seeds')
    verdict = HOLDS if count == len(measured) else FAILS
    ours = '; '.join([*parts, *excluded])
    return self.row(verdict, ours, section.title, list(measured))

  def _incomplete(self, runs: Sequence[Sequence[Run]]) -> str | None:
    """Why the runs of a seed cannot be judged; None if they can."""
    for variant, of_variant in zip(self.variants, runs, strict=True):
      if not of_variant:
        return f'no run of {variant}'
      for run in of_variant:
        if not run.ended:
          return f'{run.name} is {run.status.get("status", "not started")}'
        count = len(run.evaluations())
        is_done = run.status['status'] == workdir.Status.DONE
        if is_done and count < self.min_evaluations:
          return f'{run.name} has {count} of {self.min_evaluations} evaluations'
    return None

  def _measure(self, runs: Sequence[Sequence[Run]]) -> Measurement:
    if self.min_settings > 1:
      return self.measure(*runs)
    return self.measure(*(run for (run,) in runs))

  def _value(self, measured: Sequence[Measurement]) -> str:
    values = [one.value for one in measured]
    bound = 'at least ' if any(one.is_lower_bound for one in measured) else ''
    spread = Spread(values, never=-math.inf, word=self.missing)
    text = bound + spread.show(self.show)
    if self.unit and any(value is not None for value in values):
      text += f' {self.unit}'
    notes = dict.fromkeys(one.note for one in measured if one.note)
    return '; '.join([text, *notes])


def percent(value: float) -> str:
  """Formats a fraction as a percentage with one decimal."""
  return f'{100 * value:.1f} %'


def times(value: float) -> str:
  """Formats a factor."""
  return f'{value:.3g}x'


def _points(value: float) -> str:
  return f'{100 * value:+.1f} points'


def learns(run: Run) -> bool:
  """Whether the best accuracy is at least twice chance (our choice).

  A run that diverges before it has a best accuracy does not learn.
  """
  return _best(run) >= 2 * run.chance


def _best(run: Run) -> float:
  """The best accuracy; -infinity without one."""
  best = run.best()
  return -math.inf if best is None else best


def _lead(first: Run, *others: Run) -> tuple[float, float | None]:
  """Margin of the best accuracy of `first` over the highest of the others.

  Returns:
    The margin, NaN if no run has a best accuracy; and the margin, or None if it
    is not finite.
  """
  margin = _best(first) - max(map(_best, others))
  return margin, margin if math.isfinite(margin) else None


def speed_up(plain: Run, other: Run) -> float | None:
  """Factor by which a network needs fewer steps than one without BN.

  Steps are counted up to the best accuracy of the network without BN.

  Args:
    plain: run of the network without BN.
    other: run of the other network.

  Returns:
    The factor; None if `other` never reaches that accuracy, or if `plain` does
    not learn.
  """
  target = plain.best()
  if target is None or not learns(plain):
    return None
  ours, theirs = plain.steps_to(target), other.steps_to(target)
  return ours / theirs if ours and theirs else None


def _speed_up(plain: Run, value: float | None, *, holds: bool) -> Measurement:
  """A measured speed-up; a note says if there is nothing to speed up."""
  name = paper.label(plain.variant)
  note = '' if learns(plain) else f'{name} does not learn'
  return Measurement(holds, value, note=note)


def _faster(factor: float) -> Callable[[Run, Run], Measurement]:
  """The speed-up exceeds a factor."""

  def measure(plain: Run, other: Run) -> Measurement:
    value = speed_up(plain, other)
    holds = value is not None and value > factor
    return _speed_up(plain, value, holds=holds)

  return measure


def _faster_than(plain: Run, first: Run, second: Run) -> Measurement:
  """`second` has a larger speed-up than `first`."""
  before, after = speed_up(plain, first), speed_up(plain, second)
  holds = after is not None and after > (before or 0.0)
  return _speed_up(plain, after, holds=holds)


def _slower_than(plain: Run, first: Run, second: Run) -> Measurement:
  """`second` has a smaller speed-up than `first`, but has one."""
  before, after = speed_up(plain, first), speed_up(plain, second)
  holds = bool(before and after and after < before)
  return _speed_up(plain, after, holds=holds)


def _highest(first: Run, *others: Run) -> Measurement:
  """`first` has a higher best accuracy than all others."""
  margin, value = _lead(first, *others)
  return Measurement(margin > 0, value)


def _learns_below(first: Run, second: Run) -> Measurement:
  """`first` learns, but its best accuracy is lower than that of `second`."""
  margin, value = _lead(first, second)
  return Measurement(learns(first) and margin < 0, value)


def _at_chance(run: Run) -> Measurement:
  """The network does not learn."""
  status = run.status.get('status')
  note = '' if status == workdir.Status.DONE else f'{status} at step {run.step}'
  return Measurement(not learns(run), run.best(), note=note)


def _wider_range(
  plain_runs: Sequence[Run], bn_runs: Sequence[Run]
) -> Measurement:
  """With BN, the highest learning rate at which the network learns is higher.

  Only learning rates that both networks were trained at count.
  """
  shared = {run.learning_rate for run in plain_runs} & {
    run.learning_rate for run in bn_runs
  }
  without, with_bn = (
    highest_rate([run for run in runs if run.learning_rate in shared])
    for runs in (plain_runs, bn_runs)
  )
  if with_bn is None or without is None:
    note = 'one of the networks learns at no learning rate'
    return Measurement(with_bn is not None, None, note=note)
  return Measurement(
    with_bn > without,
    with_bn / without,
    is_lower_bound=with_bn == max(shared),
    note=f'up to {with_bn:g}, against {without:g}',
  )


def highest_rate(runs: Sequence[Run]) -> float | None:
  """Highest learning rate such that all runs up to it learn.

  None if the run with the lowest learning rate does not learn.
  """
  highest = None
  for run in sorted(runs, key=lambda run: run.learning_rate):
    if not learns(run):
      break
    highest = run.learning_rate
  return highest


def _reaches_target_sooner(plain: Run, other: Run) -> Measurement:
  """`other` reaches the target of Fig. 1 in fewer steps than `plain`."""
  ours, theirs = (run.steps_to(FIG_1_TARGET) for run in (plain, other))
  if theirs is None:
    return Measurement(holds=False, value=None)
  if ours is None:
    # It needs more than all the steps of its config.
    ours = plain.config['total_steps'] * plain.equivalent
    return Measurement(holds=True, value=ours / theirs, is_lower_bound=True)
  return Measurement(ours > theirs, ours / theirs)


def _ends_higher(plain: Run, other: Run) -> Measurement:
  """`other` has a higher accuracy than `plain` at the end of Fig. 1."""
  ours, theirs = (run.mean_of_last(FIG_1_LAST) for run in (plain, other))
  if ours is None or theirs is None:
    # A run that diverges early ends at no accuracy.
    return Measurement(theirs is not None, None)
  return Measurement(theirs > ours, theirs - ours)


def drifts(percentiles: np.ndarray) -> np.ndarray:
  """How far the inputs of sigmoids drift in training (our measure).

  The drift of a unit is the range of its median input over training, divided
  by the distance between its 15th and 85th percentile at the end.

  Args:
    percentiles: 15th, 50th and 85th percentile over test images,
      (evaluations, 3, units).

  Returns:
    Drifts, (units,); infinite where the distance is 0.
  """
  low, middle, high = np.moveaxis(percentiles, 1, 0)
  movement, width = np.ptp(middle, axis=0), high[-1] - low[-1]
  return np.divide(
    movement, width, out=np.full(len(width), np.inf), where=width > 0
  )


def drift(run: Run) -> float | None:
  """Median over units of `drifts`.

  None if it is infinite, or the run records no percentiles.
  """
  percentiles = run.percentiles(FIG_1_PROBE)
  if percentiles is None:
    return None
  median = float(np.median(drifts(percentiles)))
  return median if math.isfinite(median) else None


def _more_stable(plain: Run, other: Run) -> Measurement:
  """`other` drifts less than `plain`."""
  ours, theirs = drift(plain), drift(other)
  if not ours or theirs is None:
    return Measurement(holds=False, value=None)
  return Measurement(theirs < ours, theirs / ours)


CLAIMS: Sequence[Claim] = (
  Claim(
    'Fig. 1a: with BN, the MNIST network reaches 90 % in fewer steps.',
    'faster',
    ('mnist', 'bn_mnist'),
    _reaches_target_sooner,
    times,
    'fewer steps',
    min_evaluations=1,
  ),
  Claim(
    'Fig. 1a: with BN, the MNIST network ends at a higher accuracy.',
    'higher',
    ('mnist', 'bn_mnist'),
    _ends_higher,
    _points,
    missing='diverged',
    min_evaluations=FIG_1_LAST,
  ),
  Claim(
    'Fig. 1b, c: with BN, the inputs of the last sigmoids drift less.',
    'more stable',
    ('mnist', 'bn_mnist'),
    _more_stable,
    times,
    'the drift without BN',
    missing='unknown',
    min_evaluations=1,
  ),
  Claim(
    'BN-Baseline matches Inception in less than half the steps.',
    '2.3x fewer steps (13.3M against 31M)',
    ('inception', 'bn_baseline'),
    _faster(2),
    times,
    'fewer steps than Inception',
  ),
  Claim(
    'BN-x5 matches Inception in fewer steps than BN-Baseline.',
    '14.8x fewer steps (2.1M)',
    ('inception', 'bn_baseline', 'bn_x5'),
    _faster_than,
    times,
    'fewer steps than Inception',
  ),
  Claim(
    'BN-x30 is slower at first: it matches Inception later than BN-x5.',
    '11.5x fewer steps (2.7M)',
    ('inception', 'bn_x5', 'bn_x30'),
    _slower_than,
    times,
    'fewer steps than Inception',
  ),
  Claim(
    'BN-x30 reaches the highest accuracy of the networks with ReLU.',
    '74.8 % against 73.0 % (BN-x5): +1.8 points',
    ('bn_x30', 'bn_x5', 'bn_baseline', 'inception'),
    _highest,
    _points,
    missing='diverged',
  ),
  Claim(
    'BN-x5-Sigmoid learns, but its accuracy is lower than that of BN-x5.',
    '69.8 % against 73.0 %: -3.2 points',
    ('bn_x5_sigmoid', 'bn_x5'),
    _learns_below,
    _points,
    missing='diverged',
  ),
  Claim(
    'Without BN, the network with sigmoids stays at chance.',
    '0.1 %, chance for 1,000 classes',
    ('inception_sigmoid',),
    _at_chance,
    percent,
    missing='no accuracy',
  ),
  Claim(
    'Without BN, the network does not train at 5 times its learning rate.',
    'machine infinity',
    ('inception_x5',),
    _at_chance,
    percent,
    missing='no accuracy',
  ),
  Claim(
    'With BN, the network trains at learning rates that are too high without.',
    'at x30 with BN; not at x5 without',
    ('inception', 'bn_baseline'),
    _wider_range,
    times,
    'the highest learning rate without BN',
    min_settings=3,
  ),
)


def ledger(sections: Sequence[Section]) -> list[Row]:
  """Rows of each claim: one for each section with its runs, or 'not run'."""
  rows = []
  for claim in CLAIMS:
    found = [row for section in sections if (row := claim.judge(section))]
    judged = [row for row in found if row.verdict != AMBIGUOUS]
    rows += judged or found or [claim.row(NOT_RUN)]
  return rows


def markdown(rows: Sequence[Row]) -> str:
  """The ledger as a Markdown table."""
  headings = [field.name for field in dataclasses.fields(Row)]
  lines = [headings, ['---'] * len(headings), *map(dataclasses.astuple, rows)]
  table = ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)
  return f'{table}\n{NOTE}\n'
