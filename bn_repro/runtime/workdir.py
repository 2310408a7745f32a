"""A run's directory: who may use it, and what is written beside checkpoints.

`config.json`, `run.json` and `status.json` are replaced as a whole, never
written in place; `metrics.jsonl` grows by whole lines.
"""

from collections.abc import Iterable, Mapping, Sequence
import enum
import fcntl
import json
import os
from pathlib import Path
import socket
from typing import Any, TextIO

from ml_collections import ConfigDict

from bn_repro import config as config_lib
from bn_repro.errors import UserError


class Status(enum.StrEnum):
  """How a run stands, as `status.json` says."""

  RUNNING = 'running'
  DONE = 'done'
  PREEMPTED = 'preempted'
  DIVERGED = 'diverged'
  FAILED = 'failed'


# With nothing left to do.
ENDED = (Status.DONE, Status.DIVERGED)

# 75 is BSD's EX_TEMPFAIL: run the same command again.
EXIT_CODES = {
  Status.DONE: 0,
  Status.FAILED: 1,
  Status.DIVERGED: 3,
  Status.PREEMPTED: 75,
}


def replace_file(path: Path, text: str) -> None:
  """Writes a file so that it is seen either as it was or as it becomes."""
  temporary = path.with_name(f'.{path.name}.tmp')
  with temporary.open('w') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


def read_json(path: Path) -> Any:
  """Reads a JSON file of a workdir; None if it is not there.

  Raises:
    UserError: if it is there and cannot be read.
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
    writes: whether this process writes; of several processes one does, and
      what the others are asked to write goes nowhere.
  """

  def __init__(self, path: str, *, writes: bool = True):
    self.path = Path(path).expanduser().absolute()
    self.writes = writes
    self._lock: TextIO | None = None

  @property
  def checkpoints(self) -> Path:
    """Where Orbax keeps the checkpoints."""
    return self.path / 'checkpoints'

  @property
  def metrics(self) -> Path:
    """The log of metrics."""
    return self.path / 'metrics.jsonl'

  def check(self, config: ConfigDict) -> None:
    """Finds out, without writing, whether a run of `config` can live here.

    Raises:
      UserError: if the path is no directory, cannot be written, or holds a run
        that differs in what a resumed run may not change.
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
        f'--workdir={self.path}: {existing} cannot be written. Choose another '
        'workdir, or change its permissions.'
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
    """The content of `status.json`; empty for a new workdir."""
    return read_json(self.path / 'status.json') or {}

  def claim(self) -> None:
    """Creates the directory and locks it until this process ends.

    The lock is the kernel's: it goes with the process, however that ends.

    Raises:
      UserError: if another process has it, or it cannot be created.
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
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      lock.seek(0)
      holder = lock.read().strip() or 'another process'
      lock.close()
      raise UserError(
        f'--workdir={self.path}: in use by {holder}. Wait for it, stop it, or '
        'use another workdir.'
      ) from error
    lock.truncate(0)
    lock.write(f'process {os.getpid()} on {socket.gethostname()}')
    lock.flush()
    # Other hosts are to see it.
    os.fsync(lock.fileno())
    self._lock = lock

  def release(self) -> None:
    """Gives the lock back, and leaves no directory that holds nothing else."""
    if self._lock is None:
      return
    if [path.name for path in self.path.iterdir()] == ['lock']:
      (self.path / 'lock').unlink()
      self.path.rmdir()
    self._lock.close()
    self._lock = None

  def holder(self) -> str:
    """Who has claimed it, as seen from here; empty if nobody has."""
    try:
      return (self.path / 'lock').read_text().strip()
    except OSError:
      return ''

  def write_config(self, config: ConfigDict) -> None:
    """Writes the resolved config."""
    if self.writes:
      replace_file(self.path / 'config.json', config_lib.to_json(config))

  def write_run(self, facts: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Writes `run.json`; earlier starts are kept under `earlier_starts`.

    Returns:
      The facts of the start before this one, if there was one.
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
    """Writes `status.json`: how the run stands, and why, in one line."""
    content = {'status': status, 'step': step, 'reason': reason}
    if self.writes:
      replace_file(
        self.path / 'status.json', json.dumps(content, indent=2) + '\n'
      )


LineKey = tuple[int, str, str | None]


def _key(line: Mapping[str, Any]) -> LineKey:
  return line['step'], line['split'], line.get('statistics')


class MetricsLog:
  """`metrics.jsonl`, which has no (step, split, statistics) twice.

  Opening it for a run at `step` cuts what lies beyond, which the run will
  write again, and half a line at the end, which a killed run left.
  """

  def __init__(self, path: Path, step: int, *, writes: bool = True):
    self._path = path
    lines = [line for line in read_metrics(path) if line['step'] <= step]
    self._keys = {_key(line) for line in lines}
    text = ''.join(_to_line(line) for line in lines)
    self._file: TextIO | None = None
    if not writes:
      return
    if not path.exists() or path.read_text() != text:
      replace_file(path, text)
    self._file = path.open('a')

  def known(self) -> list[LineKey]:
    """What there is a line for."""
    return list(self._keys)

  def adopt(self, known: Iterable[Sequence[Any]]) -> None:
    """Takes another process's word for what there is a line for."""
    self._keys = {(step, split, form) for step, split, form in known}

  def has(self, step: int, split: str, statistics: str | None) -> bool:
    """Whether the line is there."""
    return (step, split, statistics) in self._keys

  def write(self, line: Mapping[str, Any]) -> None:
    """Appends a line and hands it to the operating system."""
    if _key(line) in self._keys:
      raise ValueError(f'metrics.jsonl has a line for {_key(line)} already')
    self._keys.add(_key(line))
    if self._file is not None:
      self._file.write(_to_line(line))
      self._file.flush()

  def sync(self) -> None:
    """Returns when all lines are on the disk."""
    if self._file is not None:
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    if self._file is not None:
      self._file.close()


def _to_line(line: Mapping[str, Any]) -> str:
  return json.dumps(line, allow_nan=False) + '\n'


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """The lines of a `metrics.jsonl`, without half a line at its end.

  Raises:
    UserError: if a line other than the last is damaged.
  """
  if not path.exists():
    return []
  return list(_parse_lines(path, path.read_bytes().split(b'\n')))


def _parse_lines(path: Path, lines: list[bytes]) -> Iterable[dict[str, Any]]:
  # What stands after the last newline is empty, or was cut by a kill.
  for number, line in enumerate(lines[:-1], start=1):
    try:
      yield json.loads(line)
    except ValueError as error:
      raise UserError(f'{path}:{number}: not a line of JSON.') from error
