"""Two real processes on loopback: the numbers of one, and one end for both."""

import argparse
import functools
import signal
import textwrap

import numpy as np
import pytest
import support
from support import TINY, finish, metrics, newest_arrays, status, wait_for_line

from bn_repro.errors import UserError
from bn_repro.runtime import backend
from bn_repro.runtime import processes as processes_lib

# In one worker, so that the runs which others are compared with train once.
pytestmark = pytest.mark.xdist_group('processes')

# In float64, so that the sums of two processes are those of one but for their
# last digits.
FLOAT64 = '--config.model.dtype=float64'
# The MNIST network compiles in a second. Its steps take a millisecond or more,
# so that a signal after step 35 comes before the end.
MLP = (
  '--config=configs/bn_mnist.py:mini',
  FLOAT64,
  '--config.batch_size=64',
  '--config.total_steps=250',
  '--config.steps_per_call=1',
  '--config.log_every=35',
  '--config.eval_every=100',
  '--config.checkpoint_every=60',
  '--config.bn.population_batches=4',
  '--config.data.distorted_copies=0',
  '--config.optim.momentum=0.9',
)
# With convolutions, and distortions drawn on the device.
INCEPTION = (
  '--config=configs/bn_x5.py:mini',
  TINY,
  FLOAT64,
  '--config.data.distortion=reduced',
  '--config.total_steps=30',
  '--config.log_every=7',
  '--config.eval_every=20',
  '--config.bn.population_batches=4',
)
# How a process ends that has lost process 0, which hosts the coordination
# service: JAX aborts it, unless its training notices first.
LEFT_BEHIND = (75, -signal.SIGABRT)


def patched(changes):
  """A program for Python: `bn_repro.main` after changes, as `number`."""
  return (
    '-c',
    'import sys, time\n'
    'from bn_repro import main\n'
    'from bn_repro.runtime import processes, watchdog\n'
    'number = int("--process_id=1" in sys.argv)\n'
    f'{textwrap.dedent(changes)}\n'
    'main.run_and_exit()',
  )


SHORT_TIMES = patched("""
  processes.CONNECT_TIMEOUT = 20
  processes.SHARED_TIMEOUT = 2
  watchdog.MIN_SECONDS = 6
""")


def start(workdir, *arguments, config=MLP, **options):
  return support.start(f'--workdir={workdir}', *config, *arguments, **options)


def start_all(count, workdir, *arguments, second=(), devices=None, **options):
  """Starts processes of one run; the second with further arguments."""
  address = f'--coordinator=127.0.0.1:{support.free_port()}'
  return [
    start(
      workdir,
      *(address, f'--num_processes={count}', f'--process_id={number}'),
      *arguments,
      *(second if number == 1 else ()),
      devices=devices[number] if devices else 1,
      **options,
    )
    for number in range(count)
  ]


start_pair = functools.partial(start_all, 2)


def assert_ends(processes, *codes):
  """Waits for processes; each has to end with one of the codes for it."""
  ended = finish(*processes)
  for process, code in zip(ended, codes, strict=True):
    expected = code if isinstance(code, tuple) else (code,)
    assert process.returncode in expected, [e.stderr for e in ended]
  return ended


def errors_of(*processes):
  """The errors of each process; all of them have to fail, without traceback."""
  ended = assert_ends(processes, *[1] * len(processes))
  assert not any('Traceback' in process.stderr for process in ended)
  return [
    [x for x in process.stderr.splitlines() if x.startswith('error: ')]
    for process in ended
  ]


@pytest.fixture(scope='module')
def of_two(tmp_path_factory):
  """An undisturbed run of two processes."""
  workdir = tmp_path_factory.mktemp('two') / 'run'
  assert_ends(start_pair(workdir), 0, 0)
  return workdir


@pytest.fixture(scope='module')
def of_one(tmp_path_factory):
  """The same run in one process."""
  workdir = tmp_path_factory.mktemp('one') / 'run'
  assert_ends([start(workdir)], 0)
  return workdir


def assert_close(workdir, reference, tolerance):
  found, expected = metrics(workdir), metrics(reference)
  assert len(found) == len(expected)
  for a, b in zip(found, expected, strict=True):
    assert a.keys() == b.keys()
    assert a['loss'] == pytest.approx(b['loss'], rel=tolerance)
    for key in a.keys() - {'loss'}:
      assert a[key] == b[key]
  (step, found), (expected_step, expected) = map(
    newest_arrays, (workdir, reference)
  )
  assert step == expected_step
  assert found.keys() == expected.keys()
  for path, array in expected.items():
    difference = np.linalg.norm((found[path] - array).astype(float).ravel())
    norm = np.linalg.norm(array.astype(float).ravel())
    assert difference <= tolerance * max(norm, 1e-9), path


@pytest.mark.slow
@pytest.mark.parametrize('config', [MLP, INCEPTION], ids=['mlp', 'inception'])
def test_two_processes_are_one(config, tmp_path):
  """The same examples, and every image evaluated once."""
  assert_ends(start_pair(tmp_path / 'two', config=config), 0, 0)
  assert_ends([start(tmp_path / 'one', config=config)], 0)
  assert_close(tmp_path / 'two', tmp_path / 'one', 1e-6)


@pytest.mark.parametrize('number', [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_one_saves_on_all(number, of_two, tmp_path):
  pair = start_pair(tmp_path / 'run')
  wait_for_line(pair[0], 'step 35/')
  pair[number].send_signal(signal.SIGTERM)
  assert_ends(pair, 75, 75)
  stopped = status(tmp_path / 'run')
  assert stopped['status'] == 'preempted'
  assert stopped['reason'] == 'stopped by SIGTERM'
  assert_ends(start_pair(tmp_path / 'run'), 0, 0)
  support.assert_same_run(tmp_path / 'run', of_two)


@pytest.mark.slow
@pytest.mark.parametrize('number', [0, 1])
def test_a_killed_process_ends_the_other(number, of_one, of_two, tmp_path):
  """Two processes resume bit for bit, and so may one."""
  pair = start_pair(tmp_path / 'run')
  wait_for_line(pair[0], 'step 70/')
  support.kill(pair[number])
  lost = LEFT_BEHIND if number == 0 else 75
  assert_ends([pair[1 - number]], lost)
  finish(pair[number])
  if number == 0:
    assert_ends(start_pair(tmp_path / 'run'), 0, 0)
    support.assert_same_run(tmp_path / 'run', of_two)
  else:
    assert_ends([start(tmp_path / 'run')], 0)
    assert_close(tmp_path / 'run', of_one, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('printed', ['compiling', 'step 35/'])
@pytest.mark.parametrize('number', [0, 1])
def test_a_process_killed_early_is_no_failure_of_the_other(
  number, printed, tmp_path
):
  """Whatever collective the other was about to start."""
  pair = start_pair(tmp_path / 'run')
  wait_for_line(pair[0], printed)
  support.kill(pair[number])
  lost = LEFT_BEHIND if number == 0 else 75
  assert_ends([pair[1 - number]], lost)
  finish(pair[number])
  assert status(tmp_path / 'run')['status'] != 'failed'
  assert_ends(start_pair(tmp_path / 'run'), 0, 0)


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
  """It would come again: 75 would have it restarted for ever."""
  pair = start_pair(
    tmp_path / 'run',
    program=patched("""
      from bn_repro.runtime import preemption
      def crash(self):
        raise RuntimeError('INTERNAL: Mosaic failed to compile')
      preemption.AgreedPreemption.check = crash
    """),
  )
  ended = assert_ends(pair, 1, 1)
  assert all('Mosaic failed' in process.stderr for process in ended)
  failed = status(tmp_path / 'run')
  assert failed['status'] == 'failed'
  assert 'Mosaic failed' in failed['reason']


@pytest.mark.slow
def test_a_slow_last_save_is_waited_for(tmp_path):
  pair = start_pair(
    tmp_path / 'run',
    '--config.total_steps=7',
    '--config.bn.population_batches=0',
    program=patched("""
      from bn_repro.training import checkpoint
      processes.DISCONNECT_TIMEOUT = 4
      processes.HEARTBEAT_TIMEOUT = 8
      wait = checkpoint.Checkpoints.wait
      def wait_long(self):
        wait(self)
        if 7 in self.steps():
          time.sleep(15 - 15 * number)
      checkpoint.Checkpoints.wait = wait_long
    """),
  )
  assert_ends(pair, 0, 0)
  assert status(tmp_path / 'run')['status'] == 'done'
  assert newest_arrays(tmp_path / 'run')[0] == 7


def test_an_error_of_one_alone_ends_the_other(tmp_path):
  pair = start_pair(
    tmp_path / 'run',
    program=patched("""
      from bn_repro.data import split
      from bn_repro.errors import UserError
      batches = []
      load = split.ArraySplit.training_batch
      def load_or_fail(self, *arguments):
        batches.append(arguments)
        if number and len(batches) > 100:
          raise UserError('example 7 cannot be read')
        return load(self, *arguments)
      split.ArraySplit.training_batch = load_or_fail
    """),
  )
  wait_for_line(pair[0], 'step 35/')
  _, second = assert_ends(pair, LEFT_BEHIND, 1)
  lines = [x for x in second.stderr.splitlines() if x.startswith('error: ')]
  assert lines == ['error: example 7 cannot be read']


@pytest.mark.slow
@pytest.mark.parametrize(
  'config, statistics, group',
  [
    (INCEPTION, 'global', 32),
    (MLP, 'device', 32),
    (MLP, 'group', 4),
    (MLP, 'group', 32),
  ],
)
def test_one_step_of_two_processes_is_that_of_one(
  config, statistics, group, tmp_path
):
  """With four devices either way; after one step momentum is the gradient."""
  step = (
    '--config.total_steps=1',
    f'--config.bn.statistics={statistics}',
    f'--config.bn.virtual_batch_size={group}',
    '--config.bn.population_batches=0',
  )
  pair = start_pair(tmp_path / 'two', *step, devices=(2, 2), config=config)
  assert_ends(pair, 0, 0)
  assert_ends([start(tmp_path / 'one', *step, devices=4, config=config)], 0)
  assert_close(tmp_path / 'two', tmp_path / 'one', 1e-10)


def stop_after(step, workdir, *arguments, **options):
  """Starts a run and stops it once it has printed the line of a step."""
  process = start(workdir, *arguments, **options)
  wait_for_line(process, f'step {step}/')
  process.send_signal(signal.SIGTERM)
  assert_ends([process], 75)


@pytest.mark.slow
def test_one_process_resumes_as_two(of_one, tmp_path):
  stop_after(35, tmp_path / 'run')
  assert_ends(start_pair(tmp_path / 'run'), 0, 0)
  assert_close(tmp_path / 'run', of_one, 1e-6)


# Checks in each process that it gets the bits of process 0, on all devices.
_BITS = """
import argparse
import ml_dtypes
import numpy as np
from bn_repro import parallel
from bn_repro.runtime import processes
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
  assert_ends(start_pair(tmp_path, program=('-c', _BITS), devices=(2, 2)), 0, 0)


@pytest.mark.slow
def test_elastic(of_one, tmp_path):
  """Stopped on eight devices, resumed on four, two, one and eight."""
  workdir = tmp_path / 'run'
  for number, step in ((8, 35), (4, 70), (2, 105), (1, 140)):
    stop_after(step, workdir, devices=number)
  assert_ends([start(workdir, devices=8)], 0)
  assert_close(workdir, of_one, 1e-6)


@pytest.mark.slow
def test_statistics_of_each_device_stay_those_of_as_many(tmp_path):
  """With another number of devices it would be another experiment."""
  own = '--config.bn.statistics=device'
  stop_after(35, tmp_path / 'run', own, devices=2)
  ((line,),) = errors_of(start(tmp_path / 'run', own))
  assert 'images per statistic' in line


def test_processes_of_different_configs(tmp_path):
  second = {
    'seed=1': 'seed than process 0: 1, not 0',
    # Fields that a resumed run may change, but not one process alone.
    'total_steps=251': 'total_steps than process 0: 251, not 250',
    'eval_every=50': 'eval_every than process 0: 50, not 100',
    # What process 1 would refuse.
    'batch_size=65': 'batch_size than process 0: 65, not 64',
  }
  pair = start_pair(
    tmp_path / 'run',
    second=[f'--config.{override}' for override in second],
    devices=(2, 2),
  )
  for lines in errors_of(*pair):
    assert len(lines) == len(second)
    for expected in second.values():
      start = f'error: process 1 has another config.{expected}'
      assert any(line.startswith(start) for line in lines)
  assert not (tmp_path / 'run' / 'checkpoints').exists()


def test_processes_of_different_numbers_of_devices(tmp_path):
  for lines in errors_of(*start_pair(tmp_path / 'run', devices=(1, 3))):
    (line,) = lines
    assert 'the processes have 1, 3 devices' in line


def test_one_process_without_the_data(tmp_path):
  second = ('--config.data.name=mnist', '--config.data.data_dir=/no')
  (first,), (own,) = errors_of(*start_pair(tmp_path / 'run', second=second))
  assert '/no' in own and 'idx files' in own
  assert first.startswith('error: process 1 on ') and 'idx files' in first


def test_a_batch_that_does_not_divide(tmp_path):
  for lines in errors_of(
    *start_pair(tmp_path / 'run', '--config.batch_size=65')
  ):
    (line,) = lines
    assert 'not a multiple of the 2 devices' in line


@pytest.mark.slow
def test_a_run_that_is_done_is_done_for_all(of_two):
  before = (of_two / 'metrics.jsonl').read_bytes()
  assert_ends(start_pair(of_two), 0, 0)
  assert (of_two / 'metrics.jsonl').read_bytes() == before


def test_a_workdir_of_one_host_alone(tmp_path):
  second = (f'--workdir={tmp_path / "elsewhere"}',)
  pair = start_pair(tmp_path / 'run', second=second, program=SHORT_TIMES)
  (first,), (own,) = errors_of(*pair)
  assert 'does not see what process 0' in own
  assert first.startswith('error: process 1 on ')


@pytest.mark.parametrize(
  'flags, expected',
  [
    (('a:1', None, None), 'all three or none'),
    (('a', 2, 0), 'HOST:PORT'),
    (('a:1', 2, 2), 'from 0 to 1'),
    ((f'127.0.0.1:{support.free_port()}', 2, 1), 'not be reached in 0.1 s'),
  ],
)
def test_flags_that_do_not_fit(flags, expected, monkeypatch):
  monkeypatch.setattr(processes_lib, 'CONNECT_TIMEOUT', 0.1)
  names = ('coordinator', 'num_processes', 'process_id')
  with pytest.raises(UserError, match=expected):
    processes_lib.connect(
      argparse.Namespace(**dict(zip(names, flags, strict=True)))
    )


# Connects with a short timeout, and waits alone or for the other process.
_WAITS = """
import argparse, sys, threading
from bn_repro.runtime import processes
processes.HEARTBEAT_TIMEOUT = 3
processes.END_LAST_TIME = 1
parser = argparse.ArgumentParser(allow_abbrev=False)
processes.add_arguments(parser)
parser.add_argument('--workdir')
flags, (where,) = parser.parse_known_args()
processes.connect(flags)
print('connected')
if where == 'alone':
  threading.Event().wait()
while True:
  processes.barrier()
"""


@pytest.mark.parametrize(
  'number, where',
  [
    (0, 'alone'),
    (1, 'together'),
    pytest.param(0, 'together', marks=pytest.mark.slow),
    pytest.param(1, 'alone', marks=pytest.mark.slow),
  ],
)
def test_a_stopped_process_is_lost(number, where, tmp_path):
  """One line, and 75; when it is continued it has lost the other."""
  pair = start_pair(tmp_path, where, program=('-c', _WAITS), config=())
  for process in pair:
    wait_for_line(process, 'connected')
  pair[number].send_signal(signal.SIGSTOP)
  try:
    (other,) = assert_ends([pair[1 - number]], 75)
    assert other.stderr == (
      f'error: process {number} has not answered for 3 s; the same command '
      'resumes the run\n'
    )
    pair[number].send_signal(signal.SIGCONT)
    (stopped,) = finish(pair[number])
    assert stopped.returncode != 0
  finally:
    support.kill(pair[number])


@pytest.mark.slow
def test_all_others_end_alike(tmp_path):
  """JAX would abort those that notice later than process 0."""
  three = start_all(3, tmp_path, 'alone', program=('-c', _WAITS), config=())
  for process in three:
    wait_for_line(process, 'connected')
  three[1].send_signal(signal.SIGSTOP)
  try:
    ended = assert_ends([three[0], three[2]], 75, 75)
  finally:
    support.kill(three[1])
    finish(three[1])
  for process in ended:
    assert process.stderr.startswith('error: process 1 has not answered')
    assert process.stderr.count('\n') == 1


@pytest.mark.slow
@pytest.mark.parametrize('printed', ['compiling', 'step 35/'])
@pytest.mark.parametrize('number', [0, 1])
def test_a_process_stopped_in_a_run(number, printed, of_two, tmp_path):
  """It never writes again; its lock keeps another run out until it ends."""
  workdir = tmp_path / 'run'
  pair = start_pair(
    workdir, program=patched('processes.HEARTBEAT_TIMEOUT = 10')
  )
  wait_for_line(pair[0], printed)
  pair[number].send_signal(signal.SIGSTOP)
  try:
    (other,) = assert_ends([pair[1 - number]], 75)
    assert other.stderr.startswith(f'error: process {number} has not answered')
    assert other.stderr.count('\n') == 1
    if number == 0:
      for lines in errors_of(*start_pair(workdir)):
        assert f'in use by process {pair[0].pid}' in lines[0]
    before = (workdir / 'metrics.jsonl').read_bytes()
    pair[number].send_signal(signal.SIGCONT)
    (stopped,) = finish(pair[number])
    assert stopped.returncode in LEFT_BEHIND, stopped.stderr
    assert (workdir / 'metrics.jsonl').read_bytes() == before
  finally:
    support.kill(pair[number])
  assert_ends(start_pair(workdir), 0, 0)
  support.assert_same_run(workdir, of_two)


def test_a_process_that_hangs_ends_the_other(tmp_path):
  """Stopped, not killed: its connections stay, and nobody else notices."""
  pair = start_pair(
    tmp_path / 'run',
    '--config.total_steps=10000000',
    '--config.stuck_after=10',
    program=SHORT_TIMES,
  )
  wait_for_line(pair[0], 'step 35/')
  pair[1].send_signal(signal.SIGSTOP)
  try:
    (first,) = finish(pair[0])
  finally:
    support.kill(pair[1])
    finish(pair[1])
  assert first.returncode != 0
  assert 'no step for' in first.stderr
  # The stacks show where.
  assert 'train.py' in first.stderr


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
  monkeypatch.setattr(backend, '_PCI_DEVICES', tmp_path)
  monkeypatch.setattr(
    processes_lib.importlib.util, 'find_spec', lambda name: installed or None
  )
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  if platforms is not None:
    monkeypatch.setenv('JAX_PLATFORMS', platforms)
  assert processes_lib._is_cloud_tpu() == expected
