"""Searching with Optuna: what it is told, what it ends, how it goes on."""

import csv
import os
from pathlib import Path
import subprocess
import sys
import time

import optuna
import pytest
from written_runs import write_run

from bn_repro.sweep import comparison, grid, search
from bn_repro.sweep import runner as runner_lib
from bn_repro.sweep.__main__ import write

ROOT = Path(__file__).resolve().parent.parent.parent
COMPLETE = optuna.trial.TrialState.COMPLETE
RUNNING = optuna.trial.TrialState.RUNNING
TIMEOUT = 600


@pytest.fixture
def sweep():
  return grid.load(
    'configs/sweeps/lr_multipliers.py',
    ['multiplier=1,60', 'variant=bn_baseline'],
    config_overrides=['total_steps=100'],
  )


def study(folder):
  return optuna.load_study(
    study_name='sweep', storage=f'sqlite:///{folder / "optuna.db"}'
  )


def train(found, trial, accuracies, state='done', **status):
  """What a runner would do, with a run that is written by hand."""
  found.started(trial)
  values = [o.partition('config.')[2] for o in trial.command if 'config.' in o]
  write_run(
    trial.workdir,
    'bn_baseline',
    accuracies,
    *(value for value in values if '=' in value),
    **{'status': state, **status},
  )
  trial.state = state
  found.ended(trial, 0)


def test_suggestions(sweep, tmp_path):
  """Rates within the axis, one seed, each told its best accuracy."""
  found = search.Search(sweep, tmp_path, 1, 3)
  best = []
  for number, trial in enumerate(found.suggestions()):
    best.append(0.5 + number / 10)
    train(found, trial, [best[-1]] * 10)
  trials = study(tmp_path).trials
  assert [trial.value for trial in trials] == pytest.approx(best)
  multipliers = [trial.user_attrs['values']['multiplier'] for trial in trials]
  assert all(1 <= m <= 60 for m in multipliers)
  assert len(set(multipliers)) == 3
  tried, pruned = found.sweep()
  assert not pruned
  assert {trial.values['seed'] for trial in tried.trials} == {0}
  for trial in tried.trials:
    rate = trial.config().optim.learning_rate
    assert rate == 0.02 * trial.values['multiplier']
  lines = comparison.conclusions(
    comparison.read(tried, tmp_path, pruned, searched=True)
  )
  assert lines == [
    'Best on validation images: variant bn_baseline, multiplier '
    f'{multipliers[-1]:g}, 70.00 % (mean of 1). It was not evaluated on test '
    'images.'
  ]


def test_what_has_no_numbers_is_chosen_from(tmp_path):
  """Nets, and batches, which multiply whole numbers; none of them twice."""
  sweep = grid.load(
    'configs/sweeps/batch_size.py', ['larger=1,2', 'variant=inception,bn_x5']
  )
  found = search.Search(sweep, tmp_path, 1, 12)
  names = []
  for trial in found.suggestions():
    names.append(trial.name)
    train(found, trial, [0.5] * 5)
  assert len(set(names)) == len(names) <= 4
  trials = study(tmp_path).trials
  assert len(trials) == 12
  assert sum(trial.state == COMPLETE for trial in trials) == len(names)
  for trial in trials:
    assert trial.params['larger'] in (1, 2)
    assert trial.params['variant'] in ('inception', 'bn_x5')
    assert trial.state != RUNNING


def test_what_failed_is_tried_again(sweep, tmp_path):
  """By the next search, whose trials it counts among."""
  first = search.Search(sweep, tmp_path, 1, 2)
  names = []
  for trial in first.suggestions():
    names.append(trial.name)
    first.started(trial)
    trial.state = 'failed'
    first.ended(trial, 1)
  again = search.Search(sweep, tmp_path, 1, 2)
  assert [trial.name for trial in again.suggestions()] == names


def test_a_diverged_trial_is_worth_what_it_had(sweep, tmp_path):
  found = search.Search(sweep, tmp_path, 1, 2)
  first, second = found.suggestions()
  train(found, first, [0.3] * 6, 'diverged')
  train(found, second, [], 'diverged')
  assert [t.value for t in study(tmp_path).trials] == pytest.approx([0.3, 0])


def test_a_trial_that_falls_behind_is_ended(sweep, tmp_path):
  """Below the median of five others after as many steps."""
  found = search.Search(sweep, tmp_path, 1, 8)
  suggestions = found.suggestions()
  for _ in range(5):
    train(found, next(suggestions), [0.5, 0.6, 0.7, 0.8, 0.9] * 2)
  bad, good, early = (next(suggestions) for _ in range(3))
  for trial, accuracies in (
    # Half of its 100 steps, which are evaluated every 10.
    (bad, [0.1] * 5),
    (good, [0.6, 0.7, 0.8, 0.9, 0.9]),
    (early, [0.1] * 4),
  ):
    found.started(trial)
    write_run(trial.workdir, 'bn_baseline', accuracies, status='running')
  assert list(found.tick()) == [bad]
  bad.state = runner_lib.PRUNED
  found.ended(bad, 75)
  states = [trial.state for trial in study(tmp_path).trials]
  ended_early = optuna.trial.TrialState.PRUNED
  assert states == [COMPLETE] * 5 + [ended_early, RUNNING, RUNNING]
  tried, pruned = found.sweep()
  assert pruned == {bad.name: 'pruned'}
  read = comparison.read(tried, tmp_path, pruned, searched=True)
  assert {r.name: r.status for r in read.results}[bad.name] == 'pruned'
  assert 'ended early' not in comparison.summary(read)
  write(read)
  assert 'ended early' in (tmp_path / 'sweep.svg').read_text()


def test_what_a_killed_runner_left_comes_first(sweep, tmp_path):
  left = search.Search(sweep, tmp_path, 2, 4)
  suggestions = left.suggestions()
  train(left, next(suggestions), [0.5] * 5)
  names = [next(suggestions).name, next(suggestions).name]
  again = search.Search(sweep, tmp_path, 2, 4)
  found = [trial.name for trial in again.suggestions()]
  assert found[:2] == names
  assert len(found) == 3
  assert len(study(tmp_path).trials) == 4


def test_a_search_that_goes_on_does_not_repeat_itself(sweep, tmp_path):
  names = []
  for number in (1, 2, 3):
    found = search.Search(sweep, tmp_path, 1, number)
    (trial,) = found.suggestions()
    train(found, trial, [0.5] * 5)
    names.append(trial.name)
  assert len(set(names)) == 3


SWEEP = """
from configs.sweeps import lr_multipliers

def get_config(mode):
  sweep = lr_multipliers.get_config(mode)
  sweep.config = f'configs/bn_mnist.py:{mode}'
  sweep.overrides = (
    'total_steps=200', 'steps_per_call=10', 'log_every=50', 'eval_every=50',
    'checkpoint_every=50', 'data.distorted_copies=0', 'data.holdout=500',
    'eval_split=validation',
  )
  sweep.axes.variant.values = ('bn_mnist',)
  sweep.axes.multiplier.values = (0.01, 10)
  return sweep
"""


def start(tmp_path, *arguments):
  file = tmp_path / 'own.py'
  file.write_text(SWEEP)
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'bn_repro.sweep', f'--sweep={file}'),
      *(f'--workdir={tmp_path / "search"}', '--search=optuna', '--jobs=2'),
      *arguments,
    ],
    cwd=ROOT,
    env={**os.environ, 'XLA_FLAGS': ''},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def test_killed_and_run_again(tmp_path):
  """As many trials as asked for, each trained to an end once."""
  workdir = tmp_path / 'search'
  first = start(tmp_path, '--trials=5')
  give_up = time.monotonic() + TIMEOUT
  while len(list(workdir.glob('*/metrics.jsonl'))) < 3:
    assert first.poll() is None, first.communicate()
    assert time.monotonic() < give_up
    time.sleep(0.05)
  first.kill()
  first.communicate()
  out, _ = start(tmp_path, '--trials=5').communicate(timeout=TIMEOUT)
  states = [trial.state for trial in study(workdir).trials]
  assert len(states) == 5, out
  assert RUNNING not in states
  with (workdir / 'trials.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == len(list(workdir.glob('*/config.json'))) == 5
  assert {row['status'] for row in rows} <= {'done', 'pruned'}
  assert 'Best on validation images' in out
  # Neither a grid nor another search may go on in there.
  for arguments, expected in (
    (['--search='], 'choose from'),
    (['--sweep.multiplier=1,2'], 'holds another search'),
    (['--dry_run'], 'not known beforehand'),
  ):
    out, _ = start(tmp_path, *arguments).communicate(timeout=TIMEOUT)
    assert expected in out


def test_without_optuna(tmp_path):
  script = (
    "import sys; sys.modules['optuna'] = None; from bn_repro import sweep; "
    'sys.exit(sweep.main(sys.argv[1:]))'
  )
  result = subprocess.run(
    [
      *(sys.executable, '-c', script, f'--workdir={tmp_path / "search"}'),
      *('--sweep=configs/sweeps/lr_multipliers.py', '--search=optuna'),
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 1
  assert result.stderr == (
    'error: --search=optuna: Optuna is not installed. Run: pip install -r '
    'requirements-search.txt\n'
  )
  assert not (tmp_path / 'search').exists()
