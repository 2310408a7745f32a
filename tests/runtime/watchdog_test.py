"""When a process is taken to hang, and when not."""

import threading

import pytest
from stand_ins import TIMEOUT

from bn_repro.runtime import watchdog
from bn_repro.runtime.watchdog import Watchdog


@pytest.fixture
def clock(monkeypatch):
  """A clock that is set by hand."""

  class Clock:
    now = 100.0

  monkeypatch.setattr(watchdog.time, 'monotonic', lambda: Clock.now)
  return Clock


def seconds_until_timeout(multiple, each_second, limit=20):
  """Watches without waiting; None if there is no timeout before the limit.

  Args:
    multiple: of the watchdog.
    each_second: called with the watchdog at the start of each second.
    limit: in seconds.
  """
  timeouts = []
  dog = Watchdog(multiple, lambda: timeouts.append(seconds))
  seconds = 0

  class Stopped:
    def wait(self, timeout):
      nonlocal seconds
      seconds += timeout
      each_second(dog)
      return seconds > limit

  dog._stopped = Stopped()
  dog._watch()
  return timeouts[0] if timeouts else None


def test_timeout_is_a_multiple_of_the_median(clock):
  dog = Watchdog(20, lambda: None)
  assert dog.timeout() == watchdog.SECONDS_TO_FIRST_STEP
  dog.beat()
  assert dog.timeout() == watchdog.MIN_SECONDS
  for seconds in (60, 30, 30, 30, 500):
    clock.now += seconds
    dog.beat()
  assert dog.timeout() == 20 * 30


def test_shows_the_stacks_in_a_thread_of_its_own(monkeypatch, capfd):
  monkeypatch.setattr(watchdog, 'MIN_SECONDS', 1)
  threads = []
  ended = threading.Event()

  def on_timeout():
    threads.append(threading.current_thread())
    ended.set()

  with Watchdog(3, on_timeout) as dog:
    dog.beat()
    assert ended.wait(TIMEOUT)
  assert threads != [threading.main_thread()]
  error = capfd.readouterr().err
  assert 'no step for 1 s' in error
  assert 'test_shows_the_stacks_in_a_thread_of_its_own' in error


def test_beats_keep_it_quiet(monkeypatch, clock):
  monkeypatch.setattr(watchdog, 'MIN_SECONDS', 3)
  assert seconds_until_timeout(1, lambda dog: dog.beat()) is None
  beats = [0.0] * 10

  def beat_ten_times(dog):
    if beats:
      beats.pop()
      dog.beat()

  assert seconds_until_timeout(1, beat_ten_times) == 12


def test_waits_longer_for_the_first_step(monkeypatch):
  """Compiling takes long; but not for ever."""
  monkeypatch.setattr(watchdog, 'MIN_SECONDS', 0)
  monkeypatch.setattr(watchdog, 'SECONDS_TO_FIRST_STEP', 4)
  assert seconds_until_timeout(3, lambda dog: None) == 4


def test_suspended_is_not_hung(monkeypatch, clock):
  """A jump of the clock counts as no more than a second."""
  monkeypatch.setattr(watchdog, 'MIN_SECONDS', 4)

  def suspend(dog):
    if dog._last is None:
      dog.beat()
    clock.now += 1000

  assert seconds_until_timeout(1, suspend) == 4


def test_zero_never_times_out(monkeypatch):
  monkeypatch.setattr(watchdog, 'MIN_SECONDS', 0)
  with Watchdog(0, lambda: None) as dog:
    dog.beat()
    assert not dog._thread.is_alive()
