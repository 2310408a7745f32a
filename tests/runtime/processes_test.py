"""Two real processes on loopback: the numbers of one, and one end for both."""

import signal
import socket
import subprocess
import sys
import textwrap
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

from bn_repro.runtime import processes as processes_lib

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
# What a process may end with when it has lost another: JAX aborts it where the
# lost one had the coordinator.
LEFT_BEHIND = (75, -signal.SIGABRT)


def patched(changes):
  """Python's arguments for the tiny program with changes made to it."""
  return (
    '-c',
    'import sys, time\n'
    'sys.path[:0] = ["tests"]\n'
    'import tiny\n'
    'from bn_repro import main\n'
    'from bn_repro.models import inception_table\n'
    'from bn_repro.runtime import processes, watchdog\n'
    'inception_table.rows = tiny.rows\n'
    'number = int("--process_id=1" in sys.argv)\n'
    f'{textwrap.dedent(changes)}\n'
    'main.run_and_exit()',
  )


SHORT_TIMES = patched("""
  processes.CONNECT_TIMEOUT = 20
  processes.SHARED_TIMEOUT = 2
  watchdog.LEAST_SECONDS = 15
""")


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


def start_pair(workdir, *arguments, second=(), devices=(1, 1), **options):
  """Both processes; the second with further arguments."""
  shared = (f'--coordinator=127.0.0.1:{free_port()}', '--num_processes=2')
  return [
    start(
      f'--workdir={workdir}',
      *shared,
      f'--process_id={number}',
      *arguments,
      *(second if number else ()),
      devices=devices[number],
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
@pytest.mark.parametrize('said', ['compiling', 'step 7/'])
@pytest.mark.parametrize('number', [0, 1])
def test_a_process_killed_early_is_no_failure_of_the_other(
  number, said, tmp_path
):
  """Whatever it was about to do together with the one that is gone."""
  pair = start_pair(tmp_path / 'run')
  wait_for(pair[0], said)
  pair[number].kill()
  codes, errors = finish(pair, timeout=200)
  assert codes[1 - number] in LEFT_BEHIND, errors
  assert status(tmp_path / 'run')['status'] != 'failed'


@pytest.mark.parametrize(
  'error, number, expected',
  [
    (RuntimeError('INTERNAL: Gloo all-reduce failed'), 2, True),
    (ValueError('UNKNOWN: [..] Connection closed by peer'), 2, True),
    (RuntimeError('UNAVAILABLE: the coordination service'), 2, True),
    (RuntimeError('INTERNAL: Mosaic failed to compile'), 2, False),
    (RuntimeError('RESOURCE_EXHAUSTED: out of memory'), 2, False),
    (OSError('Connection reset by peer'), 2, False),
    (RuntimeError('INTERNAL: Gloo all-reduce failed'), 1, False),
  ],
)
def test_what_tells_of_a_lost_process(error, number, expected, monkeypatch):
  monkeypatch.setattr(processes_lib._Membership, 'count', number)
  assert processes_lib.is_peer_failure(error) == expected


def test_a_crash_of_all_is_no_lost_process(tmp_path):
  """It would come again: 75 would have it started for ever."""
  pair = start_pair(
    tmp_path / 'run',
    program=patched("""
      import dataclasses
      from bn_repro import program
      def crash(state, batches):
        time.sleep(3 - 3 * number)  # With process 0 goes the coordinator.
        raise RuntimeError('INTERNAL: Mosaic failed to compile')
      program.Experiment.compile = lambda self, state: dataclasses.replace(
        self, train_steps=crash
      )
    """),
  )
  codes, errors = finish(pair, timeout=300)
  assert codes == [1, 1], errors
  assert all('Mosaic failed' in error for error in errors)
  ended = status(tmp_path / 'run')
  assert ended['status'] == 'failed'
  assert 'Mosaic failed' in ended['reason']


@pytest.mark.slow
def test_a_slow_last_save_is_waited_for(tmp_path):
  pair = start_pair(
    tmp_path / 'run',
    '--config.total_steps=7',
    '--config.bn.population_batches=0',
    program=patched("""
      from bn_repro import checkpoint
      processes.DISCONNECT_TIMEOUT = 4
      wait = checkpoint.Checkpoints.wait
      def wait_long(self):
        wait(self)
        time.sleep(15 - 15 * number)
      checkpoint.Checkpoints.wait = wait_long
    """),
  )
  codes, errors = finish(pair, timeout=300)
  assert codes == [0, 0], errors
  assert status(tmp_path / 'run')['status'] == 'done'
  assert newest_state(tmp_path / 'run')[0] == 7


def test_an_error_of_one_alone_ends_the_other(tmp_path):
  pair = start_pair(
    tmp_path / 'run',
    program=patched("""
      from bn_repro import config, splits
      batches = []
      load = splits.ArraySplit.training_batch
      def load_or_fail(self, indices, draws):
        batches.append(indices)
        if number and len(batches) > 12:
          raise config.UserError('example 7 cannot be read')
        return load(self, indices, draws)
      splits.ArraySplit.training_batch = load_or_fail
    """),
  )
  wait_for(pair[0], 'step 7/')
  codes, errors = finish(pair, timeout=200)
  assert codes[0] in LEFT_BEHIND and codes[1] == 1, errors
  lines = [e for e in errors[1].splitlines() if e.startswith('error: ')]
  assert lines == ['error: example 7 cannot be read']


@pytest.mark.slow
@pytest.mark.parametrize(
  'statistics, group',
  [('global', 32), ('device', 32), ('group', 4), ('group', 16)],
)
def test_one_step_of_two_processes_is_that_of_one(statistics, group, tmp_path):
  """With four devices either way; after one step momentum is the gradient."""
  step = (
    '--config.total_steps=1',
    f'--config.bn.statistics={statistics}',
    f'--config.bn.virtual_batch_size={group}',
    '--config.bn.population_batches=0',
  )
  pair = start_pair(tmp_path / 'two', *step, devices=(2, 2))
  codes, errors = finish(pair)
  assert codes == [0, 0], errors
  codes, errors = finish(
    [start(f'--workdir={tmp_path / "one"}', *step, devices=4)]
  )
  assert codes == [0], errors
  assert_close(tmp_path / 'two', tmp_path / 'one', 1e-10)


@pytest.mark.slow
def test_one_process_goes_on_as_two(of_one, tmp_path):
  process = start(f'--workdir={tmp_path / "run"}')
  wait_for(process, 'step 21/')
  process.send_signal(signal.SIGTERM)
  codes, errors = finish([process])
  assert codes == [75], errors
  codes, errors = finish(start_pair(tmp_path / 'run'))
  assert codes == [0, 0], errors
  assert_close(tmp_path / 'run', of_one, 1e-6)


# Says on each process whether it has got process 0's bits, on all devices.
_BITS = """
import argparse, sys
import ml_dtypes
import numpy as np
from bn_repro import parallel, processes
parser = argparse.ArgumentParser(allow_abbrev=False)
processes.add_arguments(parser)
processes.connect(parser.parse_known_args()[0])
types = (np.float32, ml_dtypes.bfloat16, np.int32)
own = [np.array([-0.0, 0.0, 1.5], dtype) for dtype in types]
own.append(np.array([np.nan, -np.inf], np.float32))
found, facts = processes.broadcast_from_first(
  lambda: (own, {'step': 7}), [np.zeros_like(x) for x in own]
)
assert facts == {'step': 7}
placed = parallel.replicate(parallel.create_mesh(), found)
for expected, x, copies in zip(own, found, placed, strict=True):
  assert x.dtype == expected.dtype and x.tobytes() == expected.tobytes()
  assert copies.is_fully_replicated
  for copy in copies.addressable_shards:
    assert np.asarray(copy.data).tobytes() == expected.tobytes()
processes.disconnect()
"""


def test_process_0_gives_its_bits_to_all(tmp_path):
  """Also those of -0.0, and of NaN, which is not equal to itself."""
  pair = start_pair(tmp_path, program=('-c', _BITS), devices=(2, 2))
  codes, errors = finish(pair, timeout=200)
  assert codes == [0, 0], errors


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


@pytest.mark.parametrize(
  'override, expected',
  [
    ('seed=1', 'seed than process 0: 1, not 0'),
    # What does not change a run's past, but when its processes meet.
    ('total_steps=61', 'total_steps than process 0: 61, not 60'),
    ('eval_every=10', 'eval_every than process 0: 10, not 20'),
    # What one process alone would refuse.
    ('batch_size=33', 'batch_size than process 0: 33, not 32'),
  ],
)
def test_processes_of_different_configs(override, expected, tmp_path):
  pair = start_pair(tmp_path / 'run', second=(f'--config.{override}',))
  for lines in errors_of(pair, timeout=200):
    (line,) = lines
    assert f'process 1 has another config.{expected}' in line
  assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_processes_of_different_numbers_of_devices(tmp_path):
  pair = start_pair(tmp_path / 'run', devices=(1, 3))
  for lines in errors_of(pair, timeout=200):
    (line,) = lines
    assert 'the processes have 1, 3 devices' in line


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
  pair = start_pair(tmp_path / 'run', second=second, program=SHORT_TIMES)
  (first,), (own,) = errors_of(pair)
  assert 'does not see what process 0' in own
  assert first.startswith('error: process 1 on ')


def test_a_coordinator_that_cannot_be_reached(tmp_path):
  process = start(
    f'--workdir={tmp_path / "run"}',
    f'--coordinator=127.0.0.1:{free_port()}',
    '--num_processes=2',
    '--process_id=1',
    program=SHORT_TIMES,
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
    program=SHORT_TIMES,
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


@pytest.mark.parametrize(
  'device, platforms, installed, expected',
  [
    ('0x0063', None, True, True),
    ('0x0063', 'tpu,cpu', True, True),
    ('0x0063', 'cpu', True, False),
    ('0x0063', None, False, False),
    # The network card of any VM of Google's.
    ('0x0042', None, True, False),
  ],
)
def test_a_cloud_tpu_is_told_from_a_network_card(
  device, platforms, installed, expected, tmp_path, monkeypatch
):
  for place, vendor, number in (
    ('0000:00:01.0', '0x8086', '0x0063'),
    ('0000:00:04.0', '0x1ae0', device),
  ):
    (tmp_path / place).mkdir()
    (tmp_path / place / 'vendor').write_text(f'{vendor}\n')
    (tmp_path / place / 'device').write_text(f'{number}\n')
  monkeypatch.setattr(processes_lib, '_PCI_DEVICES', tmp_path)
  monkeypatch.setattr(
    processes_lib.importlib.util, 'find_spec', lambda name: installed or None
  )
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  if platforms is not None:
    monkeypatch.setenv('JAX_PLATFORMS', platforms)
  assert processes_lib._is_cloud_tpu() == expected
