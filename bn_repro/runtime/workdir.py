"""The directory of a run: its lock, and the files beside its checkpoints.

`config.json`, `run.json` and `status.json` are replaced atomically, never
written in place. `metrics.jsonl` grows by whole lines.
"""

from collections.abc import Mapping
import enum
import json
import os
from pathlib import Path
import socket
from typing import Any, TextIO

from ml_collections import ConfigDict

from bn_repro import config as config_lib
from bn_repro import files
from bn_repro.errors import UserError


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


def replace_file(path: Path, text: str) -> None:
  """Writes a file atomically: readers see the old content or the new."""
  temporary = path.with_name(f'.{path.name}.tmp')
  with temporary.open('w') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


def read_json(path: Path) -> Any:
  """Reads a JSON file; None if it does not exist.

  Raises:
    UserError: if it exists and cannot be read.
  """
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise UserError(f'{path}: cannot be read ({error}).') from error


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

  @property
  def checkpoints(self) -> Path:
    """The directory of Orbax's checkpoints."""
    return self.path / 'checkpoints'

  @property
  def metrics(self) -> Path:
    """The path of `metrics.jsonl`."""
    return self.path / 'metrics.jsonl'

  def check(self, config: ConfigDict) -> None:
    """Checks, without writing, that a run of `config` can use the directory.

    Raises:
      UserError: if the path is not a directory, is not writable, or holds a run
        whose config differs in fields that a resumed run cannot change.
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
    saved = read_json(self.path / 'config.json')
    if saved is None:
      return
    differences = config_lib.differences(saved, config)
    if differences:
      raise UserError(
        f'--workdir={self.path}: holds a run of another config. Use its config '
        f'or another workdir. Differences: {"; ".join(differences)}.'
      )

  def status(self) -> Mapping[str, Any]:
    """Reads `status.json`; an empty mapping for a new workdir."""
    return read_json(self.path / 'status.json') or {}

  def claim(self) -> None:
    """Creates the directory and locks it until this process ends.

    The kernel releases the lock when the process ends, however it ends.

    Raises:
      UserError: if another process holds the lock, or the directory cannot be
        created or locked.
    """
    if not self.writes:
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
        f'--workdir={self.path}: in use by {holder}. Wait for it, stop it, or '
        'use another workdir.'
      )
    lock.truncate(0)
    lock.write(f'process {os.getpid()} on {socket.gethostname()}')
    lock.flush()
    # Processes on other hosts read it.
    os.fsync(lock.fileno())
    self._lock = lock

  def release(self) -> None:
    """Releases the lock; removes the directory if it holds nothing else."""
    if self._lock is None:
      return
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
      replace_file(self.path / 'config.json', config_lib.to_json(config))

  def write_run(self, facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Writes `run.json`, with the facts of former starts in `earlier_starts`.

    Returns:
      The facts of the previous start; None at the first.
    """
    path = self.path / 'run.json'
    previous = read_json(path)
    earlier = []
    if previous is not None:
      earlier = previous.pop('earlier_starts') + [previous]
    text = json.dumps({**facts, 'earlier_starts': earlier}, indent=2)
    if self.writes:
      replace_file(path, text + '\n')
    return previous

  def write_status(self, status: str, step: int, reason: str) -> None:
    """Writes `status.json`.

    Args:
      status: a `Status`.
      step: number of updates applied.
      reason: why the run has this status, in one line.
    """
    content = {'status': status, 'step': step, 'reason': reason}
    if self.writes:
      replace_file(
        self.path / 'status.json', json.dumps(content, indent=2) + '\n'
      )


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """Reads a `metrics.jsonl`, without an incomplete last line.

  Returns:
    The lines; none if the file does not exist.

  Raises:
    UserError: if a line other than the last is damaged.
  """
  if not path.exists():
    return []
  lines = []
  # What follows the last newline is empty, or was cut by a kill.
  for number, text in enumerate(path.read_bytes().split(b'\n')[:-1], start=1):
    try:
      lines.append(json.loads(text))
    except ValueError as error:
      raise UserError(f'{path}:{number}: not a line of JSON.') from error
  return lines
