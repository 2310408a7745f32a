"""Places: what names them, and what is read and written in a bucket."""

import importlib.util
import os
from pathlib import Path

import bucket_proxy
from google.auth import exceptions as auth_exceptions
from google.cloud.storage import retry
import pytest

from bn_repro.errors import StorageDown, UserError
from bn_repro.runtime import places


@pytest.fixture
def run(bucket, monkeypatch):
  """A place in a bucket, whose requests are repeated without much waiting."""
  quick = retry.DEFAULT_RETRY.with_delay(initial=0.05)
  monkeypatch.setattr(retry, 'DEFAULT_RETRY', quick)
  monkeypatch.setattr(places, '_TIMEOUT', 0.5)
  return places.parse('--workdir', f'{bucket.path}/runs/a')


# Names.


@pytest.mark.parametrize(
  'text, expected',
  [
    ('gs://my-bucket.1_x/run', 'gs://my-bucket.1_x/run'),
    ('gs://bucket//a///b/', 'gs://bucket/a/b'),
    ('gs://bucket/é .x/..y/a=1,b+c@d~e', 'gs://bucket/é .x/..y/a=1,b+c@d~e'),
  ],
)
def test_places_in_a_bucket(text, expected):
  place = places.parse('--workdir', text)
  assert places.is_remote(place)
  assert str(place) == expected
  assert str(place / 'x' / 'y.json') == f'{expected}/x/y.json'
  assert (place / 'x').parent == place


@pytest.mark.parametrize(
  'text',
  [
    *('gs://', 'gs:///', 'gs://bucket', 'gs://bucket/', 'gs:/bucket/run'),
    *('gs://b/run', 'gs://Bucket/run', 'gs://-ab/run', 'gs://../run'),
    *('gs://bucket/..', 'gs://bucket/a/../b', 'gs://bucket/./a'),
    # Patterns of fsspec and Orbax, and a generation.
    *(f'gs://bucket/a{c}b' for c in '*?[]#\\{}\n\0'),
    *('s3://bucket/run', 'gcs://bucket/run', 'C:/runs', 'file:///tmp/x'),
  ],
)
def test_refused_places(text):
  with pytest.raises(UserError) as caught:
    places.parse('--workdir', text)
  (problem,) = caught.value.problems
  shown = text.encode('unicode_escape').decode().replace('\\\\', '\\')
  assert problem.startswith(f'--workdir={shown}: must be a path or gs://')


def test_local_places(tmp_path):
  place = places.parse('--workdir', str(tmp_path))
  assert place == tmp_path and isinstance(place, Path)
  assert not places.is_remote(place)
  with pytest.raises(UserError, match='must not be empty'):
    places.parse('--workdir', '')
  assert places.read(tmp_path / 'a') is None
  (tmp_path / 'b').mkdir()
  for name, content in {'a': 'é', 'b/c': b'\xff'}.items():
    places.write(tmp_path / name, content)
  assert places.read(tmp_path / 'a') == 'é'.encode()
  assert places.find(tmp_path) == ['a', 'b/c']
  assert places.find(tmp_path / 'none') == []


def test_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='pip install -r requirements-tpu.txt'):
    places.parse('--workdir', 'gs://bucket/run')
  assert places.parse('--workdir', '/x') == Path('/x')


# Requests.


def test_contents(run, bucket):
  """In one request each, as another client sees them."""
  assert places.read(run / 'x') is None
  for name, content in {'x': 'é\n', 'y/z': bytes(range(256))}.items():
    places.write(run / name, content)
  places.write(run / 'x', b'')
  assert len(bucket.proxy.seen) == 4
  contents = {name: item['data'] for name, item in bucket.objects.items()}
  assert contents == {'runs/a/x': b'', 'runs/a/y/z': bytes(range(256))}
  assert places.read(run / 'y' / 'z') == bytes(range(256))
  assert places.read(run / 'y') is None


def test_large_contents(run):
  content = os.urandom(9 << 20)
  places.write(run / 'model', content)
  assert places.read(run / 'model') == content


def test_find(run, bucket):
  assert places.find(run) == []
  names = sorted(['a', 'b/a/c', 'b-d', *(f'c/{n}' for n in range(1100))])
  for name in names:
    bucket.objects[f'runs/a/{name}'] = {'name': f'runs/a/{name}'}
  bucket.objects['runs/ab'] = {'name': 'runs/ab'}
  before = len(bucket.proxy.seen)
  assert places.find(run) == names
  assert len(bucket.proxy.seen) - before == 2


def test_copy_and_remove(run, bucket):
  places.write(run / 'x', b'1')
  places.copy(run / 'x', run / 'aside' / 'x')
  places.remove(run / 'x')
  places.remove(run / 'x')
  assert [item['data'] for item in bucket.objects.values()] == [b'1']
  assert places.find(run) == ['aside/x']
  with pytest.raises(UserError, match=r'runs/a/x: does not exist'):
    places.copy(run / 'x', run / 'y')


def test_generations(run, bucket):
  place = run / 'lock'
  assert places.read_version(place) is None
  first = places.replace_if(place, b'1', 0)
  assert places.read_version(place) == (b'1', first)
  second = places.replace_if(place, b'2', first)
  for generation in (0, first):
    with pytest.raises(places.ChangedError) as caught:
      places.replace_if(place, b'3', generation)
    assert caught.value.found == (b'2', second)
    places.remove(place, generation)
    assert bucket.objects['runs/a/lock']['data'] == b'2'
  # As after an answer that was lost.
  assert places.replace_if(place, b'2', first) == second
  places.remove(place, second)
  with pytest.raises(places.ChangedError) as caught:
    places.replace_if(place, b'3', second)
  assert caught.value.found is None and bucket.objects == {}


# Each operation on a bucket that holds `x`: with what it returns, and what the
# bucket contains afterwards.
OPERATIONS = {
  'read': (
    lambda run, **options: places.read(run / 'x', **options),
    b'old',
    {'x': b'old'},
  ),
  'write': (
    lambda run, **options: places.write(run / 'x', b'new', **options),
    None,
    {'x': b'new'},
  ),
  'find': (places.find, ['x'], {'x': b'old'}),
  'copy': (
    lambda run, **options: places.copy(run / 'x', run / 'y', **options),
    None,
    {'x': b'old', 'y': b'old'},
  ),
  'remove': (
    lambda run, **options: places.remove(run / 'x', **options),
    None,
    {},
  ),
  'create': (
    lambda run, **options: (
      places.replace_if(run / 'y', b'new', 0, **options) > 0
    ),
    True,
    {'x': b'old', 'y': b'new'},
  ),
  'check': (
    lambda run, **options: places.check_writable('--workdir', run, **options),
    None,
    {'x': b'old'},
  ),
}
FAULTS = [
  *(('status', code) for code in (408, 429, 500, 502, 503, 504)),
  *(('cut request', 3), ('cut reply', 1), ('lost reply',), ('hang', 1.0)),
]


def contents(bucket):
  return {
    name.removeprefix('runs/a/'): item['data']
    for name, item in bucket.objects.items()
  }


@pytest.mark.parametrize('fault', FAULTS, ids=str)
@pytest.mark.parametrize('name', OPERATIONS)
def test_faults_that_pass(name, fault, run, bucket):
  """Twice, after which the request is answered."""
  operation, returned, left = OPERATIONS[name]
  places.write(run / 'x', b'old')
  bucket.proxy.rule = bucket_proxy.first(2, fault)
  assert operation(run) == returned
  assert contents(bucket) == left


@pytest.mark.parametrize(
  'fault', [('status', 503), ('cut request', 3)], ids=str
)
@pytest.mark.parametrize('name', OPERATIONS)
def test_faults_that_stay(name, fault, run, bucket):
  """A later run of the command may succeed; nothing is half done."""
  places.write(run / 'x', b'old')
  before = len(bucket.proxy.seen)
  bucket.proxy.rule = bucket_proxy.always(fault)
  with pytest.raises(StorageDown, match='cannot be reached') as caught:
    OPERATIONS[name][0](run, retry_for=0.3)
  assert caught.value.exit_code == 75
  (problem,) = caught.value.problems
  assert problem.startswith(str(run)) and '\n' not in problem
  assert len(bucket.proxy.seen) - before > 2
  assert contents(bucket) == {'x': b'old'}


@pytest.mark.parametrize(
  'name, code',
  [
    *((name, code) for name in OPERATIONS for code in (400, 403)),
    # The client does not close the connection of a download of this status.
    *((name, 401) for name in OPERATIONS if name != 'read'),
  ],
)
def test_refused_requests(name, code, run, bucket):
  """At once: waiting does not help."""
  places.write(run / 'x', b'old')
  before = len(bucket.proxy.seen)
  bucket.proxy.rule = bucket_proxy.always(('status', code))
  with pytest.raises(UserError, match='refuses access: ') as caught:
    OPERATIONS[name][0](run)
  assert not isinstance(caught.value, StorageDown)
  assert len(bucket.proxy.seen) - before == 1


def test_listings_that_are_stale(run, bucket):
  """Only listings can be: the client remembers nothing."""
  places.write(run / 'x', b'1')
  assert places.find(run) == ['x']
  bucket.proxy.rule = bucket_proxy.always(('stale',))
  for name in 'xy':
    places.write(run / name, b'22')
  assert places.find(run) == ['x']
  assert places.read(run / 'x') == places.read(run / 'y') == b'22'
  bucket.proxy.rule = None
  assert places.find(run) == ['x', 'y']


def test_the_file_system_of_orbax_remembers_nothing(run):
  places.write(run / 'x', b'1')
  assert [path.name for path in run.iterdir()] == ['x']
  # By another process, as far as that file system knows.
  places.write(run / 'x', b'22')
  places.write(run / 'y', b'3')
  assert (run / 'x').read_text() == '22'
  assert (run / 'y').exists()
  places.remove(run / 'x')
  assert [path.name for path in run.iterdir()] == ['y']


# What a user may have forgotten.


def test_a_bucket_that_can_be_used(run, bucket):
  places.check_writable('--workdir', run)
  assert bucket.objects == {}


@pytest.mark.parametrize(
  'permission', ['storage.objects.delete', 'storage.buckets.get']
)
def test_a_permission_that_is_missing(permission, run, bucket):
  bucket.denied.add(permission)
  with pytest.raises(UserError) as caught:
    places.check_writable('--workdir', run)
  (problem,) = caught.value.problems
  assert problem.startswith(
    f'--workdir={run}: this account lacks {permission}.'
  )
  assert caught.value.exit_code == 1


def test_a_bucket_that_does_not_exist(bucket):
  run = places.parse('--workdir', 'gs://another/run')
  for operation in (
    lambda: places.check_writable('--workdir', run),
    lambda: places.write(run / 'x', b''),
    lambda: places.find(run),
  ):
    with pytest.raises(UserError, match='there is no bucket of this name'):
      operation()
  assert places.read(run / 'x') is None


@pytest.fixture
def no_client(run, monkeypatch):
  """Outside of the emulator, as far as the client knows; makes no request."""
  monkeypatch.delenv('STORAGE_EMULATOR_HOST')
  places._client.cache_clear()
  yield
  places._client.cache_clear()


def test_no_credentials(run, no_client, monkeypatch):
  def default(**options):
    raise auth_exceptions.DefaultCredentialsError('not found')

  monkeypatch.setattr('google.auth.default', default)
  with pytest.raises(UserError, match='gcloud auth application-default login'):
    places.check_writable('--workdir', run)


def test_no_project(run, no_client, monkeypatch):
  from google.auth.credentials import AnonymousCredentials

  monkeypatch.delenv('GOOGLE_CLOUD_PROJECT', raising=False)
  monkeypatch.setattr(
    'google.auth.default', lambda **options: (AnonymousCredentials(), None)
  )
  with pytest.raises(UserError, match='GOOGLE_CLOUD_PROJECT'):
    places.check_writable('--workdir', run)
