"""A workdir in a bucket: a local folder, and a thread that copies it there.

Commands that are given `gs://BUCKET/NAME` work in a local folder that stands
for it, in a cache. Before a run starts, `Mirror.open` makes the folder
equal to the bucket; while it trains, a thread uploads what has changed; so
training never waits for the bucket. What another machine finds there is the
workdir as it was on this one at a recent moment:

- Files are uploaded in the order in which a run writes them, and read in the
  opposite order. The lines of metrics up to a step are therefore in the bucket
  before its checkpoint is, and `status.json` is never ahead of them.
- A checkpoint counts once its `commit_success.txt`, which Orbax writes, is in
  the bucket. It is uploaded last and deleted first.
- `claims.Claim` lets one process at a time write.
"""

from collections.abc import Iterable, Mapping, Sequence
import contextlib
import fnmatch
import os
from pathlib import Path
import re
import threading
import time
from typing import NamedTuple

from bn_repro import files
from bn_repro.errors import TemporaryError
from bn_repro.files import Place
from bn_repro.runtime import buckets, claims

# Seconds between uploads. Our choice: at the prices of Cloud Storage, those of
# a month cost less than a dollar.
INTERVAL = 30.0

# Seconds until a listing that was not right is asked for again. Our choice.
_LISTING_DELAY = 0.5

_LOCK = 'lock'
_STATUS = 'status.json'
_METRICS = 'metrics.jsonl'
_CHECKPOINTS = 'checkpoints/'
_CHECKPOINT = re.compile(_CHECKPOINTS + '(0|[1-9][0-9]*)/')
# The file that Orbax writes last.
_MARKER = 'commit_success.txt'

# What tells versions of a local file apart without reading it: its inode, size,
# and time of modification in ns.
_Stamp = tuple[int, int, int]


class _File(NamedTuple):
  """A local file as it was read."""

  name: str
  stamp: _Stamp
  content: bytes


class Mirror:
  """The workdir of a run, on this machine and in its bucket."""

  def __init__(
    self,
    local: Path,
    patterns: Sequence[str] = ('*',),
    *,
    interval: float = INTERVAL,
    expires: float = claims.EXPIRES,
  ):
    """Makes no request.

    Args:
      local: path of the local folder, which has a place in a bucket.
      patterns: the files to keep equal, see `fetch`. Others, such as workdirs
        in the folder, have mirrors of their own.
      interval: seconds between uploads.
      expires: see `claims.Claim`.
    """
    place = files.place_of(local)
    assert place is not None, local
    self._local, self._place, self._patterns = local, place, patterns
    self._claim = claims.Claim(place, expires)
    # What the bucket has, by name; None if the folder does not have it.
    self._uploaded: dict[str, _Stamp | None] = {}
    self._interval = interval
    self._problem: Exception | None = None
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._keep, daemon=True)

  def open(self) -> None:
    """Claims the workdir, makes the folder equal to it, and starts the thread.

    What the folder has beyond the bucket is deleted: a process that was killed
    had not uploaded it.

    Raises:
      OSError: if the folder cannot be written.
      TemporaryError: if another process holds the claim, or the bucket cannot
        be reached.
      UserError: if the bucket refuses access.
    """
    self._claim.take()
    try:
      found = _download(self._place, self._local, self._patterns)
      self._uploaded = dict.fromkeys(found)
      for name in self._names():
        self._uploaded[name] = _stamp(self._local / name)
    except BaseException:
      self._claim.release()
      raise
    self._thread.start()

  def check(self) -> None:
    """Raises what has ended the thread, if anything has.

    Raises:
      ClaimLost: if another process may continue the run.
      TemporaryError: if the bucket cannot be reached.
      UserError: if it refuses access.
    """
    self._claim.check()
    if self._problem:
      raise self._problem

  def close(self) -> None:
    """Uploads what has changed, and gives the claim back.

    Raises:
      ClaimLost, TemporaryError, UserError: as `check`. The bucket then has an
        earlier state than the folder.
    """
    self._stopped.set()
    try:
      self.check()
      self._thread.join()
      self.check()
      self._upload()
    finally:
      self._claim.release()

  def _keep(self) -> None:
    """Uploads what has changed, again and again."""
    try:
      while not self._stopped.wait(self._interval):
        self._upload()
    except Exception as problem:  # `check` raises it where the run can end.
      self._problem = problem

  def _upload(self) -> None:
    """Uploads what has changed in the folder, and removes what is gone."""
    # Read in this order, and written in the opposite one.
    status = self._changed(self._own([_STATUS]))
    checkpoints = _complete(self._names())
    metrics = self._changed(self._own([_METRICS]))
    others = [
      name
      for name in self._names()
      if name not in (_STATUS, _METRICS) and not name.startswith(_CHECKPOINTS)
    ]
    for file in self._changed(others):
      self._write(file)
    for file in metrics:
      # Without a line that is being written.
      complete = file.content[: file.content.rfind(b'\n') + 1]
      self._write(file._replace(content=complete))
    try:
      for step in sorted(checkpoints, reverse=True):
        self._upload_checkpoint(checkpoints[step])
    except FileNotFoundError:
      return  # There are newer ones now, and Orbax has deleted this one.
    kept = {name for of_step in checkpoints.values() for name in of_step}
    gone = self._uploaded.keys() - kept - {*others, _STATUS, _METRICS}
    # Markers first.
    for name in sorted(gone, key=lambda name: not _is_marker(name)):
      self._remove(name)
    for file in status:
      self._claim.renew()
      self._write(file)

  def _names(self) -> list[str]:
    return self._own(_names(self._local))

  def _own(self, names: Iterable[str]) -> list[str]:
    return [name for name in names if _matches(name, self._patterns)]

  def _changed(self, names: Iterable[str]) -> list[_File]:
    """Reads those files that the bucket does not have as they are."""
    found = []
    for name in names:
      with contextlib.suppress(FileNotFoundError):
        stamp = _stamp(self._local / name)
        if self._uploaded.get(name) != stamp:
          content = (self._local / name).read_bytes()
          found.append(_File(name, stamp, content))
    return found

  def _write(self, file: _File) -> None:
    self._claim.check()
    buckets.write(self._place / file.name, file.content)
    self._uploaded[file.name] = file.stamp

  def _remove(self, name: str) -> None:
    self._claim.check()
    buckets.remove(self._place / name)
    self._uploaded.pop(name, None)

  def _upload_checkpoint(self, names: Sequence[str]) -> None:
    """Uploads a complete checkpoint, whose marker is the last of the names.

    Raises:
      FileNotFoundError: if a file has been deleted.
    """
    stamps = {name: _stamp(self._local / name) for name in names}
    changed = [n for n in names if self._uploaded.get(n) != stamps[n]]
    if not changed:
      return
    marker = names[-1]
    if marker in self._uploaded:
      self._remove(marker)
    for name in changed:
      if name != marker:
        self._claim.check()
        buckets.write(self._place / name, self._local / name)
        self._uploaded[name] = stamps[name]
    self._claim.renew()
    buckets.write(self._place / marker, self._local / marker)
    self._uploaded[marker] = stamps[marker]


def fetch(path: Path, patterns: Sequence[str] = ('*',)) -> Path:
  """Downloads what a command reads; does nothing for a local path.

  The copy is apart from the folder in which a run of this machine may be
  working, which is newer than the bucket.

  Args:
    path: path of a workdir, of a folder of workdirs, or of a file.
    patterns: what the command reads, as names relative to the path, in which
      `*` stands for any characters.

  Returns:
    The path to read from.

  Raises:
    OSError: if the copy cannot be written.
    TemporaryError: if the bucket cannot be reached.
    UserError: if it refuses access.
  """
  place = files.place_of(path)
  if place is None:
    return path
  copy = files.cache('fetched') / place.bucket / place.name
  _download(place, copy, patterns)
  return copy


def upload(paths: Iterable[Path]) -> None:
  """Uploads files that a command has written; does nothing for local paths.

  Args:
    paths: paths of the files.

  Raises:
    OSError: if one cannot be read.
    TemporaryError: if the bucket cannot be reached.
    UserError: if it refuses access.
  """
  for path in paths:
    if place := files.place_of(path):
      buckets.write(place, path)


def pull(path: Path, patterns: Sequence[str]) -> None:
  """Makes a part of a workdir on this machine equal to its bucket.

  For the processes of a run that write nothing, and know from its files what
  it has computed already; does nothing for a local path.

  Args:
    path: path of the workdir.
    patterns: see `fetch`.

  Raises:
    OSError, TemporaryError, UserError: as `fetch`.
  """
  place = files.place_of(path)
  if place is not None:
    _download(place, path, patterns)


def _download(
  place: Place, local: Path, patterns: Sequence[str]
) -> Mapping[str, buckets.Entry]:
  """Makes what matches one of some patterns equal to the bucket.

  If an object is another than that of the listing, because a run changes it or
  the listing was late, starts again.

  Returns:
    The objects that match, by name, also of checkpoints that do not count.

  Raises:
    TemporaryError: if that goes on for `buckets.RETRY_FOR` seconds.
  """
  deadline = time.monotonic() + buckets.RETRY_FOR
  while True:
    found, is_current = _download_once(place, local, patterns)
    if is_current:
      return found
    if time.monotonic() > deadline:
      raise TemporaryError(
        f'{place}: changes faster than it can be read. Run the same command '
        'again later.'
      )
    time.sleep(_LISTING_DELAY)


def _download_once(
  place: Place, local: Path, patterns: Sequence[str]
) -> tuple[Mapping[str, buckets.Entry], bool]:
  """See `_download`; also returns whether the listing is still right."""
  found = {
    name: entry
    for name, entry in buckets.find(place).items()
    if _is_file(name) and _matches(name, patterns)
  }
  complete = {n for names in _complete(found).values() for n in names}
  wanted = {
    name: entry
    for name, entry in found.items()
    if name in complete or not name.startswith(_CHECKPOINTS)
  }
  for name in _names(local):
    if name not in wanted and _matches(name, patterns):
      # Another process may download the same.
      (local / name).unlink(missing_ok=True)
  _remove_empty_folders(local / _CHECKPOINTS)
  for name, entry in wanted.items():
    path = local / name
    if path.is_file() and buckets.entry_of(path) == entry:
      continue
    path.parent.mkdir(parents=True, exist_ok=True)
    exists = buckets.download(place / name if name else place, path)
    if not exists or buckets.entry_of(path) != entry:
      return found, False
  return found, True


def _is_file(name: str) -> bool:
  """Whether an object is a file of a workdir: no lock, no folder, no trick."""
  parts = name.split('/')
  is_inside = not {'', '.', '..'}.intersection(parts) or name == ''
  return is_inside and parts[-1] != _LOCK


def _matches(name: str, patterns: Iterable[str]) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _names(local: Path) -> list[str]:
  """The files of a folder, without locks and files that are being written."""
  return sorted(
    Path(folder, name).relative_to(local).as_posix()
    # Folders that disappear meanwhile are left out.
    for folder, _, names in os.walk(local)
    for name in names
    if name != _LOCK and not name.endswith('.tmp')
  )


def _complete(names: Iterable[str]) -> dict[int, list[str]]:
  """The files of each complete checkpoint by step, its marker last."""
  by_step: dict[int, list[str]] = {}
  for name in sorted(names, key=_is_marker):
    if step := _CHECKPOINT.match(name):
      by_step.setdefault(int(step[1]), []).append(name)
  return {s: found for s, found in by_step.items() if _is_marker(found[-1])}


def _is_marker(name: str) -> bool:
  """Whether a file is the marker of a checkpoint; its items have their own."""
  step = _CHECKPOINT.match(name)
  return step is not None and name == step[0] + _MARKER


def _remove_empty_folders(checkpoints: Path) -> None:
  """Removes folders without files, of which one could pass for a checkpoint."""
  for folder, _, _ in os.walk(checkpoints, topdown=False):
    with contextlib.suppress(OSError):  # It is not empty.
      os.rmdir(folder)


def _stamp(path: Path) -> _Stamp:
  found = path.stat()
  return found.st_ino, found.st_size, found.st_mtime_ns
