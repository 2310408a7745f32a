"""The table of a search, on runs written by hand."""

import pytest
from written_runs import read_sections, write_run

from bn_repro import paper
from bn_repro.report import page, search
from bn_repro.report.search import Setting

RATES = (0.01, 0.02)
# Inception is best, at .8, from its tenth evaluation on; the others reach this
# at the given one.
REACHED = {'bn_baseline': 4, 'bn_x5': 2, 'bn_x30': 3, 'bn_x5_sigmoid': 5}
CHANCE = ('inception_x5', 'inception_sigmoid')


def accuracies(variant, rate):
  if variant in CHANCE:
    return [0.1] * 14
  if variant == 'bn_x30' and rate == RATES[1]:
    return [0.5] * 14  # It never matches Inception.
  reached = REACHED.get(variant, 10)
  best = {'inception': 0.8, 'bn_x30': 0.9}.get(variant, 0.85)
  return [0.3] * (reached - 1) + [best] * (15 - reached)


@pytest.fixture(scope='module')
def section(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs')
  multiples = dict.fromkeys(paper.FIG_3, 5) | {'bn_x30': 30}
  multiples |= dict.fromkeys(('inception', 'bn_baseline', CHANCE[1]), 1)
  for variant in paper.FIG_3:
    for rate in RATES:
      for length in (1, 2):
        # The others train half as long as Inception.
        steps = 280 * length // (1 if variant == 'inception' else 2)
        write_run(
          folder / f'{variant}_{rate}_{length}',
          variant,
          accuracies(variant, rate),
          f'optim.learning_rate={multiples[variant] * rate}',
          f'total_steps={steps}',
        )
  (section,) = read_sections(folder)
  return section


def test_settings_are_those_of_inception(section):
  assert search.is_search(section)
  found = search.settings(section)
  assert list(found) == [
    Setting(steps, rate) for steps in (280, 560) for rate in RATES
  ]
  for part in found.values():
    assert sorted(part.variants) == sorted(paper.FIG_3)
    assert len(part.runs) == len(paper.FIG_3)
    assert not search.is_search(part)


def test_table(section):
  rows = {row.pop('claim'): row for row in search.table(section)}
  heading = '280 steps, rate {:g}'.format
  first, second = map(heading, RATES)
  assert list(rows["Inception's best accuracy"].values()) == ['80.0 %'] * 4
  cells = {claim: (row[first], row[second]) for claim, row in rows.items()}
  # 10 / 4; 4 / 2; 3 / 2.
  faster, x5, slower, highest, *_ = (
    cells[claim]
    for claim in cells
    if claim.startswith(('BN-Baseline matches', 'BN-x5 m', 'BN-x30'))
  )
  assert faster == ('✓ 2.5x fewer steps', '✓ 2.5x fewer steps')
  assert x5 == ('✓ 2x fewer steps', '✓ 2x fewer steps')
  assert slower == ('✓ 1.5x more steps', '✗ never')
  assert highest == ('✓ 5.0 points above', '✗ 35.0 points below')
  chance = cells['Without BN, the network with sigmoids stays at chance.']
  assert chance == ('✓ 10.0 points below', '✓ 10.0 points below')
  # Of the eight claims, sigmoids are not below ReLUs, .85 both.
  assert cells['claims with ✓'] == ('7', '5')


def test_strays_are_in_no_column_or_named_there(tmp_path):
  """Of another field than rate and length, of another length, or unknown."""
  for variant in paper.FIG_3:
    curve = accuracies(variant, RATES[0])
    rate = 0.01 * paper.rate_multiple(variant)
    write_run(tmp_path / variant, variant, curve)
    write_run(
      tmp_path / f'{variant}_slow',
      variant,
      [0.8] * 5,
      f'optim.learning_rate={rate}',
    )
  write_run(tmp_path / 'a', 'bn_x30', [0.8] * 5, 'optim.momentum=0.5')
  for number, steps in enumerate((300, 700, 900)):
    stray = tmp_path / f'stray{number}'
    write_run(stray, 'bn_x5', [0.8] * 5, f'total_steps={steps}')
  write_run(tmp_path / 'own', 'own', [0.8] * 5)
  (section,) = read_sections(tmp_path)
  problems = page.write_report([tmp_path], tmp_path / 'out')
  stray = 'BN-x5, optim.learning_rate=0.1, total_steps='
  assert [
    message.removeprefix(f'{tmp_path.name}: ').partition(' is left out')[0]
    for message in problems
  ] == [*(f'{stray}{steps}' for steps in (300, 700, 900)), 'own']
  rows = {row.pop('claim'): row for row in search.table(section)}
  slow, usual = '1,000 steps, rate 0.01', '1,000 steps, rate 0.02'
  assert list(rows["Inception's best accuracy"]) == [slow, usual]
  x5, x30, slower, *_ = (
    row
    for claim, row in rows.items()
    if claim.startswith(('BN-x5 m', 'BN-x30'))
  )
  assert x5 == {slow: '✗ 1x fewer steps', usual: '✓ 2x fewer steps'}
  assert x30[usual] == slower[usual] == 'several settings'
  assert rows['claims with ✓'][usual] == '5'


def test_inception_of_two_settings_in_a_column(tmp_path):
  for variant in paper.FIG_3:
    write_run(tmp_path / variant, variant, [0.8] * 5)
  write_run(tmp_path / 'a', 'inception', [0.8] * 5, 'optim.momentum=0.5')
  (section,) = read_sections(tmp_path)
  best, *_ = search.table(section)
  assert list(best.values())[1:] == ['several settings']


def test_evidence_with_a_stray_run_is_no_search(tmp_path):
  for variant in paper.FIG_3:
    write_run(tmp_path / variant, variant, [0.8] * 5)
  write_run(tmp_path / 'stray', 'bn_x5', [0.8] * 5, 'total_steps=900')
  (section,) = read_sections(tmp_path)
  assert not search.is_search(section)


def test_a_sweep_of_two_networks_is_no_search(tmp_path):
  for rate in RATES:
    for variant in ('inception', 'bn_baseline'):
      override = f'optim.learning_rate={rate}'
      write_run(tmp_path / f'{variant}{rate}', variant, [0.5] * 5, override)
  (section,) = read_sections(tmp_path)
  assert not search.is_search(section)
