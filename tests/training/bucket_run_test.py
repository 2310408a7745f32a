"""A run in a bucket, on machines that share nothing else."""

import random
import signal
import time

import bucket_proxy
import pytest
import support
from support import assert_same_run, finish, kill, wait_for_line

from bn_repro import files
from bn_repro.runtime import mirror

# In one worker, so that the run which others are compared with trains once.
pytestmark = pytest.mark.xdist_group('resume')

# Uploads all the time, and takes a claim over after ten seconds.
PROGRAM = """
from bn_repro.runtime import mirror
mirror.Mirror.__init__.__kwdefaults__.update(interval=0.05, expires=10.0)
mirror.buckets.RETRY_FOR = 20.0
from bn_repro import main
main.run_and_exit()
"""
WORKDIR = 'gs://bucket/runs/a'
NETWORK = ('--config=configs/bn_mnist.py:mini', *support.MNIST)


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  """An undisturbed run in a local workdir."""
  workdir = tmp_path_factory.mktemp('reference') / 'run'
  ended = support.run(*NETWORK, f'--workdir={workdir}')
  assert ended.returncode == 0, ended.stderr
  return workdir


@pytest.fixture
def machine(bucket, tmp_path):
  """Starts a run on a machine, which has a cache and processes of its own."""

  def start(name, *arguments, **changes):
    folder = tmp_path / name
    for kind in ('cache', 'temporary'):
      (folder / kind).mkdir(parents=True, exist_ok=True)
    return support.start(
      *NETWORK,
      f'--workdir={WORKDIR}',
      *arguments,
      program=('-c', PROGRAM),
      XDG_CACHE_HOME=str(folder / 'cache'),
      TMPDIR=str(folder / 'temporary'),
      **changes,
    )

  return start


@pytest.fixture
def fetched(bucket, tmp_path, monkeypatch):
  """Returns the workdir as another machine finds it in the bucket."""

  def fetch():
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'reader'))
    return mirror.fetch(files.expand('--workdir', WORKDIR, in_bucket=True))

  return fetch


def is_saved(bucket):
  """Whether the bucket has a whole checkpoint."""
  return any(
    name.count('/') == 4 and name.endswith('/commit_success.txt')
    for name in bucket.objects
  )


@pytest.mark.parametrize('kills', [2, pytest.param(18, marks=pytest.mark.slow)])
def test_killed_again_and_again(kills, machine, bucket, fetched, reference):
  """At random instants, on this machine or another one, until it is done."""
  rng = random.Random(kills)
  for count in range(kills):
    process = machine(f'machine{rng.randrange(2)}')
    wait_for_line(process, 'step ' if count % 3 else 'compiling')
    time.sleep(rng.random())
    kill(process)
    finish(process)
  (ended,) = finish(machine('machine3'))
  assert ended.returncode == 0, ended.stderr
  assert_same_run(fetched(), reference)
  assert 'runs/a/lock' not in bucket.objects


def test_preempted(machine, bucket, fetched, reference):
  """Its claim is free at once, also for a machine with other devices."""
  process = machine('one')
  wait_for_line(process, 'step 210/600  train')
  process.send_signal(signal.SIGTERM)
  (ended,) = finish(process)
  assert (ended.returncode, ended.stderr) == (75, '')
  assert is_saved(bucket) and 'runs/a/lock' not in bucket.objects
  assert support.status(fetched())['status'] == 'preempted'
  (ended,) = finish(machine('two', devices=2))
  assert ended.returncode == 0, ended.stderr
  assert 'Waits' not in ended.stdout
  (ended,) = finish(machine('one'))
  assert ended.stdout == f'{WORKDIR}: this run is done, at step 600.\n'
  assert support.status(fetched()) == support.status(reference)


def test_two_at_once(machine):
  """The second one is refused, and the first one does not notice."""
  first = machine('one')
  wait_for_line(first, 'compiling')
  (second,) = finish(machine('two'))
  # The first one may be about to end, on a slice that is being preempted.
  assert second.returncode == 75
  assert second.stderr.startswith(
    f'error: --workdir={WORKDIR}: in use by process {first.pid} on '
  )
  (ended,) = finish(first)
  assert (ended.returncode, ended.stderr) == (0, '')


@pytest.mark.slow
def test_two_processes(machine, bucket, fetched, tmp_path):
  """One of them is killed; both continue on other machines."""

  def pair(start):
    address = f'--coordinator=127.0.0.1:{support.free_port()}'
    return [
      start(number, address, '--num_processes=2', f'--process_id={number}')
      for number in range(2)
    ]

  undisturbed = tmp_path / 'reference'
  ended = finish(
    *pair(
      lambda _, *flags: support.start(
        *NETWORK, f'--workdir={undisturbed}', *flags
      )
    )
  )
  assert [one.returncode for one in ended] == [0, 0], ended
  first = pair(lambda number, *flags: machine(f'first{number}', *flags))
  wait_for_line(first[0], 'step 210/')
  while not is_saved(bucket):
    time.sleep(0.05)
  kill(first[0])
  assert finish(*first)[1].returncode in (75, -signal.SIGABRT)
  second = pair(lambda number, *flags: machine(f'second{number}', *flags))
  ended = finish(*second)
  assert [one.returncode for one in ended] == [0, 0], ended
  assert_same_run(fetched(), undisturbed)


@pytest.mark.parametrize(
  'status, code, problem',
  [
    (403, 1, 'Cloud Storage refuses access: HTTP status 403, injected'),
    # Of the claim or of an upload, whichever gives up first.
    (503, 75, 'Run the same command again'),
  ],
)
def test_a_bucket_that_fails(
  status, code, problem, machine, bucket, fetched, reference
):
  """While the run trains; the same command resumes it later."""
  process = machine('one', '--config.total_steps=100000')
  wait_for_line(process, 'step 210/')
  while not is_saved(bucket):
    time.sleep(0.05)
  bucket.proxy.rule = bucket_proxy.always(('status', status))
  (ended,) = finish(process)
  bucket.proxy.rule = None
  assert ended.returncode == code
  (line,) = ended.stderr.splitlines()
  assert line.startswith('error: ') and problem in line


def test_a_bucket_that_is_down(machine, bucket):
  """When the run starts: a later attempt may succeed."""
  bucket.proxy.rule = bucket_proxy.always(('status', 503))
  (ended,) = finish(machine('one'))
  assert ended.returncode == 75
  (line,) = ended.stderr.splitlines()
  assert line.startswith('error: ') and 'cannot be reached' in line


def test_short_faults(machine, bucket, fetched, reference):
  """Every seventh request fails, in one way or another."""
  faults = [('status', 503), ('cut request', 3), ('lost reply',)]
  faults += [('cut reply', 1), ('status', 429)]
  bucket.proxy.rule = lambda method, path, number: (
    None if number % 7 else faults[number // 7 % len(faults)]
  )
  (ended,) = finish(machine('one'))
  bucket.proxy.rule = None
  assert (ended.returncode, ended.stderr) == (0, '')
  assert_same_run(fetched(), reference)


@pytest.mark.parametrize(
  'url, problem',
  [
    ('gs://', 'must be a path or gs://BUCKET/NAME'),
    ('gs://other/run', 'does not exist, or there is no bucket of this name'),
    ('gs://bucket/run', 'lacks storage.objects.create'),
  ],
)
def test_bad_input(url, problem, bucket, capsys, monkeypatch, tmp_path):
  """Before anything compiles, in a line."""
  from bn_repro import main

  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  bucket.denied.add('storage.objects.create')
  assert main.main([NETWORK[0], f'--workdir={url}']) == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('error: ') and problem in line
