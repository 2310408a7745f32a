"""What is published is what the committed runs give, made by this code."""

import csv
import json
import shutil

import pytest
import study

from bn_repro import config as config_lib
from bn_repro import numerics
from bn_repro.lab import __main__ as lab
from bn_repro.report import runs as runs_lib
from bn_repro.report import search
from bn_repro.report import sections as sections_lib
from bn_repro.runtime import workdir
from bn_repro.sweep import grid

RESULTS = study.ROOT / 'results'


PARTS = [part for part in study.PARTS if (RESULTS / part).is_dir()]


@pytest.mark.parametrize('part', PARTS)
def test_a_part_has_all_of_its_runs_made_by_this_code(part):
  """Nobody has to trust a run of other code, or miss one that was bad."""
  kind = study.PARTS[part]
  axes = [
    argument.removeprefix('--sweep.')
    for argument in kind.arguments
    if argument.startswith('--sweep.')
  ]
  sweep = grid.load(kind.sweep or part, axes, '', [])
  trials = {trial.name: trial for trial in sweep.trials}
  runs = {path.parent.name: path for path in RESULTS.glob(f'{part}/*/run.json')}
  assert runs.keys() == trials.keys()
  for name, path in runs.items():
    facts = json.loads(path.read_text())
    assert facts['numerics'] == numerics.digest(), name
    assert not facts['git_revision'].endswith('-dirty'), name
    if kind.kept != study.Kept.FACTS:
      config = workdir.read_json(path.with_name('config.json'))
      expected = json.loads(config_lib.to_json(trials[name].config))
      assert config == expected, name


def test_the_page_is_that_of_the_runs(tmp_path):
  """`python scripts/study.py --publish` writes it. Pictures may differ."""
  assert study.report(RESULTS, tmp_path) == []
  for name in ('index.html', 'ledger.md'):
    assert (tmp_path / name).read_text() == (
      RESULTS / 'report' / name
    ).read_text()
  published = {path.name for path in (RESULTS / 'report').iterdir()}
  assert published == {path.name for path in tmp_path.iterdir()}


def test_the_base_rate_is_the_best_of_the_search():
  """Inception's best mean of five evaluations in a row, at full length."""
  from configs.sweeps import setting

  best = {}
  for folder in RESULTS.glob('setting/inception_fashion_mnist_length1_*'):
    run = runs_lib.read_run(folder)
    best[run.learning_rate] = run.best()
  assert len(best) == 4
  assert max(best, key=best.get) == setting.RATE


def test_what_is_said_of_the_map_of_the_search():
  """docs/evidence.md, "What the map shows"."""
  runs, problems = runs_lib.read_runs([str(RESULTS / 'setting')])
  assert problems == []
  sections, _ = sections_lib.group(runs)
  held = {}
  for section in sections:
    best, *rows, total = search.table(section)
    assert len(rows) == 8
    for place in list(best)[1:]:
      found = {row['claim']: row[place] for row in rows}
      held[section.data_label, place] = (
        best[place],
        total[place],
        {claim for claim, cell in found.items() if cell.startswith('✓')},
        found,
      )
  assert len(held) == 16

  def places(text):
    """Where a claim holds."""
    (claim,) = (c for c in next(iter(held.values()))[3] if text in c)
    return {place for place, (_, _, seen, _) in held.items() if claim in seen}

  (top,) = (place for place, (_, total, *_) in held.items() if total == '7')
  assert top[1] == '250 steps, rate 0.02' and held[top][0] == '53.7 %'
  assert max(int(total) for _, total, *_ in held.values()) == 7
  highest, fails = places('highest'), places('at 5 times')
  assert {place.split()[-1] for _, place in highest} == {'0.005', '0.01'}
  (digits,) = (p for p in highest if p[1].endswith('0.01'))
  assert digits == (top[0], '250 steps, rate 0.01')
  assert {place.split()[-1] for _, place in fails} == {'0.02', '0.04'}
  assert len(fails) == 8
  behind = [
    float(cell.split()[1])
    for place in fails
    for claim, cell in held[place][3].items()
    if 'highest' in claim
  ]
  assert (min(behind), max(behind)) == (3.5, 64.1)
  assert len(places('With BN, the network with sigmoids trains')) == 16
  assert len(places('stays at chance')) == 16
  assert len(places('fewer steps than BN-Baseline')) == 15
  assert len(places('BN-x5-Sigmoid')) == 5


def test_results_are_small():
  size = sum(p.stat().st_size for p in RESULTS.rglob('*') if p.is_file())
  assert size <= 10e6


def test_what_is_quoted_of_the_first_runs():
  """`docs/evidence.md` beside `results/explored.csv`."""
  with (RESULTS / 'explored.csv').open() as file:
    runs = list(csv.DictReader(file))

  def best(variant, steps, rate, width=0.125, init_scale=1.0):
    """Best accuracy in percent, of the run with most decay."""
    found = [
      run
      for run in runs
      if (run['variant'], int(run['total_steps'])) == (variant, steps)
      and (float(run['learning_rate']), float(run['width'])) == (rate, width)
      and float(run['init_scale']) == init_scale
    ]
    chosen = min(found, key=lambda run: float(run['last_learning_rate']))
    return 100 * float(chosen['best_mean_of_5_validation_accuracy'])

  short = [
    best('bn_x30', 600, 0.15),
    best('bn_x5', 600, 0.025),
    best('bn_x5_sigmoid', 600, 0.025),
  ]
  inception = best('inception', 3000, 0.005)
  assert inception > short[0] > short[1] > short[2]
  x30, x5 = best('bn_x30', 600, 0.3), best('bn_x5', 600, 0.05)
  longer = best('bn_x5', 2400, 0.05) - best('bn_x30', 2400, 0.3)
  wide = [best('bn_x30', 600, 0.3, 0.25), best('bn_x5', 600, 0.05, 0.25)]
  small = [
    best('inception', 3000, rate, init_scale=0.7071)
    for rate in (0.01, 0.02, 0.04)
  ]
  assert small[0] == small[1] == 10
  quoted = [
    f'before the sweep, {len(runs)} runs',
    f'order ({", ".join(f"{value:.1f}" for value in short)} %)',
    f"all are below Inception's {inception:.1f} %",
    f'BN-x30 is behind ({x30:.1f} against {x5:.1f} %)',
    f'falls behind BN-x5 by {longer:.1f} points after 2,400',
    f'and by {x5 - x30:.1f} after 600',
    f'the same at 0.01: {wide[0]:.1f} against {wide[1]:.1f} %',
    f'reaches {small[2]:.0f} % at 0.04',
    f'BN-Baseline reaches {best("bn_baseline", 1500, 0.01, 0.125, 0.7071):.0f}',
  ]
  text = (study.ROOT / 'docs' / 'evidence.md').read_text().lower()
  text = ' '.join(text.split())
  assert [one for one in quoted if one.lower() not in text] == []


def test_the_laboratory_has_what_its_experiments_give(tmp_path):
  """All seeds, made by this code; the pages are those that it writes."""
  published = RESULTS / 'lab'
  found = sorted(path.stem for path in published.glob('*.json'))
  for name in found:
    shutil.copy(published / f'{name}.json', tmp_path)
  for name in found:
    # It has nothing left to run, and refuses results of another config or code.
    assert lab.main([name, f'--workdir={tmp_path}']) == 0
  for path in published.iterdir():
    if path.suffix != '.png':
      assert (tmp_path / path.name).read_bytes() == path.read_bytes()
  assert {path.name for path in tmp_path.iterdir()} == {
    path.name for path in published.iterdir()
  }
