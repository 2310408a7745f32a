"""Each claim, on runs for which it holds and on runs for which it fails."""

import numpy as np
import pytest
from written_runs import add_percentiles, read_one, read_sections, write_run

from bn_repro.models import mlp
from bn_repro.report import claims

# Accuracies every 10 steps. Inception's best mean of five is 0.8, which it
# first reaches at step 60.
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


def ledger(tmp_path):
  return claims.ledger(read_sections(tmp_path))


def judge(tmp_path, words):
  """The row of the one claim that contains `words`."""
  (row,) = [row for row in ledger(tmp_path) if words in row.claim]
  return row


def write_all(tmp_path, seeds=(0,), **changed):
  for variant, curve in {**HOLDING, **changed}.items():
    for seed in seeds:
      write_run(tmp_path / f'{variant}{seed}', variant, curve, f'seed={seed}')


def write_pair(tmp_path, plain, other, seed=0):
  """Inception and BN-Baseline; without a curve, no run."""
  for variant, curve in (('inception', plain), ('bn_baseline', other)):
    if curve is not None:
      write_run(tmp_path / f'{variant}{seed}', variant, curve, f'seed={seed}')


def test_all_hold(tmp_path):
  write_all(tmp_path, seeds=(0, 1, 2))
  verdicts = {row.claim: row.verdict for row in ledger(tmp_path)}
  others = {c for c in verdicts if 'Fig. 1' in c or 'too high' in c}
  assert len(verdicts.keys() - others) == 7
  assert {verdicts[c] for c in verdicts.keys() - others} == {claims.HOLDS}
  assert {verdicts[c] for c in others} == {claims.NOT_RUN}


@pytest.mark.parametrize(
  'words, changed',
  [
    # 60 / 30 is not less than half.
    ('less than half', {'bn_baseline': reaching(30, 0.82)}),
    ('fewer steps than BN-Baseline', {'bn_x5': reaching(20, 0.85)}),
    ('fewer steps than BN-Baseline', {'bn_x5': CHANCE}),
    ('slower at first', {'bn_x30': reaching(10, 0.9)}),
    ('slower at first', {'bn_x30': CHANCE}),
    ('highest accuracy', {'bn_x30': reaching(20, 0.84)}),
    ('BN-x5-Sigmoid', {'bn_x5_sigmoid': reaching(30, 0.86)}),
    ('BN-x5-Sigmoid', {'bn_x5_sigmoid': CHANCE}),
    ('with sigmoids', {'inception_sigmoid': [0.25] * 10}),
    ('5 times its', {'inception_x5': [0.25] * 10}),
  ],
)
def test_does_not_hold(words, changed, tmp_path):
  write_all(tmp_path, **changed)
  assert judge(tmp_path, words).verdict == claims.FAILS


def test_one_seed_of_three_that_differs_is_enough(tmp_path):
  for seed, step in enumerate((20, 20, 40)):
    write_pair(tmp_path, PLAIN, reaching(step, 0.82), seed)
  row = judge(tmp_path, 'less than half')
  assert row.verdict == claims.FAILS
  assert row.ours == (
    '3x (1.5x to 3x) fewer steps than Inception; holds for 2 of 3 seeds'
  )
  assert row.seeds == '0, 1, 2'


def test_each_seed_is_compared_with_its_own_plain_network(tmp_path):
  """The target of seed 1 is 0.4, which its BN-Baseline reaches late."""
  write_pair(tmp_path, PLAIN, reaching(20, 0.82))
  write_pair(tmp_path, [0.4] * 10, reaching(40, 0.82), seed=1)
  row = judge(tmp_path, 'less than half')
  # The mean of two seeds.
  assert row.ours.startswith('1.62x (0.25x to 3x) fewer')
  assert row.ours.endswith('holds for 1 of 2 seeds')


def test_unfinished_runs_are_named_and_the_rest_is_judged(tmp_path):
  write_run(tmp_path / 'a', 'inception', PLAIN)
  write_run(tmp_path / 'b', 'bn_baseline', [0.9], status='running', step=10)
  row = judge(tmp_path, 'less than half')
  assert row.verdict == claims.NOT_RUN
  assert row.ours == 'seed 0 excluded: b is running'
  write_pair(tmp_path, PLAIN, reaching(20, 0.82), seed=1)
  row = judge(tmp_path, 'less than half')
  assert (row.verdict, row.seeds) == (claims.HOLDS, '1')
  assert row.ours == (
    '3x fewer steps than Inception; seed 0 excluded: b is running'
  )


@pytest.mark.parametrize(
  'words, variant, count, verdict, ours',
  [
    ('less than half', 'bn_baseline', 4, claims.NOT_RUN, '4 of 5 evaluations'),
    ('highest accuracy', 'bn_x30', 1, claims.NOT_RUN, '1 of 5 evaluations'),
    ('with sigmoids', 'inception_sigmoid', 3, claims.NOT_RUN, '3 of 5 eval'),
    ('highest accuracy', 'bn_x30', 5, claims.HOLDS, '+5.0 points'),
  ],
)
def test_runs_with_few_evaluations_are_not_judged(
  words, variant, count, verdict, ours, tmp_path
):
  """The mean of fewer than five is not what other runs are ranked by."""
  write_all(tmp_path, **{variant: [0.9] * count})
  row = judge(tmp_path, words)
  assert row.verdict == verdict
  assert ours in row.ours


def test_the_end_of_fig_1_is_of_twenty_evaluations(tmp_path):
  for name, variant in (('a', 'mnist'), ('b', 'bn_mnist')):
    write_run(tmp_path / name, variant, [0.95] * 19)
  row = judge(tmp_path, 'higher accuracy')
  assert row.ours == 'seed 0 excluded: a has 19 of 20 evaluations'
  assert judge(tmp_path, 'reaches 90 %').ours == '1x fewer steps'


@pytest.mark.parametrize(
  'words, diverged, verdict',
  [
    ('highest accuracy', 'bn_x30', claims.FAILS),
    ('BN-x5-Sigmoid', 'bn_x5', claims.FAILS),
    ('BN-x5-Sigmoid', 'bn_x5_sigmoid', claims.FAILS),
  ],
)
def test_no_margin_over_a_run_that_diverged_early(
  words, diverged, verdict, tmp_path
):
  write_all(tmp_path, **{diverged: []})
  (tmp_path / f'{diverged}0/status.json').write_text(
    '{"status": "diverged", "step": 7}'
  )
  row = judge(tmp_path, words)
  assert (row.verdict, row.ours) == (verdict, 'diverged')


def test_a_seed_without_one_of_the_networks_is_named(tmp_path):
  write_pair(tmp_path, PLAIN, reaching(20, 0.82))
  write_pair(tmp_path, PLAIN, None, seed=1)
  row = judge(tmp_path, 'less than half')
  assert row.ours.endswith('; seed 1 excluded: no run of bn_baseline')
  assert (row.seeds, row.verdict) == ('0', claims.HOLDS)


def test_a_plain_network_that_never_learnt_sets_no_target(tmp_path):
  write_pair(tmp_path, [0.1, 0.1, 0.12, 0.11, 0.1, 0.12], [0.15] * 6)
  row = judge(tmp_path, 'less than half')
  assert row.verdict == claims.FAILS
  assert row.ours == 'never; Inception does not learn'


def test_a_diverged_run_does_not_learn(tmp_path):
  write_run(tmp_path / 'hot', 'inception_x5', [], status='diverged', step=7)
  row = judge(tmp_path, '5 times its')
  assert row.verdict == claims.HOLDS
  assert row.ours == 'no accuracy; diverged at step 7'


def test_runs_of_two_settings_are_not_judged_as_one(tmp_path):
  write_pair(tmp_path, PLAIN, reaching(20, 0.82))
  write_run(
    tmp_path / 'c', 'bn_baseline', reaching(50, 0.82), 'total_steps=900'
  )
  assert judge(tmp_path, 'less than half').verdict == claims.AMBIGUOUS


def write_rates(tmp_path, variant, learning, others):
  """Runs at some learning rates at which the network learns, and others."""
  for rates, accuracy in ((learning, 0.9), (others, 0.1)):
    for rate in rates:
      folder = tmp_path / f'{variant}{rate}'
      override = f'optim.learning_rate={rate}'
      write_run(folder, variant, [accuracy] * 5, override)


@pytest.mark.parametrize(
  'without, verdict, ours',
  [
    (0.2, claims.HOLDS, '4x the highest learning rate without BN; up to 0.8, '),
    (0.8, claims.FAILS, '1x the highest learning rate without BN; up to 0.8, '),
  ],
)
def test_range_of_rates(without, verdict, ours, tmp_path):
  """A run that learns above a rate at which the network fails is luck."""
  tried = (0.1, 0.2, 0.4, 0.8, 1.6)
  for variant, last in (('inception', without), ('bn_baseline', 0.8)):
    learning = [rate for rate in tried if rate <= last]
    others = [rate for rate in tried if rate > last]
    write_rates(tmp_path, variant, [*learning, 3.2], others)
  row = judge(tmp_path, 'too high')
  assert row.ours == f'{ours}against {without}'
  assert row.verdict == verdict


def test_range_of_rates_that_exceeds_the_sweep(tmp_path):
  """A rate that only one of the networks was trained at does not count."""
  write_rates(tmp_path, 'inception', (0.1,), (0.2, 0.4))
  write_rates(tmp_path, 'bn_baseline', (0.1, 0.2, 0.4, 0.8), ())
  assert judge(tmp_path, 'too high').ours == (
    'at least 4x the highest learning rate without BN; up to 0.4, against 0.1'
  )


def test_range_of_rates_of_a_network_that_never_learns(tmp_path):
  write_rates(tmp_path, 'inception', (), (0.1, 0.2, 0.4))
  write_rates(tmp_path, 'bn_baseline', (0.1, 0.2), (0.4,))
  row = judge(tmp_path, 'too high')
  assert row.ours == 'never; one of the networks learns at no learning rate'
  assert row.verdict == claims.HOLDS


def test_fig_1_of_a_plain_network_that_never_reaches_90_percent(tmp_path):
  """It has 50,000 steps; the other network needs 10."""
  write_run(tmp_path / 'a', 'mnist', [0.5], status='diverged', step=10)
  write_run(tmp_path / 'b', 'bn_mnist', [0.95])
  row = judge(tmp_path, 'reaches 90 %')
  assert row.verdict == claims.HOLDS
  assert row.ours == 'at least 5e+03x fewer steps'


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
    [0.5, 0.8] + [0.9] * 18,
    [0.9] * 2 + [0.95] * 18,
    units(0, 1, *[0.5] * 18),
    units(*[0, 0.1] * 9, 0, 0.2),
  )
  sooner = judge(tmp_path, 'reaches 90 %')
  assert (sooner.ours, sooner.verdict) == ('3x fewer steps', claims.HOLDS)
  assert judge(tmp_path, 'higher accuracy').ours == '+7.0 points'
  # The median unit's median goes from 0 to 2 and from 0 to 0.4; width 2.
  assert judge(tmp_path, 'drift').ours == '0.2x the drift without BN'
  drifts = [claims.drift(read_one(tmp_path / name)) for name in 'ab']
  assert drifts == pytest.approx([1.0, 0.2])


def test_fig_1_does_not_hold(tmp_path):
  write_fig_1(
    tmp_path,
    [0.9] + [0.95] * 19,
    [0.5] + [0.8] * 18 + [0.9],
    units(*[0, 0.1] * 9, 0, 0.2),
    units(0, 1, *[0.5] * 18),
  )
  for words in ('reaches 90 %', 'higher accuracy', 'drift'):
    assert judge(tmp_path, words).verdict == claims.FAILS


def test_drift_of_a_unit_without_spread():
  percentiles = np.zeros((2, 3, 2))
  percentiles[1, :, 1] = (0, 1, 2)
  np.testing.assert_array_equal(claims.drifts(percentiles), [np.inf, 0.5])


def test_probe_is_the_one_that_the_network_stores():
  assert claims.FIG_1_PROBE == mlp.PROBE


def test_markdown(tmp_path):
  write_all(tmp_path)
  *lines, blank, note = claims.markdown(ledger(tmp_path)).splitlines()
  assert blank == '' and 'medians over seeds, of two seeds the mean' in note
  assert len(lines) == 2 + len(claims.CLAIMS)
  assert len({line.count('|') for line in lines}) == 1
