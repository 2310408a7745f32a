"""CPU time of training, with clocks that only the test moves."""

import time

import pytest

from bn_repro.training import timing


def test_cpu_time_of_training_alone(monkeypatch):
  now = {'monotonic': 0.0, 'process_time': 0.0}
  for name in now:
    monkeypatch.setattr(time, name, lambda name=name: now[name])

  def work(seconds):
    """With two busy cores."""
    now['monotonic'] += seconds
    now['process_time'] += 2 * seconds

  clock = timing.Clock(0)
  for kind in timing.KINDS:
    with clock.spending(kind):
      work(4 if kind in ('step', 'waiting_for_data') else 100)
  work(1)
  first = clock.lap(10, batch_size=32)
  assert first['seconds'] == pytest.approx(9)
  assert first['cpu_seconds'] == pytest.approx(18)
  with clock.spending('step'):
    work(3)
  assert clock.lap(20, batch_size=32)['cpu_seconds'] == pytest.approx(6)
