"""How claims are counted, and the ledger in Markdown."""

import pytest

from bn_repro.report import ledger
from bn_repro.report.ledger import AMBIGUOUS, NOT_RUN, Row
from bn_repro.report.verdicts import FAILS, HOLDS, UNDECIDED


def row(claim, data, verdict, folder='runs'):
  return Row('group', claim, 'paper', data, folder, verdict, 'ours', 'seeds')


def test_each_claim_counts_once_for_each_data_set():
  rows = [
    row('a', 'digits', HOLDS),
    row('a', 'clothes', HOLDS),
    row('b', 'digits', UNDECIDED),
    row('b', 'clothes', FAILS),
    # Two folders that agree, and two that do not.
    row('c', 'digits', HOLDS, 'one'),
    row('c', 'digits', HOLDS, 'two'),
    row('d', 'digits', HOLDS, 'one'),
    row('d', 'digits', FAILS, 'two'),
    # They do not count.
    row('e', 'digits', AMBIGUOUS),
    row('f', '', NOT_RUN),
  ]
  assert ledger.summary(rows) == (
    '3 of 6 claims hold, 2 are undecided, 1 does not hold'
  )
  assert (
    ledger.summary([]) == '0 of 0 claims hold, 0 are undecided, 0 do not hold'
  )


@pytest.mark.parametrize(
  'words, expected',
  [
    ((HOLDS, NOT_RUN), HOLDS),
    ((NOT_RUN, FAILS), FAILS),
    ((UNDECIDED, HOLDS), UNDECIDED),
    ((AMBIGUOUS,), AMBIGUOUS),
  ],
)
def test_verdict_of_several_folders(words, expected):
  rows = [row('a', 'digits', word) for word in words]
  assert ledger.verdict_of(rows) == expected


def test_markdown():
  rows = [row('a', 'digits', HOLDS), row('b', 'digits', FAILS)]
  first, _, *table, _, note = ledger.markdown(rows).splitlines()
  assert first == '1 of 2 claims hold, 0 are undecided, 1 does not hold.'
  assert len(table) == 2 + len(rows)
  assert len({line.count('|') for line in table}) == 1
  assert 'bootstrap interval' in note
