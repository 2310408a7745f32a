"""`metrics.jsonl`: a line for each step, split and statistics, once."""

import contextlib
import errno
import json
import os
import resource
import shutil

import pytest

from bn_repro.errors import UserError
from bn_repro.runtime.metric_writer import MetricWriter
from bn_repro.runtime.progress import ProgressDisplay
from bn_repro.runtime.workdir import Workdir, read_metrics


def line(step, split='validation', **more):
  values = {'loss': 0.1, 'accuracy': 0.9, 'num_examples': 10}
  return {'step': step, 'split': split, **values, **more}


def open_at(step, workdir, recorded=None, *, tensorboard=False):
  """The writer of a run that resumes from a step; a context."""
  display = ProgressDisplay(100, silent=True)
  return MetricWriter(
    Workdir(workdir), step, display, recorded, tensorboard=tensorboard
  )


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'metrics.jsonl'


def test_lines_beyond_the_step_are_removed(path):
  with open_at(0, path.parent) as writer:
    for step in (1, 2, 3):
      writer.write(line(step))
  kept = path.read_text().splitlines()[:2]
  with open_at(2, path.parent) as writer:
    assert path.read_text().splitlines() == kept
    assert writer.has(2, 'validation', None)
    assert not writer.has(3, 'validation', None)
    writer.write(line(3))
  assert [entry['step'] for entry in read_metrics(path)] == [1, 2, 3]


def test_a_line_is_written_once(path):
  with open_at(0, path.parent) as writer:
    writer.write(line(1, 'test'))
    writer.write(line(1, statistics='moving'))
    writer.write(line(1, statistics='population'))
    with pytest.raises(ValueError, match='already'):
      writer.write(line(1, statistics='moving'))
  with (
    open_at(1, path.parent) as again,
    pytest.raises(ValueError, match='already'),
  ):
    again.write(line(1, 'test'))
  assert len(read_metrics(path)) == 3


def test_a_file_that_needs_no_cut_is_not_replaced(path):
  with open_at(0, path.parent) as writer:
    writer.write(line(1))
  inode = path.stat().st_ino
  with open_at(1, path.parent):
    assert path.stat().st_ino == inode


def test_sync_returns_when_the_lines_are_on_disk(path, monkeypatch):
  synced = []

  def fsync(number):
    synced.append((os.fstat(number).st_ino, path.read_text()))

  with open_at(0, path.parent) as writer:
    writer.write(line(1))
    monkeypatch.setattr(os, 'fsync', fsync)
    writer.sync()
  assert synced == [(path.stat().st_ino, json.dumps(line(1)) + '\n')]


@pytest.mark.parametrize('rest', ['', '{"step": 2, "spl', '{"step": 2}'])
def test_an_incomplete_line_is_removed(rest, path):
  path.write_text(json.dumps(line(1)) + '\n' + rest)
  assert read_metrics(path) == [line(1)]
  with open_at(5, path.parent):
    assert path.read_text() == json.dumps(line(1)) + '\n'


@pytest.mark.parametrize(
  'damaged', ['{"step"', '[]', '{}', '1', '{"step": "1", "split": "test"}']
)
def test_damage_in_the_middle_is_named(damaged, path):
  path.write_text(f'{damaged}\n{json.dumps(line(1))}\n')
  with pytest.raises(UserError, match=r'metrics\.jsonl:1'):
    read_metrics(path)
  with pytest.raises(UserError, match=r'metrics\.jsonl:1'):
    open_at(1, path.parent)


def test_lines_of_the_checkpoint_must_be_there(path):
  with open_at(0, path.parent) as writer:
    for step in (1, 2):
      writer.write(line(step))
    recorded = writer.digest()
    writer.write(line(3))
  with open_at(2, path.parent, recorded) as writer:
    assert writer.digest() == recorded
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(lines[1])
  with pytest.raises(UserError, match='--accept_lost_metrics'):
    open_at(2, path.parent, recorded)
  assert path.read_text() == lines[1]
  with open_at(2, path.parent) as writer:
    assert writer.has(2, 'validation', None)
    assert not writer.has(1, 'validation', None)


@contextlib.contextmanager
def full_disk(size):
  """A limit on the sizes of files stands for it."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
      yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error(path):
  """The next start removes half a line."""
  with open_at(0, path.parent) as writer:
    writer.write(line(1))
    with full_disk(path.stat().st_size + 10):
      writer.write(line(2))
  with open_at(1, path.parent):
    assert path.read_text() == json.dumps(line(1)) + '\n'


def test_a_full_disk_of_tensorboard_is_an_error(path):
  """With a thread that writes, this would hang."""
  with (
    contextlib.suppress(OSError),  # What is left cannot be written at the end.
    open_at(0, path.parent, tensorboard=True) as writer,
  ):
    (events,) = (path.parent / 'tensorboard').iterdir()
    for step in range(1, 100):
      writer.write({**line(step), 'loss': 1.0})
    with full_disk(events.stat().st_size + 10):
      writer.sync()


def test_tensorboard_forgets_steps_that_come_again(path):
  """A resumed run begins a file that replaces those from its next step on."""
  from tensorboardX.proto.event_pb2 import Event, SessionLog

  for step in (0, 2):
    with open_at(step, path.parent, tensorboard=True) as writer:
      for number in range(step + 1, 4):
        writer.write(line(number))
  # Named by the time.
  newest = max((path.parent / 'tensorboard').iterdir())
  records, events = newest.read_bytes(), []
  while records:
    length = int.from_bytes(records[:8], 'little')
    events.append(Event.FromString(records[12 : 12 + length]))
    records = records[16 + length :]
  version, start, *scalars = events
  assert version.file_version == 'brain.Event:2'
  assert start.session_log.status == SessionLog.START
  assert {event.step for event in (start, *scalars)} == {3}
  assert len(scalars) == 2  # Loss and accuracy.


@pytest.mark.parametrize('how', ['file', 'folder', 'replaced'])
def test_a_deleted_file_is_noticed_at_the_next_line(how, tmp_path):
  workdir = tmp_path / 'run'
  workdir.mkdir()
  with open_at(0, workdir) as writer:
    writer.write(line(1))
    if how == 'folder':
      shutil.rmtree(workdir)
    else:
      (workdir / 'metrics.jsonl').unlink()
    if how == 'replaced':
      (workdir / 'metrics.jsonl').write_text('')
    with pytest.raises(FileNotFoundError, match='deleted or replaced'):
      writer.write(line(2))


def test_numbers_that_json_has_not_are_refused(path):
  """Python alone reads NaN in a file of JSON."""
  with (
    open_at(0, path.parent) as writer,
    pytest.raises(ValueError, match='JSON'),
  ):
    writer.write(line(1, loss=float('nan')))
  assert path.read_text() == ''
