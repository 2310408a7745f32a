"""When a process counts as lost. Real ones are in `processes_test.py`."""

import threading

import pytest
import stand_ins

from bn_repro.runtime import heartbeats as heartbeats_lib
from bn_repro.runtime.heartbeats import Heartbeats

TIMEOUT = 5


class Store:
  """JAX's key-value store, which process 0 hosts."""

  def __init__(self):
    self.values = {}
    self.answers = True

  def key_value_set(self, key, value, *, allow_overwrite):
    assert allow_overwrite
    if not self.answers:
      raise RuntimeError('UNAVAILABLE: Socket closed')
    self.values[key] = value

  def key_value_dir_get(self, directory):
    assert all(key.startswith(f'{directory}/') for key in self.values)
    return list(self.values.items())


def fail(lost):
  raise AssertionError(f'process {lost} counts as lost')


@pytest.fixture
def store():
  return Store()


@pytest.fixture
def three(store):
  return [Heartbeats(store, index, 3, TIMEOUT, fail) for index in range(3)]


def lost_after(seconds, watching, *counting):
  """The process that is lost when those of `counting` count once a second."""
  for _ in range(seconds):
    lost = watching._lost_in(1)
    if lost is not None:
      return lost
    for process in counting:
      process._exchange_counters(finished=False)
  return None


def test_processes_that_count_are_alive(three):
  assert lost_after(4 * TIMEOUT, three[0], *three, three[0]) is None


@pytest.mark.parametrize('silent', [1, 2])
def test_a_silent_process_is_lost(silent, three):
  counting = [x for x in three if x is not three[silent]]
  assert lost_after(2, three[0], *three, three[0]) is None
  assert lost_after(TIMEOUT - 1, three[0], *counting, three[0]) is None
  assert lost_after(1, three[0], *counting, three[0]) == silent


def test_slow_is_not_silent(three):
  """A busy machine delays a counter, again and again."""
  for _ in range(3):
    assert lost_after(TIMEOUT - 2, three[0], three[2], three[0]) is None
    assert lost_after(1, three[0], three[1], three[2], three[0]) is None


def test_a_store_that_does_not_answer_is_process_0(store, three):
  assert lost_after(2, three[2], *three, three[2]) is None
  store.answers = False
  assert lost_after(TIMEOUT, three[2], three[2]) == 0


def test_a_process_that_has_finished_is_not_lost(three):
  assert lost_after(2, three[0], *three, three[0]) is None
  three[1]._exchange_counters(finished=True)
  assert lost_after(4 * TIMEOUT, three[0], three[2], three[0]) is None


def test_lost_although_the_store_blocks(store, monkeypatch):
  """A stopped process 0 does not refuse a call, it never returns."""
  monkeypatch.setattr(heartbeats_lib, 'INTERVAL', 0.01)
  blocked, ended = threading.Event(), threading.Event()
  lost = []

  def block(*arguments, **options):
    blocked.wait()
    return []

  def end(number):
    lost.append(number)
    ended.set()

  monkeypatch.setattr(store, 'key_value_set', block)
  process = Heartbeats(store, 1, 2, 0.05, end)
  process.start()
  assert ended.wait(stand_ins.TIMEOUT)
  assert lost == [0]
  blocked.set()
  process.finish()


def test_finishes_with_a_last_word(store, monkeypatch):
  monkeypatch.setattr(heartbeats_lib, 'INTERVAL', 0.01)
  process = Heartbeats(store, 0, 1, TIMEOUT, fail)
  process.start()
  process.finish()
  assert list(store.values.values()) == ['finished']
  process._watching.join()
