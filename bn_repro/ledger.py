"""The paper's claims, one by one, each held against the runs there are.

A claim is measured for each seed by itself, on nets that start from the same
weights and see the same batches; it holds if it does for every seed.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import NamedTuple

import numpy as np

from bn_repro.results import Run, Section, Spread

HOLDS = 'holds'
FAILS = 'does not hold here'
UNFINISHED = 'not finished'
NOT_RUN = 'not run'

# Section 4.1 gives none; 90 % is our choice.
FIG_1_TARGET = 0.9
FIG_1_PROBE = 'last_hidden_input'
# "Ends": over so many of the 200 evaluations of Fig. 1 (our choice).
FIG_1_LAST = 20


class Found(NamedTuple):
  """What the runs of one seed say of a claim."""

  holds: bool
  value: float | None


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the ledger.

  Attributes:
    claim: in words.
    verdict: one of those above.
    ours: our figure, with the range over seeds.
    paper: the paper's figure.
    where: the section of the runs.
    seeds: which.
  """

  claim: str
  verdict: str
  ours: str
  paper: str
  where: str
  seeds: str


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim of the paper.

  Attributes:
    text: in words.
    paper: the paper's figure.
    needs: variants that it is about.
    measure: from the runs of one seed by variant, each in rising rates.
    show: writes a measured value.
    unit: follows the values.
    num_settings: how many settings of each variant it takes; 1 takes sections
      with exactly one, more takes sweeps of at least so many.
  """

  text: str
  paper: str
  needs: tuple[str, ...]
  measure: Callable[[Mapping[str, Sequence[Run]]], Found]
  show: Callable[[float], str]
  unit: str = ''
  num_settings: int = 1

  def applies(self, section: Section) -> bool:
    """Whether a section has the runs that the claim is about."""
    counts = [len(section.settings_of(variant)) for variant in self.needs]
    if self.num_settings == 1:
      return all(count == 1 for count in counts)
    return all(count >= self.num_settings for count in counts)

  def row(self, section: Section) -> Row:
    """The claim, held against a section that it applies to."""
    by_seed: dict[int, dict[str, list[Run]]] = {}
    for variant in self.needs:
      for group in section.settings_of(variant):
        for run in group.runs:
          runs = by_seed.setdefault(run.config['seed'], {})
          runs.setdefault(variant, []).append(run)
    left_out = [
      f'; seed {seed} is left out: no {variant}'
      for seed, runs in sorted(by_seed.items())
      for variant in self.needs
      if variant not in runs
    ]
    complete = {
      seed: runs
      for seed, runs in sorted(by_seed.items())
      if len(runs) == len(self.needs)
    }
    row = Row(
      claim=self.text,
      verdict=UNFINISHED,
      ours=''.join(left_out).removeprefix('; '),
      paper=self.paper,
      where=section.title,
      seeds=', '.join(map(str, complete)),
    )
    ended = all(
      run.ended
      for of_seed in complete.values()
      for runs in of_seed.values()
      for run in runs
    )
    if not complete or not ended:
      return row
    found = [self.measure(runs) for runs in complete.values()]
    count = sum(one.holds for one in found)
    values = Spread([one.value for one in found], never=-math.inf)
    ours = f'{values.show(self.show)} {self.unit}'.strip()
    if len(found) > 1 and 0 < count < len(found):
      ours += f'; for {count} of {len(found)} seeds'
    ours += ''.join(left_out)
    verdict = HOLDS if count == len(found) else FAILS
    return dataclasses.replace(row, ours=ours, verdict=verdict)


def percent(value: float) -> str:
  """A share in percent, with one decimal."""
  return f'{100 * value:.1f} %'


def times(value: float) -> str:
  """A factor."""
  return f'{value:.3g}x'


def _points(value: float) -> str:
  return f'{100 * value:+.1f} points'


def _steps(run: Run, target: float | None) -> float | None:
  return None if target is None else run.steps_to(target)


def speed_up(plain: Run, other: Run) -> float | None:
  """How many times fewer steps a net needs to the best of one without BN."""
  target = plain.best()
  ours, theirs = _steps(plain, target), _steps(other, target)
  return ours / theirs if ours and theirs else None


def _faster(factor: float) -> Callable[..., Found]:
  def measure(runs: Mapping[str, Sequence[Run]]) -> Found:
    (plain,), (other,) = runs.values()
    value = speed_up(plain, other)
    return Found(value is not None and value > factor, value)

  return measure


def _faster_still(runs: Mapping[str, Sequence[Run]]) -> Found:
  """The third net needs fewer steps than the second, in units of the first."""
  (plain,), (first,), (second,) = runs.values()
  before, after = speed_up(plain, first), speed_up(plain, second)
  return Found(after is not None and after > (before or 0.0), after)


def _slower_at_first(runs: Mapping[str, Sequence[Run]]) -> Found:
  """The third net needs more steps than the second, and gets there."""
  (plain,), (first,), (second,) = runs.values()
  before, after = speed_up(plain, first), speed_up(plain, second)
  return Found(bool(before and after and after < before), after)


def _above_all(runs: Mapping[str, Sequence[Run]]) -> Found:
  """The first net's best is above that of all others, by how much."""
  first, *others = [run.best() or 0.0 for (run,) in runs.values()]
  return Found(first > max(others), first - max(others))


def _trains_below(runs: Mapping[str, Sequence[Run]]) -> Found:
  """The first net learns, and stays below the second, by how much."""
  (first,), (second,) = runs.values()
  ours, theirs = first.best() or 0.0, second.best() or 0.0
  return Found(learns(first) and ours < theirs, ours - theirs)


def learns(run: Run) -> bool:
  """Whether a run leaves chance: twice chance is still no learning."""
  return (run.best() or 0.0) >= 2 * run.chance


def _at_chance(runs: Mapping[str, Sequence[Run]]) -> Found:
  ((run,),) = runs.values()
  return Found(not learns(run), run.best())


def _wider_range(runs: Mapping[str, Sequence[Run]]) -> Found:
  """The highest rate at which the second learns, over that of the first."""
  highest = [highest_rate(of_variant) for of_variant in runs.values()]
  plain, other = highest
  value = other / plain if plain and other else None
  return Found(value is not None and value > 1, value)


def highest_rate(runs: Sequence[Run]) -> float | None:
  """The highest rate such that a net learns at it and all lower ones."""
  highest = None
  for run in sorted(runs, key=lambda r: r.config['optim']['learning_rate']):
    if not learns(run):
      break
    highest = run.config['optim']['learning_rate']
  return highest


def _sooner(runs: Mapping[str, Sequence[Run]]) -> Found:
  (plain,), (other,) = runs.values()
  ours, theirs = _steps(plain, FIG_1_TARGET), _steps(other, FIG_1_TARGET)
  if theirs is None:
    return Found(holds=False, value=None)
  # A net that never gets there needs at least all of its steps.
  value = (ours or plain.step * plain.config['batch_size'] / 32) / theirs
  return Found(value > 1, value)


def _ends_higher(runs: Mapping[str, Sequence[Run]]) -> Found:
  (plain,), (other,) = runs.values()
  ours, theirs = plain.last(FIG_1_LAST), other.last(FIG_1_LAST)
  value = (theirs or 0.0) - (ours or 0.0)
  return Found(value > 0, value)


def travels(percentiles: np.ndarray) -> np.ndarray:
  """How far what each sigmoid receives moves in training.

  The range over training of its median over test images, divided by the width
  between its 15th and 85th percentile at the end.

  Args:
    percentiles: (evaluations, 3, units).
  """
  low, middle, high = np.moveaxis(percentiles, 1, 0)
  return np.ptp(middle, axis=0) / (high[-1] - low[-1])


def travel(run: Run) -> float | None:
  """The median over units of `travels`; None if the run has no probes."""
  percentiles = run.percentiles(FIG_1_PROBE)
  return None if percentiles is None else float(np.median(travels(percentiles)))


def _more_stable(runs: Mapping[str, Sequence[Run]]) -> Found:
  (plain,), (other,) = runs.values()
  ours, theirs = travel(plain), travel(other)
  if not ours or theirs is None:
    return Found(holds=False, value=None)
  return Found(theirs < ours, theirs / ours)


CLAIMS: Sequence[Claim] = (
  Claim(
    'Fig. 1a: with BN the MNIST net reaches 90 % in fewer steps.',
    'faster',
    ('mnist', 'bn_mnist'),
    _sooner,
    times,
    'fewer',
  ),
  Claim(
    'Fig. 1a: with BN it ends higher.',
    'higher',
    ('mnist', 'bn_mnist'),
    _ends_higher,
    _points,
  ),
  Claim(
    'Fig. 1b, c: with BN what the last sigmoids receive moves less.',
    'more stable',
    ('mnist', 'bn_mnist'),
    _more_stable,
    times,
    'the travel over width',
  ),
  Claim(
    'BN-Baseline needs less than half of the steps of Inception.',
    '2.3x fewer (13.3M against 31M)',
    ('inception', 'bn_baseline'),
    _faster(2),
    times,
    'fewer',
  ),
  Claim(
    'BN-x5 needs fewer steps still.',
    '14.8x fewer (2.1M)',
    ('inception', 'bn_baseline', 'bn_x5'),
    _faster_still,
    times,
    'fewer',
  ),
  Claim(
    'BN-x30 is slower than BN-x5 at first.',
    '11.5x fewer (2.7M)',
    ('inception', 'bn_x5', 'bn_x30'),
    _slower_at_first,
    times,
    'fewer',
  ),
  Claim(
    'BN-x30 ends highest of the nets with ReLU.',
    '74.8 % against 73.0 (BN-x5): +1.8 points',
    ('bn_x30', 'bn_x5', 'bn_baseline', 'inception'),
    _above_all,
    _points,
  ),
  Claim(
    'BN-x5-Sigmoid trains, and ends below BN-x5.',
    '69.8 % against 73.0: -3.2 points',
    ('bn_x5_sigmoid', 'bn_x5'),
    _trains_below,
    _points,
  ),
  Claim(
    'With the sigmoid and without BN the net stays at chance.',
    '0.1 %, chance of 1,000 classes',
    ('inception_sigmoid',),
    _at_chance,
    percent,
  ),
  Claim(
    'At 5 times its rate the net without BN does not train.',
    'machine infinity',
    ('inception_x5',),
    _at_chance,
    percent,
  ),
  Claim(
    'With BN the net trains at rates at which it does not without.',
    'at x30, against not at x5',
    ('inception', 'bn_baseline'),
    _wider_range,
    times,
    'the highest rate without',
    num_settings=3,
  ),
)


def ledger(sections: Sequence[Section]) -> list[Row]:
  """Each claim in each section that has its runs, or as not run."""
  rows = []
  for claim in CLAIMS:
    found = [claim.row(s) for s in sections if claim.applies(s)]
    rows += found or [Row(claim.text, NOT_RUN, '', claim.paper, '', '')]
  return rows


HEADS = tuple(field.name for field in dataclasses.fields(Row))


def markdown(rows: Sequence[Row]) -> str:
  """The ledger as a Markdown table."""
  lines = [HEADS, ('---',) * len(HEADS), *map(dataclasses.astuple, rows)]
  return ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)
