"""When a process is taken to hang, and when not."""

import threading
import time

import pytest

from bn_repro.runtime import watchdog
from bn_repro.runtime.watchdog import Watchdog


@pytest.fixture
def clock(monkeypatch):
  """A clock that is set by hand."""

  class Clock:
    now = 100.0

  monkeypatch.setattr(watchdog.time, 'monotonic', lambda: Clock.now)
  return Clock


def test_limit_is_a_multiple_of_the_median(clock):
  dog = Watchdog(20, lambda: None)
  assert dog.timeout() == watchdog.SECONDS_TO_FIRST_STEP
  dog.beat()
  assert dog.timeout() == watchdog.MIN_SECONDS
  for seconds in (60, 30, 30, 30, 500):
    clock.now += seconds
    dog.beat()
  assert dog.timeout() == 20 * 30


def test_gives_up_and_shows_the_stacks(monkeypatch, capfd):
  monkeypatch.setattr(watchdog, 'MIN_SECONDS', 2)
  given_up = threading.Event()
  with Watchdog(3, given_up.set) as dog:
    for _ in range(30):  # Beats keep it quiet, for longer than the limit.
      dog.beat()
      time.sleep(0.1)
    assert not given_up.is_set()
    assert given_up.wait(10)
  error = capfd.readouterr().err
  assert 'no step for 2 s' in error
  assert 'test_gives_up_and_shows_the_stacks' in error


def test_waits_longer_for_the_first_step(monkeypatch):
  """Compiling takes long; but not for ever."""
  monkeypatch.setattr(watchdog, 'MIN_SECONDS', 0)
  monkeypatch.setattr(watchdog, 'SECONDS_TO_FIRST_STEP', 4)
  given_up = threading.Event()
  with Watchdog(3, given_up.set):
    assert not given_up.wait(2.5)
    assert given_up.wait(10)


def test_suspended_is_not_hung(monkeypatch):
  """Of a jump of the clock it counts no more than a second."""
  monkeypatch.setattr(watchdog, 'MIN_SECONDS', 4)
  given_up = threading.Event()
  with Watchdog(1, given_up.set) as dog:
    dog.beat()
    real = time.monotonic
    monkeypatch.setattr(watchdog.time, 'monotonic', lambda: real() + 1000)
    assert not given_up.wait(2.5)


def test_zero_never_gives_up(monkeypatch):
  monkeypatch.setattr(watchdog, 'MIN_SECONDS', 0)
  given_up = threading.Event()
  with Watchdog(0, given_up.set) as dog:
    dog.beat()
    assert not given_up.wait(2.5)
