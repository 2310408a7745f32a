"""A run's directory: locks, whole files, and lines that stand there once."""

import json
import subprocess
import sys

import pytest

from bn_repro.errors import UserError
from bn_repro.runtime.workdir import (
  MetricsLog,
  Workdir,
  read_json,
  read_metrics,
  replace_file,
)


def line(step, split='train', **more):
  return {'step': step, 'split': split, 'loss': 0.1, **more}


def test_lines_beyond_the_step_are_cut(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  log = MetricsLog(path, 0)
  for step in (1, 2, 3):
    log.write(line(step))
  log.close()
  kept = path.read_text().splitlines()[:2]
  log = MetricsLog(path, 2)
  assert path.read_text().splitlines() == kept
  assert log.has(2, 'train', None)
  assert not log.has(3, 'train', None)
  log.write(line(3))
  log.close()
  assert [entry['step'] for entry in read_metrics(path)] == [1, 2, 3]


def test_a_line_is_never_there_twice(tmp_path):
  log = MetricsLog(tmp_path / 'metrics.jsonl', 0)
  log.write(line(1))
  log.write(line(1, 'validation', statistics='moving'))
  log.write(line(1, 'validation', statistics='population'))
  with pytest.raises(ValueError, match='already'):
    log.write(line(1, 'validation', statistics='moving'))
  log.close()
  again = MetricsLog(tmp_path / 'metrics.jsonl', 1)
  with pytest.raises(ValueError, match='already'):
    again.write(line(1))
  again.close()


def test_a_log_that_needs_no_cut_is_not_written(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  log = MetricsLog(path, 0)
  log.write(line(1))
  log.close()
  inode = path.stat().st_ino
  MetricsLog(path, 1).close()
  assert path.stat().st_ino == inode


@pytest.mark.parametrize('rest', ['', '{"step": 2, "spl', '{"step": 2}'])
def test_what_a_kill_left_of_a_line_is_cut(rest, tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text(json.dumps(line(1)) + '\n' + rest)
  assert read_metrics(path) == [line(1)]
  MetricsLog(path, 5).close()
  assert path.read_text() == json.dumps(line(1)) + '\n'


def test_damage_in_the_middle_is_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step"\n' + json.dumps(line(1)) + '\n')
  with pytest.raises(UserError, match=r'metrics\.jsonl:1'):
    read_metrics(path)


def test_numbers_that_json_has_not_are_refused(tmp_path):
  """NaN in a log is read by Python alone."""
  log = MetricsLog(tmp_path / 'metrics.jsonl', 0)
  with pytest.raises(ValueError, match='JSON'):
    log.write({**line(1), 'loss': float('nan')})
  log.close()


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
  process = subprocess.Popen(
    [sys.executable, '-c', hold, str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == 'held\n'
  with pytest.raises(UserError, match=f'in use by process {process.pid} on'):
    Workdir(str(tmp_path)).claim()
  process.kill()
  process.wait()
  process.stdout.close()
  workdir = Workdir(str(tmp_path))
  workdir.claim()
  workdir.release()


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
