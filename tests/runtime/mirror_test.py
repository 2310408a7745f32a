"""A workdir in a bucket: what is there at each moment, and what comes back."""

import json
import random
import re
import shutil
import time

import bucket_proxy
from google.cloud.storage import retry
import pytest

from bn_repro import config as config_lib
from bn_repro import files
from bn_repro.errors import TemporaryError, UserError
from bn_repro.runtime import buckets, claims, mirror
from bn_repro.runtime.mirror import Mirror
from bn_repro.runtime.workdir import Workdir

# Seconds after which a claim expires here.
EXPIRES = 5.0
MARKER = 'commit_success.txt'


@pytest.fixture(autouse=True)
def quick(bucket, tmp_path, monkeypatch):
  """Requests are repeated without much waiting; all files are temporary."""
  without_waiting = retry.DEFAULT_RETRY.with_delay(initial=0.05)
  monkeypatch.setattr(retry, 'DEFAULT_RETRY', without_waiting)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))


@pytest.fixture
def folder():
  """The local folder of a workdir, which does not exist yet."""
  return files.local_path(files.parse_place('--workdir', 'gs://bucket/runs/a'))


@pytest.fixture
def opened(folder):
  """Opens the workdir; its thread uploads as good as never."""
  found = []

  def opened(interval=1000.0):
    found.append(Mirror(folder, interval=interval, expires=EXPIRES))
    found[-1].open()
    return found[-1]

  yield opened
  for one in found:
    one._stopped.set()
    one._claim.release()


def write(path, content):
  """As `workdir.replace_file` does."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.tmp')
  temporary.write_text(content)
  temporary.replace(path)


def add_line(folder, step):
  with (folder / 'metrics.jsonl').open('a') as file:
    file.write(json.dumps({'step': step}) + '\n')


def save(folder, step):
  """A checkpoint as Orbax writes it, which holds the number of lines."""
  path = folder / 'metrics.jsonl'
  lines = len(path.read_text().splitlines()) if path.exists() else 0
  temporary = folder / 'checkpoints' / f'{step}.orbax-checkpoint-tmp'
  write(temporary / 'state' / 'd' / f'{step}a', 'x' * 1000)
  write(temporary / 'state' / MARKER, '')
  write(temporary / 'meta' / 'metadata', json.dumps({'lines': lines}))
  write(temporary / MARKER, '')
  temporary.rename(folder / 'checkpoints' / str(step))


def contents(bucket):
  """The objects of the workdir, by name."""
  return {
    name.removeprefix('runs/a/'): item['data'].decode()
    for name, item in bucket.objects.items()
    if name != 'runs/a/lock'
  }


def files_of(folder):
  return {
    path.relative_to(folder).as_posix(): path.read_text()
    for path in folder.rglob('*')
    if path.is_file()
  }


def steps_of(names):
  """The steps whose checkpoints count."""
  found = (re.fullmatch(f'checkpoints/([0-9]+)/{MARKER}', n) for n in names)
  return {int(step[1]) for step in found if step}


def check_resumable(found):
  """Whether a run could resume from these files; returns the newest step."""
  steps = steps_of(found)
  for step in steps:
    prefix = f'checkpoints/{step}/'
    of_step = {name for name in found if name.startswith(prefix)}
    assert of_step == {
      prefix + name
      for name in (
        f'state/d/{step}a',
        f'state/{MARKER}',
        'meta/metadata',
        MARKER,
      )
    }
    lines = found.get('metrics.jsonl', '').splitlines(keepends=True)
    assert all(line.endswith('\n') for line in lines)
    expected = json.loads(found[f'{prefix}meta/metadata'])['lines']
    assert len(lines) >= expected
  if 'status.json' in found:
    step = json.loads(found['status.json'])['step']
    assert step <= max(steps, default=0)
  return max(steps, default=0)


class Watch:
  """A rule of the proxy that checks the bucket before each change of it.

  Attributes:
    newest: the newest step from which a run could resume, at each moment.
  """

  def __init__(self, bucket, then=lambda: None):
    self._bucket, self._then = bucket, then
    self.newest, self._problems = [], []
    bucket.proxy.rule = self

  def __call__(self, method, path, number):
    if method != 'GET':
      try:
        self.newest.append(check_resumable(contents(self._bucket)))
      except AssertionError as problem:  # Not in the thread of the proxy.
        self._problems.append(problem)
      self._then()

  def check(self):
    self._bucket.proxy.rule = None
    assert not self._problems
    assert self.newest == sorted(self.newest)


def train(folder, first, last):
  """What a run does, of which it keeps two checkpoints; yields after each."""
  write(folder / 'config.json', 'config')
  yield
  write(folder / 'run.json', f'started at {first}')
  yield
  for step in range(first + 1, last + 1):
    write(folder / 'model.safetensors', f'model of {step}')
    yield
    add_line(folder, step)
    yield
    save(folder, step)
    yield
    write(folder / 'status.json', json.dumps({'step': step}))
    yield
    shutil.rmtree(folder / 'checkpoints' / str(step - 2), ignore_errors=True)
    yield


# Names.


def test_local_paths(folder, tmp_path):
  assert folder == tmp_path / 'cache/bn_repro/buckets/bucket/runs/a'
  assert str(files.place_of(folder)) == 'gs://bucket/runs/a'
  assert str(files.place_of(folder / 'x.json')) == 'gs://bucket/runs/a/x.json'
  for path in (tmp_path, folder.parents[1], folder.parents[2]):
    assert files.place_of(path) is None


def test_a_cache_that_is_relative(monkeypatch, tmp_path):
  """The specification of XDG_CACHE_HOME says to ignore it."""
  monkeypatch.setenv('XDG_CACHE_HOME', 'cache')
  monkeypatch.setenv('HOME', str(tmp_path))
  assert files.cache('buckets') == tmp_path / '.cache/bn_repro/buckets'


# A folder of runs.


def put(name, content='x'):
  place = files.parse_place('--workdir', 'gs://bucket/runs')
  buckets.write(place / name, content.encode())


def test_the_mirror_of_a_folder_of_runs(bucket):
  """It touches nothing but its own files, here and in the bucket."""
  folder = files.local_path(files.parse_place('--workdir', 'gs://bucket/runs'))
  for name in ('a/lock', 'a/config.json', 'status.json', 'a/b/lock'):
    put(name)
  saving = folder / 'a/checkpoints/15.orbax-checkpoint-tmp'
  saving.mkdir(parents=True)
  write(folder / 'metrics.jsonl', '{"step": 1}\n')
  write(folder / 'sweep.json', '{}')
  write(folder / 'x.log', 'said')
  put('sweep.json', '{"old": 1}')
  sweep = Mirror(folder, ['sweep.json', '*.log'], interval=1000.0)
  sweep.open()
  assert saving.is_dir()
  # Equal to the bucket, which has no log.
  assert files_of(folder) == {
    'metrics.jsonl': '{"step": 1}\n',
    'sweep.json': '{"old": 1}',
  }
  write(folder / 'x.log', 'said more')
  (folder / 'sweep.json').unlink()
  sweep.close()
  assert {n: item['data'] for n, item in bucket.objects.items()} == {
    'runs/a/lock': b'x',
    'runs/a/config.json': b'x',
    'runs/a/b/lock': b'x',
    'runs/status.json': b'x',
    'runs/x.log': b'said more',
  }


def test_a_run_in_a_folder_of_runs_is_refused(bucket, tmp_path):
  """Its mirror would take over the files of the others."""
  config = config_lib.load('bn_mnist:mini')
  put('sweeps/a/config.json', '{}')
  folder = files.local_path(files.parse_place('--workdir', 'gs://bucket/runs'))
  with pytest.raises(UserError, match=re.escape('gs://bucket/runs/sweeps/a.')):
    Workdir(folder).check(config)
  Workdir(folder / 'b').check(config)


@pytest.mark.parametrize('name', ['../../x.json', '/tmp/x.json', 'a//x.json'])
def test_names_that_lead_elsewhere(name, bucket, tmp_path):
  """Whoever can write to a bucket cannot write to the machine of a reader."""
  put('a/config.json')
  item = bucket.objects['runs/a/config.json']
  bucket.objects[f'runs/{name}'] = {**item, 'name': f'runs/{name}'}
  folder = files.local_path(files.parse_place('--workdir', 'gs://bucket/runs'))
  copy = mirror.fetch(folder)
  assert files_of(copy) == {'a/config.json': 'x'}
  assert [p.name for p in tmp_path.rglob('*.json')] == ['config.json']


# A run.


def test_a_run_comes_back(folder, opened, bucket):
  first = opened()
  for _ in train(folder, 0, 5):
    pass
  first.close()
  assert 'runs/a/lock' not in bucket.objects
  expected = files_of(folder)
  assert contents(bucket) == expected
  assert steps_of(expected) == {4, 5}
  # On another machine.
  shutil.rmtree(folder)
  opened()
  assert files_of(folder) == expected


def test_what_is_there_at_each_moment(folder, opened, bucket):
  """A kill at any request leaves a workdir that a run can resume from."""
  one = opened()
  watch = Watch(bucket)
  for _ in train(folder, 0, 6):
    one._upload()
    there = check_resumable(contents(bucket))
    assert there == max(steps_of(files_of(folder)), default=0)
  watch.check()
  assert watch.newest[-1] == 6 and len(watch.newest) > 60


def test_a_run_that_goes_on_while_files_are_uploaded(folder, opened, bucket):
  """At each request another file changes."""
  one = opened()
  writing = train(folder, 0, 30)
  watch = Watch(bucket, lambda: next(writing, None))
  while steps_of(files_of(folder)) != {29, 30}:
    one._upload()
  watch.check()
  assert len(set(watch.newest)) > 5
  one.close()
  assert contents(bucket) == files_of(folder)


def test_a_run_that_goes_on_while_files_are_read(
  folder, opened, bucket, monkeypatch
):
  """Before each local file is read, others change; checkpoints disappear."""
  one = opened()
  writing = train(folder, 0, 60)
  stamp, rng = mirror._stamp, random.Random(0)

  def stamp_later(path):
    for _ in range(rng.choice((0, 0, 0, 3))):
      next(writing, None)
    return stamp(path)

  monkeypatch.setattr(mirror, '_stamp', stamp_later)
  watch = Watch(bucket)
  while steps_of(files_of(folder)) != {59, 60}:
    one._upload()
  watch.check()
  one.close()
  assert contents(bucket) == files_of(folder)


def test_a_checkpoint_that_is_deleted_meanwhile(
  folder, opened, bucket, monkeypatch
):
  """The bucket keeps the ones before it until there is a newer one."""
  one = opened()
  for _ in train(folder, 0, 3):
    pass
  one._upload()
  for _ in train(folder, 3, 6):
    pass
  stamp = mirror._stamp

  def stamp_and_delete(path):
    found = stamp(path)
    if path.name == 'metadata':
      shutil.rmtree(folder / 'checkpoints' / '6', ignore_errors=True)
    return found

  monkeypatch.setattr(mirror, '_stamp', stamp_and_delete)
  one._upload()
  assert check_resumable(contents(bucket)) == 3


def test_a_half_written_line_stays_here(folder, opened, bucket):
  one = opened()
  folder.mkdir(parents=True)
  (folder / 'metrics.jsonl').write_text('{"step": 1}\n{"ste')
  one._upload()
  assert contents(bucket) == {'metrics.jsonl': '{"step": 1}\n'}
  (folder / 'metrics.jsonl').write_text('{"step": 1}\n{"step": 2}\n')
  one._upload()
  assert contents(bucket) == files_of(folder)


def test_nothing_is_uploaded_twice(folder, opened, bucket):
  one = opened()
  for _ in train(folder, 0, 3):
    pass
  one._upload()
  before = len(bucket.proxy.seen)
  one._upload()
  assert len(bucket.proxy.seen) == before
  # Nor by the next process, which has downloaded it.
  one.close()
  other = opened()
  before = len(bucket.proxy.seen)
  other._upload()
  assert len(bucket.proxy.seen) == before


def test_a_checkpoint_of_the_same_step(folder, opened, bucket):
  """After a resume from the one before; it counts again when it is whole."""
  one = opened()
  for _ in train(folder, 0, 3):
    pass
  (folder / 'status.json').unlink()  # It says that there is step 3.
  one._upload()
  shutil.rmtree(folder / 'checkpoints' / '3')
  add_line(folder, 4)
  save(folder, 3)
  watch = Watch(bucket)
  one._upload()
  assert watch.newest[0] == watch.newest[-1] + 1 == 3
  assert not watch._problems
  assert contents(bucket) == files_of(folder)


# A machine that is gone.


def test_what_was_not_uploaded_is_forgotten(folder, opened, bucket):
  one = opened()
  for _ in train(folder, 0, 3):
    pass
  one._upload()
  expected = files_of(folder)
  for _ in train(folder, 3, 4):
    pass
  write(folder / 'checkpoints' / '5' / 'state' / 'x', '')
  one._stopped.set()
  one._claim.release()  # As if it had expired.
  opened()
  assert files_of(folder) == expected
  # An empty folder would pass for a checkpoint.
  steps = {path.name for path in (folder / 'checkpoints').iterdir()}
  assert steps == {'2', '3'}


def test_a_checkpoint_that_was_not_uploaded_whole(folder, opened, bucket):
  one = opened()
  for _ in train(folder, 0, 3):
    pass
  one._upload()
  expected = contents(bucket)
  passes = iter([True])
  bucket.proxy.rule = lambda method, path, number: (
    'uploadType' in path and not next(passes, False) and ('status', 403)
  )
  save(folder, 4)
  with pytest.raises(UserError, match='refuses access'):
    one._upload()
  one._claim.release()
  bucket.proxy.rule = None
  assert 'checkpoints/4/meta/metadata' in contents(bucket)
  other = opened()
  assert files_of(folder) == expected
  other._upload()
  assert contents(bucket) == expected


def test_a_bucket_is_the_truth(folder, opened, bucket):
  """What a user has deleted, added or replaced there."""
  one = opened()
  for _ in train(folder, 0, 3):
    pass
  one.close()
  del bucket.objects['runs/a/status.json']
  place = files.parse_place('--workdir', 'gs://bucket/runs/a')
  buckets.write(place / 'run.json', b'started at 1')  # As long as before.
  buckets.write(place / 'notes' / 'x', b'new')
  opened()
  assert files_of(folder) == contents(bucket)


# Two processes, and outages.


def test_two_at_once(folder, opened, bucket):
  opened()
  with pytest.raises(UserError, match='gs://bucket/runs/a: in use by process'):
    opened()


def test_a_process_that_was_suspended(folder, opened, bucket, tmp_path):
  """Another one has taken over: this one commits nothing, and stops."""
  one = opened(interval=0.01)
  for _ in train(folder, 0, 2):
    pass
  one._stopped.set()
  one._thread.join()
  one._upload()
  one._claim._stopped.set()
  one._claim._thread.join()
  for path in tmp_path.glob('bn_repro-*'):  # As if on another machine.
    path.unlink()
  before = contents(bucket)
  other = claims.Claim(files.place_of(folder), EXPIRES)
  other.take()
  save(folder, 3)
  write(folder / 'status.json', '{"step": 3}')
  # As far as its clock tells, no time has passed.
  one._claim._renewed += 1000
  with pytest.raises(claims.ClaimLost, match='has taken it over'):
    one._upload()
  assert steps_of(contents(bucket)) == steps_of(before) == {1, 2}
  assert contents(bucket)['status.json'] == before['status.json']
  with pytest.raises(claims.ClaimLost):
    one.check()
  with pytest.raises(claims.ClaimLost):
    one.close()
  other.check()
  other.release()


def test_a_short_outage(folder, opened, bucket):
  one = opened(interval=0.05)
  fault = ('status', 503)
  bucket.proxy.rule = bucket_proxy.first(5, fault)
  for _ in train(folder, 0, 3):
    one.check()
  one.close()
  assert contents(bucket) == files_of(folder)


@pytest.mark.parametrize(
  'fault, kind',
  [(('status', 503), TemporaryError), (('status', 403), UserError)],
)
def test_an_outage_ends_a_run(fault, kind, folder, opened, bucket, monkeypatch):
  """In the thread that asks; nothing of the folder or bucket is lost."""
  monkeypatch.setattr(buckets, 'RETRY_FOR', 0.3)
  one = opened(interval=0.05)
  for _ in train(folder, 0, 3):
    pass
  while contents(bucket) != files_of(folder):
    time.sleep(0.01)
  before = contents(bucket)
  bucket.proxy.rule = bucket_proxy.always(fault, text='uploadType')
  save(folder, 4)
  with pytest.raises(kind) as caught:
    while True:
      one.check()
      time.sleep(0.01)
  assert type(caught.value) in (kind, claims.ClaimLost)
  with pytest.raises(kind):
    one.close()
  assert contents(bucket) == before
  assert steps_of(files_of(folder)) == {2, 3, 4}


def test_stale_listings(folder, opened, bucket, monkeypatch):
  """Of objects that are gone: they are asked for again."""
  monkeypatch.setattr(mirror, '_LISTING_DELAY', 0.01)
  for first, last in ((0, 2), (2, 5)):
    one = opened()  # The second listing is repeated.
    for _ in train(folder, first, last):
      pass
    one.close()
  shutil.rmtree(folder)
  bucket.proxy.rule = bucket_proxy.first(3, ('stale',), 'GET', '/o?')
  one = opened()
  assert files_of(folder) == contents(bucket)
  assert check_resumable(files_of(folder)) == 5


def test_a_listing_that_is_never_right(folder, opened, bucket, monkeypatch):
  monkeypatch.setattr(buckets, 'RETRY_FOR', 0.1)
  place = files.place_of(folder / 'x')
  write(folder / 'x', '1')
  buckets.write(place, folder / 'x')
  mirror.fetch(folder)
  bucket.proxy.rule = bucket_proxy.always(('stale',))
  write(folder / 'x', '2')
  buckets.write(place, folder / 'x')
  with pytest.raises(TemporaryError, match='faster than it can be read'):
    opened()
  assert 'runs/a/lock' not in bucket.objects


# Commands that read.


def test_fetch(folder, opened, bucket, tmp_path):
  one = opened()
  for _ in train(folder / 'one', 0, 3):
    pass
  one.close()
  before = len(bucket.proxy.seen)
  copy = mirror.fetch(folder, ['*/config.json', '*/metrics.jsonl'])
  assert not copy.is_relative_to(files.local_path(files.place_of(folder)))
  expected = files_of(folder)
  names = {'one/config.json', 'one/metrics.jsonl'}
  assert files_of(copy) == {name: expected[name] for name in names}
  assert len(bucket.proxy.seen) - before == 3
  # What has not changed is not downloaded again; what is gone is deleted.
  assert mirror.fetch(folder, ['*/config.json', '*/metrics.jsonl']) == copy
  assert len(bucket.proxy.seen) - before == 4
  del bucket.objects['runs/a/one/config.json']
  mirror.fetch(folder, ['*/config.json'])
  assert files_of(copy).keys() == {'one/metrics.jsonl'}
  model = mirror.fetch(folder / 'one' / 'model.safetensors')
  assert model.read_text() == 'model of 3'
  mirror.fetch(folder)
  assert files_of(copy) == contents(bucket)
  assert mirror.fetch(tmp_path) == tmp_path


def test_fetch_of_what_does_not_exist(folder):
  assert not mirror.fetch(folder).exists()
