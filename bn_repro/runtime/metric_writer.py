"""Writes metrics to `metrics.jsonl`, to the display and to TensorBoard."""

from collections.abc import Mapping
import json
import os
from pathlib import Path
import time
from typing import Any, TextIO

from bn_repro.runtime import processes
from bn_repro.runtime.progress import ProgressDisplay
from bn_repro.runtime.workdir import (
  MetricsDigest,
  Workdir,
  check_metrics,
  read_metrics,
  replace_file,
)

# The step, split and statistics of a line; a file has each once.
_Key = tuple[int, str, str | None]


def _key(line: Mapping[str, Any]) -> _Key:
  return line['step'], line['split'], line.get('statistics')


def _to_text(line: Mapping[str, Any]) -> str:
  return json.dumps(line, allow_nan=False) + '\n'


class _EventFile:
  """A file of TensorBoard, written by the thread that calls.

  The thread of tensorboardX's SummaryWriter ends when the disk is full, and
  those that call it then wait for ever.
  """

  def __init__(self, directory: Path, purge_step: int):
    """Creates a file that replaces the steps of others from `purge_step` on."""
    # Rarely used; loads protobuf.
    from tensorboardX import event_file_writer
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    directory.mkdir(exist_ok=True)
    self._create_event = Event
    self._writer = event_file_writer.EventsWriter(str(directory / 'events'))
    start = SessionLog(status=SessionLog.START)
    self._write(step=purge_step, session_log=start)

  def add_scalar(self, name: str, value: float, step: int) -> None:
    from tensorboardX.summary import scalar

    self._write(step=step, summary=scalar(name, value))

  def _write(self, **fields: Any) -> None:
    self._writer.write_event(
      self._create_event(wall_time=time.time(), **fields)
    )

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()


class MetricWriter:
  """Writes each line of metrics once, also after a resume.

  Only the process that writes the workdir opens files.
  """

  def __init__(
    self,
    workdir: Workdir,
    step: int,
    display: ProgressDisplay,
    recorded: Mapping[str, Any] | None = None,
    *,
    tensorboard: bool,
  ):
    """Opens the files of a run that resumes from `step`.

    Lines beyond `step` are removed, because the run writes them again. So is an
    incomplete last line, which a killed run leaves.

    Args:
      workdir: where the files are.
      step: the step of the checkpoint.
      display: also shows each line.
      recorded: `digest()` of the lines when the checkpoint was saved; None to
        accept the lines that are left.
      tensorboard: also write event files for TensorBoard.

    Raises:
      UserError: on all processes, if a line other than the last is damaged, or
        lines that the checkpoint was saved after are missing or differ.
    """
    self._display = display
    self._digest = MetricsDigest()
    self._path = workdir.metrics
    self._file: TextIO | None = None
    self._tensorboard: _EventFile | None = None

    def open_files() -> list[_Key]:
      if not workdir.writes:
        return []
      path = workdir.metrics
      check_metrics(path, recorded)
      lines = [line for line in read_metrics(path) if line['step'] <= step]
      texts = list(map(_to_text, lines))
      text = ''.join(texts)
      if not path.exists() or path.read_text() != text:
        replace_file(path, text)
      for line in texts:
        self._digest.add(line.encode())
      self._file = path.open('a')
      if tensorboard:
        self._tensorboard = _EventFile(workdir.path / 'tensorboard', step + 1)
      return [_key(line) for line in lines]

    # All processes skip the evaluations that process 0 has lines for.
    keys = processes.broadcast(processes.run_on_all(open_files))
    self._keys: set[_Key] = set(map(tuple, keys))

  def has(self, step: int, split: str, statistics: str | None) -> bool:
    """Whether there is a line of this step, split and statistics."""
    return (step, split, statistics) in self._keys

  def write(self, line: Mapping[str, Any]) -> None:
    """Writes a line.

    Raises:
      FileNotFoundError: if the file has been deleted or replaced.
      ValueError: if a line of its step, split and statistics exists, or a value
        is not valid in JSON, such as NaN.
    """
    if _key(line) in self._keys:
      raise ValueError(f'metrics.jsonl has a line for {_key(line)} already')
    text = _to_text(line)
    self._keys.add(_key(line))
    if self._file is not None:
      self._file.write(text)
      self._file.flush()
      self._require_in_place(self._file)
      self._digest.add(text.encode())
    self._display.show(line)
    if self._tensorboard is not None:
      group = '_'.join(
        line[key] for key in ('split', 'statistics') if key in line
      )
      for name in ('loss', 'accuracy', 'top5_accuracy', 'learning_rate'):
        if name in line:
          self._tensorboard.add_scalar(
            f'{group}/{name}', line[name], line['step']
          )

  def _require_in_place(self, file: TextIO) -> None:
    """Checks that the path still names the open file."""
    try:
      if os.path.samestat(os.stat(self._path), os.fstat(file.fileno())):
        return
    except FileNotFoundError:
      pass
    raise FileNotFoundError(
      f'{self._path}: deleted or replaced while the run was writing it. '
      'Restore the workdir, or start the run in another one.'
    )

  def digest(self) -> dict[str, Any]:
    """Identifies the lines of the file, on the process that writes it."""
    return self._digest.to_json()

  def sync(self) -> None:
    """Returns when all lines are on disk."""
    if self._file is not None:
      os.fsync(self._file.fileno())
    if self._tensorboard is not None:
      self._tensorboard.flush()

  def __enter__(self) -> 'MetricWriter':
    return self

  def __exit__(self, *exception: object) -> None:
    for file in (self._file, self._tensorboard):
      if file is not None:
        file.close()
