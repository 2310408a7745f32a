"""What is concluded from the trials of a sweep, on runs written by hand."""

from collections import Counter
import csv
import json
import math
import shutil

from matplotlib import image
import pytest
from written_runs import write_run

from bn_repro import paper
from bn_repro.errors import UserError
from bn_repro.report import drawing
from bn_repro.sweep import comparison, figures, grid

# Accuracies of ten evaluations; the best mean of five of the first is .6, which
# it first reaches at the sixth.
PLAIN = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6]
FAST = [0.1, 0.7, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8]
CHANCE = [0.1] * 10


def load(*axes):
  return grid.load(
    'configs/sweeps/lr_multipliers.py',
    [*axes, 'variant=inception,bn_baseline'],
    overrides=['total_steps=100'],
  )


def write(folder, sweep, curves, seeds_lower=0.0, **endings):
  """Runs by (variant, multiplier); seed 1 is `seeds_lower` below seed 0."""
  for trial in sweep.trials:
    key = trial.values['variant'], trial.values['multiplier']
    lower = seeds_lower * trial.values['seed']
    accuracies = [round(a - lower, 6) for a in curves.get(key, CHANCE)]
    write_run(
      folder / trial.name,
      trial.values['variant'],
      accuracies,
      *trial.overrides,
      **endings.get(trial.name, {}),
    )


def add_test(folder, accuracy):
  path = folder / 'metrics.jsonl'
  line = json.loads(path.read_text().splitlines()[-1])
  line |= {'split': 'test', 'accuracy': accuracy}
  with path.open('a') as file:
    file.write(json.dumps(line) + '\n')


@pytest.fixture
def usual(tmp_path):
  """Without BN it learns up to x2, with BN from x1 to x15."""
  sweep = load('multiplier=1,2,5,10,15,30')
  curves = {('inception', m): PLAIN for m in (1, 2)}
  curves |= {('bn_baseline', m): FAST for m in (1, 2, 5, 10, 15)}
  curves[('bn_baseline', 5)] = [a + 0.05 for a in FAST]
  diverged = {
    f'inception_multiplier30_seed{seed}': {
      'status': 'diverged',
      'step': 100,
      'reason': 'loss',
    }
    for seed in (0, 1)
  }
  write(tmp_path, sweep, curves, **diverged)
  for trial in sweep.trials:
    # On test images another setting is best, which no output may show.
    best = trial.name.startswith('bn_baseline_multiplier5_')
    add_test(
      tmp_path / trial.name, 0.8 + trial.values['seed'] / 50 if best else 0.99
    )
  return comparison.read(sweep, tmp_path, ())


def test_range_of_usable_rates(usual):
  """By hand: 15 over 1 against 2 over 1."""
  first, second, note, _ = comparison.conclusions(usual)
  assert first == 'Inception: learns with multiplier 1* to 2, a factor of 2.'
  assert second == (
    'BN-Baseline: learns with multiplier 1* to 15, a factor of 15; 7.5 times '
    'the range of Inception.'
  )
  assert note == '(*) An end of the sweep, beyond which nothing was tried.'


def test_best_by_validation_and_its_test_accuracy(usual):
  assert comparison.conclusions(usual)[-1] == (
    'Best on validation images: variant bn_baseline, multiplier 5, 85.00 % '
    '(mean of 2); after the last step, on the test images 81.00 %.'
  )
  for text in (comparison.table(usual), comparison.summary(usual)):
    assert '99' not in text


def test_table(usual):
  rows = {
    row['trial']: row
    for row in csv.DictReader(comparison.table(usual).splitlines())
  }
  assert len(rows) == 24
  row = rows['bn_baseline_multiplier2_seed1']
  assert row == {
    'trial': 'bn_baseline_multiplier2_seed1',
    'variant': 'bn_baseline',
    'multiplier': '2',
    'seed': '1',
    'status': 'done',
    'step': '100',
    'total_steps': '100',
    'best_mean_of_5_validation_accuracy': '0.8',
    'mean_of_last_5_validation_accuracy': '0.8',
    'equivalent_steps_to_target': '20.0',
    'learns': 'True',
  }
  assert rows['inception_multiplier1_seed0']['equivalent_steps_to_target'] == (
    '60.0'
  )
  assert rows['inception_multiplier30_seed0']['status'] == 'diverged'
  assert rows['inception_multiplier5_seed0']['learns'] == 'False'
  assert rows['inception_multiplier5_seed0']['equivalent_steps_to_target'] == ''


def test_summary(usual):
  text = comparison.summary(usual)
  assert '| inception | 1 | 2 | 60.0 | 60 | done |' in (text)
  assert '| inception | 5 | 2 | 10.0 | never ' in (text)
  assert 'diverged at step 100' in text
  assert 'seed: 0: 60.0 %, 1: 60.0 %' in text


def test_each_seed_has_a_target_of_its_own(tmp_path):
  sweep = load('multiplier=1,2')
  curves = dict.fromkeys(
    [('inception', 1), ('inception', 2), ('bn_baseline', 1)], PLAIN
  )
  write(tmp_path, sweep, curves, seeds_lower=0.2)
  found = comparison.read(sweep, tmp_path, ())
  assert found.targets == pytest.approx({0: 0.6, 1: 0.4})
  by_name = {result.trial.name: result for result in found.results}
  assert by_name['inception_multiplier2_seed1'].steps_to_target == 60


def test_a_seed_that_does_not_learn_makes_a_rate_unusable(tmp_path):
  sweep = load('multiplier=1,2,5')
  curves = {
    (variant, m): [0.3] * 10
    for variant in ('inception', 'bn_baseline')
    for m in (1, 2, 5)
  }
  curves['inception', 2] = [0.25] * 10
  # Twice chance is .2: seed 1 of Inception at x2 is below.
  write(tmp_path, sweep, curves, seeds_lower=0.06)
  first, second, *_ = comparison.conclusions(
    comparison.read(sweep, tmp_path, ())
  )
  assert first == 'Inception: learns with multiplier 1* alone, a factor of 1.'
  assert second == (
    'BN-Baseline: learns with multiplier 1* to 5*, a factor of 5; 5 times the '
    'range of Inception.'
  )


def test_no_wider_range_and_none_at_all(tmp_path):
  sweep = load('multiplier=1,2', 'seed=0')
  same = {('inception', 1): PLAIN, ('bn_baseline', 2): FAST}
  write(tmp_path / 'same', sweep, same)
  _, second, *_ = comparison.conclusions(
    comparison.read(sweep, tmp_path / 'same', ())
  )
  assert second.endswith('a factor of 1; no wider than Inception.')
  write(tmp_path / 'none', sweep, {('bn_baseline', 2): FAST})
  found = comparison.read(sweep, tmp_path / 'none', ())
  first, second, *_ = comparison.conclusions(found)
  assert first == 'Inception: learns at no multiplier.'
  assert second.startswith('BN-Baseline: learns with multiplier 2* alone')
  assert found.targets == {0: None}
  # There is nothing to reach, or never to reach.
  assert 'never' not in comparison.summary(found)
  assert all(result.steps_to_target is None for result in found.results)


def test_what_has_not_ended_is_named(tmp_path):
  sweep = load('multiplier=1', 'seed=0')
  write(
    tmp_path,
    sweep,
    {('inception', 1): PLAIN},
    bn_baseline_multiplier1_seed0={'status': 'preempted'},
  )
  lines = comparison.conclusions(comparison.read(sweep, tmp_path, ()))
  assert lines[1] == 'BN-Baseline: 1 trials have not ended.'
  assert lines[-1] == (
    'Not ended: 1 of 2 trials, bn_baseline_multiplier1_seed0.'
  )


def test_trials_that_were_not_started(tmp_path, usual):
  sweep = usual.sweep
  missing = sweep.trials[0].name
  shutil.rmtree(tmp_path / missing)
  found = comparison.read(sweep, tmp_path, ())
  assert {r.trial.name: r.status for r in found.results}[
    missing
  ] == 'not started'
  lines = comparison.conclusions(found)
  # Nothing is said of a range of which a part is unknown.
  assert lines[0] == 'Inception: 1 trials have not ended.'
  assert lines[1].endswith('15, a factor of 15.')
  assert lines[-1] == f'Not ended: 1 of 24 trials, {missing}.'
  with pytest.raises(UserError, match='no trial of this sweep'):
    comparison.read(sweep, tmp_path / 'nothing', ())


def test_diverged_trials_are_no_best_setting(tmp_path):
  sweep = load('multiplier=1,2', 'seed=0')
  write(
    tmp_path,
    sweep,
    {('inception', 1): PLAIN, ('bn_baseline', 2): FAST},
    bn_baseline_multiplier2_seed0={'status': 'diverged', 'reason': 'loss'},
  )
  lines = comparison.conclusions(comparison.read(sweep, tmp_path, ()))
  assert 'variant inception, multiplier 1, 60.00 %' in lines[-1]


def test_trials_with_few_evaluations_are_not_ranked(tmp_path):
  """Four of .95 are better than ten of .8, but are not a mean of five."""
  sweep = load('multiplier=1,2', 'seed=0')
  write(
    tmp_path,
    sweep,
    {
      ('inception', 1): PLAIN,
      ('bn_baseline', 1): FAST,
      ('bn_baseline', 2): [0.95] * 4,
    },
  )
  found = comparison.read(sweep, tmp_path, ())
  first, second, *_, best = comparison.conclusions(found)
  assert first == 'Inception: learns with multiplier 1* alone, a factor of 1.'
  assert second == 'BN-Baseline: 1 trials have fewer than 5 evaluations.'
  assert 'variant bn_baseline, multiplier 1, 80.00 %' in best
  text = comparison.summary(found)
  row = '| bn_baseline | 2 | 1 | – | 10 | too few evaluations |'
  assert row in text and '95.0' not in text
  rows = list(csv.DictReader(comparison.table(found).splitlines()))
  (few,) = [r for r in rows if r['trial'] == 'bn_baseline_multiplier2_seed0']
  columns = ('best_mean_of_5', 'mean_of_last_5')
  assert [few[f'{c}_validation_accuracy'] for c in columns] == ['', '']
  assert few['learns'] == ''


def test_no_setting_with_enough_evaluations(tmp_path):
  sweep = load('multiplier=1', 'seed=0')
  curves = {(v, 1): [0.9] for v in ('inception', 'bn_baseline')}
  write(tmp_path, sweep, curves)
  *_, best = comparison.conclusions(comparison.read(sweep, tmp_path, ()))
  assert best == (
    'Best: no setting has all of its trials done, with 5 evaluations or more.'
  )


@pytest.mark.parametrize(
  'seeds, name, cell, best',
  [
    ('0', '', '60.0', '60.00 %.'),
    ('0,1', ', mean of 2', '55.0 (50.0 to 60.0)', '55.00 % (mean of 2).'),
    ('0,1,2', ', median of 3', '50.0 (40.0 to 60.0)', '50.00 % (median of 3).'),
    ('0,1,2,3', ', median of 4', '45.0 (30.0 to 60.0)', '(median of 4).'),
  ],
)
def test_one_statistic_over_seeds(seeds, name, cell, best, tmp_path):
  """The table, its caption and the conclusion use it, by its name."""
  sweep = load('multiplier=1', f'seed={seeds}')
  write(tmp_path, sweep, {('inception', 1): PLAIN}, seeds_lower=0.1)
  found = comparison.read(sweep, tmp_path, ())
  text = comparison.summary(found)
  for head in ('best validation accuracy, %', 'steps of 32 to the target'):
    assert f'| {head}{name} |' in text
  assert f'| inception | 1 | {len(sweep.trials) // 2} | {cell} |' in text
  assert best.rstrip('.') in comparison.conclusions(found)[-1]
  assert (f' Values are the{name[1:]} over seed, with' in text) == bool(name)


def test_named_settings_have_no_ranges(tmp_path):
  sweep = grid.load(
    'configs/sweeps/section_421.py',
    [
      'net=bn_baseline,baseline_with_smaller_l2,x5_without_smaller_l2',
      'seed=0',
    ],
    overrides=['total_steps=100'],
  )
  for trial in sweep.trials:
    write_run(tmp_path / trial.name, 'bn_x5', FAST, *trial.overrides)
  found = comparison.read(sweep, tmp_path, ())
  beside, best = comparison.conclusions(found)
  assert beside == (
    'Best accuracy beside bn_baseline, for each seed: '
    'baseline_with_smaller_l2 undecided (fewer than five values).'
  )
  assert 'net bn_baseline, 80.00 %. It was not' in best
  figure = figures.draw_names(found)
  best, shares, _ = figure.axes
  names = [label.get_text() for label in best.get_yticklabels()]
  assert names == [
    'BN-Baseline',
    'baseline with smaller l2',
    'x5 without smaller l2',
  ]
  points = [line for line in best.lines if line.get_marker() == 'o']
  assert [line.get_ydata() for line in points] == [[0], [1], [2]]
  assert [line.get_xdata() for line in points] == [[pytest.approx(0.8)]] * 3
  assert points[0].get_color() == drawing.color_of('bn_baseline')
  assert [text.get_text() for text in shares.texts] == ['1/1'] * 3
  (line,) = [ln for ln in best.lines if ln.get_label() == 'BN-Baseline']
  assert line.get_xdata() == pytest.approx([0.8, 0.8])
  figures.plt.close(figure)


def test_named_settings_beside_what_they_change(tmp_path):
  """By the differences of each seed, whose interval is their range."""
  sweep = grid.load(
    'configs/sweeps/section_421.py',
    [
      'net=bn_baseline,baseline_with_smaller_l2,baseline_with_faster_decay,'
      'bn_x5,x5_without_smaller_l2',
      'seed=0,1,2,3,4',
    ],
    overrides=['total_steps=100'],
  )
  higher = {
    'bn_baseline': (0, 0, 0, 0, 0),
    'baseline_with_smaller_l2': (0.01, 0.02, 0.03, 0.04, 0.05),
    'baseline_with_faster_decay': (-0.01, 0.02, 0.02, 0.02, 0.03),
    'bn_x5': (0.1, 0.1, 0.1, 0.1, 0.1),
    'x5_without_smaller_l2': (0.09, 0.08, 0.07, 0.06, 0.05),
  }
  for trial in sweep.trials:
    more = higher[trial.values['net']][trial.values['seed']]
    # Other seeds end elsewhere, which pairs leave out.
    lower = 0.1 * trial.values['seed']
    curve = [round(a + more - lower, 6) for a in FAST]
    write_run(tmp_path / trial.name, 'bn_x5', curve, *trial.overrides)
  baseline, x5, _ = comparison.conclusions(comparison.read(sweep, tmp_path, ()))
  assert baseline == (
    'Best accuracy beside bn_baseline, for each seed: '
    'baseline_with_smaller_l2 3.0 points above (1.0 to 5.0); '
    'baseline_with_faster_decay undecided (1.0 points below to 3.0 points '
    'above).'
  )
  assert x5 == (
    'Best accuracy beside bn_x5, for each seed: x5_without_smaller_l2 3.0 '
    'points below (1.0 to 5.0).'
  )


def test_marks_of_the_picture(usual):
  """A mark for each trial that diverged, and for each target missed."""
  figure = figures.draw_numbers(usual)
  best, shares, steps = figure.axes
  states = Counter(result.outcome for result in usual.results)
  crosses = [line for line in best.lines if line.get_marker() == 'x']
  assert len(crosses) == states['diverged'] == 2
  assert [line.get_ydata() for line in crosses] == [[pytest.approx(0.1)]] * 2
  missed = [line for line in steps.lines if 'infty' in str(line.get_marker())]
  # Four of Inception, and one of BN-Baseline.
  assert [line.get_xdata() for line in missed] == [[5], [10], [15], [30], [30]]
  written = {
    (text.get_position()[0], text.get_position()[1]): text.get_text()
    for text in shares.texts
  }
  assert [written[x, 0] for x in (1, 2, 5, 30)] == ['2/2', '2/2', '0/2', '0/2']
  assert [written[x, 1] for x in (1, 15, 30)] == ['2/2', '2/2', '0/2']
  figures.plt.close(figure)


def test_many_lines_are_drawn_in_panels(tmp_path, monkeypatch):
  """By hand: 7 variants, on 2 data sets, with a rate of .01 and .02."""
  drawn = []
  monkeypatch.setattr(drawing, 'save', lambda figure, *_: drawn.append(figure))
  sweep = grid.load('configs/sweeps/setting.py', ['rate=0.02,0.01', 'length=1'])
  accuracies = {}
  for number, trial in enumerate(sweep.trials):
    variant, data, rate = (trial.values[a] for a in ('variant', 'data', 'rate'))
    accuracies[variant, data, rate] = number / 100
    write_run(
      tmp_path / trial.name, variant, [number / 100] * 5, *trial.overrides
    )
  figures.sweep(comparison.read(sweep, tmp_path, ()), tmp_path, '')
  (figure,) = drawn
  assert len(figure.axes) == 8
  lines_of_panel = []
  for axes, variant in zip(figure.axes, paper.FIG_3, strict=False):
    assert axes.get_title('left') == paper.label(variant)
    lines = {line.get_label(): line for line in axes.lines}
    for data in ('mnist_5k', 'fashion_mnist'):
      x, y = lines[f'{data}, length 1'].get_data()
      expected = [accuracies[variant, data, rate] for rate in (0.01, 0.02)]
      assert list(x) == [0.01, 0.02]
      assert list(y) == pytest.approx(expected)
    names = ('mnist_5k, length 1', 'fashion_mnist, length 1')
    lines_of_panel.append([lines[name].get_color() for name in names])
  first, second = lines_of_panel[0]
  assert first != second
  assert lines_of_panel == [[first, second]] * 7
  assert not figure.axes[7].axison
  names = [text.get_text() for text in figure.legends[0].texts]
  assert names == [
    *('mnist_5k, length 1', 'fashion_mnist, length 1', 'one run', 'chance')
  ]
  figure.canvas.draw()  # Warns if a part does not fit.
  figures.plt.close(figure)


def test_lines_of_the_picture(tmp_path):
  """Median and band; nothing where a trial has no best accuracy."""
  sweep = load('multiplier=1,2,5', 'seed=0,1,2')
  curves = {('inception', 1): PLAIN, ('inception', 2): [0.5] * 5}
  write(
    tmp_path,
    sweep,
    curves,
    seeds_lower=0.1,
    inception_multiplier5_seed1={'status': 'running'},
  )
  figure = figures.draw_numbers(comparison.read(sweep, tmp_path, ()))
  best, _, steps = figure.axes
  lines = {line.get_label(): line for line in best.lines}
  median = lines['Inception']
  assert list(median.get_ydata())[:2] == pytest.approx([0.5, 0.4])
  assert math.isnan(median.get_ydata()[2])
  assert median.get_color() == drawing.color_of('inception')
  assert lines['BN-Baseline'].get_color() == drawing.color_of('bn_baseline')
  edges = best.collections[0].get_paths()[0].vertices
  at_first = [y for x, y in edges if x == 1]
  assert (min(at_first), max(at_first)) == pytest.approx((0.4, 0.6))
  assert steps.lines[0].get_ydata()[0] == 60
  figures.plt.close(figure)


def test_what_is_written(usual, tmp_path):
  folder = tmp_path / 'new/folder'
  comparison.write(usual, folder)
  assert (folder / 'trials.csv').read_text() == comparison.table(usual)
  assert (folder / 'summary.md').read_text() == comparison.summary(usual)
  assert image.imread(folder / 'sweep.png').shape[1] == 1200
