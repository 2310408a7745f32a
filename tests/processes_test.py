"""Two real processes on loopback: the numbers of one, and one end for both."""

import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from resume_test import (
  TESTS,
  assert_same_run,
  environment,
  leaves,
  metrics,
  newest_state,
  status,
)

# In float64, so that the sums of two processes are those of one but for their
# last digits.
CONFIG = (
  '--config=configs/bn_x5.py:mini',
  '--config.model.dtype=float64',
  '--config.total_steps=60',
  '--config.log_every=7',
  '--config.eval_every=20',
  '--config.checkpoint_every=15',
  '--config.bn.population_batches=4',
)
SHORT_TIMES = (
  'import sys; sys.path[:0] = ["tests"];'
  'import tiny;'
  'from bn_repro import architecture, main, processes, watchdog;'
  'architecture.rows = tiny.rows;'
  'processes.CONNECT_TIMEOUT = 20; processes.SHARED_TIMEOUT = 2;'
  'watchdog.LEAST_SECONDS = 15;'
  'main.run_and_exit()'
)


def free_port():
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


def start(*arguments, program=('tests/tiny.py',), devices=1):
  flags = f'--xla_force_host_platform_device_count={devices}'
  return subprocess.Popen(
    [sys.executable, *program, *CONFIG, *arguments],
    cwd=TESTS.parent,
    env=environment(PYTHONUNBUFFERED='1', XLA_FLAGS=flags),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def start_pair(workdir, *arguments, second=(), **options):
  """Both processes; the second with further arguments."""
  shared = (f'--coordinator=127.0.0.1:{free_port()}', '--num_processes=2')
  return [
    start(
      f'--workdir={workdir}',
      *shared,
      f'--process_id={number}',
      *arguments,
      *(second if number else ()),
      **options,
    )
    for number in (0, 1)
  ]


def finish(processes, timeout=600):
  """Exit codes and standard errors; none may be left hanging."""
  try:
    ended = [process.communicate(timeout=timeout) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [process.returncode for process in processes], [e for _, e in ended]


def wait_for(process, text):
  for line in process.stdout:
    if line.startswith(text):
      return
  raise AssertionError(process.stderr.read())


@pytest.fixture(scope='module')
def of_two(tmp_path_factory):
  """A run of two processes, left alone."""
  workdir = tmp_path_factory.mktemp('two') / 'run'
  codes, errors = finish(start_pair(workdir))
  assert codes == [0, 0], errors
  return workdir


@pytest.fixture(scope='module')
def of_one(tmp_path_factory):
  """The same run in one process."""
  workdir = tmp_path_factory.mktemp('one') / 'run'
  codes, errors = finish([start(f'--workdir={workdir}')])
  assert codes == [0], errors
  return workdir


def assert_close(workdir, reference, tolerance):
  found, expected = metrics(workdir), metrics(reference)
  assert len(found) == len(expected)
  for a, b in zip(found, expected, strict=True):
    assert a.keys() == b.keys()
    assert a['loss'] == pytest.approx(b['loss'], rel=tolerance)
    for key in a.keys() - {'loss'}:
      assert a[key] == b[key]
  (step, state), (same_step, same_state) = map(
    newest_state, (workdir, reference)
  )
  assert step == same_step
  found, expected = leaves(state), leaves(same_state)
  assert found.keys() == expected.keys()
  for path, array in expected.items():
    difference = np.linalg.norm((found[path] - array).astype(float).ravel())
    norm = np.linalg.norm(array.astype(float).ravel())
    assert difference <= tolerance * max(norm, 1e-9), path


@pytest.mark.slow
def test_two_processes_are_one(of_one, of_two):
  """The same examples, and every image evaluated once."""
  assert_close(of_two, of_one, 1e-6)


@pytest.mark.parametrize('number', [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_saves_on_all(number, of_two, tmp_path):
  pair = start_pair(tmp_path / 'run')
  wait_for(pair[0], 'step 21/')
  pair[number].send_signal(signal.SIGTERM)
  codes, errors = finish(pair)
  assert codes == [75, 75], errors
  stopped = status(tmp_path / 'run')
  assert (stopped['status'], stopped['reason']) == (
    'preempted',
    'stopped by SIGTERM',
  )
  codes, errors = finish(start_pair(tmp_path / 'run'))
  assert codes == [0, 0], errors
  assert_same_run(tmp_path / 'run', of_two)


@pytest.mark.slow
@pytest.mark.parametrize('number', [0, 1])
def test_a_killed_process_ends_the_other(number, of_one, of_two, tmp_path):
  """Within a minute; two processes go on bit for bit, and so may one."""
  pair = start_pair(tmp_path / 'run')
  wait_for(pair[0], 'step 35/')
  pair[number].kill()
  killed = time.monotonic()
  codes, errors = finish(pair)
  assert time.monotonic() - killed < 60
  assert codes[1 - number] != 0
  if number == 0:
    codes, errors = finish(start_pair(tmp_path / 'run'))
    assert codes == [0, 0], errors
    assert_same_run(tmp_path / 'run', of_two)
  else:
    codes, errors = finish([start(f'--workdir={tmp_path / "run"}')])
    assert codes == [0], errors
    assert_close(tmp_path / 'run', of_one, 1e-6)


@pytest.mark.slow
def test_elastic(of_one, tmp_path):
  """Stopped on eight devices, gone on with on four, two, one and eight."""
  workdir = tmp_path / 'run'
  for number, stop_after in ((8, 7), (4, 21), (2, 28), (1, 42), (8, None)):
    process = start(f'--workdir={workdir}', devices=number)
    if stop_after is not None:
      wait_for(process, f'step {stop_after}/')
      process.send_signal(signal.SIGTERM)
    codes, errors = finish([process])
    assert codes == [0 if stop_after is None else 75], errors
  assert_close(workdir, of_one, 1e-6)


@pytest.mark.slow
def test_statistics_of_each_device_stay_those_of_as_many(tmp_path):
  """With another number of devices it would be another experiment."""
  own = '--config.bn.statistics=device'
  process = start(f'--workdir={tmp_path / "run"}', own, devices=2)
  wait_for(process, 'step 21/')
  process.send_signal(signal.SIGTERM)
  codes, errors = finish([process])
  assert codes == [75], errors
  ((line,),) = errors_of([start(f'--workdir={tmp_path / "run"}', own)])
  assert 'another images per statistic' in line


def errors_of(processes, timeout=300):
  """What each process says; all of them have to fail, in one line each."""
  codes, errors = finish(processes, timeout)
  assert codes == [1] * len(processes), errors
  assert not any('Traceback' in error for error in errors), errors
  return [
    [line for line in error.splitlines() if line.startswith('error: ')]
    for error in errors
  ]


def test_processes_of_different_configs(tmp_path):
  for lines in errors_of(
    start_pair(tmp_path / 'run', second=('--config.seed=1',))
  ):
    (line,) = lines
    assert 'process 1 has another config.seed than process 0: 1, not 0' in line
  assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_one_process_without_the_data(tmp_path):
  second = ('--config.data.name=mnist', '--config.data.data_dir=/no')
  (first,), (own,) = errors_of(start_pair(tmp_path / 'run', second=second))
  assert '/no' in own and 'idx files' in own
  assert first.startswith('error: process 1 on ') and 'idx files' in first


def test_a_batch_that_does_not_divide(tmp_path):
  pair = start_pair(tmp_path / 'run', '--config.batch_size=33')
  for lines in errors_of(pair):
    (line,) = lines
    assert 'not a multiple of the 2 devices' in line


@pytest.mark.slow
def test_a_run_that_is_done_is_done_for_all(of_two):
  before = (of_two / 'metrics.jsonl').read_bytes()
  codes, errors = finish(start_pair(of_two))
  assert codes == [0, 0], errors
  assert (of_two / 'metrics.jsonl').read_bytes() == before


def test_a_workdir_of_one_host_alone(tmp_path):
  second = (f'--workdir={tmp_path / "elsewhere"}',)
  (first,), (own,) = errors_of(start_pair(tmp_path / 'run', second=second))
  assert 'does not see what process 0' in own
  assert first.startswith('error: process 1 on ')


def test_a_coordinator_that_cannot_be_reached(tmp_path):
  process = start(
    f'--workdir={tmp_path / "run"}',
    f'--coordinator=127.0.0.1:{free_port()}',
    '--num_processes=2',
    '--process_id=1',
    program=('-c', SHORT_TIMES),
  )
  ((line,),) = errors_of([process])
  assert 'could not be reached in 20 s' in line


@pytest.mark.parametrize(
  'flags, expected',
  [
    (('--coordinator=a:1',), 'all three or none'),
    (
      ('--coordinator=a', '--num_processes=2', '--process_id=0'),
      'HOST:PORT',
    ),
    (
      ('--coordinator=a:1', '--num_processes=2', '--process_id=2'),
      'from 0 to 1',
    ),
  ],
)
def test_flags_that_do_not_fit(flags, expected, tmp_path):
  ((line,),) = errors_of([start(f'--workdir={tmp_path}', *flags)])
  assert expected in line


def test_a_process_that_hangs_ends_the_other(tmp_path):
  """Stopped, not killed: its connections stay, and nobody else notices."""
  pair = start_pair(
    tmp_path / 'run',
    '--config.total_steps=100000',
    '--config.stuck_after=10',
    program=('-c', SHORT_TIMES),
  )
  wait_for(pair[0], 'step 21/')
  pair[1].send_signal(signal.SIGSTOP)
  try:
    _, error = pair[0].communicate(timeout=300)
  finally:
    pair[1].kill()
    finish(pair)
  assert pair[0].returncode != 0
  assert 'no step for' in error
  # The stacks show where.
  assert 'train.py' in error
