"""The directory of a run: its lock, and the files beside its checkpoints.

`config.json`, `run.json` and `status.json` are replaced atomically, never
written in place, and contain a checksum of themselves. `metrics.jsonl` grows by
whole lines; checkpoints and the final `status.json` contain its digest.
"""

from collections.abc import Iterable, Mapping, Sequence
import enum
import hashlib
import json
import os
from pathlib import Path
import socket
from typing import Any, TextIO

from ml_collections import ConfigDict

from bn_repro import config as config_lib
from bn_repro import files
from bn_repro.errors import UserError
from bn_repro.runtime import buckets
from bn_repro.runtime.mirror import Mirror, fetch, pull

# The trained network of a run, which `training.model_file` describes.
MODEL = 'model.safetensors'


class Status(enum.StrEnum):
  """The status of a run, in `status.json`."""

  RUNNING = 'running'
  DONE = 'done'
  PREEMPTED = 'preempted'
  DIVERGED = 'diverged'
  FAILED = 'failed'


# Runs that have nothing left to do.
ENDED = (Status.DONE, Status.DIVERGED)

# 75 is EX_TEMPFAIL of BSD: run the same command again.
EXIT_CODES = {
  Status.DONE: 0,
  Status.FAILED: 1,
  Status.DIVERGED: 3,
  Status.PREEMPTED: 75,
}


def replace_file(path: Path, content: str | bytes) -> None:
  """Writes a file atomically: readers see the old content or the new."""
  temporary = path.with_name(f'.{path.name}.tmp')
  with temporary.open('wb') as file:
    file.write(content.encode() if isinstance(content, str) else content)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


# Begins a checksum. What contains it is not older than checksums are.
_SHA256 = 'sha256:'


def add_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
  """Adds a checksum of a JSON object to the object."""
  return {'checksum': _checksum(content), **content}


def remove_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
  """Verifies the checksum of a JSON object; returns the object without it.

  Objects of revision 3a68ec7 and before have none, and are not verified.

  Raises:
    ValueError: if the object does not match its checksum.
  """
  rest = {key: value for key, value in content.items() if key != 'checksum'}
  has_checksum = 'checksum' in content or _SHA256 in json.dumps(content)
  if has_checksum and content.get('checksum') != _checksum(rest):
    raise ValueError('does not match its checksum: it is damaged or was edited')
  return rest


def _checksum(content: Mapping[str, Any]) -> str:
  text = json.dumps(content, sort_keys=True)
  return _SHA256 + hashlib.sha256(text.encode()).hexdigest()


def write_json(
  path: Path, content: Mapping[str, Any], *, indent: int | None = 2
) -> None:
  """Writes a JSON object atomically, with a checksum of its content.

  Args:
    path: the file.
    content: the object.
    indent: spaces before a field; None writes one line.
  """
  replace_file(path, json.dumps(add_checksum(content), indent=indent) + '\n')


def read_json(path: Path) -> dict[str, Any] | None:
  """Reads a file that `write_json` has written.

  Returns:
    The object without its checksum; None if the file does not exist.

  Raises:
    UserError: if the file cannot be read, is no JSON object, or does not match
      its checksum.
  """
  try:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
      raise TypeError('is not a JSON object')
    return remove_checksum(content)
  except FileNotFoundError:
    return None
  except OSError as error:
    raise UserError(
      f'{files.as_given(path)}: cannot be read ({error.strerror}).'
    ) from error
  except (ValueError, TypeError, RecursionError) as error:
    is_json = not isinstance(error, json.JSONDecodeError | RecursionError)
    problem = error if is_json else f'is not valid JSON ({error})'
    raise UserError(
      f'{files.as_given(path)}: {problem}. Restore it from a copy; or '
      'delete it, and run the training command again, which writes it.'
    ) from error


class MetricsDigest:
  """Identifies lines of metrics by their number and the SHA-256 of their bytes.

  Attributes:
    num_lines: number of lines.
  """

  def __init__(self, lines: Iterable[bytes] = ()):
    """Starts with lines, each with its newline."""
    self.num_lines = 0
    self._sha256 = hashlib.sha256()
    for line in lines:
      self.add(line)

  def add(self, line: bytes) -> None:
    """Adds a line, with its newline."""
    self.num_lines += 1
    self._sha256.update(line)

  def to_json(self) -> dict[str, Any]:
    """Returns the digest in the form that checkpoints and status.json hold."""
    return {
      'lines': self.num_lines,
      'sha256': _SHA256 + self._sha256.hexdigest(),
    }


def check_metrics(path: Path, recorded: Mapping[str, Any] | None) -> None:
  """Checks that a file begins with the lines of a recorded digest.

  Args:
    path: a `metrics.jsonl`.
    recorded: `MetricsDigest.to_json()`, from a checkpoint or from
      `status.json`; None, which passes, if that is older than digests are.

  Raises:
    UserError: if lines are missing or differ.
  """
  if recorded is None:
    return
  lines = _complete_lines(path)
  if MetricsDigest(lines[: recorded['lines']]).to_json() != recorded:
    problem = (
      f'has {len(lines)} lines, and should have at least {recorded["lines"]}'
      if len(lines) < recorded['lines']
      else f'its first {recorded["lines"]} lines are not those of the run'
    )
    raise UserError(
      f'{files.as_given(path)}: {problem}. Restore it from a copy, or train '
      'with --accept_lost_metrics to continue with the lines that are left.'
    )


def _complete_lines(path: Path) -> list[bytes]:
  """The lines of a file, each with its newline; none if it does not exist.

  What follows the last newline is empty, or was cut by a kill.
  """
  if not path.exists():
    return []
  return [line + b'\n' for line in path.read_bytes().split(b'\n')[:-1]]


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """Reads a `metrics.jsonl`, without an incomplete last line.

  Returns:
    The lines; none if the file does not exist.

  Raises:
    UserError: if a line other than the last is damaged.
  """
  lines = []
  for number, text in enumerate(_complete_lines(path), start=1):
    try:
      line = json.loads(text)
      if not isinstance(line['step'], int) or not isinstance(
        line['split'], str
      ):
        raise TypeError('step or split')
    except (ValueError, RecursionError, TypeError, KeyError) as error:
      raise UserError(
        f'{files.as_given(path)}:{number}: not a line of metrics. Restore the '
        'file from a copy.'
      ) from error
    lines.append(line)
  return lines


class Workdir:
  """The directory of one run.

  Attributes:
    path: absolute path.
    writes: whether this process writes files; the methods that write do nothing
      where it is False. Of several processes, only process 0 writes.
  """

  def __init__(self, path: str | Path, *, writes: bool = True):
    self.path = Path(path).absolute()
    self.writes = writes
    self._lock: TextIO | None = None
    self._mirror: Mirror | None = None

  def __str__(self) -> str:
    """As the user names it."""
    return files.as_given(self.path)

  @property
  def checkpoints(self) -> Path:
    """The directory of Orbax's checkpoints."""
    return self.path / 'checkpoints'

  @property
  def metrics(self) -> Path:
    """The path of `metrics.jsonl`."""
    return self.path / 'metrics.jsonl'

  @property
  def model(self) -> Path:
    """The path of the trained network."""
    return self.path / MODEL

  def require_model(self) -> Path:
    """Returns the path of the trained network.

    Raises:
      UserError: if there is none.
    """
    if not self.model.is_file():
      raise UserError(
        f'{files.as_given(self.model)}: does not exist. A run writes it at '
        'its first evaluation; a run that is done, if you run its training '
        'command again.'
      )
    return self.model

  def check(self, config: ConfigDict) -> None:
    """Checks, without writing, that a run of `config` can use the directory.

    Raises:
      TemporaryError: if it is in a bucket that cannot be reached.
      UserError: if the path is not a directory, is not writable, or holds a run
        whose config differs in fields that a resumed run cannot change, or in
        a bucket a folder of runs.
    """
    self.check_writable()
    copy = fetch(self.path, ['*config.json'])
    if copy != self.path:
      # Its mirror would take over the files of other runs.
      others = {path.parent for path in copy.rglob('*/config.json')}
      for other in sorted(others):
        raise UserError(
          f'--workdir={self}: holds another run, {files.as_given(other)}. Name '
          'a workdir that is not a folder of runs.'
        )
    saved = read_json(copy / 'config.json')
    if saved is None:
      return
    differences = config_lib.differences(saved, config)
    if differences:
      raise UserError(
        f'--workdir={self}: holds a run of another config. Use its config '
        f'or another workdir. Differences: {"; ".join(differences)}.'
      )

  def check_writable(self) -> None:
    """Checks, without writing, that the directory can be written.

    Raises:
      TemporaryError: if it is in a bucket that cannot be reached.
      UserError: if the path is not a directory, or is not writable.
    """
    existing = self.path
    while not existing.exists():
      existing = existing.parent
    if not existing.is_dir():
      raise UserError(
        f'--workdir={self.path}: {existing} is a file. Name a directory.'
      )
    if not os.access(existing, os.W_OK | os.X_OK):
      raise UserError(
        f'--workdir={self.path}: {existing} cannot be written. Change its '
        'permissions, or use another workdir.'
      )
    place = files.place_of(self.path)
    if place:
      buckets.check_writable('--workdir', place)

  def status(self) -> Mapping[str, Any]:
    """Reads `status.json`; an empty mapping for a new workdir."""
    return read_json(self.path / 'status.json') or {}

  def has_saved(self) -> bool:
    """Whether the run has saved a step, as far as its files tell.

    At step 0 it may have lost another process before it could save.
    """
    facts = read_json(self.path / 'run.json') or {}
    status = self.status()
    was_preempted = status.get('status') == Status.PREEMPTED
    return facts.get('start_step', 0) > 0 or (
      was_preempted and status['step'] > 0
    )

  def claim(self, patterns: Sequence[str] = ('*',)) -> None:
    """Creates the directory and locks it until this process ends.

    The kernel releases the lock when the process ends, however it ends.

    Args:
      patterns: of a directory in a bucket, the files that this process writes;
        see `mirror.Mirror`.

    Raises:
      TemporaryError: if it is in a bucket that cannot be reached, or in which
        another process holds it.
      UserError: if another process holds the lock, or the directory cannot be
        created or locked.
    """
    if not self.writes:
      # Of a local workdir, which all processes share, it does nothing.
      pull(self.path, ['*.json', 'metrics.jsonl', MODEL])
      return
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      lock = (self.path / 'lock').open('a+')
    except OSError as error:
      raise UserError(
        f'--workdir={self.path}: cannot be written ({error.strerror}).'
      ) from error
    try:
      is_free = files.lock(lock)
    except UserError:
      self._lock = lock
      self.release()
      raise
    if not is_free:
      lock.seek(0)
      holder = lock.read().strip() or 'another process'
      lock.close()
      raise UserError(
        f'--workdir={self}: in use by {holder}. Wait for it, stop it, or '
        'use another workdir.'
      )
    lock.truncate(0)
    lock.write(f'process {os.getpid()} on {socket.gethostname()}')
    lock.flush()
    # Processes on other hosts read it.
    os.fsync(lock.fileno())
    self._lock = lock
    if files.place_of(self.path):
      self._mirror = Mirror(self.path, patterns)
      try:
        self._mirror.open()
      except (UserError, OSError):
        self._mirror = None
        self.release()
        raise

  def check_claim(self) -> None:
    """Raises if the run cannot continue, because of its bucket.

    Raises:
      TemporaryError: if the bucket cannot be reached, or the claim may be lost.
      UserError: if the bucket refuses access.
    """
    if self._mirror:
      self._mirror.check()

  def release(self) -> None:
    """Releases the lock; removes the directory if it holds nothing else.

    Of a workdir in a bucket, what has changed is uploaded first.

    Raises:
      TemporaryError, UserError: as `check_claim`.
    """
    if self._lock is None:
      return
    mirror, self._mirror = self._mirror, None
    if mirror:
      mirror.close()
    if [path.name for path in self.path.iterdir()] == ['lock']:
      (self.path / 'lock').unlink()
      self.path.rmdir()
    self._lock.close()
    self._lock = None

  def holder(self) -> str:
    """Names the process that last held the lock; empty if none has."""
    try:
      return (self.path / 'lock').read_text().strip()
    except OSError:
      return ''

  def write_config(self, config: ConfigDict) -> None:
    """Writes the resolved config."""
    if self.writes:
      write_json(self.path / 'config.json', config.to_dict())

  def write_run(self, facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Writes `run.json`, with the facts of former starts in `earlier_starts`.

    Returns:
      The facts of the previous start; None at the first.
    """
    path = self.path / 'run.json'
    previous = read_json(path)
    earlier = []
    if previous is not None:
      earlier = [*previous.pop('earlier_starts', ()), previous]
    if self.writes:
      write_json(path, {**facts, 'earlier_starts': earlier})
    return previous

  def write_status(
    self,
    status: str,
    step: int,
    reason: str,
    metrics: Mapping[str, Any] | None = None,
  ) -> None:
    """Writes `status.json`.

    Args:
      status: a `Status`.
      step: number of updates applied.
      reason: why the run has this status, in one line.
      metrics: digest of the lines at the end of a run.
    """
    content = {'status': status, 'step': step, 'reason': reason}
    if metrics is not None:
      content['metrics'] = metrics
    if self.writes:
      write_json(self.path / 'status.json', content)
