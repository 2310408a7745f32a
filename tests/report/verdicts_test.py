"""Bootstrap intervals against other computations, and verdicts by them."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from bn_repro.report.verdicts import (
  FAILS,
  HOLDS,
  UNDECIDED,
  Estimate,
  Scale,
  count_of,
  to_sentence,
)

INF = math.inf


@pytest.mark.parametrize('count', [1, 3, 5])
def test_interval_is_that_of_all_resamples(count):
  values = np.random.default_rng(count).normal(size=count)
  medians = np.median(list(itertools.product(values, repeat=count)), axis=1)
  expected = np.quantile(medians, (0.025, 0.975), method='inverted_cdf')
  assert Estimate(list(values)).interval == tuple(expected)


@pytest.mark.parametrize('count', [9, 11, 31])
def test_interval_is_that_of_scipy(count):
  """Its quantiles come from 9,999 resamples and are interpolated."""
  values = np.random.default_rng(count).normal(size=count)
  found = stats.bootstrap(
    (values,), np.median, n_resamples=9_999, method='percentile', rng=0
  ).confidence_interval
  assert Estimate(list(values)).interval == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize('count', [2, 4, 6, 12])
def test_interval_of_an_even_number_contains_that_of_scipy(count):
  values = np.random.default_rng(count).normal(size=count)
  found = stats.bootstrap(
    (values,), np.median, n_resamples=9_999, method='percentile', rng=0
  ).confidence_interval
  low, high = Estimate(list(values)).interval
  assert low <= found.low and found.high <= high


def test_coverage_of_five_seeds():
  """As the docstring of `ENOUGH_SEEDS` says: 1 - 2 / 2**5 and 1 - 2 / 2**3."""
  samples = np.random.default_rng(0).normal(size=(2000, 5))
  for count, expected in ((5, 0.9375), (3, 0.75)):
    intervals = [Estimate(list(row[:count])).interval for row in samples]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    assert covered == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
  'values, verdict',
  [
    ([0.1, 0.2, 0.3, 0.4, 0.5], HOLDS),
    ([0.1, 0.2, 0.3, 0.4, INF], HOLDS),
    # One of five seeds is on the other side.
    ([-0.1, 0.2, 0.3, 0.4, 0.5], UNDECIDED),
    ([-INF, 0.2, 0.3, 0.4, 0.5], UNDECIDED),
    # One of nine does not matter.
    ([-INF, *[0.2] * 8], HOLDS),
    ([INF, *[-0.2] * 8], FAILS),
    ([-0.1, -0.2, -0.3, -0.4, -INF], FAILS),
    # Fewer than five decide nothing.
    ([-0.1, -0.2, -0.3, -INF], UNDECIDED),
    ([0.1, 0.2, 0.3], UNDECIDED),
    # Equality is neither.
    ([0.0, 0.0, 0.0, 0.0, 0.0], UNDECIDED),
    ([-INF, INF], UNDECIDED),
    # A single seed decides nothing.
    ([0.5], UNDECIDED),
    ([-INF], UNDECIDED),
  ],
)
def test_verdicts(values, verdict):
  assert Estimate(values).verdict(0) == verdict
  assert Estimate([value + 3 for value in values]).verdict(3) == verdict


STEPS = Scale('{:g}x'.format, 'fewer', 'more', 'never')


@pytest.mark.parametrize(
  'values, sentence',
  [
    ([2.0, 3.0, 4.0], 'needs 3x fewer (2x to 4x).'),
    ([-2.0, -3.0, -4.0], 'needs 3x more (2x to 4x).'),
    ([-1.0, 3.0, 4.0], 'needs 3x fewer (1x more to 4x fewer).'),
    ([-INF, 3.0, 4.0], 'needs 3x fewer (never to 4x fewer).'),
    ([-INF, -INF, 4.0], 'fails (never to 4x fewer).'),
    ([-INF, -2.0, -1.0], 'needs 2x more (never to 1x more).'),
    ([-INF, -INF, -INF], 'fails (in all 3).'),
    ([-INF, INF], 'fails (never to infx fewer).'),
    ([2.0], 'needs 2x fewer.'),
    # The mean of two.
    ([2.0, 3.0], 'needs 2.5x fewer (2x to 3x).'),
  ],
)
def test_sentences(values, sentence):
  found = to_sentence(Estimate(values), STEPS, 'needs {value}', 'fails')
  assert found == sentence


@pytest.mark.parametrize(
  'count, shown',
  [(1, 'a single seed'), (4, '4 seeds, fewer than five'), (5, '5 seeds')],
)
def test_few_seeds_are_said(count, shown):
  assert count_of(count, 'seed') == shown
