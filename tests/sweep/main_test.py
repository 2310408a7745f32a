"""The command that runs a sweep, with small networks that really train."""

import contextlib
import csv
import json
import os
import shutil
import signal
import time

import pytest
import support
from written_runs import write_run

from bn_repro import files
from bn_repro.runtime import mirror
from bn_repro.sweep import __main__ as sweep

# In one worker, so that the undisturbed sweep trains once.
pytestmark = pytest.mark.xdist_group('sweep')

# Four runs of 200 steps of the MNIST network, which compiles once in a second.
SWEEP = """
from bn_repro.sweep.sweep import Sweep
from configs.sweeps import lr_multipliers

def get_sweep(mode):
  return Sweep(
    axes={
      'variant': ('mnist', 'bn_mnist'), 'multiplier': (1, 10), 'seed': (0,),
    },
    trial=lr_multipliers.trial,
    x='multiplier',
    repeat='seed',
    defaults={
      'total_steps': 200, 'steps_per_call': 10, 'log_every': 50,
      'eval_every': 40, 'checkpoint_every': 50, 'data.distorted_copies': 0,
      'data.holdout': 500, 'eval_split': 'validation', 'model.init_std': 0.1,
    },
  )
"""
NAMES = [
  'mnist_multiplier1_seed0',
  'bn_mnist_multiplier1_seed0',
  'mnist_multiplier10_seed0',
  'bn_mnist_multiplier10_seed0',
]


@pytest.fixture(scope='session')
def file(tmp_path_factory):
  path = tmp_path_factory.mktemp('sweeps') / 'own.py'
  path.write_text(SWEEP)
  return path


def start(file, workdir, *arguments, **environment):
  return support.start(
    f'--sweep={file}',
    f'--workdir={workdir}',
    *arguments,
    program=('-m', 'bn_repro.sweep'),
    **environment,
  )


def run(file, workdir, *arguments, **environment):
  (result,) = support.finish(start(file, workdir, *arguments, **environment))
  return result.returncode, result.stdout + result.stderr


def read_only(file, workdir, *arguments):
  """Runs a command that starts no trial in this process."""
  return sweep.main([f'--sweep={file}', f'--workdir={workdir}', *arguments])


def table(workdir):
  with (workdir / 'trials.csv').open() as file:
    return list(csv.DictReader(file))


def content(workdir):
  """All that a sweep leaves and that does not depend on the clock."""
  return {
    'table': (workdir / 'trials.csv').read_text(),
    'summary': (workdir / 'summary.md').read_text(),
    **{name: support.metrics(workdir / name) for name in NAMES},
  }


@pytest.fixture(scope='session')
def undisturbed(file, tmp_path_factory):
  """An undisturbed sweep, and its output."""
  workdir = tmp_path_factory.mktemp('alone') / 'sweep'
  code, out = run(file, workdir)
  assert code == 0, out
  return workdir, out


def copy_trials(undisturbed, workdir, names):
  """Puts complete trials in place; a sweep continues with the others."""
  for name in names:
    shutil.copytree(undisturbed[0] / name, workdir / name)


def test_results(undisturbed):
  workdir, out = undisturbed
  rows = table(workdir)
  assert [row['trial'] for row in rows] == [
    NAMES[0],
    NAMES[2],
    NAMES[1],
    NAMES[3],
  ]
  assert {row['status'] for row in rows} == {'done'}
  assert {row['step'] for row in rows} == {'200'}
  for row in rows:
    lines = support.metrics(workdir / row['trial'])
    accuracies = [
      line['accuracy']
      for line in lines
      if line['split'] == 'validation' and line.get('statistics') != 'moving'
    ]
    for column in ('best_mean_of_5', 'mean_of_last_5'):
      found = float(row[f'{column}_validation_accuracy'])
      assert found == pytest.approx(sum(accuracies) / 5)
    config = json.loads((workdir / row['trial'] / 'config.json').read_text())
    rate = 0.1 * 32 / 60 * int(row['multiplier'])
    assert config['optim']['learning_rate'] == pytest.approx(rate)
    assert config['bn']['enabled'] == (row['variant'] == 'bn_mnist')
  assert 'test' not in (workdir / 'trials.csv').read_text()
  assert 'Best on validation images: ' in out
  assert out.count('on the test images') == 1
  assert (workdir / 'sweep.png').stat().st_size > 10_000


def test_trials_that_differ_in_a_rate_compile_once(file, tmp_path):
  """The second trial finds every program in the cache."""
  cache = tmp_path / 'cache'
  environment = {
    'JAX_COMPILATION_CACHE_DIR': str(cache),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
  }
  counts = []
  for multipliers in ('1', '1,10'):
    code, out = run(
      file,
      tmp_path / 'sweep',
      '--sweep.variant=bn_mnist',
      f'--sweep.multiplier={multipliers}',
      **environment,
    )
    assert code == 0, out
    counts.append(len(list(cache.glob('*-cache'))))
  assert counts[0] == counts[1] > 0


def test_a_completed_sweep_does_nothing(file, undisturbed):
  workdir, _ = undisturbed
  before = {
    path: path.stat().st_mtime_ns for path in workdir.rglob('metrics.jsonl')
  }
  code, out = run(file, workdir)
  assert code == 0
  assert '4 trials, 0 remaining' in out
  assert 'Best on validation images: ' in out
  for path, time_of in before.items():
    assert path.stat().st_mtime_ns == time_of


def wait_for(path, process, text=''):
  """Waits until a file exists and contains a text."""
  give_up = time.monotonic() + support.TIMEOUT
  while not (path.exists() and text in path.read_text()):
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < give_up
    time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
  'moment', ['sweep.json', f'{NAMES[0]}/run.json', f'{NAMES[1]}/metrics.jsonl']
)
def test_killed_at_any_moment(moment, file, undisturbed, tmp_path):
  """SIGKILL to the sweep, then to a trial, then SIGTERM; then to the end."""
  workdir = tmp_path / 'sweep'
  first = start(file, workdir)
  wait_for(workdir / moment, first)
  first.kill()
  first.communicate()
  second = start(file, workdir)
  wait_for(workdir / NAMES[0] / 'metrics.jsonl', second, 'validation')
  # "process 123 on host"
  holder = (workdir / NAMES[0] / 'lock').read_text().split()[1]
  with contextlib.suppress(ProcessLookupError):
    os.kill(int(holder), signal.SIGKILL)
  wait_for(workdir / NAMES[1] / 'metrics.jsonl', second, 'validation')
  second.send_signal(signal.SIGTERM)
  (result,) = support.finish(second)
  # All trials may have ended before the signal.
  assert result.returncode in (0, 75), result
  code, out = run(file, workdir)
  assert code == 0, out
  assert content(workdir) == content(undisturbed[0])


# Uploads all the time, and takes a claim over after six seconds; for the sweep
# and the trials that it starts.
QUICK = """
from bn_repro.runtime import mirror
mirror.Mirror.__init__.__kwdefaults__.update(interval=0.05, expires=6.0)
"""


def lose_machine(process, folder):
  """Kills a sweep and its trials, none of which can save."""
  process.send_signal(signal.SIGSTOP)
  for lock in folder.glob('*/lock'):
    os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
  support.kill(process)
  process.communicate()


def test_in_a_bucket(file, undisturbed, bucket, tmp_path, monkeypatch, capsys):
  """The machine is lost, then the next one preempted, then to the end."""
  place = 'gs://bucket/sweeps/a'
  site = tmp_path / 'site'
  site.mkdir()
  (site / 'sitecustomize.py').write_text(QUICK)

  def on_machine(name):
    temporary = tmp_path / name
    temporary.mkdir(exist_ok=True)
    return {
      'XDG_CACHE_HOME': str(tmp_path / name),
      'TMPDIR': str(temporary),
      'PYTHONPATH': f'{site}:{support.ROOT}',
    }

  first = start(file, place, '--jobs=1', **on_machine('one'))
  while not any(
    name.endswith('/commit_success.txt') for name in bucket.objects
  ):
    assert first.poll() is None, first.communicate()
    time.sleep(0.01)
  lose_machine(first, tmp_path / 'one/bn_repro/buckets/bucket/sweeps/a')
  second = start(file, place, '--jobs=2', **on_machine('two'))
  support.wait_for_line(second, f'{NAMES[0]}: running from step ')
  support.wait_for_line(second, f'{NAMES[0]}: done')
  second.send_signal(signal.SIGTERM)
  (result,) = support.finish(second)
  assert result.returncode == 75, result
  code, out = run(file, place, **on_machine('three'))
  assert code == 0, out
  assert f' into {place} and {tmp_path}/three/' in out
  assert not any(name.endswith('/lock') for name in bucket.objects)
  # What a fourth machine finds.
  bucket.objects['sweeps/a/trials.csv']['data'] = b''
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'four'))
  assert read_only(file, place, '--dry_run') == 0
  lines = capsys.readouterr().out.splitlines()
  assert sum(line.endswith('done') for line in lines) == 4
  assert read_only(file, place, '--compare') == 0
  local = mirror.fetch(files.expand('--workdir', place, in_bucket=True))
  assert content(local) == content(undisturbed[0])


def test_ctrl_c(file, undisturbed, tmp_path):
  """All trials save; the same command resumes, to the same table."""
  workdir = tmp_path / 'sweep'
  # Two of the other three run at a time, so that one is waiting.
  copy_trials(undisturbed, workdir, NAMES[3:])
  process = start(file, workdir, '--jobs=2')
  wait_for(workdir / NAMES[0] / 'metrics.jsonl', process, 'validation')
  process.send_signal(signal.SIGINT)
  (result,) = support.finish(process)
  assert result.returncode == 75, result
  assert 'stopping: the running trials are saving' in result.stdout
  assert result.stdout.endswith('stopped; the same command resumes\n')
  statuses = {
    support.status(path.parent)['status']
    for path in workdir.glob('*/status.json')
  }
  assert statuses <= {'done', 'preempted'}
  code, out = run(file, workdir)
  assert code == 0
  assert content(workdir) == content(undisturbed[0])


def test_one_trial_of_it(file, undisturbed, tmp_path, capsys):
  """As a job of a cluster, by its number; then the other trials."""
  workdir = tmp_path / 'sweep'
  code, out = run(file, workdir, '--trial=2')
  assert code == 0
  assert 'done at step 200' in out
  assert [p.name for p in workdir.iterdir()] == [NAMES[2]]
  assert read_only(file, workdir, '--compare') == 0
  assert 'Not ended: 3 of 4 trials' in capsys.readouterr().out
  copy_trials(undisturbed, workdir, NAMES[:2])
  code, out = run(file, workdir)
  assert '4 trials, 1 remaining' in out
  assert content(workdir) == content(undisturbed[0])


def test_trials_can_be_added(file, undisturbed, capsys):
  workdir, _ = undisturbed
  assert not read_only(file, workdir, '--sweep.seed=0,1', '--dry_run')
  lines = capsys.readouterr().out.splitlines()
  assert sum(line.endswith('done') for line in lines) == 4
  assert sum(line.endswith('waiting') for line in lines) == 4
  assert '8 trials, 96,000 images; about ' in lines[-1]


@pytest.mark.parametrize(
  'arguments, expected',
  [
    (
      ['--sweep.multiplier=1,2'],
      'holds 2 runs that are not trials of this sweep, such as bn_mnist_mult',
    ),
    (['--config.model.init_std=0.2'], 'holds a run of another config'),
    (['--trial=9'], '--trial=9: no such trial'),
    (['--trial=nobody'], '--trial=nobody: no such trial'),
    # From a shell variable that is not set.
    (['--trial='], '--trial=: no such trial'),
    (['--config.total_steps=100'], 'holds a run with total_steps=200, not 100'),
    (['--config.eval_every=100'], 'holds a run with eval_every=40, not 100'),
    (['--jobs=0'], "argument --jobs: '0' is not a whole number of at least 1"),
  ],
)
def test_what_is_refused(arguments, expected, file, undisturbed, capsys):
  workdir, _ = undisturbed
  before = sorted(workdir.rglob('*'))
  assert read_only(file, workdir, *arguments) == 1
  errors = capsys.readouterr().err.splitlines()
  assert all(error.startswith('error: ') for error in errors)
  assert expected in errors[0]
  assert sorted(workdir.rglob('*')) == before


@pytest.mark.parametrize(
  'arguments, count',
  [
    ([], 0),
    (['--config.eval_every=20'], 0),
    (['--config.eval_every=50'], 4),
    (['--config.total_steps=160', '--sweep.multiplier=1'], 2),
  ],
)
def test_few_evaluations_are_named(arguments, count, file, tmp_path, capsys):
  """Before anything is trained: such trials are not compared."""
  assert read_only(file, tmp_path / 'sweep', '--dry_run', *arguments) == 0
  error = capsys.readouterr().err
  assert error == '' if not count else f'warning: {count} trials, such' in error


def test_a_directory_of_a_run_is_refused(file, tmp_path, capsys):
  write_run(tmp_path / 'run', 'mnist', [0.5])
  assert read_only(file, tmp_path / 'run') == 1
  assert 'holds a run, not a sweep' in capsys.readouterr().err


def test_all_problems_before_the_first_trial(file, tmp_path, capsys):
  workdir = tmp_path / 'sweep'
  arguments = ('--sweep.multiplier=', '--sweep.sed=1', '--config.sed=2')
  assert read_only(file, workdir, *arguments) == 1
  assert len(capsys.readouterr().err.splitlines()) == 3
  assert not workdir.exists()


def test_a_trial_that_cannot_start(file, tmp_path):
  """The other trials go on; the end of the output says why it failed."""
  workdir = tmp_path / 'sweep'
  bad = workdir / NAMES[0] / 'checkpoints'
  bad.parent.mkdir(parents=True)
  bad.write_text('no directory')
  code, out = run(file, workdir, '--sweep.multiplier=1', '--retries=0')
  assert code == 1, out
  assert 'will be restarted' not in out
  assert out.splitlines()[-1].startswith(f'error: {NAMES[0]}: failed, see ')
  states = {row['trial']: row['status'] for row in table(workdir)}
  assert states[NAMES[1]] == 'done'
  assert states[NAMES[0]] == 'failed'


def test_dry_run_writes_nothing(file, tmp_path, capsys):
  workdir = tmp_path / 'sweep'
  assert not read_only(file, workdir, '--dry_run', '--jobs=2')
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines[1:-1]] == NAMES
  assert [line.split()[2] for line in lines[1:-1]] == ['12,000'] * 4
  assert not workdir.exists()


def test_a_closed_pipe(file, undisturbed, tmp_path):
  """As in `| head -1`: the trials continue."""
  workdir = tmp_path / 'sweep'
  copy_trials(undisturbed, workdir, NAMES[1:])
  with start(file, workdir) as process:
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=support.TIMEOUT) == 0
  assert content(workdir) == content(undisturbed[0])


def test_a_directory_of_an_earlier_version(file, undisturbed, tmp_path, capsys):
  """Its `sweep.json` had other fields; it can still be compared."""
  workdir = tmp_path / 'sweep'
  shutil.copytree(undisturbed[0], workdir)
  (workdir / 'sweep.json').write_text('{"search": ""}')
  (workdir / 'trials.csv').unlink()
  assert read_only(file, workdir, '--compare') == 0
  assert content(workdir) == content(undisturbed[0])


def test_a_file_in_the_place_of_a_trial(file, tmp_path, capsys):
  workdir = tmp_path / 'sweep'
  workdir.mkdir()
  (workdir / NAMES[1]).touch()
  assert read_only(file, workdir) == 1
  assert 'is a file. Name a directory' in capsys.readouterr().err
  assert [path.name for path in workdir.iterdir()] == [NAMES[1]]


def test_a_locked_directory(file, undisturbed):
  workdir, _ = undisturbed
  holder = sweep.workdir_lib.Workdir(str(workdir))
  holder.claim()
  try:
    code, out = run(file, workdir)
  finally:
    holder.release()
  assert code == 1
  assert 'in use by process' in out


def test_help():
  result = support.run('--help', program=('-m', 'bn_repro.sweep'))
  assert result.returncode == 0
  sweeps = (support.ROOT / 'configs' / 'sweeps').glob('[a-z]*.py')
  names = [path.stem for path in sweeps]
  for text in (*names, '--dry_run', 'trials.csv', '75', '--sweep.seed'):
    assert text in result.stdout
