"""Verdicts on a value that is measured once for each seed, and sentences.

The statistic is the median over seeds, because a seed may be infinitely far
off: a network that never reaches an accuracy needs infinitely many steps. Its
interval is the percentile interval of the bootstrap, at 95 %.
"""

from collections.abc import Callable, Sequence
import dataclasses
import math
import statistics
from typing import NamedTuple

HOLDS = 'holds'
FAILS = 'does not hold'
UNDECIDED = 'undecided'
# The verdicts that count. Other words say why there is none.
VERDICTS = (HOLDS, UNDECIDED, FAILS)

CONFIDENCE = 0.95
# With fewer seeds, an interval is too narrow to be trusted: that of five is
# their range, which contains the true median in 94 % of all cases; the range
# of three does in 75 %.
ENOUGH_SEEDS = 5


@dataclasses.dataclass(frozen=True)
class Estimate:
  """The median of a value over seeds, and how certain it is.

  Attributes:
    values: one for each seed; may be infinite.
  """

  values: Sequence[float]

  @property
  def median(self) -> float:
    """The median; of an even number, the mean of the two in the middle.

    Of minus infinity and infinity, which have no mean, it is the former.
    """
    middle = statistics.median(self.values)
    return -math.inf if math.isnan(middle) else middle

  @property
  def interval(self) -> tuple[float, float]:
    """The bootstrap interval of the median.

    A resample draws as many values as there are, with replacement. Its median
    is among the k smallest values if more than half of the draws are, whose
    number is binomial. The interval is therefore exact, without random numbers.
    For an even number of values its ends are those of the lower and of the
    upper one in the middle. Their mean, which is the median, has a slightly
    narrower interval, but none if one is infinite.
    """
    ranked, count = sorted(self.values), len(self.values)

    def quantile(probability: float, draws: int) -> float:
      """Smallest value that so many draws do not exceed, so probably."""
      return next(
        value
        for k, value in enumerate(ranked, start=1)
        if _at_least(draws, count, k / count) >= probability
      )

    tail = (1 - CONFIDENCE) / 2
    return (
      quantile(tail, (count + 1) // 2),
      quantile(1 - tail, count // 2 + 1),
    )

  def verdict(self, threshold: float) -> str:
    """Whether the value exceeds a threshold; few seeds do not decide."""
    low, high = self.interval
    if len(self.values) < ENOUGH_SEEDS or low <= threshold <= high:
      return UNDECIDED
    return HOLDS if low > threshold else FAILS


def _at_least(successes: int, trials: int, probability: float) -> float:
  """Probability of at least so many successes in independent trials."""
  return sum(
    math.comb(trials, i) * probability**i * (1 - probability) ** (trials - i)
    for i in range(successes, trials + 1)
  )


class Scale(NamedTuple):
  """How a value is written: its size, and a word for its sign.

  Attributes:
    size: formats an absolute value.
    positive: words after a positive value.
    negative: words after a negative value.
    lowest: text for minus infinity.
  """

  size: Callable[[float], str]
  positive: str
  negative: str
  lowest: str

  def phrase(self, value: float) -> str:
    """A value, such as '2.4x fewer steps'."""
    if value == -math.inf:
      return self.lowest
    word = self.positive if value >= 0 else self.negative
    return f'{self.size(abs(value))} {word}'

  def interval(self, low: float, high: float) -> str:
    """An interval, such as '2.1x to 3x'; with words if its signs differ."""
    if low >= 0 or -math.inf < low <= high < 0:
      smaller, larger = sorted((abs(low), abs(high)))
      return f'{self.size(smaller)} to {self.size(larger)}'
    return f'{self.phrase(low)} to {self.phrase(high)}'

  def flipped(self) -> 'Scale':
    """The scale of the negated values."""
    return self._replace(positive=self.negative, negative=self.positive)


def to_sentence(
  estimate: Estimate,
  scale: Scale,
  sentence: str,
  never: str = '',
  shown: Sequence[str] = (),
) -> str:
  """Our figure as a sentence, with its interval.

  Args:
    estimate: the values.
    scale: how they are written.
    sentence: see `claims.Claim`.
    never: see `claims.Claim`.
    shown: further values.
  """
  median = estimate.median
  if median == -math.inf:
    text = never.format(*shown)
  else:
    text = sentence.format(*shown, value=scale.phrase(median))
  if len(estimate.values) == 1:
    return f'{text}.'
  if len(set(estimate.values)) == 1:
    return f'{text} (in all {len(estimate.values)}).'
  return f'{text} ({scale.interval(*estimate.interval)}).'


def count_of(count: int, what: str) -> str:
  """A number of seeds or networks, and whether there are enough."""
  if count == 1:
    return f'a single {what}'
  few = '' if count >= ENOUGH_SEEDS else ', fewer than five'
  return f'{count} {what}s{few}'
