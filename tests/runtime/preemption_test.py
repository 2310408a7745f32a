"""Signals to a process that hangs: it notes the first, a later one ends it."""

import signal
import socket
import time
import types

import pytest
import support

from bn_repro.runtime import preemption

HANGS = """
import signal
import sys
import threading
signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))
from bn_repro.runtime.preemption import Preempted, Preemption
own = Preemption()
own.listen()
print('listening')
while not own.signal:
  threading.Event().wait(0.01)
try:
  own.check()
except Preempted as reason:
  print(reason)
threading.Event().wait()
"""


@pytest.fixture
def hanging():
  process = support.start('SIG_DFL', program=('-c', HANGS))
  support.wait_for_line(process, 'listening')
  yield process
  support.kill(process)
  support.finish(process)


def test_the_first_is_polled(hanging):
  hanging.send_signal(signal.SIGTERM)
  assert hanging.stdout.readline() == 'stopped by SIGTERM\n'


@pytest.mark.parametrize(
  'seconds, codes',
  [
    (0, []),
    (preemption.SAME_SIGNAL_SECONDS, []),
    (1.01 * preemption.SAME_SIGNAL_SECONDS, [128 + signal.SIGINT]),
  ],
)
def test_another_at_once_is_the_same_one(seconds, codes, monkeypatch):
  times = iter([100.0, 100.0 + seconds])
  ended = []
  clock = types.SimpleNamespace(monotonic=lambda: next(times))
  monkeypatch.setattr(preemption, 'time', clock)
  monkeypatch.setattr(preemption.os, '_exit', ended.append)
  own = preemption.Preemption()
  reader, writer = socket.socketpair()
  with reader:
    with writer:
      writer.send(bytes([signal.SIGTERM, signal.SIGINT]))
    own._note(reader)
  assert ended == codes
  assert own.signal == signal.SIGTERM


def test_a_closed_terminal_stops_it(hanging):
  hanging.send_signal(signal.SIGHUP)
  assert hanging.stdout.readline() == 'stopped by SIGHUP\n'


def test_nohup():
  """The first signal that it notes is another one."""
  process = support.start('SIG_IGN', program=('-c', HANGS))
  try:
    support.wait_for_line(process, 'listening')
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == 'stopped by SIGTERM\n'
  finally:
    support.kill(process)
    support.finish(process)


@pytest.mark.parametrize('number', preemption.SIGNALS)
def test_another_one_later_ends_it(hanging, number):
  hanging.send_signal(signal.SIGTERM)
  hanging.stdout.readline()
  time.sleep(0.2 + preemption.SAME_SIGNAL_SECONDS)
  hanging.send_signal(number)
  assert hanging.wait(support.TIMEOUT) == 128 + number
