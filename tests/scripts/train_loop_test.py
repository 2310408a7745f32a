"""Tests of scripts/train_loop.sh, with a stand-in for the training command."""

import os
import signal
import subprocess
import sys

import pytest
from stand_ins import (
  ROOT,
  SAVED,
  SAVES,
  TIMEOUT,
  arguments_of_runs,
  lines,
  run,
  set_ends,
  started,
)

LOOP = ROOT / 'scripts' / 'train_loop.sh'


def loop(notes, ends, **environment):
  set_ends(notes, *ends)
  return run('bash', LOOP, 'train', 'a b', '$c', **environment)


ALL_ENDS = '75 75 0, 0, 1, 3, 2, 127, 134 0, SIGKILL SIGABRT 75 3, 75 1'


@pytest.mark.parametrize('ends', ALL_ENDS.split(', '))
def test_loop(ends, notes):
  ends = ends.split()
  ended = loop(notes, [*ends, 99])
  assert ended.returncode == int(ends[-1])
  assert arguments_of_runs(notes) == [['a b', '$c']] * len(ends)
  said = ended.stderr.splitlines()[-1]
  assert said.endswith(f'exit code {ends[-1]}: exiting')


@pytest.mark.parametrize(
  'ends, lasting, pauses',
  [
    ([75] * 6 + [0], '1200', [10, 20, 40, 60, 60, 60]),
    ([75] * 12 + [0], '0', [10] * 12),
  ],
)
def test_pauses_grow_while_runs_end_early(ends, lasting, pauses, notes):
  loop(notes, ends, LASTING=lasting)
  assert lines(notes / 'pauses') == list(map(str, pauses))


def test_the_loop_gives_up_after_early_ends(notes):
  ended = loop(notes, [75] * 20)
  assert ended.returncode == 1
  assert len(arguments_of_runs(notes)) == 10
  assert 'error: exit code 75; 10 runs in a row ended early' in ended.stderr
  assert ended.stderr.endswith('exit code 1: exiting\n')


@pytest.mark.parametrize('words', [(), ('',), ('--jobs', 'train'), ('-c',)])
def test_what_is_no_command(words, notes):
  """It is refused, and not passed to `setsid` as an option."""
  said = run('bash', LOOP, *words)
  assert said.returncode == 1
  (line,) = said.stderr.splitlines()
  assert line.startswith('error: ') and 'is not a command to restart' in line


@pytest.mark.parametrize(
  'number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
)
def test_a_signal_is_forwarded_once(number):
  """Ctrl-C and a closed terminal go to all processes of the terminal."""
  with started(
    *('bash', LOOP, sys.executable, '-c', SAVES),
    start_new_session=True,
    # Not ignored, as it would be under `nohup` or in the background.
    preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
  ) as process:
    assert process.stdout.readline() == 'ready\n'
    send = os.kill if number == signal.SIGTERM else os.killpg
    send(process.pid, number)
    said, _ = process.communicate(timeout=TIMEOUT)
  assert said == SAVED
  assert process.returncode == 75


def test_the_reader_of_its_messages_exits(notes):
  set_ends(notes, 75, 75, 0)
  reader, writer = os.pipe()
  os.close(reader)
  ended = subprocess.run(['bash', LOOP, 'train'], cwd=ROOT, stderr=writer)
  os.close(writer)
  assert ended.returncode == 0
  assert len(arguments_of_runs(notes)) == 3


def test_a_signal_ends_a_pause(bin_dir, notes):
  (bin_dir / 'sleep').unlink()
  set_ends(notes, 75, 0)
  with started('bash', LOOP, 'train') as process:
    assert any('restarting in' in line for line in process.stderr)
    process.terminate()
    process.communicate(timeout=TIMEOUT)
  assert process.returncode == 75
  assert len(arguments_of_runs(notes)) == 1


def test_a_signal_before_the_process_is_known(tmp_path):
  """A signal that arrives as the run starts is forwarded too."""
  text = LOOP.read_text()
  hurried = tmp_path / 'loop.sh'
  hurried.write_text(
    text.replace('  process=$!\n', '  kill -TERM $$\n  process=$!\n', 1)
  )
  assert hurried.read_text() != text
  assert run('bash', hurried, 'sleep', '600').returncode == 143
