"""The ledger: a row for each claim and each folder of runs that tests it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
import dataclasses

from bn_repro.report.runs import WINDOW
from bn_repro.report.verdicts import FAILS, HOLDS, UNDECIDED, VERDICTS

# Words in the place of a verdict.
NOT_RUN = 'not run'
AMBIGUOUS = 'several settings'

# How to read the ledger.
NOTE = (
  'Each claim is measured for each seed on its own, between networks with the '
  'same initial weights and data. Our figures are medians over seeds, with '
  'the 95 % bootstrap interval of the median in parentheses, or "in all" if '
  'all values are equal. A claim holds if the whole interval is on its side, '
  'does not hold if the whole interval is on the other side, and is undecided '
  'otherwise. Of five seeds the interval is the range; fewer decide nothing. A '
  f'network trains if its best accuracy, the highest mean of {WINDOW} '
  'consecutive evaluations, is at least twice chance. It matches Inception at '
  "its first evaluation with Inception's best accuracy. Accuracies are "
  'compared on the test images, after the last step; where a data set has '
  'none, the best accuracies are. Folders with the same data count as one '
  'claim, which is undecided if their verdicts differ.'
)


@dataclasses.dataclass(frozen=True)
class Row:
  """A row of the ledger.

  Attributes:
    group: part of the paper, or of its question, that the claim belongs to.
    claim: the claim, as a sentence.
    paper: what the paper reports, as a sentence.
    data: name of the data set; empty if the claim was not tested.
    folder: folder of the runs.
    verdict: one of `VERDICTS`, or a word in their place.
    ours: what our runs show, as a sentence.
    seeds: number of seeds, and remarks.
  """

  group: str
  claim: str
  paper: str
  data: str = ''
  folder: str = ''
  verdict: str = NOT_RUN
  ours: str = ''
  seeds: str = ''


Key = tuple[str, str]


def cells(rows: Iterable[Row]) -> Mapping[Key, Sequence[Row]]:
  """The rows by claim and data set: what counts once."""
  found: dict[Key, list[Row]] = {}
  for row in rows:
    found.setdefault((row.claim, row.data), []).append(row)
  return found


def verdict_of(rows: Sequence[Row]) -> str:
  """The verdict of a cell; undecided if its rows disagree."""
  words = [row.verdict for row in rows]
  counted = {word for word in words if word in VERDICTS}
  if len(counted) > 1:
    return UNDECIDED
  return counted.pop() if counted else words[0]


def summary(rows: Iterable[Row]) -> str:
  """How many claims hold, are undecided and do not hold."""
  counts = Counter(map(verdict_of, cells(rows).values()))
  held, undecided, failed = (counts[word] for word in (HOLDS, UNDECIDED, FAILS))
  return (
    f'{held} of {held + undecided + failed} claims hold, '
    f'{undecided} {"is" if undecided == 1 else "are"} undecided, '
    f'{failed} {"does" if failed == 1 else "do"} not hold'
  )


def markdown(rows: Sequence[Row]) -> str:
  """The ledger as a Markdown table."""
  headings = [field.name for field in dataclasses.fields(Row)]
  lines = [headings, ['---'] * len(headings), *map(dataclasses.astuple, rows)]
  table = ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)
  return f'{summary(rows)}.\n\n{table}\n{NOTE}\n'
