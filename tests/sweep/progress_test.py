"""What is shown of a sweep, on a terminal and elsewhere."""

import io
import json
import sys

import pytest

from bn_repro.sweep import progress as progress_lib
from bn_repro.sweep.progress import SweepProgress
from bn_repro.sweep.runner import TrialProcess


class Terminal(io.StringIO):
  def isatty(self):
    return True


class Clock:
  """In the place of the `time` module."""

  now = 100.0

  def monotonic(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  clock = Clock()
  monkeypatch.setattr(progress_lib, 'time', clock)
  return clock


def create(tmp_path, number):
  return [
    TrialProcess(f't{i}', tmp_path / f't{i}', ['true'], total_steps=100)
    for i in range(number)
  ]


def write(trial, *lines):
  trial.workdir.mkdir(exist_ok=True)
  with (trial.workdir / 'metrics.jsonl').open('a') as file:
    for step, split, accuracy in lines:
      line = {'step': step, 'split': split, 'accuracy': accuracy}
      file.write(json.dumps(line) + '\n')


def start(progress, trial):
  """What a runner does when it starts a trial."""
  trial.state = 'running'
  trial.first_step, trial.start = trial.step, progress_lib.time.monotonic()
  progress.changed(trial)


def end(progress, trial, state, code):
  """What a runner does when a trial has ended."""
  trial.update()
  trial.state, trial.code = state, code
  progress.changed(trial)


def test_lines(tmp_path, clock, capsys):
  """By hand: half of a trial in 50 s, of three that are trained one by one."""
  first, *_ = many = create(tmp_path, 3)
  progress = SweepProgress(many, jobs=1)
  start(progress, first)
  assert 't0: running from step 0' in capsys.readouterr().out
  write(
    first,
    (50, 'train', 0.9),
    (50, 'validation', 0.75),
    # Not shown, so that no choice relies on it.
    (50, 'test', 0.99),
  )
  clock.now += 50
  progress.tick()
  out = capsys.readouterr().out
  assert out == 't0: step 50/100, accuracy 0.7500, ETA 0:50\n'
  clock.now += 1
  progress.tick()
  assert not capsys.readouterr().out
  clock.now += 49
  write(first, (100, 'validation', 0.8))
  first.seconds = 100.0
  end(progress, first, 'done', 0)
  assert capsys.readouterr().out == (
    't0: done, accuracy 0.8000, 1:40; 1 done, 2 waiting, ETA 3:20\n'
  )
  progress.close()
  assert capsys.readouterr().out == (
    'Wall 1:40; trials 1:40 in total; overhead 0 %\n'
  )


def test_a_resumed_trial(tmp_path, clock, capsys):
  """What was there before takes no part in the estimate."""
  trial, other = create(tmp_path, 2)
  trial.step = 80
  progress = SweepProgress([trial, other], jobs=1)
  start(progress, trial)
  write(trial, (90, 'validation', 0.5))
  clock.now += 40
  progress.tick()
  assert 'step 90/100, accuracy 0.5000, ETA 0:40' in capsys.readouterr().out
  clock.now += 40
  # 20 steps took 80 s, and 100 steps remain.
  end(progress, trial, 'done', 0)
  assert '1 done, 1 waiting, ETA 6:40' in capsys.readouterr().out


def test_endings(tmp_path, clock, capsys):
  again, failed, diverged = create(tmp_path, 3)
  progress = SweepProgress([again, failed, diverged], jobs=2)
  failed.log.write_text('error: no data\n')
  for trial, state, code, expected in (
    (again, 'waiting', -9, 't0: exit code -9, will be restarted'),
    (failed, 'failed', 1, 'see ' + str(failed.log) + ': error: no data'),
    (diverged, 'diverged', 3, 't2: diverged, 0:00'),
  ):
    start(progress, trial)
    end(progress, trial, state, code)
    assert expected in capsys.readouterr().out


def test_table(tmp_path, clock, monkeypatch):
  """Running trials, then ended ones, latest first; the rest is counted."""
  terminal = Terminal()
  monkeypatch.setattr(sys, 'stdout', terminal)
  monkeypatch.setenv('LINES', '13')
  monkeypatch.setenv('COLUMNS', '100')
  monkeypatch.setenv('TERM', 'xterm')
  many = create(tmp_path, 8)
  progress = SweepProgress(many, jobs=1)
  start(progress, many[2])
  end(progress, many[2], 'done', 0)
  clock.now += 1
  start(progress, many[4])
  write(many[4], (25, 'validation', 0.3))
  start(progress, many[6])
  end(progress, many[6], 'done', 0)
  clock.now += 30
  progress.tick()
  text = terminal.getvalue()
  rows = [line for line in text.splitlines() if '│ t' in line]
  cells = [[cell.strip() for cell in row.split('│')[1:-1]] for row in rows]
  assert cells[0] == ['t4', 'running', '25/100', '0.3000', '1:30']
  assert cells[1][:2] == ['t6', 'done']
  assert cells[2][:2] == ['t2', 'done']
  assert [row[1] for row in cells[3:]] == ['waiting'] * 2
  assert 'and 3 more' in text
  assert '5 waiting' in text
  progress.close()
