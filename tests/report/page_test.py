"""The page of runs written by hand, whose results follow by arithmetic."""

import json
import subprocess
import sys

from matplotlib import image
from page_elements import Elements
import pytest
from written_runs import (
  add_percentiles,
  edit_facts,
  read_one,
  read_sections,
  write_run,
)

from bn_repro import numerics
from bn_repro.paper import FIG_3
from bn_repro.report import figures
from bn_repro.report.__main__ import main
from bn_repro.report.page import fig_3


def write_report(tmp_path):
  out = tmp_path / 'out'
  arguments = [f'--runs={tmp_path / "runs"}', f'--out={out}']
  assert main(arguments) == 0
  return (out / 'index.html').read_text(), out


def test_fig_3_has_the_paper_s_numbers_beside_ours(tmp_path):
  write_run(tmp_path / 'a', 'inception', [0.5, 0.8, 0.8, 0.8, 0.8, 0.8])
  write_run(tmp_path / 'b', 'bn_baseline', [0.85] * 6)
  table = fig_3(*read_sections(tmp_path))
  row = table.split('<tr>')[3].replace('</td>', '').split('<td>')[1:]
  assert '|'.join(row) == (
    'BN-Baseline|0.0015|0.02|13.3M|10|2.3x|2x|72.7|85.0|–|1|done</tr>'
  )
  assert table.count('not run') == len(FIG_3) - 2


def test_values_are_below_their_headings(tmp_path):
  write_run(tmp_path / 'runs' / 'a', 'inception', [0.8] * 6)
  write_run(tmp_path / 'runs' / 'b', 'bn_baseline', [0.85] * 6, 'seed=0')
  page, out = write_report(tmp_path)
  ledger, fig_3 = (Elements(page).rows(number) for number in (0, 1))
  (claim,) = [row for row in ledger if 'less than half' in row['claim']]
  expected = {
    'verdict': 'does not hold here',
    'ours': '1x fewer steps than Inception',
    'paper': '2.3x fewer steps (13.3M against 31M)',
    'section': 'runs (mnist_5k)',
    'seeds': '0',
  }
  assert claim == {**claim, **expected}
  headings, _, *rows = (
    [cell.strip() for cell in line.strip('|\n').split('|')]
    for line in (out / 'ledger.md').read_text().splitlines()
    if line.startswith('|')
  )
  assert claim in [dict(zip(headings, row, strict=True)) for row in rows]
  (row,) = [row for row in fig_3 if row['variant'] == 'BN-Baseline']
  expected = {
    'learning rate, paper': '0.0015',
    'learning rate, ours': '0.02',
    'steps to 72.2 %, paper': '13.3M',
    "steps to Inception's best, ours": '10',
    'speed-up, paper': '2.3x',
    'speed-up, ours': '1x',
    'best accuracy, %, paper': '72.7',
    'best accuracy, %, ours': '85.0',
    'runs': '1',
    'status': 'done',
  }
  assert row == {**row, **expected}


def test_text_of_runs_is_no_markup(tmp_path):
  """Whatever the text is, the page has the same elements."""

  def elements(text):
    folder = tmp_path / str(len(text)) / 'runs' / f'in {text}'
    for name, variant, status in (
      ('a', text, {}),
      ('b', f'{text}2', {'status': 'diverged', 'reason': text}),
      ('c', 'mnist', {}),
    ):
      write_run(folder / name, variant, [0.5], **status)
      run = folder / name / 'run.json'
      facts = json.loads(run.read_text())
      facts |= {'git_revision': text, 'versions': {text: text}}
      facts |= {'started': text, 'devices': [text]}
      run.write_text(json.dumps(facts))
    (folder / 'd').mkdir()
    (folder / 'd' / 'config.json').write_text('{')
    # Repeats a run, and a field differs.
    write_run(folder / 'e', text, [0.5])
    write_run(folder / 'f', f'{text}3', [0.5], 'total_steps=900')
    # A sweep, whose text names the variant.
    sweep = folder.with_name(f'sweep of {text}')
    for rate in (0.1, 0.2, 0.4):
      override = f'optim.learning_rate={rate}'
      write_run(sweep / str(rate), text, [0.5] * 5, override)
    out = tmp_path / str(len(text)) / 'out'
    assert main([f'--runs={folder}', f'--runs={sweep}', f'--out={out}']) == 0
    page = (out / 'index.html').read_text()
    return Elements(page).tags, page

  tags, _ = elements('plain')
  hostile, page = elements("\"<b onload='x'>&lt;<script>")
  assert hostile == tags
  assert '&amp;lt;' in page


def test_fig_3_medians_and_ranges(tmp_path):
  for seed, best in enumerate((0.80, 0.90, 0.85)):
    write_run(tmp_path / f'p{seed}', 'inception', [best] * 5, f'seed={seed}')
  table = fig_3(*read_sections(tmp_path))
  assert '85.0 (80.0 to 90.0)' in table
  assert '<td>3</td>' in table


def test_page(tmp_path, capsys):
  runs = tmp_path / 'runs'
  write_run(runs / 'plain', 'inception', [0.5, 0.8])
  write_run(runs / 'base', 'bn_baseline', [0.85])
  write_run(runs / 'hot', 'inception_x5', [], status='diverged', step=7)
  write_run(runs / 'own', '<b>own $x^$', [0.3])
  write_run(runs / 'going', 'bn_x30', [0.3], status='running', step=10)
  write_run(runs / 'broken', 'bn_x5', [0.9])
  lines = (runs / 'broken' / 'metrics.jsonl').read_text()
  (runs / 'broken' / 'metrics.jsonl').write_text('x\n' + lines)
  page, out = write_report(tmp_path)
  for text in (
    'Inception',
    'BN-Baseline',
    'diverged at step 7',
    'running at step 10',
    '&lt;b&gt;own',
    'broken',
  ):
    assert text in page
  assert '<b>own' not in page
  assert 'metrics.jsonl:1' in capsys.readouterr().err
  for picture in ('runs', 'runs_moving'):
    assert f'<img src="{picture}.png"' in page
    assert image.imread(out / f'{picture}.png').shape[1] == 1200
  assert 'BN-x30 reaches the highest' in (out / 'ledger.md').read_text()


def test_page_of_fig_1(tmp_path):
  for seed in (0, 1):
    for variant, end in (('mnist', 0.9), ('bn_mnist', 0.95)):
      folder = tmp_path / 'runs' / f'{variant}{seed}'
      write_run(folder, variant, [0.5] + [end] * 19, f'seed={seed}')
      add_percentiles(folder, [[[-1, -1], [0, 0], [1, 1]]] * 20)
  page, out = write_report(tmp_path)
  assert (out / 'runs.png').stat().st_size > 1000
  # Steps of 60 images, as in the paper's Fig. 1.
  assert '<td>20 (20 to 20)</td>' in page
  assert '92.8 (92.8 to 92.8)' in page


def test_page_of_settings_of_fig_1(tmp_path):
  for variant, end in (('mnist', 0.11), ('bn_mnist', 0.95)):
    for std in (0.05, 0.1):
      folder = tmp_path / 'runs' / f'{variant}{std}'
      write_run(folder, variant, [end] * 5, f'model.init_std={std}')
  page, _ = write_report(tmp_path)
  assert page.count('11.0 → 95.0') == 2
  assert 'rate 0.1' in page


def test_page_of_a_sweep(tmp_path):
  for rate in (0.1, 0.2, 0.4):
    folder = tmp_path / 'runs' / f'{rate}'
    good = rate < 0.3
    override = f'optim.learning_rate={rate}'
    write_run(folder, 'inception', [0.9 if good else 0.1] * 5, override)
  page, out = write_report(tmp_path)
  assert 'Inception 0.2.' in page
  assert (out / 'runs.png').stat().st_size > 1000
  assert 'Inception, optim.learning_rate=0.4' in page


def test_page_of_runs_with_few_evaluations(tmp_path):
  """Nothing is named a best accuracy, or follows from it."""
  for rate in (0.1, 0.2, 0.4):
    folder = tmp_path / 'runs' / f'{rate}'
    write_run(folder, 'inception', [0.9] * 4, f'optim.learning_rate={rate}')
  page, _ = write_report(tmp_path)
  assert 'Inception unknown (a run has fewer than 5 evaluations).' in page
  assert '90.0' not in page


def test_values_of_two_seeds_are_named_means(tmp_path):
  for seed, best in enumerate((0.8, 0.9)):
    folder = tmp_path / 'runs' / f'{seed}'
    write_run(folder, 'inception', [best] * 5, f'seed={seed}')
  page, out = write_report(tmp_path)
  assert '<td>85.0 (80.0 to 90.0)</td>' in page
  for text in (page, (out / 'ledger.md').read_text()):
    assert 'medians over seeds, of two seeds the mean' in text


@pytest.mark.parametrize(
  'status, shown', [('done', 'never'), ('running', 'not yet')]
)
def test_targets_that_are_not_reached(status, shown, tmp_path):
  """Only a run that has ended never reaches them."""
  write_run(tmp_path / 'a', 'inception', [0.8] * 5)
  write_run(tmp_path / 'b', 'bn_baseline', [0.3] * 5, status=status)
  row = fig_3(*read_sections(tmp_path)).split('<tr>')[3]
  assert row.count(f'<td>{shown}</td>') == 2


def test_without_a_network_to_speed_up(tmp_path):
  """Inception does not learn: there is no target to reach and no factor."""
  write_run(tmp_path / 'a', 'inception', [0.1] * 5)
  write_run(tmp_path / 'b', 'bn_baseline', [0.8] * 5)
  rows = fig_3(*read_sections(tmp_path)).split('<tr>')
  row = rows[3].replace('</td>', '').split('<td>')[1:]
  assert row[6] == '–'


def test_fig_1_without_percentiles(tmp_path):
  write_run(tmp_path / 'runs' / 'a', 'mnist', [0.95] * 3)
  page, _ = write_report(tmp_path)
  # Neither twenty evaluations nor a drift.
  assert '<td>10</td><td>–</td><td>–</td>' in page


def test_mismatches_are_named(tmp_path):
  runs = tmp_path / 'runs'
  write_run(runs / 'a', 'inception', [0.5])
  write_run(runs / 'b', 'bn_x5', [0.5], 'total_steps=900')
  write_run(runs / 'c', 'bn_x5', [0.5], 'data.name=mnist')
  page, out = write_report(tmp_path)
  assert 'not comparable: they differ in total_steps (500, 900).' in page
  assert 'runs (mnist)' in page
  assert (out / 'runs_2.png').exists()


def test_typical_unit_is_that_of_median_drift(tmp_path):
  write_run(tmp_path / 'a', 'mnist', [0.5, 0.6])
  start = [[-1, -1, -1], [0, 0, 0], [1, 1, 1]]
  add_percentiles(tmp_path / 'a', [start, [[-1] * 3, [9, 5, 7], [1] * 3]])
  assert figures.typical_unit(read_one(tmp_path)) == 2


def test_the_same_run_twice_is_named_and_counts_once(tmp_path, capsys):
  for name in ('a', 'copy'):
    write_run(tmp_path / 'runs' / name, 'inception', [0.5])
  write_run(tmp_path / 'runs' / 'b', 'bn_baseline', [0.5])
  page, _ = write_report(tmp_path)
  for text in (page, capsys.readouterr().err):
    assert 'copy: left out, because ' in text


def test_runs_of_other_numerics_are_named(tmp_path, capsys):
  for name in ('a', 'b', 'c', 'd', 'e'):
    write_run(tmp_path / 'runs' / name, 'inception', [0.5], f'seed={ord(name)}')
    if name != 'c':
      edit_facts(tmp_path / 'runs' / name, numerics='0123456789ab')
  page, _ = write_report(tmp_path)
  expected = (
    'runs (mnist_5k): 4 of 5 runs were made by other numerics (0123456789ab) '
    f'than those of this code ({numerics.digest()}), which may give other '
    'results: a, b, d and 1 more. Train them again.'
  )
  assert f'warning: {expected}\n' in capsys.readouterr().err
  assert f'<p class="fails">{expected}</p>' in page


def test_fig_1_with_another_setting_is_still_drawn(tmp_path):
  write_run(tmp_path / 'runs' / 'a', 'mnist', [0.5])
  write_run(tmp_path / 'runs' / 'b', 'mnist', [0.6], 'optim.momentum=0.9')
  page, out = write_report(tmp_path)
  assert 'Without BN, optim.momentum=0.9' in page
  assert (out / 'runs.png').exists()


def test_report_imports_no_jax(tmp_path):
  write_run(tmp_path / 'runs' / 'a', 'inception', [0.5])
  code = (
    'import sys; from bn_repro.report.__main__ import main; '
    'assert main(sys.argv[1:]) == 0; assert "jax" not in sys.modules'
  )
  arguments = [f'--runs={tmp_path / "runs"}', f'--out={tmp_path / "out"}']
  subprocess.run([sys.executable, '-c', code, *arguments], check=True)


@pytest.mark.parametrize(
  'is_empty, message',
  [(True, 'contains no run'), (False, 'File exists')],
  ids=['no runs', 'out is a file'],
)
def test_mistakes_are_one_line(is_empty, message, tmp_path, capsys):
  out = tmp_path / 'out'
  if not is_empty:
    write_run(tmp_path / 'runs' / 'a', 'inception', [0.5])
    out.write_text('mine')
  assert main([f'--runs={tmp_path}', f'--out={out}']) == 1
  error = capsys.readouterr().err
  assert message in error
  assert error.count('\n') == 1
  assert not out.is_dir()
