"""A run that was cut off ends as one that was not: array by array, bit for bit.

Real processes, real signals, the real program; only the network is small.
"""

import json
import os
from pathlib import Path
import random
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

TESTS = Path(__file__).resolve().parent.parent

RUN = (
  '--config.total_steps=60',
  '--config.log_every=7',
  '--config.eval_every=20',
  '--config.checkpoint_every=15',
  '--config.bn.population_batches=4',
)
# BN-Baseline has dropout and BN, BN-x5 BN alone, Inception dropout alone.
VARIANTS = ('bn_baseline', 'bn_x5', 'inception')


def command(variant, workdir, *overrides):
  return [
    sys.executable,
    str(TESTS / 'tiny.py'),
    f'--config=configs/{variant}.py:mini',
    f'--workdir={workdir}',
    *RUN,
    *overrides,
  ]


def environment(**changes):
  """One CPU device, whatever the tests themselves use."""
  inherited = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
  return {**inherited, 'JAX_PLATFORMS': 'cpu', **changes}


def run(variant, workdir, *overrides):
  return subprocess.run(
    command(variant, workdir, *overrides),
    cwd=TESTS.parent,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=300,
  )


def start(variant, workdir, *overrides, **changes):
  return subprocess.Popen(
    command(variant, workdir, *overrides),
    cwd=TESTS.parent,
    env=environment(PYTHONUNBUFFERED='1', **changes),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for_line(process, text):
  for line in process.stdout:
    if text in line:
      return
  raise AssertionError(f'ended before it said {text!r}')


def status(workdir):
  return json.loads((workdir / 'status.json').read_text())


def metrics(workdir):
  """The lines without what depends on the clock, as they stand in the file."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [
    {key: value for key, value in json.loads(line).items() if key != 'timing'}
    for line in lines
  ]


def newest_state(workdir):
  manager = ocp.CheckpointManager((workdir / 'checkpoints').absolute())
  step = manager.latest_step()
  restored = manager.restore(
    step, args=ocp.args.Composite(state=ocp.args.StandardRestore())
  )
  manager.close()
  return step, restored.state


def leaves(tree, path=()):
  if isinstance(tree, dict):
    return {
      name: leaf
      for key, value in tree.items()
      for name, leaf in leaves(value, (*path, key)).items()
    }
  if isinstance(tree, list | tuple):
    return leaves(dict(enumerate(tree)), path)
  return {} if tree is None else {path: np.asarray(tree)}


def assert_same_run(workdir, reference):
  assert metrics(workdir) == metrics(reference)
  step, state = newest_state(workdir)
  reference_step, reference_state = newest_state(reference)
  assert step == reference_step
  found, expected = leaves(state), leaves(reference_state)
  assert found.keys() == expected.keys()
  assert {path[0] for path in found} >= {'params', 'opt_state', 'step', 'seed'}
  for path, array in expected.items():
    np.testing.assert_array_equal(found[path], array, err_msg=str(path))
  assert status(workdir) == status(reference)


@pytest.fixture(scope='module')
def references(tmp_path_factory):
  """Uninterrupted runs, made once for each variant that is asked for."""
  made = {}

  def get(variant):
    if variant not in made:
      workdir = tmp_path_factory.mktemp('reference') / variant
      result = run(variant, workdir)
      assert result.returncode == 0, result.stderr
      made[variant] = workdir
    return made[variant]

  return get


def test_the_same_command_twice_gives_the_same_run(references, tmp_path):
  assert run('bn_baseline', tmp_path / 'again').returncode == 0
  assert_same_run(tmp_path / 'again', references('bn_baseline'))


@pytest.mark.parametrize('variant', VARIANTS)
def test_killed_again_and_again(variant, references, tmp_path):
  """SIGKILL after a random number of lines and a random instant, until done."""
  reference = references(variant)
  workdir = tmp_path / 'run'
  rng = random.Random(variant)
  kills = 0
  while True:
    process = start(variant, workdir)
    if kills < 4:
      for _ in range(rng.randrange(1, 7)):
        wait_for_line(process, 'step ')
      time.sleep(rng.random() / 4)
    else:
      process.stdout.read()
    process.kill()
    code = process.wait()
    process.communicate()
    if code == 0:
      break
    kills += 1
    assert kills < 10
  assert_same_run(workdir, reference)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_signal_while_training(number, references, tmp_path):
  workdir = tmp_path / 'run'
  process = start('bn_baseline', workdir)
  wait_for_line(process, 'step 21/60  train')
  process.send_signal(number)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 75
  assert errors == ''
  stopped = status(workdir)
  assert stopped['status'] == 'preempted'
  assert stopped['reason'] == f'stopped by {number.name}'
  assert newest_state(workdir)[0] == stopped['step']
  assert run('bn_baseline', workdir).returncode == 0
  assert_same_run(workdir, references('bn_baseline'))


def test_signal_while_compiling(references, tmp_path):
  workdir = tmp_path / 'run'
  # An empty cache, so that there is something to compile.
  process = start(
    'bn_baseline', workdir, JAX_COMPILATION_CACHE_DIR=str(tmp_path / 'cache')
  )
  wait_for_line(process, 'compiling')
  process.send_signal(signal.SIGTERM)
  output, errors = process.communicate(timeout=60)
  assert process.returncode == 75
  assert 'compiled in' not in output
  assert errors == ''
  assert status(workdir)['status'] == 'preempted'
  assert run('bn_baseline', workdir).returncode == 0
  assert_same_run(workdir, references('bn_baseline'))


def test_signals_of_one_shutdown_are_one(references, tmp_path):
  """Both stand waiting before the process can act on the first."""
  process = start('bn_baseline', tmp_path / 'run')
  wait_for_line(process, 'compiling')
  process.send_signal(signal.SIGSTOP)
  for number in (signal.SIGTERM, signal.SIGINT):
    process.send_signal(number)
  process.send_signal(signal.SIGCONT)
  process.communicate(timeout=60)
  assert process.returncode == 75
  assert run('bn_baseline', tmp_path / 'run').returncode == 0
  assert_same_run(tmp_path / 'run', references('bn_baseline'))


def test_second_run_in_a_workdir_is_refused(tmp_path):
  workdir = tmp_path / 'run'
  first = start('bn_baseline', workdir)
  wait_for_line(first, 'compiling')
  second = run('bn_baseline', workdir)
  first.kill()
  first.communicate()
  assert second.returncode == 1
  assert second.stderr.count('\n') == 1
  assert f'in use by process {first.pid}' in second.stderr
  # The lock went with its holder.
  assert run('bn_baseline', workdir).returncode == 0


def test_finished_run_is_left_alone(references):
  workdir = references('bn_x5')

  def snapshot():
    return {
      path: (path.stat().st_mtime_ns, path.stat().st_size)
      for path in [workdir, *workdir.rglob('*')]
    }

  before = snapshot()
  result = run('bn_x5', workdir)
  assert result.returncode == 0
  assert 'done' in result.stdout
  assert snapshot() == before


def test_longer_run_has_had_the_same_past(references, tmp_path):
  """40 steps, then 60 with other intervals: the arrays of 60 at once."""
  workdir = tmp_path / 'run'
  assert run('bn_x5', workdir, '--config.total_steps=40').returncode == 0
  result = run(
    'bn_x5', workdir, '--config.log_every=10', '--config.checkpoint_every=9'
  )
  assert result.returncode == 0, result.stderr
  found = leaves(newest_state(workdir)[1])
  expected = leaves(newest_state(references('bn_x5'))[1])
  for path, array in expected.items():
    np.testing.assert_array_equal(found[path], array, err_msg=str(path))
  rates, reference_rates = (
    {
      line['step']: line['learning_rate']
      for line in metrics(path)
      if line['split'] == 'train'
    }
    for path in (workdir, references('bn_x5'))
  )
  assert rates[28] == reference_rates[28]
  assert rates[60] == reference_rates[60]


@pytest.mark.parametrize(
  'override, difference',
  [
    ('batch_size=16', 'batch_size: 32 -> 16'),
    ('seed=1', 'seed: 0 -> 1'),
    ('model.reading=608', 'model.reading: 576 -> 608'),
    ('optim.momentum=0.8', 'optim.momentum: 0.9 -> 0.8'),
    ('data.name=synthetic', 'data.name: mnist_5k -> synthetic'),
  ],
)
def test_another_config_is_refused(override, difference, references):
  workdir = references('bn_x5')
  before = (workdir / 'config.json').read_bytes()
  result = run('bn_x5', workdir, f'--config.{override}')
  assert result.returncode == 1
  assert difference in result.stderr
  assert result.stderr.count('\n') == 1
  assert (workdir / 'config.json').read_bytes() == before


def preempted_copy(variant, workdir):
  """A run with checkpoints of steps 15, 30 and one between 35 and 60."""
  process = start(variant, workdir)
  wait_for_line(process, 'step 35/60  train')
  process.send_signal(signal.SIGTERM)
  process.communicate(timeout=60)
  assert process.returncode == 75


def damage(checkpoint):
  """Flips one bit in the middle of the largest file of a checkpoint."""
  largest = max(checkpoint.rglob('*'), key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[len(content) // 2] ^= 1
  largest.write_bytes(content)


def test_damaged_checkpoints(references, tmp_path):
  workdir = tmp_path / 'run'
  preempted_copy('bn_baseline', workdir)
  newest = status(workdir)['step']
  damage(workdir / 'checkpoints' / str(newest))
  result = run('bn_baseline', workdir)
  assert result.returncode == 0, result.stderr
  assert f'checkpoint {newest}' in result.stderr
  assert 'going on from the checkpoint of step 30' in result.stdout
  # Set aside, not deleted.
  assert (workdir / f'damaged_checkpoint_{newest}').is_dir()
  assert_same_run(workdir, references('bn_baseline'))


def test_all_checkpoints_damaged(tmp_path):
  workdir = tmp_path / 'run'
  preempted_copy('bn_baseline', workdir)
  for checkpoint in (workdir / 'checkpoints').iterdir():
    damage(checkpoint)
  before = (workdir / 'metrics.jsonl').read_bytes()
  result = run('bn_baseline', workdir)
  assert result.returncode == 1
  assert 'all checkpoints are damaged' in result.stderr
  assert (workdir / 'metrics.jsonl').read_bytes() == before


def test_half_a_line_is_cut(references, tmp_path):
  workdir = tmp_path / 'run'
  preempted_copy('bn_baseline', workdir)
  with (workdir / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 36, "spl')
  assert run('bn_baseline', workdir).returncode == 0
  assert_same_run(workdir, references('bn_baseline'))


def test_divergence_is_a_result(tmp_path):
  workdir = tmp_path / 'run'
  result = run('inception', workdir, '--config.optim.learning_rate=1e6')
  assert result.returncode == 3
  ended = status(workdir)
  assert ended['status'] == 'diverged'
  assert 0 < ended['step'] < 60
  assert 'loss' in ended['reason']
  again = run('inception', workdir, '--config.optim.learning_rate=1e6')
  assert again.returncode == 3
  assert status(workdir) == ended


def test_full_disk_is_an_error_and_costs_no_checkpoint(references, tmp_path):
  """A limit on file sizes stands for the disk."""
  workdir = tmp_path / 'run'
  preempted_copy('bn_baseline', workdir)
  process = subprocess.run(
    ['bash', '-c', 'ulimit -f 20; "$@"', '-', *command('bn_baseline', workdir)],
    cwd=TESTS.parent,
    env=environment(),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert process.returncode == 1
  assert 'could not be saved' in process.stderr
  assert 'Traceback' not in process.stderr
  assert status(workdir)['status'] == 'failed'
  assert run('bn_baseline', workdir).returncode == 0
  assert_same_run(workdir, references('bn_baseline'))
