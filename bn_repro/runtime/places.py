"""Places: local paths, and `gs://BUCKET/NAME`, an object in Cloud Storage.

The only module that knows buckets. A local place is a `pathlib.Path`; one in a
bucket is an `epath.Path`, which has the same `/`, `name`, `parent` and `str`.
Orbax writes checkpoints to both; the files beside them are read and written
here, by Google's own client: it caches nothing, writes an object in one
request, and can make a request depend on the generation of an object.

A request that fails for a reason that may pass, such as a lost connection, is
repeated for `RETRY_FOR` seconds. All of them may be repeated: to write the same
content twice, or to remove what is gone, changes nothing.
"""

from collections.abc import Callable
import contextlib
import functools
import importlib.util
import logging
import os
from pathlib import Path
import re
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from etils import epath

from bn_repro import files
from bn_repro.errors import StorageDown, UserError

if TYPE_CHECKING:
  from google.cloud import storage

Place: TypeAlias = Path | epath.Path
_T = TypeVar('_T')

# Seconds for which a request is repeated. Our choice: most outages of a network
# are shorter, and a run that stops costs more than one that waits.
RETRY_FOR = 300.0
# Seconds without a byte from the server, after which a request has failed. Our
# choice; they answer within one.
_TIMEOUT = 15.0

_SCHEME = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*:/')
# Google's names of buckets. In a name, characters that fsspec or Orbax take for
# patterns are not allowed, nor parts that a path cannot have.
_IN_BUCKET = re.compile(
  r'gs://([a-z0-9][a-z0-9._-]+[a-z0-9])((/+(?!\.\.?(/|$))[\w .+=@,~-]+)+)/*'
)
# What a run does to objects, and what Orbax asks of a bucket.
_PERMISSIONS = (
  'storage.buckets.get',
  *(f'storage.objects.{name}' for name in ('create', 'delete', 'get', 'list')),
)


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


def parse(name: str, text: str) -> Place:
  """Returns the place that a flag or field names.

  Args:
    name: the flag or field that has the value `text`, for messages.
    text: a path or `gs://BUCKET/NAME`.

  Raises:
    UserError: if it is neither, or what buckets need is not installed.
  """
  if not _SCHEME.match(text):
    return files.expand(name, text)
  if not _IN_BUCKET.fullmatch(text):
    raise UserError(
      f'{name}={text}: must be a path or gs://BUCKET/NAME. A name in a bucket '
      'consists of letters, digits, spaces and any of -_.+=@,~/.'
    )
  # It brings Google's client, and Orbax requires it.
  if importlib.util.find_spec('gcsfs') is None:
    raise UserError(
      f'{name}={text}: a bucket requires further packages. Run: pip install -r '
      'requirements-tpu.txt'
    )
  _set_up()
  return epath.Path(re.sub('(?<=[^:])/+', '/', text).rstrip('/'))


def is_remote(place: Place) -> bool:
  """Whether a place is in a bucket."""
  return not isinstance(place, Path)


def read(place: Place, *, retry_for: float = RETRY_FOR) -> bytes | None:
  """Returns the content of a file; None if it does not exist.

  Args:
    place: place of the file.
    retry_for: seconds for which a request is repeated.

  Raises:
    OSError: if a local file cannot be read.
    StorageDown: if the bucket cannot be reached.
    UserError: if it refuses access.
  """
  if isinstance(place, Path):
    try:
      return place.read_bytes()
    except FileNotFoundError:
      return None
  found = read_version(place, retry_for=retry_for)
  return None if found is None else found.content


def write(
  place: Place, content: str | bytes, *, retry_for: float = RETRY_FOR
) -> None:
  """Writes a file atomically: readers see the old content or the new.

  Args:
    place: place of the file; a local one in a folder that exists.
    content: its content.
    retry_for: seconds for which a request is repeated.

  Raises:
    OSError: if a local file cannot be written.
    StorageDown: if the bucket cannot be reached.
    UserError: if it refuses access or does not exist.
  """
  if isinstance(content, str):
    content = content.encode()
  if not isinstance(place, Path):
    _upload(place, content, None, retry_for)
    return
  temporary = place.with_name(f'.{place.name}.tmp')
  with temporary.open('wb') as file:
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(place)


def find(place: Place, *, retry_for: float = RETRY_FOR) -> list[str]:
  """Lists all files below a place, one request for each 1,000 in a bucket.

  Args:
    place: a folder, which need not exist.
    retry_for: seconds for which a request is repeated.

  Returns:
    Their names relative to the place, sorted.

  Raises:
    StorageDown: if the bucket cannot be reached.
    UserError: if it refuses access or does not exist.
  """
  if isinstance(place, Path):
    found = (path for path in place.rglob('*') if path.is_file())
    return sorted(path.relative_to(place).as_posix() for path in found)
  prefix = f'{_blob(place).name}/'

  def list_names() -> list[str]:
    blobs = _client().list_blobs(
      _blob(place).bucket,
      prefix=prefix,
      fields='items(name),nextPageToken',
      timeout=_TIMEOUT,
      retry=None,
    )
    return sorted(blob.name.removeprefix(prefix) for blob in blobs)

  return _request(place, list_names, retry_for)


# The rest is for places in a bucket only: local files have locks and renames.


def read_version(
  place: epath.Path, *, retry_for: float = RETRY_FOR
) -> Version | None:
  """Reads an object and its generation in one request.

  Args:
    place: place of the object.
    retry_for: seconds for which a request is repeated.

  Returns:
    The object; None if it does not exist.

  Raises:
    StorageDown, UserError: as `read`.
  """

  def download() -> Version:
    blob = _blob(place)
    content = blob.download_as_bytes(timeout=_TIMEOUT, retry=None)
    return Version(content, blob.generation)

  try:
    return _request(place, download, retry_for)
  except _AbsentError:
    return None


def replace_if(
  place: epath.Path,
  content: bytes,
  generation: int,
  *,
  retry_for: float = RETRY_FOR,
) -> int:
  """Writes an object if it still has a generation.

  Args:
    place: place of the object.
    content: what to write, unlike anything that others write there. An earlier
      request for the same content may have succeeded though its answer was
      lost: an object with this content counts as written.
    generation: the generation to replace; 0 for an object that must not exist.
    retry_for: seconds for which a request is repeated.

  Returns:
    The new generation.

  Raises:
    ChangedError: if it has another generation and another content.
    StorageDown, UserError: as `write`.
  """
  try:
    return _upload(place, content, generation, retry_for)
  except _UnmetError:
    found = read_version(place, retry_for=retry_for)
    if found is None or found.content != content:
      raise ChangedError(found) from None
    return found.generation


def copy(
  place: epath.Path, to: epath.Path, *, retry_for: float = RETRY_FOR
) -> None:
  """Copies an object within its bucket, atomically.

  Args:
    place: place of the object, which must exist.
    to: place of the copy.
    retry_for: seconds for which a request is repeated.

  Raises:
    StorageDown, UserError: as `write`.
  """
  source = _blob(place)

  def copy_object() -> None:
    source.bucket.copy_blob(
      source,
      source.bucket,
      new_name=_blob(to).name,
      timeout=_TIMEOUT,
      retry=None,
    )

  _request(place, copy_object, retry_for)


def remove(
  place: epath.Path,
  generation: int | None = None,
  *,
  retry_for: float = RETRY_FOR,
) -> None:
  """Removes an object, if it exists.

  Args:
    place: place of the object.
    generation: if given, an object of another generation stays.
    retry_for: seconds for which a request is repeated.

  Raises:
    StorageDown, UserError: as `read`.
  """

  def delete() -> None:
    _blob(place).delete(
      if_generation_match=generation, timeout=_TIMEOUT, retry=None
    )

  with contextlib.suppress(_AbsentError, _UnmetError):
    _request(place, delete, retry_for)


def check_writable(
  flag: str, place: epath.Path, *, retry_for: float = RETRY_FOR
) -> None:
  """Checks, without writing, that a run can use a place in a bucket.

  Args:
    flag: flag that names the place, for messages.
    place: a folder.
    retry_for: seconds for which a request is repeated.

  Raises:
    StorageDown: if the bucket cannot be reached.
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
    raise UserError(
      f'{flag}={place}: this account lacks {", ".join(sorted(lacking))}. Grant '
      'it roles/storage.objectUser and roles/storage.legacyBucketReader on '
      f'gs://{bucket.name}.'
    )


class _AbsentError(UserError):
  """The object, or its bucket, does not exist."""


class _UnmetError(Exception):
  """The object does not have the generation that a request requires."""


def _upload(
  place: epath.Path, content: bytes, generation: int | None, retry_for: float
) -> int:
  """Writes an object; returns its new generation."""

  def upload() -> int:
    blob = _blob(place)
    # Without it, Google caches objects that everybody may read for an hour.
    blob.cache_control = 'no-store'
    blob.upload_from_string(
      content,
      content_type='application/octet-stream',
      if_generation_match=generation,
      timeout=_TIMEOUT,
      retry=None,
    )
    return blob.generation

  return _request(place, upload, retry_for)


def _request(
  place: epath.Path, operation: Callable[[], _T], retry_for: float
) -> _T:
  """Repeats an operation while it fails for a reason that may pass."""
  from google.api_core import exceptions
  from google.auth.exceptions import GoogleAuthError, TransportError
  from google.cloud.storage.exceptions import DataCorruption
  from google.cloud.storage.retry import DEFAULT_RETRY

  try:
    return DEFAULT_RETRY.with_timeout(retry_for)(operation)()
  except exceptions.NotFound as error:
    raise _AbsentError(
      f'{place}: does not exist, or there is no bucket of this name.'
    ) from error
  except exceptions.PreconditionFailed as error:
    raise _UnmetError from error
  except (
    exceptions.RetryError,
    DataCorruption,
    exceptions.GoogleAPICallError,
    GoogleAuthError,
  ) as error:
    # The last is that of a token that could not be renewed.
    if isinstance(error, exceptions.RetryError | DataCorruption) or isinstance(
      error.__cause__, TransportError
    ):
      raise StorageDown(
        f'{place}: Cloud Storage cannot be reached: {_reason(error)}. Run the '
        'same command again later.'
      ) from error
    raise UserError(
      f'{place}: Cloud Storage refuses access: {_reason(error)}.'
    ) from error


def _reason(error: Exception) -> str:
  """What an error says, in one line and without its request."""
  cause = error.__cause__ or error
  lines = str(getattr(cause, 'message', cause)).splitlines() or ['']
  return lines[0].strip().removesuffix('.') or type(cause).__name__


def _blob(place: epath.Path) -> 'storage.Blob':
  """A client's view of an object; makes no request."""
  _, _, bucket, *parts = place.parts
  return _client().bucket(bucket).blob('/'.join(parts))


@functools.cache
def _client() -> 'storage.Client':
  """Creates Google's client, which threads may share.

  Raises:
    UserError: if there are no credentials, or no project is known. Without a
      project, Orbax could not write checkpoints.
  """
  from google.auth.exceptions import DefaultCredentialsError
  from google.cloud import storage

  try:
    return storage.Client()
  except DefaultCredentialsError as error:
    raise UserError(
      'gs://: found no credentials for Cloud Storage. Run: gcloud auth '
      'application-default login'
    ) from error
  except OSError as error:  # "Project was not passed ..."
    raise UserError(
      'gs://: the project is unknown. Set the environment variable '
      'GOOGLE_CLOUD_PROJECT.'
    ) from error


@functools.cache
def _set_up() -> None:
  """Configures the packages through which Orbax uses a bucket."""
  import fsspec.config

  for name, value in {
    # Otherwise the file system is TensorFlow's, if that is installed.
    'EPATH_USE_TF': '0',
    # Requests that nobody needs, with permissions that few have.
    'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',
    'DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA': 'true',
  }.items():
    os.environ.setdefault(name, value)
  # gcsfs caches listings for ever, and with them the sizes of objects: a file
  # that another process has replaced would be read to its old length.
  options: dict[str, Any] = fsspec.config.conf.setdefault('gcs', {})
  options.update(use_listings_cache=False, requests_timeout=2 * _TIMEOUT)
  # It prints a traceback of each request that it repeats.
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
