"""Standard streams that fail in a process of their own, in each known way."""

import json
import os
from pathlib import Path
import subprocess
import sys

import pytest
import support

# A command: prints, says on standard error what still works, and ends with 3.
COMMAND = """
import os, sys
from bn_repro import cli
from bn_repro.runtime import streams

def main():
  if sys.argv[1] == 'run':
    streams.make_output_optional()
  with open(sys.argv[2], 'w') as file:
    print('h\\u00e9llo \\udcff')
    print('warning', file=sys.stderr)
    print('without a newline', end='')
    file.write(f'{file.fileno()} written')
  return 3

sys.exit(cli.run(main))
"""


def start(kind, path, **options):
  return subprocess.Popen(
    [sys.executable, '-c', COMMAND, kind, path],
    cwd=support.ROOT,
    env=support.environment(**options.pop('changes', {})),
    **options,
  )


def gone():
  """The end of a pipe that nobody reads."""
  reader, writer = os.pipe()
  os.close(reader)
  return os.fdopen(writer, 'wb')


def vanished():
  """A terminal whose other end is gone."""
  terminal, writer = os.openpty()
  os.close(terminal)
  return os.fdopen(writer, 'wb')


def full():
  return Path('/dev/full').open('wb')


def read_only():
  return Path('/dev/null').open('rb')


FAILING = {
  'full disk': full,
  'pipe': gone,
  'terminal': vanished,
  'read only': read_only,
}


@pytest.mark.parametrize('failure', FAILING)
def test_a_run_goes_on_without_its_output(failure, tmp_path):
  path = tmp_path / 'file'
  with FAILING[failure]() as stdout:
    process = start('run', path, stdout=stdout, stderr=stdout)
    assert process.wait(support.TIMEOUT) == 3
  assert path.read_text().endswith('written')


@pytest.mark.parametrize('closed', [(1,), (2,), (1, 2), (0, 1, 2)])
def test_no_file_takes_the_place_of_a_closed_stream(closed, tmp_path):
  path = tmp_path / 'file'
  options = {
    name: subprocess.DEVNULL
    for number, name in enumerate(('stdin', 'stdout', 'stderr'))
    if number not in closed
  }

  def close():
    for number in closed:
      os.close(number)

  process = start('run', path, preexec_fn=close, **options)
  assert process.wait(support.TIMEOUT) == 3
  number, written = path.read_text().split(maxsplit=1)
  assert int(number) > 2 and written == 'written'


@pytest.mark.parametrize(
  'failure, code, message',
  [
    ('full disk', 1, 'No space left on device'),
    ('read only', 1, 'Bad file descriptor'),
    # As of a tool that SIGPIPE kills.
    ('pipe', 141, ''),
  ],
)
@pytest.mark.parametrize('buffering', ['', '1'])
def test_a_command_whose_result_is_its_output(
  failure, code, message, buffering, tmp_path
):
  changes = {'PYTHONUNBUFFERED': buffering}
  with FAILING[failure]() as stdout:
    process = start(
      'print',
      tmp_path / 'file',
      stdout=stdout,
      stderr=subprocess.PIPE,
      text=True,
      changes=changes,
    )
    _, err = process.communicate(timeout=support.TIMEOUT)
  assert process.returncode == code
  expected = f'error: standard output: cannot be written ({message}).\n'
  assert err == (expected if message else '')


def test_help_is_output_too():
  with open('/dev/full', 'wb') as stdout:
    process = subprocess.run(
      [sys.executable, '-m', 'bn_repro.main', '--help'],
      cwd=support.ROOT,
      stdout=stdout,
      stderr=subprocess.PIPE,
      text=True,
      check=False,
    )
  assert process.returncode == 1
  assert (
    process.stderr.startswith('error: ') and process.stderr.count('\n') == 1
  )


@pytest.mark.parametrize(
  'encoding, printed',
  [
    ('ascii', 'h\\xe9llo \\udcff'),
    ('latin-1', 'héllo \\udcff'),
    ('utf-8:strict', 'héllo \\udcff'),
  ],
)
def test_characters_that_an_encoding_lacks(encoding, printed, tmp_path):
  process = start(
    'print',
    tmp_path / 'file',
    stdout=subprocess.PIPE,
    changes={'PYTHONIOENCODING': encoding},
  )
  out, _ = process.communicate(timeout=support.TIMEOUT)
  assert process.returncode == 3
  name, _, _ = encoding.partition(':')
  assert out.decode(name) == f'{printed}\nwithout a newline'


def test_a_full_pipe_that_does_not_block(tmp_path):
  """Another process may have made it so: the output waits for its reader."""
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  filling = 0
  try:
    while True:
      filling += os.write(writer, b'x' * 1000)
  except BlockingIOError:
    pass
  path = tmp_path / 'file'
  process = start('print', path, stdout=writer, stderr=subprocess.PIPE)
  os.close(writer)
  # The command is about to print, or waits for the pipe.
  assert process.poll() is None
  with os.fdopen(reader, 'rb') as pipe:
    out = pipe.read()
  assert process.wait(support.TIMEOUT) == 3
  process.stderr.close()
  assert out[filling:].endswith(b'without a newline')


PAUSED = """
import sys
from bn_repro import cli
from bn_repro.runtime import streams

def main():
  streams.make_output_optional()
  streams._PATIENCE = 0.1
  for _ in range(3000):
    print(100 * 'x')
  print('done', file=sys.stderr)
  sys.stdin.readline()
  print(5000 * 'y')
  return 3

sys.exit(cli.run(main))
"""


def test_a_reader_that_pauses():
  """Output beyond what the pipe holds is discarded until it reads again."""
  pipe = subprocess.PIPE
  process = subprocess.Popen(
    [sys.executable, '-c', PAUSED],
    cwd=support.ROOT,
    env=support.environment(),
    stdin=pipe,
    stdout=pipe,
    stderr=pipe,
    bufsize=0,
  )
  assert process.stderr.readline() == b'done\n'
  os.set_blocking(process.stdout.fileno(), False)
  held = b''
  while part := process.stdout.read(100_000):
    held += part
  assert 4096 <= held.count(b'x') < 300_000 and held.endswith(b'x\n')
  os.set_blocking(process.stdout.fileno(), True)
  out, _ = process.communicate(b'\n', timeout=support.TIMEOUT)
  assert process.returncode == 3
  assert out == 5000 * b'y' + b'\n'


DISPLAY = """
import sys
from bn_repro import cli
from bn_repro.runtime import streams
from bn_repro.runtime.progress import ProgressDisplay
from bn_repro.sweep.progress import SweepProgress

def main():
  streams.make_output_optional()
  with ProgressDisplay(10) as display:
    display.start(0)
    display.say('compiling')
    shares = {'waiting_for_data': 0.5}
    timing = {'shares': shares, 'images_per_second': 1.0}
    line = {'step': 1, 'split': 'train', 'loss': 1.0, 'accuracy': 0.5}
    display.show({**line, 'timing': timing})
  sweep = SweepProgress([], 1)
  sweep.stopping()
  sweep.close()
  return 75

sys.exit(cli.run(main))
"""


@pytest.mark.parametrize('failure', ['full disk', 'terminal'])
def test_displays(failure):
  with FAILING[failure]() as stdout:
    process = subprocess.run(
      [sys.executable, '-c', DISPLAY],
      cwd=support.ROOT,
      env=support.environment(TERM='xterm'),
      stdout=stdout,
      stderr=stdout,
      check=False,
    )
  assert process.returncode == 75


@pytest.mark.slow
@pytest.mark.parametrize('failure', ['full disk', 'pipe', 'closed'])
def test_training(failure, tmp_path):
  arguments = [
    *('--config=mnist:mini', f'--workdir={tmp_path / "run"}'),
    *('--config.data.distorted_copies=0', '--config.total_steps=50'),
  ]
  stream = None if failure == 'closed' else FAILING[failure]()
  process = subprocess.Popen(
    [sys.executable, '-m', 'bn_repro.main', *arguments],
    cwd=support.ROOT,
    env=support.environment(),
    stdout=stream,
    stderr=stream,
    preexec_fn=lambda: stream or [os.close(n) for n in range(3)],
  )
  assert process.wait(support.TIMEOUT) == 0
  if stream:
    stream.close()
  status = json.loads((tmp_path / 'run' / 'status.json').read_text())
  assert status['status'] == 'done'
