"""Candidates that run in processes of their own, and take turns."""

import json
import os
from pathlib import Path
import subprocess
import sys

FOLDER = Path(__file__).resolve().parent


def start(
  script: str, *arguments: str, python: str = sys.executable
) -> subprocess.Popen[str]:
  """Starts a script of this folder that answers lines with lines of JSON."""
  return subprocess.Popen(
    [python, f'{FOLDER}/{script}', *arguments],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env={**os.environ, 'TF_CPP_MIN_LOG_LEVEL': '3'},
    text=True,
  )


def read_answer(process: subprocess.Popen[str]) -> dict[str, float]:
  """Reads a line of JSON from a process of `start`.

  Raises:
    RuntimeError: if the process exits instead.
  """
  assert process.stdout is not None
  line = process.stdout.readline()
  if not line:
    raise RuntimeError(f'{process.args!r} exited with {process.wait()}')
  return json.loads(line)


def ask(process: subprocess.Popen[str], question: str) -> dict[str, float]:
  """Sends a line to a process of `start`; returns the answer."""
  print(question, file=process.stdin, flush=True)
  return read_answer(process)
