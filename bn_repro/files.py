"""Paths that users give, locks on files, and errors of the system."""

import argparse
from collections.abc import Sequence
import dataclasses
import errno
import fcntl
import importlib.util
import os
from pathlib import Path
import re
import sys
from typing import IO, Any
import unicodedata

from bn_repro.errors import UserError

# Errors of a disk that is full or takes no larger file.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# Begins a URL of Cloud Storage.
BUCKET = 'gs://'
# Google's names of buckets. In a name, no characters that shells or Google's
# tools take for patterns, and no parts that a path cannot have.
_BUCKET_URL = re.compile(
  r'gs://([a-z0-9][a-z0-9._-]+[a-z0-9])((/+(?!\.\.?(/|$))[\w .+=@,~-]+)+)/*'
)
# With one slash, a URL that was normalized as a path.
_SCHEME = re.compile(r'[A-Za-z][A-Za-z0-9+.-]*:/')
# Unicode categories of control characters and separators of lines.
_CONTROL = ('Cc', 'Zl', 'Zp')
# Category of bytes that the encoding of the locale does not have.
_NOT_DECODED = 'Cs'


@dataclasses.dataclass(frozen=True)
class Place:
  """An object in a bucket, or a folder: all objects below a name.

  Attributes:
    bucket: name of the bucket.
    name: name in the bucket, without a slash at either end.
  """

  bucket: str
  name: str

  def __str__(self) -> str:
    return f'{BUCKET}{self.bucket}/{self.name}'

  def __truediv__(self, name: str) -> 'Place':
    return Place(self.bucket, f'{self.name}/{name}')


def cache(kind: str) -> Path:
  """A folder for what can be made or fetched again, such as 'compiled'."""
  home = os.environ.get('XDG_CACHE_HOME', '')
  if not os.path.isabs(home):  # By its specification, it is then ignored.
    home = os.path.expanduser('~/.cache')
  return Path(home, 'bn_repro', kind)


def parse_place(name: str, text: str) -> Place:
  """Returns the place in a bucket that a flag or field names.

  Args:
    name: the flag or field that has the value `text`, for messages.
    text: `gs://BUCKET/NAME`.

  Raises:
    UserError: if it is not.
  """
  found = _BUCKET_URL.fullmatch(text)
  if not found:
    raise UserError(
      f'{name}={text}: must be a path or gs://BUCKET/NAME. A name in a bucket '
      'consists of letters, digits, spaces and any of -_.+=@,~/.'
    )
  return Place(found[1], re.sub('/+', '/', found[2]).strip('/'))


def local_path(place: Place) -> Path:
  """The local path that stands for a place in a bucket."""
  return cache('buckets') / place.bucket / place.name


def place_of(path: Path) -> Place | None:
  """The place in a bucket that a local path stands for; None if it is local."""
  if not path.is_relative_to(cache('buckets')):
    return None
  parts = path.relative_to(cache('buckets')).parts
  return Place(parts[0], '/'.join(parts[1:])) if len(parts) > 1 else None


def as_given(path: Path) -> str:
  """A path as users name it: a local copy of a place in a bucket by its URL."""
  for kind in ('buckets', 'fetched'):
    if path.is_relative_to(cache(kind)) and path != cache(kind):
      return f'{BUCKET}{path.relative_to(cache(kind))}'
  return str(path)


def path_problem(text: str) -> str | None:
  """Returns the requirement that the text of a path violates, or None."""
  if not text.strip():
    return 'must not be empty (is a shell variable unset?)'
  if _SCHEME.match(text):
    how = (
      ' (gcsfuse --implicit-dirs BUCKET FOLDER)' if text[:3] == 'gs:' else ''
    )
    return f'must be a path; to use a bucket, mount it{how} and name the folder'
  categories = {unicodedata.category(c) for c in text}
  if categories.intersection(_CONTROL):
    return 'must not contain control characters'
  if _NOT_DECODED in categories:
    return (
      f'must be {sys.getfilesystemencoding()} text in this locale '
      '(LC_ALL=C.UTF-8 allows UTF-8)'
    )
  try:
    Path(text).expanduser()
  except RuntimeError:
    return 'the home folder is unknown; give an absolute path'
  return None


def check_path(name: str, text: str) -> None:
  """Checks the text of a path, which may be one of another machine.

  Args:
    name: the flag or field that has the value `text`, for messages.
    text: a path.

  Raises:
    UserError: if it is empty or a URL, contains control characters or bytes
      that are not text, or begins with an unknown home folder.
  """
  problem = path_problem(text)
  if problem:
    raise UserError(f'{name}={text}: {problem}.')


def expand(name: str, text: str, *, in_bucket: bool = False) -> Path:
  """Returns the absolute path that a flag or field names; `~` is expanded.

  Args:
    name: the flag or field that has the value `text`, for messages.
    text: a path.
    in_bucket: whether it may also be a place in a bucket, of which the local
      path is returned.

  Raises:
    UserError: as `check_path`, also for the current and the home folder; if
      the current folder no longer exists; if what a bucket requires is not
      installed.
  """
  if in_bucket and _SCHEME.match(text):
    place = parse_place(name, text)
    if importlib.util.find_spec('google_crc32c') is None:
      raise UserError(
        f'{name}={text}: a bucket requires further packages. Run: pip install '
        '-r requirements-tpu.txt'
      )
    return local_path(place)
  check_path(name, text)
  try:
    path = Path(text).expanduser().absolute()
  except FileNotFoundError as error:
    raise UserError(
      f'{name}={text}: the current folder no longer exists. Give an absolute '
      'path.'
    ) from error
  check_path(name, str(path))
  return path


def expand_data_dir(data_dir: str, need: str) -> Path:
  """Returns the path of data that have no usual place.

  Args:
    data_dir: value of `config.data.data_dir`.
    need: what the data set needs, and what to pass.

  Raises:
    UserError: as `expand`; if the path is empty, with `need`.
  """
  if not data_dir:
    raise UserError(f'config.data.data_dir: {need}')
  return expand('config.data.data_dir', data_dir)


def add_path_argument(
  parser: argparse.ArgumentParser,
  flag: str,
  *,
  metavar: str = 'DIR',
  in_bucket: bool = False,
  **options: Any,
) -> None:
  """Adds an argument whose value is what `expand` returns.

  Args:
    parser: parser to add it to.
    flag: such as '--workdir'.
    metavar: the value in the help.
    in_bucket: see `expand`.
    **options: further ones of `argparse.ArgumentParser.add_argument`.
  """
  parser.add_argument(
    flag,
    type=lambda text: expand(flag, text, in_bucket=in_bucket),
    metavar=metavar,
    **options,
  )


def check_output(flag: str, path: Path, inputs: Sequence[Path]) -> None:
  """Checks a file to write, before anything is computed for it.

  Args:
    flag: such as '--csv'.
    path: value of the flag.
    inputs: files that the command reads.

  Raises:
    UserError: if its folder does not exist, or it is a folder or an input.
  """
  if not path.parent.is_dir():
    raise UserError(f'{flag}={path}: no folder {path.parent}. Create it.')
  if path.is_dir():
    raise UserError(f'{flag}={path}: is a folder. Name a file.')
  if path in inputs:
    raise UserError(f'{flag}={path}: is one of the files to read.')


def lock(file: IO[Any], *, shared: bool = False) -> bool:
  """Locks an open file until it is closed.

  Args:
    file: file to lock.
    shared: whether other shared locks are allowed.

  Returns:
    False if another process holds the lock.

  Raises:
    UserError: if the file system cannot lock the file.
  """
  operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
  try:
    fcntl.flock(file, operation | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    raise UserError(
      f'{file.name}: cannot be locked ({error.strerror}). Use a folder on a '
      'file system that supports flock, or mount it with locks.'
    ) from error
  return True


def is_system_error(error: Exception, numbers: tuple[int, ...]) -> bool:
  """Whether an error is one of these; storage layers keep its text alone."""
  if isinstance(error, OSError) and error.errno in numbers:
    return True
  return any(os.strerror(number) in str(error) for number in numbers)
