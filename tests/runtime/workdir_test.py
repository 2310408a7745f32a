"""The directory of a run: its lock, and files that are replaced as a whole."""

import pytest
import support

from bn_repro.errors import UserError
from bn_repro.runtime.workdir import Workdir, read_json, replace_file


def test_a_failed_replacement_leaves_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'status.json'
  replace_file(path, '{"old": 1}')

  def no_room(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('os.fsync', no_room)
  with pytest.raises(OSError, match='No space'):
    replace_file(path, '{"new": 2}')
  assert read_json(path) == {'old': 1}


def test_lock_goes_with_the_process(tmp_path):
  hold = (
    'import sys, time; from bn_repro.runtime.workdir import Workdir;'
    'w = Workdir(sys.argv[1]); w.claim(); print("held", flush=True);'
    'time.sleep(60)'
  )
  process = support.start(str(tmp_path), program=('-c', hold))
  support.wait_for_line(process, 'held')
  with pytest.raises(UserError, match=f'in use by process {process.pid} on'):
    Workdir(str(tmp_path)).claim()
  support.kill(process)
  support.finish(process)
  workdir = Workdir(str(tmp_path))
  workdir.claim()
  workdir.release()


def test_a_directory_that_cannot_be_created():
  with pytest.raises(UserError, match='/proc/no/where: cannot be written'):
    Workdir('/proc/no/where').claim()


def test_release_leaves_no_empty_directory(tmp_path):
  workdir = Workdir(str(tmp_path / 'new' / 'run'))
  workdir.claim()
  workdir.release()
  assert not (tmp_path / 'new' / 'run').exists()
  workdir.claim()
  workdir.write_status('failed', 3, 'a reason')
  workdir.release()
  assert workdir.status() == {
    'status': 'failed',
    'step': 3,
    'reason': 'a reason',
  }


def test_starts_are_kept(tmp_path):
  workdir = Workdir(str(tmp_path))
  assert workdir.write_run({'start_step': 0}) is None
  assert workdir.write_run({'start_step': 5})['start_step'] == 0
  workdir.write_run({'start_step': 9})
  facts = read_json(tmp_path / 'run.json')
  assert facts['start_step'] == 9
  assert [start['start_step'] for start in facts['earlier_starts']] == [0, 5]
