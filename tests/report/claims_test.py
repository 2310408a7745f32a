"""Each claim on runs for which it holds, and on runs for which it does not."""

import numpy as np
import pytest
from written_runs import add_percentiles, write_run

from bn_repro.models import mlp
from bn_repro.paper import PAPER
from bn_repro.report import claims
from bn_repro.report import runs as runs_lib

# Accuracies every 10 steps. Inception's best mean of five is 0.8, first
# reached at step 60.
PLAIN = [0.1, 0.2, 0.3, 0.4, 0.5, 0.8, 0.8, 0.8, 0.8, 0.8]
CHANCE = [0.1] * 10


def reaching(step, best):
  """A curve that is at 0.8 from a step on, and at `best` at the end."""
  return [0.1] * (step // 10 - 1) + [0.8] * (5 - step // 10) + [best] * 5


HOLDING = {
  'inception': PLAIN,
  'bn_baseline': reaching(20, 0.82),
  'bn_x5': reaching(10, 0.85),
  'bn_x30': reaching(20, 0.9),
  'bn_x5_sigmoid': reaching(30, 0.83),
  'inception_x5': CHANCE,
  'inception_sigmoid': CHANCE,
}


def rows_of(tmp_path):
  runs, _ = runs_lib.read_runs([str(tmp_path)])
  sections, problems = runs_lib.sections(runs, list(PAPER))
  assert problems == []
  return claims.ledger(sections)


def verdicts(tmp_path):
  return {row.claim: row.verdict for row in rows_of(tmp_path)}


def write_all(tmp_path, seeds=(0,), **changed):
  for variant, curve in {**HOLDING, **changed}.items():
    for seed in seeds:
      write_run(tmp_path / f'{variant}{seed}', variant, curve, f'seed={seed}')


def claim(word):
  (found,) = [c.text for c in claims.CLAIMS if word in c.text]
  return found


def test_all_hold(tmp_path):
  write_all(tmp_path, seeds=(0, 1, 2))
  found = verdicts(tmp_path)
  of_runs = [c for c in found if 'Fig. 1' not in c and 'rates at' not in c]
  assert len(of_runs) == 7
  assert {found[c] for c in of_runs} == {claims.HOLDS}
  rest = {verdict for c, verdict in found.items() if c not in of_runs}
  assert rest == {claims.NOT_RUN}


@pytest.mark.parametrize(
  'word, changed',
  [
    # 60 / 30 is not less than half.
    ('less than half', {'bn_baseline': reaching(30, 0.82)}),
    ('fewer steps still', {'bn_x5': reaching(20, 0.85)}),
    ('fewer steps still', {'bn_x5': CHANCE}),
    ('slower than BN-x5', {'bn_x30': reaching(10, 0.9)}),
    ('slower than BN-x5', {'bn_x30': CHANCE}),
    ('gets highest', {'bn_x30': reaching(20, 0.84)}),
    ('BN-x5-Sigmoid', {'bn_x5_sigmoid': reaching(30, 0.86)}),
    ('BN-x5-Sigmoid', {'bn_x5_sigmoid': CHANCE}),
    ('With the sigmoid', {'inception_sigmoid': [0.25] * 10}),
    ('5 times its rate', {'inception_x5': [0.25] * 10}),
  ],
)
def test_does_not_hold(word, changed, tmp_path):
  write_all(tmp_path, **changed)
  assert verdicts(tmp_path)[claim(word)] == claims.FAILS


def test_one_seed_of_three_that_differs_is_enough(tmp_path):
  write_all(tmp_path, seeds=(0, 1))
  for variant, curve in {**HOLDING, 'bn_baseline': reaching(40, 0.82)}.items():
    write_run(tmp_path / f'{variant}2', variant, curve, 'seed=2')
  (row,) = [r for r in rows_of(tmp_path) if r.claim == claim('less than half')]
  assert row.verdict == claims.FAILS
  assert row.ours == '3x (1.5x to 3x) fewer; for 2 of 3 seeds'
  assert row.seeds == '0, 1, 2'


def test_each_seed_is_held_against_its_own_plain_net(tmp_path):
  """The target of seed 1 is 0.4, which its BN-Baseline reaches late."""
  write_run(tmp_path / 'p0', 'inception', PLAIN)
  write_run(tmp_path / 'b0', 'bn_baseline', reaching(20, 0.82))
  write_run(tmp_path / 'p1', 'inception', [0.4] * 10, 'seed=1')
  write_run(tmp_path / 'b1', 'bn_baseline', reaching(40, 0.82), 'seed=1')
  (row,) = [r for r in rows_of(tmp_path) if r.claim == claim('less than half')]
  assert row.ours == '0.25x (0.25x to 3x) fewer; for 1 of 2 seeds'


def test_unfinished_runs_are_named_and_the_rest_is_judged(tmp_path):
  write_run(tmp_path / 'a', 'inception', PLAIN)
  write_run(tmp_path / 'b', 'bn_baseline', [0.9], status='running', step=10)
  (row,) = [r for r in rows_of(tmp_path) if r.claim == claim('less than half')]
  assert row.verdict == claims.NOT_RUN
  assert row.ours == 'seed 0 is left out: b is running'
  write_run(tmp_path / 'a1', 'inception', PLAIN, 'seed=1')
  write_run(tmp_path / 'b1', 'bn_baseline', reaching(20, 0.82), 'seed=1')
  (row,) = [r for r in rows_of(tmp_path) if r.claim == claim('less than half')]
  assert (row.verdict, row.seeds) == (claims.HOLDS, '1')
  assert row.ours == '3x fewer; seed 0 is left out: b is running'


def test_a_plain_net_that_never_trained_sets_no_target(tmp_path):
  write_run(tmp_path / 'a', 'inception', [0.1, 0.1, 0.12, 0.11, 0.1, 0.12])
  write_run(tmp_path / 'b', 'bn_baseline', [0.15] * 6)
  (row,) = [r for r in rows_of(tmp_path) if r.claim == claim('less than half')]
  assert (row.verdict, row.ours) == (claims.FAILS, 'never fewer')


def test_a_seed_without_one_of_the_nets_is_named(tmp_path):
  write_run(tmp_path / 'p0', 'inception', PLAIN)
  write_run(tmp_path / 'b0', 'bn_baseline', reaching(20, 0.82))
  write_run(tmp_path / 'p1', 'inception', PLAIN, 'seed=1')
  (row,) = [r for r in rows_of(tmp_path) if r.claim == claim('less than half')]
  assert row.ours == '3x fewer; seed 1 is left out: no bn_baseline'
  assert (row.seeds, row.verdict) == ('0', claims.HOLDS)


def test_divergence_is_no_training(tmp_path):
  write_run(tmp_path / 'hot', 'inception_x5', [], status='diverged', step=7)
  (row,) = [r for r in rows_of(tmp_path) if r.claim == claim('5 times')]
  assert row.verdict == claims.HOLDS
  assert row.ours == '0.0 %; diverged at step 7'


def test_runs_of_two_settings_are_not_judged_as_one(tmp_path):
  write_run(tmp_path / 'a', 'inception', PLAIN)
  write_run(tmp_path / 'b', 'bn_baseline', reaching(20, 0.82))
  write_run(
    tmp_path / 'c', 'bn_baseline', reaching(50, 0.82), 'total_steps=900'
  )
  assert verdicts(tmp_path)[claim('less than half')] == claims.SEVERAL


@pytest.mark.parametrize(
  'without, ours',
  [
    (0.2, '4x the highest rate without; up to 0.8 against 0.2'),
    (0.8, '1x the highest rate without; up to 0.8 against 0.8'),
  ],
)
def test_range_of_rates(without, ours, tmp_path):
  """The highest rate with all lower ones: a lucky run beyond does not count."""
  for variant, last in (('inception', without), ('bn_baseline', 0.8)):
    for rate in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2):
      good = rate <= last or rate == 3.2
      write_run(
        tmp_path / f'{variant}{rate}',
        variant,
        [0.9 if good else 0.1],
        f'optim.learning_rate={rate}',
      )
  (row,) = [r for r in rows_of(tmp_path) if r.claim == claim('rates at')]
  assert row.ours == ours
  holds = claims.HOLDS if without < 0.8 else claims.FAILS
  assert row.verdict == holds


def test_range_of_rates_that_was_not_searched_to_its_end(tmp_path):
  """And a rate that only one of the nets was run at says nothing."""
  for variant, rates in (
    ('inception', (0.1, 0.2, 0.4)),
    ('bn_baseline', (0.1, 0.2, 0.4, 0.8)),
  ):
    for rate in rates:
      good = rate <= 0.1 or variant == 'bn_baseline'
      write_run(
        tmp_path / f'{variant}{rate}',
        variant,
        [0.9 if good else 0.1],
        f'optim.learning_rate={rate}',
      )
  (row,) = [r for r in rows_of(tmp_path) if r.claim == claim('rates at')]
  assert row.ours == (
    'at least 4x the highest rate without; up to 0.4 against 0.1'
  )


def test_fig_1_of_a_plain_net_that_never_gets_there(tmp_path):
  """Not even in all of its 50,000 steps; the other needs 10."""
  write_run(tmp_path / 'a', 'mnist', [0.5], status='diverged', step=10)
  write_run(tmp_path / 'b', 'bn_mnist', [0.95])
  (row,) = [r for r in rows_of(tmp_path) if r.claim == claim('reaches 90 %')]
  assert (row.verdict, row.ours) == (claims.HOLDS, 'at least 5e+03x fewer')


def write_fig_1(tmp_path, plain, with_bn, plain_units, bn_units):
  write_run(tmp_path / 'a', 'mnist', plain)
  write_run(tmp_path / 'b', 'bn_mnist', with_bn)
  add_percentiles(tmp_path / 'a', plain_units)
  add_percentiles(tmp_path / 'b', bn_units)


def units(*medians):
  """Three units of width 2 at the end; the medians of each evaluation."""
  return [[[m - 1] * 3, [m, 2 * m, 3 * m], [m + 1] * 3] for m in medians]


def test_fig_1(tmp_path):
  write_fig_1(
    tmp_path,
    [0.5, 0.8, 0.9, 0.9],
    [0.9, 0.95, 0.95, 0.95],
    units(0, 1, 0.5, 0.5),
    units(0, 0.1, 0, 0.2),
  )
  rows = {row.claim: row for row in rows_of(tmp_path)}
  sooner = rows[claim('reaches 90 %')]
  assert (sooner.ours, sooner.verdict) == ('3x fewer', claims.HOLDS)
  higher = rows[claim('it ends higher')]
  assert higher.ours == '+16.2 points'
  # The median unit's median goes from 0 to 2 and from 0 to 0.4; width 2.
  stable = rows[claim('moves less')]
  assert stable.ours == '0.2x the travel over width'
  runs, _ = runs_lib.read_runs([str(tmp_path)])
  assert [claims.travel(run) for run in runs] == pytest.approx([1.0, 0.2])


def test_fig_1_does_not_hold(tmp_path):
  write_fig_1(
    tmp_path,
    [0.9, 0.95, 0.95],
    [0.5, 0.8, 0.9],
    units(0, 0.1, 0.2),
    units(0, 1, 0.5),
  )
  found = verdicts(tmp_path)
  for word in ('reaches 90 %', 'it ends higher', 'moves less'):
    assert found[claim(word)] == claims.FAILS


def test_travel_of_a_unit_that_never_varies():
  percentiles = np.zeros((2, 3, 2))
  percentiles[1, :, 1] = (0, 1, 2)
  np.testing.assert_array_equal(claims.travels(percentiles), [np.inf, 0.5])


def test_probe_is_the_one_that_the_network_stores():
  assert claims.FIG_1_PROBE == mlp.PROBE


def test_markdown(tmp_path):
  write_all(tmp_path)
  lines = claims.markdown(rows_of(tmp_path)).splitlines()
  assert len(lines) == 2 + len(claims.CLAIMS)
  assert len({line.count('|') for line in lines}) == 1
