"""A run that was cut off ends as one that was not: array by array, bit for bit.

Real processes, real signals, the real program; only the networks are small.
"""

import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import support
from support import (
  MNIST,
  assert_same_run,
  finish,
  metrics,
  newest_arrays,
  run_without_jax,
  status,
  wait_for_line,
)

from bn_repro.training import model_file

# In one worker, so that the runs which others are compared with train once.
pytestmark = pytest.mark.xdist_group('resume')

# BN-Baseline has dropout and BN, Inception dropout only, BN-MNIST BN only; it
# shuffles within shards, as BN-x5 does.
_SMALL_INCEPTION = (
  support.TINY,
  '--config.total_steps=60',
  '--config.log_every=7',
  '--config.eval_every=20',
  '--config.checkpoint_every=15',
  '--config.bn.population_batches=4',
)


def command(variant, workdir, *overrides):
  return (
    f'--config=configs/{variant}.py:mini',
    f'--workdir={workdir}',
    *(MNIST if variant in ('mnist', 'bn_mnist') else _SMALL_INCEPTION),
    *overrides,
  )


def run(*arguments, **changes):
  return support.run(*command(*arguments), **changes)


def start(*arguments, **changes):
  return support.start(*command(*arguments), **changes)


@pytest.fixture(scope='module')
def references(tmp_path_factory):
  """Undisturbed runs, one for each variant that a test asks for."""
  made = {}

  def get(variant):
    if variant not in made:
      workdir = tmp_path_factory.mktemp('reference') / variant
      result = run(variant, workdir)
      assert result.returncode == 0, result.stderr
      made[variant] = workdir
    return made[variant]

  return get


def stop(variant, workdir, line, number):
  """Sends a signal to a run that has printed a line."""
  process = start(variant, workdir)
  wait_for_line(process, line)
  process.send_signal(number)
  (ended,) = finish(process)
  assert ended.returncode == 75
  assert ended.stderr == ''
  content = status(workdir)
  assert content['status'] == 'preempted'
  assert content['reason'] == f'stopped by {number.name}'
  assert newest_arrays(workdir)[0] == content['step']


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
  """BN-MNIST, stopped after two checkpoints."""
  workdir = tmp_path_factory.mktemp('stopped') / 'run'
  stop('bn_mnist', workdir, 'step 210/600  train', signal.SIGTERM)
  return workdir


@pytest.fixture
def workdir(stopped, tmp_path):
  """A copy of it."""
  return shutil.copytree(stopped, tmp_path / 'run')


@pytest.mark.parametrize(
  'variant',
  [
    'bn_mnist',
    pytest.param('bn_baseline', marks=pytest.mark.slow),
    pytest.param('inception', marks=pytest.mark.slow),
  ],
)
def test_killed_again_and_again(variant, references, tmp_path):
  """SIGKILL after a random number of lines and a random instant, until done."""
  rng = random.Random(variant)
  codes = []
  while not codes or codes[-1] != 0:
    process = start(variant, tmp_path / 'run')
    if len(codes) < 2:
      for _ in range(rng.randrange(1, 7)):
        wait_for_line(process, 'step ')
      time.sleep(rng.random() / 4)
      support.kill(process)
    (ended,) = finish(process)
    codes.append(ended.returncode)
    assert codes[-1] in (0, -signal.SIGKILL), ended.stderr
  assert_same_run(tmp_path / 'run', references(variant))


def test_sigterm_and_ctrl_c_while_training(workdir, references):
  """SIGTERM stopped it before: see the fixture `stopped`."""
  stop('bn_mnist', workdir, '  train', signal.SIGINT)
  assert run('bn_mnist', workdir).returncode == 0
  assert_same_run(workdir, references('bn_mnist'))


def test_signal_while_compiling(tmp_path):
  """At once, and with the initial state; another test resumes from it."""
  workdir = tmp_path / 'run'
  # An empty cache, so that there is something to compile.
  process = start(
    'bn_baseline', workdir, JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'cache')
  )
  wait_for_line(process, 'compiling')
  process.send_signal(signal.SIGTERM)
  (ended,) = finish(process)
  assert ended.returncode == 75
  assert 'compiled in' not in ended.stdout
  assert ended.stderr == ''
  assert status(workdir)['status'] == 'preempted'
  assert newest_arrays(workdir)[0] == 0


def test_signals_of_one_shutdown_are_one(references, tmp_path):
  """Both are pending before the process can act on the first."""
  process = start('bn_mnist', tmp_path / 'run')
  wait_for_line(process, 'compiling')
  process.send_signal(signal.SIGSTOP)
  for number in (signal.SIGTERM, signal.SIGINT):
    process.send_signal(number)
  process.send_signal(signal.SIGCONT)
  assert finish(process)[0].returncode == 75
  assert status(tmp_path / 'run')['status'] == 'preempted'
  assert run('bn_mnist', tmp_path / 'run').returncode == 0
  assert_same_run(tmp_path / 'run', references('bn_mnist'))


def test_second_run_in_a_workdir_is_refused(references, tmp_path):
  workdir = tmp_path / 'run'
  first = start('bn_mnist', workdir)
  wait_for_line(first, 'compiling')
  second = run('bn_mnist', workdir)
  support.kill(first)
  finish(first)
  assert second.returncode == 1
  assert second.stderr.count('\n') == 1
  assert f'in use by process {first.pid}' in second.stderr
  # The kernel releases the lock of a killed process, and the same command gives
  # the same run.
  assert run('bn_mnist', workdir).returncode == 0
  assert_same_run(workdir, references('bn_mnist'))


def test_finished_run_is_left_alone(references):
  workdir = references('bn_mnist')

  def snapshot():
    return {
      path: (path.stat().st_mtime_ns, path.stat().st_size)
      for path in [workdir, *workdir.rglob('*')]
    }

  before = snapshot()
  (result,) = run_without_jax(command('bn_mnist', workdir))
  assert result.code == 0
  assert 'done' in result.out
  assert snapshot() == before


def test_finished_run_without_a_model_evaluates_once_more(references, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(references('bn_mnist'), workdir)
  (workdir / model_file.NAME).unlink()
  result = run('bn_mnist', workdir)
  assert result.returncode == 0, result.stderr
  assert_same_run(workdir, references('bn_mnist'))


def test_longer_run_has_had_the_same_past(references, tmp_path):
  """140 steps, then 600 with other intervals: the arrays of 600 at once."""
  workdir = tmp_path / 'run'
  shorter = ('--config.total_steps=140',)
  assert run('bn_mnist', workdir, *shorter).returncode == 0
  changes = ('--config.log_every=100', '--config.checkpoint_every=90')
  result = run('bn_mnist', workdir, *changes)
  assert result.returncode == 0, result.stderr
  _, found = newest_arrays(workdir)
  _, expected = newest_arrays(references('bn_mnist'))
  for path, array in expected.items():
    np.testing.assert_array_equal(found[path], array, err_msg=str(path))
  rates, reference_rates = (
    {
      line['step']: line['learning_rate']
      for line in metrics(path)
      if line['split'] == 'train'
    }
    for path in (workdir, references('bn_mnist'))
  )
  assert rates[140] == reference_rates[140]
  assert rates[600] == reference_rates[600]


def test_another_config_is_refused(references):
  workdir = references('bn_mnist')
  differences = {
    'batch_size=16': 'batch_size: 60 -> 16',
    'seed=1': 'seed: 0 -> 1',
    'model.reading=608': 'model.reading: 576 -> 608',
    'optim.momentum=0.8': 'optim.momentum: 0.0 -> 0.8',
    'data.name=synthetic': 'data.name: mnist_5k -> synthetic',
  }
  before = (workdir / 'config.json').read_bytes()
  results = run_without_jax(
    *(
      command('bn_mnist', workdir, f'--config.{override}')
      for override in differences
    )
  )
  for result, difference in zip(results, differences.values(), strict=True):
    assert result.code == 1
    assert difference in result.err
    assert result.err.count('\n') == 1
  assert (workdir / 'config.json').read_bytes() == before


def damage(checkpoint):
  """Flips one bit in the middle of the largest file of a checkpoint."""
  largest = max(checkpoint.rglob('*'), key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)


def test_damaged_checkpoint_and_half_a_line(workdir, references):
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 36, "spl')
  checkpoints = workdir / 'checkpoints'
  *_, older, newest = sorted(int(path.name) for path in checkpoints.iterdir())
  damage(checkpoints / str(newest))
  result = run('bn_mnist', workdir)
  assert result.returncode == 0, result.stderr
  assert f'checkpoint {newest}' in result.stderr
  assert f'from the checkpoint of step {older}\n' in result.stdout
  # Set aside, not deleted.
  assert (workdir / f'damaged_checkpoint_{newest}').is_dir()
  assert_same_run(workdir, references('bn_mnist'))


def test_all_checkpoints_damaged(workdir):
  for checkpoint in (workdir / 'checkpoints').iterdir():
    damage(checkpoint)
  before = (workdir / 'metrics.jsonl').read_bytes()
  result = run('bn_mnist', workdir)
  assert result.returncode == 1
  assert 'all checkpoints are damaged' in result.stderr
  assert (workdir / 'metrics.jsonl').read_bytes() == before


def test_divergence_is_a_result(tmp_path):
  workdir = tmp_path / 'run'
  too_fast = '--config.optim.learning_rate=1e6'
  result = run('mnist', workdir, too_fast)
  assert result.returncode == 3, result.stderr
  ended = status(workdir)
  assert ended['status'] == 'diverged'
  assert 0 < ended['step'] < 600
  assert 'loss' in ended['reason']
  (again,) = run_without_jax(command('mnist', workdir, too_fast))
  assert again.code == 3
  assert status(workdir) == ended


def test_full_disk_is_an_error_and_costs_no_checkpoint(workdir, references):
  """A limit on file sizes stands for the disk."""
  process = subprocess.run(
    (
      *('bash', '-c', 'ulimit -f 20; "$@"', '-'),
      *(sys.executable, *support.TRAIN, *command('bn_mnist', workdir)),
    ),
    cwd=support.ROOT,
    env=support.environment(),
    capture_output=True,
    text=True,
    timeout=support.TIMEOUT,
  )
  assert process.returncode == 1
  assert 'could not be saved' in process.stderr
  assert 'Traceback' not in process.stderr
  assert status(workdir)['status'] == 'failed'
  assert run('bn_mnist', workdir).returncode == 0
  assert_same_run(workdir, references('bn_mnist'))
