"""Fig. 4 of runs and probabilities written by hand."""

import numpy as np
from page_elements import Elements
import pytest
from written_probabilities import predicting, write
from written_runs import read_sections, write_run

from bn_repro.report import fig_4
from bn_repro.report.__main__ import main
from bn_repro.report.verdicts import FAILS, HOLDS, UNDECIDED

COUNT = 100
CROPS = '144 crops of each image'
ENSEMBLE = 'The ensemble'


def write_probabilities(run, correct, crops=1, offset=0, **facts):
  """Of a network that is right at `correct` images, from `offset` on.

  There are six classes, and its second choices are the five before the last.
  """
  labels = np.zeros(COUNT, np.int32)
  is_correct = (np.arange(COUNT) - offset) % COUNT < correct
  values = predicting(np.where(is_correct, 0, 5), 0.5, labels, num_classes=6)
  values[:, 4] += 0.05
  values[:, 0] -= 0.05
  path = run / 'probabilities' / f'test-{crops}.npz'
  return write(path, values, labels, crops=crops, **facts)


def write_network(folder, variant, correct, seed=0, many=None, offset=0):
  """A run, its probabilities with one crop and, if given, with many."""
  run = folder / f'{variant}_seed{seed}'
  write_run(run, variant, [0.5] * 5, f'seed={seed}')
  write_probabilities(run, correct, offset=offset)
  if many is not None:
    write_probabilities(run, many, crops=144, offset=offset)
  return run


def page(tmp_path):
  out = tmp_path / 'out'
  assert main([f'--runs={tmp_path / "runs"}', f'--out={out}']) == 0
  text = (out / 'index.html').read_text()
  return Elements(text), text, (out / 'ledger.md').read_text()


def judge(folder, words):
  (section,) = read_sections(folder)
  results, problems = fig_4.read(section)
  assert problems == []
  rows = fig_4.judge(section, results)
  return next((row for row in rows if words in row.claim), None)


def test_our_errors_are_beside_the_paper_s(tmp_path):
  folder = tmp_path / 'runs'
  for seed, correct in enumerate((70, 72, 77)):
    write_network(folder, 'bn_x30', correct, seed, many=correct + 10)
  for number, member in enumerate(('dropout_5', 'init_2', 'per_activation')):
    write_network(folder, member, 60, number, many=70, offset=10 * number)
  elements, text, _ = page(tmp_path)
  assert "The paper's Fig. 4, on these data" in text
  rows = elements.rows(-1)
  table = [tuple(row.values()) for row in rows]
  assert list(rows[0]) == [
    *('network', 'images', 'crops', 'networks'),
    *('top-1 error, %, paper', 'top-1 error, %, ours'),
    *('top-5 error, %, paper', 'top-5 error, %, ours', 'runs'),
  ]
  # The label 0 is among the five unless it is last: where it is not correct.
  shown = '28.00 (23.00 to 30.00)'
  assert table[0][:6] == ('BN-x30', '100 test', '1', '1', '25.2', shown)
  assert table[0][6:] == ('7.82', shown, '3')
  member = 'BN-x30, dropout 5 %'
  assert table[1][:6] == (member, '100 test', '1', '1', '–', '40.00')
  # Two of three are right from 10 to 70; the first two or all three: to 80.
  assert table[4][:6] == ('Ensemble', '100 test', '1', '3', '–', '40.00')
  shown = '18.00 (13.00 to 20.00)'
  assert table[5][:6] == ('BN-x30', '100 test', '144', '1', '21.99', shown)
  assert len(table) == 10


def test_six_networks_are_the_paper_s_ensemble(tmp_path):
  for number in range(6):
    name = list(fig_4.paper.ENSEMBLE)[number]
    write_network(tmp_path / 'runs', name, 60, many=70, offset=number)
  elements, _, _ = page(tmp_path)
  *_, (_, images, crops, networks, paper_1, _, paper_5, _, runs) = (
    tuple(row.values()) for row in elements.rows(-1)
  )
  assert (images, crops, networks, paper_1) == ('100 test', '144', '6', '20.1')
  assert paper_5 == '4.9 (4.82 on the 100,000 test images, by the test server)'
  assert runs == '1'


@pytest.mark.parametrize(
  'networks, verdict, ours',
  [
    (
      [(70, 80), (73, 77)] * 3,
      HOLDS,
      '7.00 points below one crop, on',
    ),
    ([(70, 80), (73, 77), (70, 75)] * 2, HOLDS, '(4.00 to 10.00)'),
    (
      [(70, 80), (73, 72)] * 3,
      UNDECIDED,
      '(1.00 points above to 10.00 points',
    ),
    ([(70, 68), (73, 72)] * 3, FAILS, '1.50 points above one crop'),
    ([(70, 80)], UNDECIDED, '10.00 points below one crop, on 100 test images.'),
  ],
)
def test_gain_by_crops(networks, verdict, ours, tmp_path):
  for seed, (one, many) in enumerate(networks):
    write_network(tmp_path, 'bn_x30', one, seed, many)
  # Without a file of 144 crops.
  write_network(tmp_path, 'dropout_5', 10)
  row = judge(tmp_path, CROPS)
  assert row.verdict == verdict
  assert ours in row.ours
  assert row.paper == ('144 crops: 3.2 points below (21.99 % against 25.2 %).')
  assert (row.group, row.data) == ('Fig. 4', 'MNIST, 5,000 digits')
  assert judge(tmp_path, ENSEMBLE) is None


@pytest.mark.parametrize(
  'members, ours',
  [
    # Right at 0-59, 20-79 and 40-99: two of them are at 20-79.
    ([(60, 0), (60, 20), (60, 40)], '0.00 points below its best member'),
    # Right at 0-59, 30-89, and all but 30-69: two of them at all but 60-69 and
    # 90-99.
    ([(60, 0), (60, 30), (60, 70)], '20.00 points below its best member'),
    # A member is better by 39 points.
    (
      [(60, 0), (99, 0), (60, 0)],
      '39.00 points above its best member',
    ),
  ],
)
def test_gain_by_the_ensemble(members, ours, tmp_path):
  """One ensemble decides nothing, whatever its members."""
  names = list(fig_4.paper.ENSEMBLE)
  for name, (correct, offset) in zip(names, members, strict=False):
    write_network(tmp_path, name, correct, offset=offset)
  # Not a member.
  write_network(tmp_path, 'bn_x30', 100)
  row = judge(tmp_path, ENSEMBLE)
  assert (row.verdict, row.seeds) == (UNDECIDED, 'a single ensemble')
  assert row.ours.startswith('Ensemble of 3: ') and ours in row.ours
  assert ', on 100 test images, 1 crop' in row.ours
  assert (
    row.paper == 'Ensemble of 6: 1.9 points below (20.1 % against 21.99 %).'
  )
  assert judge(tmp_path, CROPS) is None


def test_the_largest_ensemble_is_judged(tmp_path):
  """With most crops only if as many members have a file."""
  for name, many in (('dropout_5', 80), ('init_2', 80), ('dropout_10', None)):
    write_network(tmp_path, name, 70, many=many)
  row = judge(tmp_path, ENSEMBLE)
  assert 'Ensemble of 3: ' in row.ours and ', 1 crop' in row.ours
  run = tmp_path / 'dropout_10_seed0'
  write_probabilities(run, 80, crops=144)
  row = judge(tmp_path, ENSEMBLE)
  assert 'Ensemble of 3: ' in row.ours and ', 144 crops' in row.ours


def test_without_files_there_is_no_fig_4(tmp_path):
  write_run(tmp_path / 'runs' / 'a', 'bn_x30', [0.5] * 5)
  _, text, ledger = page(tmp_path)
  assert 'Fig. 4' not in text and 'Fig. 4' not in ledger


def test_the_ledger_has_the_claims(tmp_path):
  for name in ('dropout_5', 'init_2'):
    write_network(tmp_path / 'runs', name, 70, many=80)
  _, text, ledger = page(tmp_path)
  for claim in (CROPS, ENSEMBLE):
    assert claim in text
    assert ledger.count(claim) == 1


def damage(run):
  path = run / 'probabilities' / 'test-1.npz'
  path.write_bytes(path.read_bytes()[:-100])


def replace(run):
  write_probabilities(run, 50, data_fingerprint='other')


@pytest.mark.parametrize(
  'change, expected',
  [
    (damage, 'not a file of probabilities'),
    (replace, 'not of the same images'),
  ],
)
def test_files_that_are_left_out(change, expected, tmp_path, capsys):
  """Those of their name; the others are shown."""
  for name in ('dropout_5', 'init_2'):
    run = write_network(tmp_path / 'runs', name, 70, many=80)
  change(run)
  elements, text, ledger = page(tmp_path)
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('warning: Fig. 4 without test-1.npz: ')
  assert expected in line and str(run) in line
  assert line.removeprefix('warning: ') in text
  assert {row['crops'] for row in elements.rows(-1)} == {'144'}
  assert CROPS not in ledger and ENSEMBLE in ledger
