"""The page of runs written by hand, whose results follow by arithmetic."""

import json
import subprocess
import sys

from matplotlib import image
from page_elements import Elements
import pytest
from written_runs import (
  add_lines,
  add_percentiles,
  edit_facts,
  read_one,
  read_sections,
  write_run,
)

from bn_repro import numerics
from bn_repro.paper import FIG_3
from bn_repro.report import costs, figures
from bn_repro.report import page as page_lib
from bn_repro.report import runs as runs_lib
from bn_repro.report import sections as sections_lib
from bn_repro.report.__main__ import main
from bn_repro.report.costs import Cost
from bn_repro.report.tables import costs_table, fig_3


def write_report(tmp_path):
  out = tmp_path / 'out'
  arguments = [f'--runs={tmp_path / "runs"}', f'--out={out}']
  assert main(arguments) == 0
  return (out / 'index.html').read_text(), out


def test_fig_3_has_the_paper_s_numbers_beside_ours(tmp_path):
  write_run(tmp_path / 'a', 'inception', [0.5, 0.8, 0.8, 0.8, 0.8, 0.8])
  write_run(tmp_path / 'b', 'bn_baseline', [0.85] * 6)
  rows = fig_3(*read_sections(tmp_path))
  assert rows[1] == {
    'variant': 'BN-Baseline',
    'learning rate, paper': '0.0015',
    'learning rate, ours': '0.02',
    'steps to 72.2 %, paper': '13.3M',
    "steps to Inception's best, ours": '10',
    'speed-up, paper': '2.3x',
    'speed-up, ours': '2x',
    'best accuracy, %, paper': '72.7',
    'best accuracy, %, ours': '85.0',
    'test accuracy, %, ours': '–',
    'seeds that train': '1 of 1',
    'status': 'done',
  }
  assert [row['status'] for row in rows].count('not run') == len(FIG_3) - 2


def test_values_are_below_their_headings(tmp_path):
  for seed in range(5):
    override = f'seed={seed}'
    write_run(tmp_path / 'runs' / f'a{seed}', 'inception', [0.8] * 6, override)
    best = [0.85] * 6
    write_run(tmp_path / 'runs' / f'b{seed}', 'bn_baseline', best, override)
  page, out = write_report(tmp_path)
  elements = Elements(page)
  claims, fig_3, costs = (elements.rows(number) for number in (0, 1, 2))
  (claim,) = [row for row in claims if 'less than half' in row['claim']]
  sentence = 'BN-Baseline needs 1x fewer steps than Inception (in all 5).'
  expected = {
    'claim': 'BN-Baseline matches Inception in less than half the steps.',
    'paper': 'BN-Baseline needs 2.3x fewer steps than Inception.',
    'MNIST, 5,000 digits': f'does not hold\n{sentence}\n5 seeds',
  }
  assert claim == expected
  headings, _, *rows = (
    [cell.strip() for cell in line.strip('|\n').split('|')]
    for line in (out / 'ledger.md').read_text().splitlines()
    if line.startswith('|')
  )
  expected = {
    'group': 'Fig. 2 and 3: speed',
    'data': 'MNIST, 5,000 digits',
    'folder': 'runs',
    'verdict': 'does not hold',
    'ours': sentence,
    'seeds': '5 seeds',
  }
  ledger = [dict(zip(headings, row, strict=True)) for row in rows]
  (row,) = [row for row in ledger if row['claim'] == claim['claim']]
  assert row == {**row, **expected}
  (row,) = [row for row in fig_3 if row['variant'] == 'BN-Baseline']
  assert row['speed-up, ours'] == '1x'
  assert [row['variant'] for row in costs] == ['Inception', 'BN-Baseline']


def test_the_first_line_counts_claims(tmp_path):
  for seed in range(5):
    folder = tmp_path / 'runs' / 'digits'
    for variant, best in (('bn_x5', 0.8), ('bn_x5_sigmoid', 0.7)):
      write_run(
        folder / f'{variant}{seed}', variant, [best] * 5, f'seed={seed}'
      )
  folder = tmp_path / 'runs' / 'clothes'
  data = 'data.name=fashion_mnist'
  write_run(folder / 's', 'bn_x5_sigmoid', [0.1] * 5, data)
  page, _ = write_report(tmp_path)
  first = '2 of 3 claims hold, 1 is undecided, 0 do not hold'
  assert page.partition('<body>')[2].strip().startswith(f'<h1>{first}</h1>')
  (row,) = [
    row for row in Elements(page).rows(0) if 'sigmoids trains' in row['claim']
  ]
  assert row['Fashion-MNIST'].startswith('undecided\nBN-x5-Sigmoid: best acc')
  assert row['MNIST, 5,000 digits'].startswith('holds\n')


def test_an_introduction_is_below_the_first_line(tmp_path):
  write_run(tmp_path / 'runs' / 'a', 'inception', [0.5])
  page_lib.write_report(
    [tmp_path / 'runs'], tmp_path / 'out', 'Chosen <by> me.'
  )
  text = (tmp_path / 'out' / 'index.html').read_text()
  assert '<p>Chosen &lt;by&gt; me.</p>' in text.partition('<h2>')[0]


@pytest.mark.parametrize('last', [4, 5], ids=['same', 'another seed'])
def test_the_study_as_another_cpu_computes_it(last, tmp_path):
  """Two claims are tested, and the verdicts on one of them differ."""
  for name, accuracy in (('one', 0.8), ('two', 0.75)):
    for variant, best in (('bn_x5', accuracy), ('bn_x5_sigmoid', 0.77)):
      for number in (0, 1, 2, 3, last if name == 'two' else 4):
        folder = tmp_path / 'runs' / name / f'{variant}{number}'
        write_run(folder, variant, [best] * 5, f'seed={number}')
        flags = '--xla_cpu_max_isa=AVX2' if name == 'two' else ''
        edit_facts(folder, xla_flags=flags)
  page, _ = write_report(tmp_path)
  sentence = (
    'of 2 verdicts on MNIST, 5,000 digits are the same in one and two '
    '(XLA_FLAGS=--xla_cpu_max_isa=AVX2). A claim counts as undecided if its '
    'verdicts differ.</p>'
  )
  warning = 'MNIST, 5,000 digits: runs in one, two test the same claims.'
  if last == 4:
    assert f'<p>1 {sentence}' in page
    assert warning not in page
  else:
    assert f'<p class="fails">{warning}' in page
    assert sentence not in page
  # Below the runs of the second folder alone.
  assert page.count('; XLA_FLAGS=--xla_cpu_max_isa=AVX2</small>') == 1


def test_captions_promise_the_loss_only_where_it_is_drawn(tmp_path):
  for data in ('mnist', 'fashion_mnist'):
    folder = tmp_path / 'runs' / data
    write_run(folder, 'inception', [0.5], f'data.name={data}')
  losses = [{'step': 1, 'split': 'train', 'loss': 2.0}]
  add_lines(tmp_path / 'runs' / 'mnist', losses)
  page, _ = write_report(tmp_path)
  for text in ('alt="Accuracy and training loss', 'and the training loss, in'):
    assert page.count(text) == 1
  assert page.count('(Algorithm 2). Each run') == 1


def test_two_folders_with_runs_of_one_claim_are_both_named(tmp_path):
  for name, accuracy in (('one', 0.8), ('two', 0.1)):
    for seed in range(5):
      folder = tmp_path / 'runs' / name / f'{seed}'
      write_run(folder, 'bn_x5_sigmoid', [accuracy] * 5, f'seed={seed}')
  page, _ = write_report(tmp_path)
  (row,) = [
    row for row in Elements(page).rows(0) if 'sigmoids trains' in row['claim']
  ]
  lines = row['MNIST, 5,000 digits'].splitlines()
  assert lines[:2] == ['undecided', 'one: holds']
  assert 'two: does not hold' in lines
  assert 'MNIST, 5,000 digits: runs in one, two test the same claims.' in page
  assert '0 of 1 claims hold, 1 is undecided' in page


def test_runs_that_are_left_out_are_listed_and_change_nothing(tmp_path, capsys):
  """Of another setting, unfinished, repeated, or edited."""
  runs = tmp_path / 'runs'
  for seed in range(3):
    write_run(runs / f'good{seed}', 'bn_x5', [0.8] * 5, f'seed={seed}')
  _, out = write_report(tmp_path)
  before = (out / 'ledger.md').read_text()
  write_run(runs / 'stray', 'bn_x5', [0.9] * 5, 'seed=7', 'total_steps=900')
  write_run(runs / 'going', 'bn_x5', [0.9] * 5, 'seed=8', status='running')
  write_run(runs / 'twin', 'bn_x5', [0.9] * 5, 'seed=2')
  write_run(runs / 'edited', 'bn_x5', [0.9] * 5, 'seed=9')
  status = json.loads((runs / 'edited' / 'status.json').read_text())
  text = json.dumps({'checksum': 'sha256:0', **status})
  (runs / 'edited' / 'status.json').write_text(text)
  page, _ = write_report(tmp_path)
  assert (out / 'ledger.md').read_text() == before
  (row, *_) = Elements(page).rows(1)
  assert row['best accuracy, %, ours'] == '80.0'
  assert row['seeds that train'] == '3 of 3'
  listed = page.partition('Problems with the runs</h2>')[2].partition('</ul>')[
    0
  ]
  shown = listed.split('<li>')[1:]
  assert len(shown) == 4
  errors = capsys.readouterr().err
  for part in (
    'runs/stray: left out, because its setting is not that of the 3 runs '
    'beside it: total_steps 900, not 500.',
    'runs/going: left out, because it is unfinished: running at step 50.',
    'runs/twin: left out, because runs/good2 has the same config, '
    'seed and fold.',
    'does not match its checksum',
  ):
    assert part in errors
    assert sum(part in item for item in shown) == 1


def test_no_two_sections_have_one_title(tmp_path):
  """Two folders of one name, and two networks and data sets in a folder."""
  for parent in 'xy':
    folder = tmp_path / 'runs' / parent / 'same'
    write_run(folder / 'a', 'inception', [0.5])
    write_run(folder / 'b', 'inception', [0.5], 'model.name=inception_tiny')
    write_run(folder / 'c', 'mnist', [0.5])
    write_run(folder / 'd', 'inception', [0.5], 'data.name=mnist')
  folders = [tmp_path / 'runs' / parent for parent in 'xy']
  page_lib.write_report(folders, tmp_path / 'out')
  page = (tmp_path / 'out' / 'index.html').read_text()
  titles = Elements(page).headings
  assert len(set(titles)) == len(titles) == 2 + 8
  assert 'Fig. 2 and 3 on MNIST, 5,000 digits (x/same)' in titles
  assert 'Fig. 1 on MNIST, 5,000 digits (y/same)' in titles


def cost(steps, flops, cpu_minutes=None):
  return Cost(steps, 32 * steps, flops, cpu_minutes)


def test_costs_are_beside_those_of_inception(tmp_path, monkeypatch):
  """By hand: 2x fewer steps, 1.6x fewer FLOPs, 1.25x more minutes."""
  write_run(tmp_path / 'a', 'inception', [0.8] * 5)
  write_run(tmp_path / 'b', 'bn_baseline', [0.8] * 5)
  write_run(tmp_path / 'c', 'bn_x5', [0.5] * 5)
  of_variant = {
    'inception': cost(2000, 8e12, 4.0),
    'bn_baseline': cost(1000, 5e12, 5.0),
    'bn_x5': None,
  }
  monkeypatch.setattr(
    costs, 'to_target', lambda run, target: of_variant[run.variant]
  )
  rows = costs_table(*read_sections(tmp_path))
  assert rows[1] == {
    'variant': 'BN-Baseline',
    'steps, paper': '2.33x less',
    'steps of 32 images, ours': '1,000 (2x less)',
    'images': '32,000 (2x less)',
    'FLOPs': '5e+12 (1.6x less)',
    'CPU-minutes': '5 (1.25x more)',
  }
  assert rows[2] == {
    **dict.fromkeys(rows[1], 'never'),
    'variant': 'BN-x5',
    'steps, paper': '14.8x less',
  }
  of_variant['bn_baseline'] = cost(1000, None)
  rows = costs_table(*read_sections(tmp_path))
  assert (rows[1]['images'], rows[1]['FLOPs']) == ('32,000 (2x less)', '–')


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
  (row, *_) = fig_3(*read_sections(tmp_path))
  assert row['best accuracy, %, ours'] == '85.0 (80.0 to 90.0)'
  assert row['seeds that train'] == '3 of 3'


def test_a_run_that_diverged_early_ranks_lowest(tmp_path):
  for seed, best in enumerate((0.80, 0.90)):
    write_run(tmp_path / f'p{seed}', 'bn_x5', [best] * 5, f'seed={seed}')
  status = {'status': 'diverged', 'step': 7}
  write_run(tmp_path / 'hot', 'bn_x5', [], 'seed=2', **status)
  (row, *_) = fig_3(*read_sections(tmp_path))
  assert row['best accuracy, %, ours'] == '80.0 (diverged to 90.0)'
  assert row['seeds that train'] == '2 of 3'
  assert row['status'] == 'done, diverged at step 7'


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
  for seed in range(5):
    for variant, end in (('mnist', 0.9), ('bn_mnist', 0.95)):
      folder = tmp_path / 'runs' / f'{variant}{seed}'
      write_run(folder, variant, [0.5] + [end] * 19, f'seed={seed}')
      add_percentiles(folder, [[[-1, -1], [0, 0], [1, 1]]] * 20)
  page, out = write_report(tmp_path)
  assert (out / 'runs.png').stat().st_size > 1000
  # Steps of 60 images, as in the paper's Fig. 1.
  assert '<td>20</td>' in page
  assert '92.8' in page


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
  page, _ = write_report(tmp_path)
  assert '<td>85.0 (80.0 to 90.0)</td>' in page
  assert 'medians over seeds, of two seeds the mean' in page


@pytest.mark.parametrize(
  'status, shown', [('done', 'never'), ('running', 'not yet')]
)
def test_targets_that_are_not_reached(status, shown, tmp_path):
  """Only a run that has ended never reaches them."""
  write_run(tmp_path / 'a', 'inception', [0.8] * 5)
  write_run(tmp_path / 'b', 'bn_baseline', [0.3] * 5, status=status)
  runs, _ = runs_lib.read_runs([str(tmp_path)])
  sections, _ = sections_lib.group(runs)
  row = fig_3(*sections)[1]
  assert list(row.values()).count(shown) == 2


def test_without_a_network_to_speed_up(tmp_path):
  """Inception does not learn: there is no target to reach and no factor."""
  write_run(tmp_path / 'a', 'inception', [0.1] * 5)
  write_run(tmp_path / 'b', 'bn_baseline', [0.8] * 5)
  (section,) = read_sections(tmp_path)
  assert fig_3(section)[1]['speed-up, ours'] == '–'
  assert costs_table(section) == []


def test_fig_1_without_percentiles(tmp_path):
  write_run(tmp_path / 'runs' / 'a', 'mnist', [0.95] * 3)
  page, _ = write_report(tmp_path)
  # Neither twenty evaluations nor a drift.
  assert '<td>10</td><td>–</td><td>–</td>' in page


def test_mismatches_are_named(tmp_path):
  runs = tmp_path / 'runs'
  write_run(runs / 'a', 'inception', [0.5])
  write_run(runs / 'b', 'bn_x5', [0.5], 'eval_every=50', 'bn.momentum=0.5')
  write_run(runs / 'c', 'bn_x5', [0.5], 'data.name=mnist')
  page, out = write_report(tmp_path)
  assert 'not comparable: they differ in eval_every (20, 50).' in page
  assert (
    '<li>runs: BN-x5 does not differ from Inception as configs/bn_x5.py does: '
    'bn.momentum 0.5 beside 0.9, not 0.9 beside 0.9.</li>'
  ) in page
  assert 'Fig. 2 and 3 on MNIST (runs)' in page
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
    'runs: 4 of 5 runs were made by other numerics (0123456789ab) '
    f'than those of this code ({numerics.digest()}), which may give other '
    'results: a, b, d and 1 more. Train them again.'
  )
  assert f'warning: {expected}\n' in capsys.readouterr().err
  assert f'<li>{expected}</li>' in page


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
