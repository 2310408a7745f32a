"""Published findings, and whether an experiment sees them too."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
import math
from typing import Any, NamedTuple

from bn_repro.report.verdicts import FAILS, HOLDS, UNDECIDED, Estimate

# What an experiment measures with one seed, as JSON.
Result = Mapping[str, Any]


class Finding(NamedTuple):
  """A published finding, and the figure by which it is checked.

  Attributes:
    claim: the finding, as a sentence.
    source: who has published it, and the figure.
    measure: our figure, from the result of a seed.
    low: the claim holds for larger figures.
    high: the claim holds for smaller figures.
    unit: text after our figure.
  """

  claim: str
  source: str
  measure: Callable[[Result], float]
  low: float = -math.inf
  high: float = math.inf
  unit: str = ''

  def verdict(self, results: Iterable[Result]) -> str:
    """Whether the claim holds; fewer than five seeds leave it undecided."""
    values = map(self.measure, results)
    inside = [min(value - self.low, self.high - value) for value in values]
    return Estimate(inside).verdict(0)

  def ours(self, results: Iterable[Result]) -> str:
    """Our figure: the median, and its interval."""
    estimate = Estimate([self.measure(result) for result in results])
    text = f'{estimate.median:.3g}{self.unit}'
    if len(estimate.values) > 1:
      text += ' ({:.3g} to {:.3g})'.format(*estimate.interval)
    return text


def markdown(
  findings: Iterable[tuple[Finding, Sequence[Result]]],
) -> tuple[str, str]:
  """Counts findings, and lists them.

  Args:
    findings: each with the results that it is checked by.

  Returns:
    A line, and a Markdown table.
  """
  lines = ['| finding | published | ours | verdict |', '|---|---|---|---|']
  counts: Counter[str] = Counter()
  for finding, results in findings:
    verdict = finding.verdict(results)
    counts[verdict] += 1
    cells = (finding.claim, finding.source, finding.ours(results), verdict)
    lines.append(f'| {" | ".join(cells)} |')
  held, undecided, failed = (counts[word] for word in (HOLDS, UNDECIDED, FAILS))
  line = (
    f'{held} of {counts.total()} findings hold here, {undecided} undecided, '
    f'{failed} not.'
  )
  return line, ''.join(f'{line}\n' for line in lines)
