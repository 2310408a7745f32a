"""Objects in a bucket of Cloud Storage, `gs://BUCKET/NAME`.

The only module that uses Google's client. It caches nothing, writes an object
in one request, verifies checksums, and can make a request depend on the
generation of an object.

A request that fails for a reason that may pass, such as a lost connection, is
repeated for `RETRY_FOR` seconds. All of them may be repeated: to write the same
content twice, or to remove what is gone, changes nothing.
"""

import base64
from collections.abc import Callable
import contextlib
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from bn_repro.errors import TemporaryError, UserError
from bn_repro.files import Place

if TYPE_CHECKING:
  from google.cloud import storage

_T = TypeVar('_T')

# Seconds for which a request is repeated. Our choice: most outages of a network
# are shorter, and a run that stops costs more than one that waits.
RETRY_FOR = 120.0
# Seconds without a byte from the server, after which a request has failed. Our
# choice; they answer within one.
_TIMEOUT = 15.0

# What a run does to objects.
_PERMISSIONS = tuple(
  f'storage.objects.{name}' for name in ('create', 'delete', 'get', 'list')
)


class Entry(NamedTuple):
  """An object in a listing.

  Attributes:
    size: number of bytes.
    crc32c: checksum of its content, as Cloud Storage writes it.
  """

  size: int
  crc32c: str


class Version(NamedTuple):
  """An object as it was at one time.

  Attributes:
    content: its bytes.
    generation: number of this version; each write changes it.
  """

  content: bytes
  generation: int


class ChangedError(Exception):
  """An object does not have the generation that a write requires.

  Attributes:
    found: what it is instead; None if it does not exist.
  """

  def __init__(self, found: Version | None):
    super().__init__('the object has another generation')
    self.found = found


def entry_of(path: Path) -> Entry:
  """What a listing has of an object with the content of a local file."""
  import google_crc32c

  checksum = google_crc32c.Checksum()
  with path.open('rb') as file:
    for _ in checksum.consume(file, 1 << 20):
      pass
  digest = base64.b64encode(checksum.digest()).decode()
  return Entry(path.stat().st_size, digest)


def find(place: Place, *, retry_for: float | None = None) -> dict[str, Entry]:
  """Lists a folder with one request for each 1,000 objects.

  Args:
    place: a folder, which need not exist, or an object.
    retry_for: seconds for which a request is repeated, if not `RETRY_FOR`.

  Returns:
    The objects by name relative to the place; that of the place itself is ''.

  Raises:
    TemporaryError: if the bucket cannot be reached.
    UserError: if it refuses access or does not exist.
  """

  def list_objects() -> dict[str, Entry]:
    blobs = _client().list_blobs(
      place.bucket,
      prefix=place.name,
      fields='items(name,size,crc32c),nextPageToken',
      timeout=_TIMEOUT,
      retry=None,
    )
    names = {b.name.removeprefix(place.name): b for b in blobs}
    return {
      name.removeprefix('/'): Entry(blob.size, blob.crc32c)
      for name, blob in sorted(names.items())
      if name[:1] in ('', '/')
    }

  return _request(place, list_objects, retry_for)


def read(place: Place, *, retry_for: float | None = None) -> Version | None:
  """Reads an object and its generation in one request.

  Args:
    place: place of the object.
    retry_for: seconds for which a request is repeated, if not `RETRY_FOR`.

  Returns:
    The object; None if it does not exist.

  Raises:
    TemporaryError: if the bucket cannot be reached.
    UserError: if it refuses access.
  """

  def download() -> Version:
    blob = _blob(place)
    content = blob.download_as_bytes(timeout=_TIMEOUT, retry=None)
    return Version(content, blob.generation)

  try:
    return _request(place, download, retry_for)
  except _AbsentError:
    return None


def download(place: Place, path: Path) -> bool:
  """Copies an object into a local file, atomically.

  Args:
    place: place of the object.
    path: the file, in a folder that exists.

  Returns:
    Whether the object exists.

  Raises:
    OSError: if the file cannot be written.
    TemporaryError: if the bucket cannot be reached.
    UserError: if it refuses access.
  """
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')

  def copy() -> None:
    _blob(place).download_to_filename(
      str(temporary), timeout=_TIMEOUT, retry=None
    )

  try:
    _request(place, copy, None)
  except _AbsentError:
    temporary.unlink(missing_ok=True)
    return False
  temporary.replace(path)
  return True


def write(
  place: Place,
  content: bytes | Path,
  generation: int | None = None,
  *,
  retry_for: float | None = None,
) -> int:
  """Writes an object atomically: readers see the old content or the new.

  Args:
    place: place of the object.
    content: its content, or the local file that has it.
    generation: the generation to replace, 0 for an object that must not exist;
      None replaces any. If it is given, `content` is bytes unlike anything that
      others write there: an earlier request for it may have succeeded though
      its answer was lost, so an object with this content counts as written.
    retry_for: seconds for which a request is repeated, if not `RETRY_FOR`.

  Returns:
    The new generation.

  Raises:
    ChangedError: if it has another generation and another content.
    FileNotFoundError: if the local file does not exist.
    TemporaryError: if the bucket cannot be reached.
    UserError: if it refuses access or does not exist.
  """

  def upload() -> int:
    blob = _blob(place)
    # Without it, Google caches objects that everybody may read for an hour.
    blob.cache_control = 'no-store'
    options = {
      'content_type': 'application/octet-stream',
      'if_generation_match': generation,
      'timeout': _TIMEOUT,
      'retry': None,
    }
    if isinstance(content, Path):
      blob.upload_from_filename(str(content), **options)
    else:
      blob.upload_from_string(content, **options)
    return int(blob.generation)

  try:
    return _request(place, upload, retry_for)
  except _UnmetError:
    found = read(place, retry_for=retry_for)
    if found is None or found.content != content:
      raise ChangedError(found) from None
    return found.generation


def remove(
  place: Place,
  generation: int | None = None,
  *,
  retry_for: float | None = None,
) -> None:
  """Removes an object, if it exists.

  Args:
    place: place of the object.
    generation: if given, an object of another generation stays.
    retry_for: seconds for which a request is repeated, if not `RETRY_FOR`.

  Raises:
    TemporaryError, UserError: as `read`.
  """

  def delete() -> None:
    _blob(place).delete(
      if_generation_match=generation, timeout=_TIMEOUT, retry=None
    )

  with contextlib.suppress(_AbsentError, _UnmetError):
    _request(place, delete, retry_for)


def check_writable(
  flag: str, place: Place, *, retry_for: float | None = None
) -> None:
  """Checks, without writing, that a run can use a place in a bucket.

  Args:
    flag: flag that names the place, for messages.
    place: a folder.
    retry_for: seconds for which a request is repeated, if not `RETRY_FOR`.

  Raises:
    TemporaryError: if the bucket cannot be reached.
    UserError: if it does not exist, or this account lacks a permission.
  """
  bucket = _blob(place).bucket

  def missing() -> set[str]:
    granted = bucket.test_iam_permissions(
      _PERMISSIONS, timeout=_TIMEOUT, retry=None
    )
    return {*_PERMISSIONS}.difference(granted)

  lacking = _request(place, missing, retry_for)
  if lacking:
    # Of a service account of a machine, which the request above has looked up.
    email = getattr(_client()._credentials, 'service_account_email', None)
    raise UserError(
      f'{flag}={place}: {email or "this account"} lacks '
      f'{", ".join(sorted(lacking))}. Grant it roles/storage.objectUser on '
      f'gs://{bucket.name}.'
    )


class _AbsentError(UserError):
  """The object, or its bucket, does not exist."""


class _UnmetError(Exception):
  """The object does not have the generation that a request requires."""


def _request(
  place: Place, operation: Callable[[], _T], retry_for: float | None
) -> _T:
  """Repeats an operation while it fails for a reason that may pass."""
  from google.api_core import exceptions
  from google.auth.exceptions import GoogleAuthError, TransportError
  from google.cloud.storage.exceptions import DataCorruption
  from google.cloud.storage.retry import DEFAULT_RETRY

  seconds = RETRY_FOR if retry_for is None else retry_for
  try:
    return DEFAULT_RETRY.with_timeout(seconds)(operation)()
  except exceptions.NotFound as error:
    raise _AbsentError(
      f'{place}: does not exist, or there is no bucket of this name.'
    ) from error
  except exceptions.PreconditionFailed as error:
    raise _UnmetError from error
  except (exceptions.RetryError, DataCorruption) as error:
    raise _down(place, error) from error
  except (exceptions.GoogleAPICallError, GoogleAuthError) as error:
    # As a token that cannot be renewed now.
    if isinstance(error.__cause__, TransportError):
      raise _down(place, error) from error
    raise UserError(
      f'{place}: Cloud Storage refuses access: {_reason(error)}.'
    ) from error


def _down(place: Place, error: Exception) -> TemporaryError:
  return TemporaryError(
    f'{place}: Cloud Storage cannot be reached: {_reason(error)}. Run the same '
    'command again later.'
  )


def _reason(error: Exception) -> str:
  """What an error says, in one line: the server's words, if it has answered."""
  cause = error.__cause__ or error
  response = getattr(cause, 'response', None)
  if response is None:
    text = str(cause) or type(cause).__name__
  else:
    try:
      text = response.json()['error']['message']
    except (ValueError, KeyError, TypeError):
      text = response.text
    text = f'HTTP status {response.status_code}, {text}'
  return text.splitlines()[0].strip().removesuffix('.')


def _blob(place: Place) -> 'storage.Blob':
  """A client's view of an object; makes no request."""
  return _client().bucket(place.bucket).blob(place.name)


@functools.cache
def _client() -> 'storage.Client':
  """Creates Google's client, which threads may share.

  Raises:
    UserError: if there are no credentials.
  """
  from google.auth.exceptions import DefaultCredentialsError
  from google.cloud import storage

  os.environ.setdefault('DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA', '1')
  try:
    # Objects are not of a project; only new buckets are.
    return storage.Client(project='none')
  except DefaultCredentialsError as error:
    raise UserError(
      'gs://: found no credentials for Cloud Storage. Run: gcloud auth '
      'application-default login'
    ) from error
