"""Stand-ins for programs that scripts call, and helpers to run scripts.

A stand-in reads what to do from the folder `$NOTES`, and records there what it
did; see the fixtures in `tests/scripts/conftest.py`.
"""

import contextlib
import os
from pathlib import Path
import signal
import subprocess
import time

ROOT = Path(__file__).resolve().parent.parent

# Seconds after which a process hangs; none takes as long on a busy machine.
TIMEOUT = 600

# Records its arguments, and ends as the next line of the file `ends` says.
ENDS = r"""
printf '%s\0' "$@" >>"$NOTES/arguments"
printf '\n' >>"$NOTES/arguments"
end=$(head -n 1 "$NOTES/ends")
sed -i 1d "$NOTES/ends"
case $end in
  SIG*) kill -s "${end#SIG}" $$ ;;
  *) exit "$end" ;;
esac
"""
# A Python program that takes a moment to save when it gets a signal.
SAVES = """
import signal, sys, time
def save(number, frame):
  print('got', number, flush=True)
  time.sleep(0.2)
  sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, save)
print('ready', flush=True)
while True:
  time.sleep(0.1)
"""
SAVED = f'got {int(signal.SIGTERM)}\n'


def stand_in(path, script):
  """Writes an executable."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'#!/usr/bin/env bash\n{script}')
  path.chmod(0o755)


def set_ends(notes, *ends):
  """Sets the exit codes, or signals, with which runs of `ENDS` end."""
  (notes / 'ends').write_text(''.join(f'{end}\n' for end in ends))


def arguments_of_runs(notes):
  """Returns the arguments of each run of `ENDS`."""
  runs = (notes / 'arguments').read_text().split('\0\n')[:-1]
  return [run.split('\0') for run in runs]


def lines(path):
  """Returns the lines of a file."""
  return path.read_text().splitlines()


def run(*command, check=False, cwd=ROOT, **environment):
  """Runs a command in a changed environment; returns its code and output."""
  options = {'capture_output': True, 'text': True, 'timeout': TIMEOUT}
  environment = {**os.environ, **environment}
  return subprocess.run(
    command, check=check, cwd=cwd, env=environment, **options
  )


@contextlib.contextmanager
def started(*command, **options):
  """Starts a command, and kills it at the end if it is still running."""
  options |= {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
  with subprocess.Popen(command, text=True, **options) as process:
    try:
      yield process
    finally:
      process.kill()


def finish(starting):
  """Waits for the end of a `started` command; returns its code and errors."""
  with starting as process:
    _, errors = process.communicate(timeout=TIMEOUT)
  return process.returncode, errors


def wait_until(condition):
  """Waits for a state that no output tells of."""
  give_up = time.monotonic() + TIMEOUT
  while not condition():
    assert time.monotonic() < give_up
    time.sleep(0.02)
