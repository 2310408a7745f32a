"""Places in a bucket: what names them, and what is read and written there."""

import importlib.util
import os

import bucket_proxy
from google.auth import exceptions as auth_exceptions
from google.cloud.storage import retry
import pytest

from bn_repro import files
from bn_repro.errors import TemporaryError, UserError
from bn_repro.runtime import buckets


@pytest.fixture
def run(bucket, monkeypatch):
  """A place in a bucket, whose requests are repeated without much waiting."""
  quick = retry.DEFAULT_RETRY.with_delay(initial=0.05)
  monkeypatch.setattr(retry, 'DEFAULT_RETRY', quick)
  monkeypatch.setattr(buckets, '_TIMEOUT', 0.5)
  return files.parse_place('--workdir', f'{bucket.path}/runs/a')


# Names.


@pytest.mark.parametrize(
  'text, expected',
  [
    ('gs://my-bucket.1_x/run', 'gs://my-bucket.1_x/run'),
    ('gs://bucket//a///b/', 'gs://bucket/a/b'),
    ('gs://bucket/é .x/..y/a=1,b+c@d~e', 'gs://bucket/é .x/..y/a=1,b+c@d~e'),
  ],
)
def test_places(text, expected):
  place = files.parse_place('--workdir', text)
  assert str(place) == expected
  assert str(place / 'x' / 'y.json') == f'{expected}/x/y.json'


@pytest.mark.parametrize(
  'text',
  [
    *('gs://', 'gs:///', 'gs://bucket', 'gs://bucket/', 'gs:/bucket/run'),
    *('gs://b/run', 'gs://Bucket/run', 'gs://-ab/run', 'gs://../run'),
    *('gs://bucket/..', 'gs://bucket/a/../b', 'gs://bucket/./a'),
    # Patterns of shells and Google's tools.
    *(f'gs://bucket/a{c}b' for c in '*?[]#\\{}\n\0'),
  ],
)
def test_refused_places(text):
  with pytest.raises(UserError) as caught:
    files.parse_place('--workdir', text)
  (problem,) = caught.value.problems
  shown = text.encode('unicode_escape').decode().replace('\\\\', '\\')
  assert problem.startswith(f'--workdir={shown}: must be a path or gs://')


def test_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='pip install -r requirements-tpu.txt'):
    files.expand('--workdir', 'gs://bucket/run', in_bucket=True)


# Requests.


def test_contents(run, bucket, tmp_path):
  """In one request each, as another client sees them."""
  assert buckets.read(run / 'x') is None
  for name, content in {'x': b'1', 'y/z': bytes(range(256))}.items():
    buckets.write(run / name, content)
  (tmp_path / 'x').write_bytes(b'')
  buckets.write(run / 'x', tmp_path / 'x')
  assert len(bucket.proxy.seen) == 4
  assert contents(bucket) == {'x': b'', 'y/z': bytes(range(256))}
  assert buckets.read(run / 'y' / 'z').content == bytes(range(256))
  assert buckets.read(run / 'y') is None


@pytest.mark.parametrize('form', ['bytes', 'file'])
def test_large_contents(form, run, tmp_path):
  content, copy = os.urandom(9 << 20), tmp_path / 'copy'
  (tmp_path / 'model').write_bytes(content)
  buckets.write(
    run / 'model', content if form == 'bytes' else tmp_path / 'model'
  )
  assert buckets.read(run / 'model').content == content
  assert buckets.download(run / 'model', copy)
  assert copy.read_bytes() == content


def test_what_is_not_there_to_copy(run, tmp_path):
  (tmp_path / 'x').write_text('old')
  assert not buckets.download(run / 'x', tmp_path / 'x')
  assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('x', 'old')]
  with pytest.raises(FileNotFoundError):
    buckets.write(run / 'x', tmp_path / 'y')
  assert buckets.find(run) == {}


def test_find(run, bucket):
  """As a local file is described: CRC-32C of b'' is 0."""
  assert buckets.find(run) == {}
  names = sorted(['a', 'b/a/c', 'b-d', *(f'c/{n}' for n in range(1100))])
  for name in (*(f'runs/a/{name}' for name in names), 'runs/ab', 'runs/a-'):
    bucket.objects[name] = {'name': name, 'size': '0', 'crc32c': 'AAAAAA=='}
  before = len(bucket.proxy.seen)
  found = buckets.find(run)
  assert list(found) == names
  assert len(bucket.proxy.seen) - before == 2
  assert set(found.values()) == {(0, 'AAAAAA==')}
  assert buckets.find(run / 'a') == {'': (0, 'AAAAAA==')}


def test_entries_of_local_files(run, tmp_path):
  """As the server computes them."""
  for size in (0, 1, 3 << 20):
    (tmp_path / 'x').write_bytes(os.urandom(size))
    buckets.write(run / 'x', tmp_path / 'x')
    assert buckets.find(run) == {'x': buckets.entry_of(tmp_path / 'x')}


def test_generations(run, bucket):
  place = run / 'lock'
  assert buckets.read(place) is None
  first = buckets.write(place, b'1', 0)
  assert buckets.read(place) == (b'1', first)
  second = buckets.write(place, b'2', first)
  for generation in (0, first):
    with pytest.raises(buckets.ChangedError) as caught:
      buckets.write(place, b'3', generation)
    assert caught.value.found == (b'2', second)
    buckets.remove(place, generation)
    assert bucket.objects['runs/a/lock']['data'] == b'2'
  # As after an answer that was lost.
  assert buckets.write(place, b'2', first) == second
  buckets.remove(place, second)
  with pytest.raises(buckets.ChangedError) as caught:
    buckets.write(place, b'3', second)
  assert caught.value.found is None and bucket.objects == {}


# Each operation on a bucket that holds `x`: with what it returns, and what the
# bucket contains afterwards.
OPERATIONS = {
  'read': (
    lambda run, **options: buckets.read(run / 'x', **options).content,
    b'old',
    {'x': b'old'},
  ),
  'write': (
    lambda run, **options: buckets.write(run / 'x', b'new', **options) > 0,
    True,
    {'x': b'new'},
  ),
  'find': (
    lambda run, **options: list(buckets.find(run, **options)),
    ['x'],
    {'x': b'old'},
  ),
  'remove': (
    lambda run, **options: buckets.remove(run / 'x', **options),
    None,
    {},
  ),
  'create': (
    lambda run, **options: buckets.write(run / 'y', b'new', 0, **options) > 0,
    True,
    {'x': b'old', 'y': b'new'},
  ),
  'check': (
    lambda run, **options: buckets.check_writable('--workdir', run, **options),
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
  buckets.write(run / 'x', b'old')
  bucket.proxy.rule = bucket_proxy.first(2, fault)
  assert operation(run) == returned
  assert contents(bucket) == left


@pytest.mark.parametrize(
  'fault', [('status', 503), ('cut request', 3)], ids=str
)
@pytest.mark.parametrize('name', OPERATIONS)
def test_faults_that_stay(name, fault, run, bucket):
  """A later run of the command may succeed; nothing is half done."""
  buckets.write(run / 'x', b'old')
  before = len(bucket.proxy.seen)
  bucket.proxy.rule = bucket_proxy.always(fault)
  with pytest.raises(TemporaryError, match='cannot be reached') as caught:
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
  buckets.write(run / 'x', b'old')
  before = len(bucket.proxy.seen)
  bucket.proxy.rule = bucket_proxy.always(('status', code))
  with pytest.raises(UserError, match='refuses access: ') as caught:
    OPERATIONS[name][0](run)
  assert not isinstance(caught.value, TemporaryError)
  if code != 401:  # The client then tries to renew its credentials first.
    assert str(caught.value).endswith(f': HTTP status {code}, injected.')
  assert len(bucket.proxy.seen) - before == 1


@pytest.mark.parametrize(
  'cause, kind',
  [
    (auth_exceptions.TransportError('no metadata server'), TemporaryError),
    (None, UserError),
  ],
)
def test_a_token_that_cannot_be_renewed(cause, kind, run, monkeypatch):
  """Because of the network, or because the account is gone."""

  def fail(blob, **options):
    raise auth_exceptions.RefreshError('no token') from cause

  monkeypatch.setattr('google.cloud.storage.Blob.download_as_bytes', fail)
  with pytest.raises(UserError) as caught:
    buckets.read(run / 'x')
  assert type(caught.value) is kind


def test_listings_that_are_stale(run, bucket):
  """Only listings can be: the client remembers nothing."""
  buckets.write(run / 'x', b'1')
  assert list(buckets.find(run)) == ['x']
  bucket.proxy.rule = bucket_proxy.always(('stale',))
  for name in 'xy':
    buckets.write(run / name, b'22')
    assert buckets.read(run / name).content == b'22'
  assert [(n, e.size) for n, e in buckets.find(run).items()] == [('x', 1)]
  bucket.proxy.rule = None
  assert [e.size for e in buckets.find(run).values()] == [2, 2]


# What a user may have forgotten.


def test_a_bucket_that_can_be_used(run, bucket):
  buckets.check_writable('--workdir', run)
  assert bucket.objects == {}


@pytest.mark.parametrize(
  'permission', ['storage.objects.delete', 'storage.objects.create']
)
def test_a_permission_that_is_missing(permission, run, bucket):
  bucket.denied.add(permission)
  with pytest.raises(UserError) as caught:
    buckets.check_writable('--workdir', run)
  (problem,) = caught.value.problems
  assert problem.startswith(
    f'--workdir={run}: this account lacks {permission}.'
  )
  assert caught.value.exit_code == 1


def test_a_service_account_is_named(run, bucket, monkeypatch):
  bucket.denied.add('storage.objects.get')
  credentials = buckets._client()._credentials
  monkeypatch.setattr(
    credentials, 'service_account_email', 'tpu@host', raising=False
  )
  with pytest.raises(UserError, match=f'={run}: tpu@host lacks storage.objec'):
    buckets.check_writable('--workdir', run)


def test_a_bucket_that_does_not_exist(bucket):
  run = files.parse_place('--workdir', 'gs://another/run')
  for operation in (
    lambda: buckets.check_writable('--workdir', run),
    lambda: buckets.write(run / 'x', b''),
    lambda: buckets.find(run),
  ):
    with pytest.raises(UserError, match='there is no bucket of this name'):
      operation()
  assert buckets.read(run / 'x') is None


@pytest.fixture
def no_client(run, monkeypatch):
  """Outside of the emulator, as far as the client knows; makes no request."""
  monkeypatch.delenv('STORAGE_EMULATOR_HOST')
  buckets._client.cache_clear()
  yield
  buckets._client.cache_clear()


def test_no_credentials(run, no_client, monkeypatch):
  def default(**options):
    raise auth_exceptions.DefaultCredentialsError('not found')

  monkeypatch.setattr('google.auth.default', default)
  with pytest.raises(UserError, match='gcloud auth application-default login'):
    buckets.check_writable('--workdir', run)
