"""The paper's claims, each tested on runs.

A claim is measured for each seed on its own, on runs of that seed: networks
with the same initial weights and data. The values of all seeds decide, see
`verdicts`. Steps are counted on the images of `eval_split`, up to `Run.best` of
Inception. Accuracies are compared on test images after the last step, on which
nothing was chosen; the paper compares maxima on its validation images.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import NamedTuple

import numpy as np

from bn_repro import paper
from bn_repro.report.ledger import AMBIGUOUS, Row
from bn_repro.report.runs import WINDOW, Run
from bn_repro.report.sections import Section
from bn_repro.report.verdicts import Estimate, Scale, count_of, to_sentence
from bn_repro.runtime import workdir

# Accuracy to reach in Fig. 1, for which section 4.1 gives no number (our
# choice).
FIG_1_TARGET = 0.9
FIG_1_PROBE = 'last_hidden_input'
# Number of evaluations, of 200, that count as the end of Fig. 1 (our choice).
FIG_1_LAST = 20


class Measurement(NamedTuple):
  """A claim measured on the runs of one seed.

  Attributes:
    value: compared with the threshold of the claim; infinite if a network
      never reaches the target, or diverges.
    shown: further values for the sentence.
    note: remark.
  """

  value: float
  shown: Sequence[float] = ()
  note: str = ''


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim of the paper.

  Attributes:
    group: see `Row`.
    text: see `Row.claim`.
    paper: see `Row`.
    subject: variant that the claim is about.
    short: the claim in a few words, after the name of the subject.
    variants: variants that the claim compares.
    measure: function of the runs of one seed, with an argument for each
      variant: its run, or for a sweep the list of its runs. None if the runs
      cannot be compared.
    scale: how its values are written.
    sentence: template of our figure, with `value` and the numbers of the
      further values.
    never: template of the sentence if the median is minus infinity, with the
      numbers of the further values.
    show: formats a further value.
    threshold: the claim holds for values above.
    min_evaluations: minimum number of evaluations of a run that is done; that
      of `Run.best`, unless the claim is measured otherwise.
    min_settings: minimum number of settings of each variant; more than 1 for
      a claim about sweeps.
  """

  group: str
  text: str
  paper: str
  subject: str
  short: str
  variants: tuple[str, ...]
  measure: Callable[..., Measurement | None]
  scale: Scale
  sentence: str
  never: str
  show: Callable[[float], str] = str
  threshold: float = 0.0
  min_evaluations: int = WINDOW
  min_settings: int = 1

  def judge(self, section: Section) -> Row | None:
    """Tests the claim; None if the section lacks settings that it needs."""
    row = Row(
      group=self.group,
      claim=self.text,
      paper=self.paper,
      data=section.data_label,
      folder=section.name,
    )
    counts = [len(section.settings_of(variant)) for variant in self.variants]
    if min(counts) < self.min_settings:
      return None
    measured, notes = self._measured(section)
    if not measured:
      verdict = AMBIGUOUS if self.is_ambiguous(section) else row.verdict
      return dataclasses.replace(row, verdict=verdict, seeds='; '.join(notes))
    notes += dict.fromkeys(one.note for one in measured if one.note)
    estimate = Estimate([one.value for one in measured])
    return dataclasses.replace(
      row,
      verdict=estimate.verdict(self.threshold),
      ours=self._sentence(measured),
      seeds='; '.join([count_of(len(measured), 'seed'), *notes]),
    )

  def median(self, section: Section) -> float | None:
    """The median over seeds of what `threshold` is compared with.

    None if the claim `is_ambiguous`, or no seed can be compared.
    """
    measured, _ = self._measured(section)
    return (
      Estimate([one.value for one in measured]).median if measured else None
    )

  def is_ambiguous(self, section: Section) -> bool:
    """Whether a variant has several settings, and the claim is about one."""
    return self.min_settings == 1 and any(
      len(section.settings_of(variant)) > 1 for variant in self.variants
    )

  def _measured(self, section: Section) -> tuple[list[Measurement], list[str]]:
    """The measurement of each seed that can be compared, and remarks.

    None at all if the claim `is_ambiguous`.
    """
    if self.is_ambiguous(section):
      return [], []
    complete, excluded = self._complete(section)
    notes = [*self._trains(complete), *excluded]
    measured = [one for runs in complete if (one := self._measure(runs))]
    if len(measured) < len(complete):
      missing = len(complete) - len(measured)
      notes.append(f'{missing} of {len(complete)} seeds cannot be compared')
    return measured, notes

  def _complete(
    self, section: Section
  ) -> tuple[list[Sequence[Sequence[Run]]], list[str]]:
    """The runs of each seed that has all, and why each other seed has not."""
    complete: list[Sequence[Sequence[Run]]] = []
    excluded = []
    for runs in section.by_seed(*self.variants).values():
      reason = self._incomplete(runs)
      if reason:
        excluded.append(f'a seed is left out: {reason}')
      else:
        complete.append(runs)
    return complete, excluded

  def _incomplete(self, runs: Sequence[Sequence[Run]]) -> str | None:
    """Why the runs of a seed cannot be compared; None if they can."""
    first = next(run for of_variant in runs for run in of_variant)
    for variant, of_variant in zip(self.variants, runs, strict=True):
      if not of_variant:
        return f'{first.name} has no {paper.label(variant)} of its seed'
      for run in of_variant:
        if not run.ended:
          return f'{run.name} is {run.status.get("status", "not started")}'
        count = len(run.evaluations())
        is_done = run.status['status'] == workdir.Status.DONE
        if is_done and count < self.min_evaluations:
          return f'{run.name} has {count} of {self.min_evaluations} evaluations'
    return None

  def _measure(self, runs: Sequence[Sequence[Run]]) -> Measurement | None:
    if self.min_settings > 1:
      return self.measure(*runs)
    return self.measure(*(run for (run,) in runs))

  def _trains(self, complete: Sequence[Sequence[Sequence[Run]]]) -> list[str]:
    """For each variant that does not train with all seeds: with how many."""
    if self.min_settings > 1 or self.min_evaluations < WINDOW:
      return []
    total, notes = len(complete), []
    for index, variant in enumerate(self.variants):
      count = sum(learns(runs[index][0]) for runs in complete)
      # That a network of "What trains" does or does not is the claim itself.
      if 0 < count < total or (count < total and self.group != _TRAINS):
        edge = ', at the edge of what trains' if count else ''
        notes.append(
          f'{paper.label(variant)} trains in {count} of {total} seeds{edge}'
        )
    return notes

  def _sentence(self, measured: Sequence[Measurement]) -> str:
    shown = [
      self.show(Estimate(values).median)
      for values in zip(*(one.shown for one in measured), strict=True)
    ]
    estimate = Estimate([one.value for one in measured])
    return to_sentence(estimate, self.scale, self.sentence, self.never, shown)


def percent(value: float) -> str:
  """Formats a fraction as a percentage with one decimal."""
  return f'{100 * value:.1f} %'


def times(value: float) -> str:
  """Formats a factor."""
  return '∞x' if value == math.inf else f'{value:.3g}x'


def learns(run: Run) -> bool:
  """Whether the best accuracy is at least twice chance (our choice).

  A run that diverges before it has a best accuracy does not learn.
  """
  return _best(run) >= 2 * run.chance


def _best(run: Run) -> float:
  """The best accuracy; -infinity without one."""
  best = run.best()
  return -math.inf if best is None else best


def _final(run: Run) -> float:
  """Accuracy on test images after the last step.

  The best accuracy where a data set has no test images, or where the run was
  evaluated on them throughout. -infinity if the run diverged.
  """
  has_test = 'test' in run.facts.get('num_examples', {})
  if not has_test or run.config['eval_split'] == 'test':
    return _best(run)
  if run.status.get('status') == workdir.Status.DIVERGED:
    return -math.inf
  test = run.test_accuracy()
  return _best(run) if test is None else test


def _lead(first: Run, *others: Run) -> float:
  """Margin of the final accuracy of `first` over the highest of the others."""
  ours = _final(first)
  return ours if ours == -math.inf else ours - max(map(_final, others))


def _log_ratio(larger: float | None, smaller: float | None) -> float:
  """Logarithm of a ratio of steps; None is more than any number.

  If both are None, `smaller` is not smaller: the ratio is 0.
  """
  if smaller is None:
    return -math.inf
  return math.inf if larger is None else math.log(larger / smaller)


def accuracy_to_match(plain: Run) -> float | None:
  """The best accuracy of a network; None if it does not learn."""
  return plain.best() if learns(plain) else None


def _steps_to_match(plain: Run, *others: Run) -> list[float | None] | None:
  """Steps of networks up to the best accuracy of `plain`; its own first.

  None if `plain` does not train: then there is nothing to match.
  """
  target = accuracy_to_match(plain)
  if target is None:
    return None
  return [run.steps_to(target) for run in (plain, *others)]


def speed_up(plain: Run, other: Run) -> float | None:
  """Factor by which a network needs fewer steps than one without BN.

  Steps are counted up to the best accuracy of the network without BN.

  Args:
    plain: run of the network without BN.
    other: run of the other network.

  Returns:
    The factor; None if `other` never reaches that accuracy, or if `plain` does
    not train.
  """
  steps = _steps_to_match(plain, other)
  if not steps or steps[0] is None or steps[1] is None:
    return None
  return steps[0] / steps[1]


def _faster(plain: Run, other: Run) -> Measurement | None:
  """How many times fewer steps than `plain` a network needs to match it."""
  steps = _steps_to_match(plain, other)
  return Measurement(_log_ratio(*steps)) if steps else None


def _faster_than(plain: Run, first: Run, second: Run) -> Measurement | None:
  """How many times fewer steps than `first` does `second` need."""
  steps = _steps_to_match(plain, first, second)
  if not steps:
    return None
  ours, before, after = steps
  shown = _log_ratio(ours, after), _log_ratio(ours, before)
  return Measurement(_log_ratio(before, after), shown)


def _slower_than(plain: Run, first: Run, second: Run) -> Measurement | None:
  """How many times more steps than `first` does `second` need.

  A network that never matches `plain` is not slow at first, but fails.
  """
  steps = _steps_to_match(plain, first, second)
  if not steps:
    return None
  ours, before, after = steps
  shown = _log_ratio(ours, after), _log_ratio(ours, before)
  is_late = before is not None and after is not None
  value = -_log_ratio(before, after) if is_late else -math.inf
  return Measurement(value, shown)


def _above(first: Run, *others: Run) -> Measurement:
  """How far the final accuracy of `first` is above all others."""
  return Measurement(_lead(first, *others))


def _below(first: Run, second: Run) -> Measurement:
  """How far the final accuracy of `first` is below that of `second`."""
  return Measurement(_lead(second, first))


def _trains(run: Run) -> Measurement:
  """How far the best accuracy is above twice chance."""
  best = _best(run)
  return Measurement(best - 2 * run.chance, (best,))


def _fails_to_train(run: Run) -> Measurement:
  """How far the best accuracy is below twice chance."""
  best = _best(run)
  return Measurement(2 * run.chance - best, (best,))


def _wider_range(
  plain_runs: Sequence[Run], bn_runs: Sequence[Run]
) -> Measurement | None:
  """How many times higher are the learning rates that train with BN.

  Only learning rates that both networks were trained at count.
  """
  shared = {run.learning_rate for run in plain_runs} & {
    run.learning_rate for run in bn_runs
  }
  without, with_bn = (
    highest_rate([run for run in runs if run.learning_rate in shared])
    for runs in (plain_runs, bn_runs)
  )
  if with_bn is None:
    return Measurement(-math.inf, (0.0, without or 0.0))
  note = 'higher rates were not tried' if with_bn == max(shared) else ''
  value = math.log(with_bn / without) if without else math.inf
  return Measurement(value, (with_bn, without or 0.0), note)


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


def _sooner(plain: Run, other: Run) -> Measurement:
  """How many times fewer steps to the target of Fig. 1 `other` needs."""
  return Measurement(
    _log_ratio(*(run.steps_to(FIG_1_TARGET) for run in (plain, other)))
  )


def _ends_higher(plain: Run, other: Run) -> Measurement:
  """How far `other` is above `plain` at the end of Fig. 1."""
  ours, theirs = (run.mean_of_last(FIG_1_LAST) for run in (plain, other))
  # A run that diverges early ends at no accuracy.
  if theirs is None:
    return Measurement(-math.inf)
  return Measurement(math.inf if ours is None else theirs - ours)


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


def _more_stable(plain: Run, other: Run) -> Measurement | None:
  """How many times less `other` drifts; None without records of drift."""
  ours, theirs = drift(plain), drift(other)
  return Measurement(math.log(ours / theirs)) if ours and theirs else None


def _factor(value: float) -> str:
  """Formats the logarithm of a factor."""
  return times(math.exp(value))


def _points(value: float) -> str:
  return '∞' if value == math.inf else f'{100 * value:.1f}'


def _best_accuracy(value: float) -> str:
  return 'none (diverged)' if value == -math.inf else percent(value)


_FEWER = Scale(_factor, 'fewer steps', 'more steps', 'never')
POINTS = Scale(_points, 'points above', 'points below', 'diverged')

LESS = Scale(_factor, 'less', 'more', 'never')

_FIG_1 = 'Fig. 1'
_SPEED = 'Fig. 2 and 3: speed'
_ACCURACY = 'Fig. 3: accuracy'
_TRAINS = 'What trains'


def _paper_speed(variant: str) -> str:
  """How many times fewer steps than Inception the paper's network needs."""
  factor = paper.speed_up(variant)
  assert factor is not None
  return f'{factor:.1f}x'


def _paper_lead(first: str, second: str) -> str:
  """The paper's difference in best accuracy, without its sign."""
  ours, theirs = (paper.PAPER[name].accuracy for name in (first, second))
  difference = abs(float(ours) - float(theirs))
  order = 'above' if float(ours) > float(theirs) else 'below'
  return (
    f'The best accuracy of {paper.label(first)} is {difference:.1f} points '
    f'{order} that of {paper.label(second)} ({ours} % against {theirs} %).'
  )


CLAIMS: Sequence[Claim] = (
  Claim(
    _FIG_1,
    'With BN, the MNIST network reaches 90 % in fewer steps.',
    'With BN it needs fewer steps (a curve, no number).',
    'bn_mnist',
    '90 % sooner',
    ('mnist', 'bn_mnist'),
    _sooner,
    _FEWER,
    'With BN it needs {value} than without',
    'With BN it never reaches 90 %',
    min_evaluations=1,
  ),
  Claim(
    _FIG_1,
    'With BN, the MNIST network ends at a higher accuracy.',
    'With BN it ends higher (a curve, no number).',
    'bn_mnist',
    'more accurate in the end',
    ('mnist', 'bn_mnist'),
    _ends_higher,
    POINTS,
    'With BN it ends {value} the network without',
    'With BN it diverges',
    min_evaluations=FIG_1_LAST,
  ),
  Claim(
    _FIG_1,
    'With BN, the inputs of the last sigmoids drift less.',
    'With BN they are more stable (curves, no number).',
    'bn_mnist',
    'stable inputs of sigmoids',
    ('mnist', 'bn_mnist'),
    _more_stable,
    LESS,
    'With BN they drift {value} than without',
    '',
    min_evaluations=1,
  ),
  Claim(
    _SPEED,
    'BN-Baseline matches Inception in less than half the steps.',
    f'BN-Baseline needs {_paper_speed("bn_baseline")} fewer steps than '
    'Inception.',
    'bn_baseline',
    'less than half the steps',
    ('inception', 'bn_baseline'),
    _faster,
    _FEWER,
    'BN-Baseline needs {value} than Inception',
    'BN-Baseline never matches Inception',
    threshold=math.log(2),
  ),
  Claim(
    _SPEED,
    'BN-x5 matches Inception in fewer steps than BN-Baseline.',
    f'BN-x5 needs {_paper_speed("bn_x5")} fewer steps than Inception, '
    f'BN-Baseline {_paper_speed("bn_baseline")}.',
    'bn_x5',
    'faster than BN-Baseline',
    ('inception', 'bn_baseline', 'bn_x5'),
    _faster_than,
    _FEWER,
    'BN-x5 needs {0} than Inception, BN-Baseline {1}: {value} than BN-Baseline',
    'BN-x5 never matches Inception',
    _FEWER.phrase,
  ),
  Claim(
    _SPEED,
    'BN-x30 is slower at first: it matches Inception later than BN-x5.',
    f'BN-x30 needs {_paper_speed("bn_x30")} fewer steps than Inception, '
    f'BN-x5 {_paper_speed("bn_x5")}.',
    'bn_x30',
    'matches Inception, later than BN-x5',
    ('inception', 'bn_x5', 'bn_x30'),
    _slower_than,
    _FEWER.flipped(),
    'BN-x30 needs {0} than Inception, BN-x5 {1}: {value} than BN-x5',
    'Steps to match Inception: BN-x30 {0}, BN-x5 {1}; BN-x30 beside BN-x5: '
    'never',
    _FEWER.phrase,
  ),
  Claim(
    _ACCURACY,
    'BN-x30 reaches the highest accuracy of the networks with ReLU.',
    _paper_lead('bn_x30', 'bn_x5'),
    'bn_x30',
    'most accurate',
    ('bn_x30', 'bn_x5', 'bn_baseline', 'inception'),
    _above,
    POINTS,
    'The accuracy of BN-x30 is {value} that of all others',
    'BN-x30 diverges',
  ),
  Claim(
    _ACCURACY,
    'BN-x5-Sigmoid reaches a lower accuracy than BN-x5.',
    _paper_lead('bn_x5_sigmoid', 'bn_x5'),
    'bn_x5_sigmoid',
    'less accurate than BN-x5',
    ('bn_x5_sigmoid', 'bn_x5'),
    _below,
    POINTS.flipped(),
    'The accuracy of BN-x5-Sigmoid is {value} that of BN-x5',
    'BN-x5 diverges',
  ),
  Claim(
    _TRAINS,
    'With BN, the network with sigmoids trains.',
    'BN-x5-Sigmoid: best accuracy '
    f'{paper.PAPER["bn_x5_sigmoid"].accuracy} %; twice chance is 0.2 %.',
    'bn_x5_sigmoid',
    'trains',
    ('bn_x5_sigmoid',),
    _trains,
    POINTS,
    'BN-x5-Sigmoid: best accuracy {0}, {value} twice chance',
    'BN-x5-Sigmoid diverges',
    _best_accuracy,
  ),
  Claim(
    _TRAINS,
    'Without BN, the network with sigmoids stays at chance.',
    'Inception with sigmoids: never better than chance, 0.1 %.',
    'inception_sigmoid',
    'stays at chance',
    ('inception_sigmoid',),
    _fails_to_train,
    POINTS.flipped(),
    'Inception with sigmoids: best accuracy {0}, {value} twice chance',
    '',
    _best_accuracy,
  ),
  Claim(
    _TRAINS,
    'Without BN, the network does not train at 5 times its learning rate.',
    'Inception at x5: its parameters reach machine infinity.',
    'inception_x5',
    'does not train',
    ('inception_x5',),
    _fails_to_train,
    POINTS.flipped(),
    'Inception at x5: best accuracy {0}, {value} twice chance',
    '',
    _best_accuracy,
  ),
  Claim(
    _TRAINS,
    'With BN, the network trains at learning rates that are too high without.',
    'With BN it trains at 30 times the learning rate; without, not at 5 times.',
    'bn_baseline',
    'trains at higher learning rates',
    ('inception', 'bn_baseline'),
    _wider_range,
    Scale(_factor, 'higher', 'lower', 'none'),
    'BN-Baseline trains up to a learning rate of {0}, Inception up to {1}: '
    '{value}',
    'BN-Baseline trains at no learning rate',
    '{:g}'.format,
    min_settings=3,
  ),
)


def judge(sections: Sequence[Section]) -> list[Row]:
  """Rows of each claim: one for each section that tests it, or 'not run'.

  Beside these, a section in which all variants have several settings has none:
  it is another experiment. One in which only some have is named.
  """
  rows = []
  for claim in CLAIMS:
    found = [
      (section, row) for section in sections if (row := claim.judge(section))
    ]
    kept = [
      row
      for section, row in found
      if row.verdict != AMBIGUOUS or not section.is_sweep_of(section.variants)
    ]
    rows += (
      kept
      or [row for _, row in found]
      or [Row(claim.group, claim.text, claim.paper)]
    )
  return rows
