"""Where the time of a run goes: each log interval, and the whole run."""

from collections.abc import Iterator, Mapping
from concurrent import futures
import contextlib
import time
from typing import Any

import jax

# What time is spent on. `waiting_for_data`: the device is idle because no batch
# is ready.
KINDS = ('compile', 'waiting_for_data', 'step', 'evaluation', 'checkpoint')
# Kinds that are left out of images per second, and of CPU time.
_NOT_TRAINING = ('compile', 'evaluation', 'checkpoint')


class Clock:
  """Counts the seconds spent on each of `KINDS`, per interval and in total."""

  def __init__(self, step: int):
    """Starts the first interval, at `step`."""
    self._total = dict.fromkeys(KINDS, 0.0)
    self._first_start = time.monotonic()
    self._begin(step)

  def _begin(self, step: int) -> None:
    self._step = step
    self._start = time.monotonic()
    self._spent = dict.fromkeys(KINDS, 0.0)
    self._cpu_start = time.process_time()

  @contextlib.contextmanager
  def spending(self, kind: str) -> Iterator[None]:
    """Counts the time inside this context as one of `KINDS`."""
    entered, cpu_entered = time.monotonic(), time.process_time()
    try:
      yield
    finally:
      seconds = time.monotonic() - entered
      if kind in _NOT_TRAINING:
        self._cpu_start += time.process_time() - cpu_entered
      self._spent[kind] += seconds
      self._total[kind] += seconds

  def move(self, from_kind: str, to_kind: str, seconds: float) -> None:
    """Counts seconds of one kind as seconds of another kind."""
    for spent in (self._spent, self._total):
      spent[from_kind] -= seconds
      spent[to_kind] += seconds

  def lap(self, step: int, batch_size: int) -> dict[str, Any]:
    """The `timing` of a training line; starts the next interval.

    Args:
      step: the current step.
      batch_size: images per step.

    Returns:
      `seconds` of training, `images_per_second` in them, `cpu_seconds` of all
      threads of this process in them, and the `shares` of all time since the
      previous line, by kind. Worker processes that decode are not counted, and
      what a save still does in the background is.
    """
    wall = time.monotonic() - self._start
    seconds = wall - sum(self._spent[kind] for kind in _NOT_TRAINING)
    timing = {
      'images_per_second': (step - self._step) * batch_size / seconds,
      'seconds': seconds,
      'cpu_seconds': time.process_time() - self._cpu_start,
      'shares': _shares(self._spent, wall),
    }
    self._begin(step)
    return timing

  def summary(self) -> str:
    """Shares of the time since the start, in words."""
    shares = _shares(self._total, time.monotonic() - self._first_start)
    return 'time: ' + ', '.join(
      f'{kind.replace("_", " ")} {share:.1%}' for kind, share in shares.items()
    )


def _shares(spent: Mapping[str, float], wall: float) -> dict[str, float]:
  """Fractions of `wall` by kind; `idle` is the rest."""
  shares = {kind: seconds / wall for kind, seconds in spent.items()}
  return {**shares, 'idle': max(1 - sum(shares.values()), 0.0)}


class DeviceIdleTimer:
  """Measures how long the device has been without work.

  A thread notes when the results of the newest call are ready.
  """

  def __init__(self) -> None:
    self._watcher = futures.ThreadPoolExecutor(1)
    self._finished: futures.Future[float] | None = None

  def works_on(self, results: Any) -> None:
    """Registers the results of the newest call."""

    def finish() -> float:
      jax.block_until_ready(results)
      return time.monotonic()

    self._finished = self._watcher.submit(finish)

  def idle_seconds(self, since: float) -> float:
    """Seconds for which the device has been idle, counted from `since` on."""
    now = time.monotonic()
    if self._finished is None:
      return now - since
    if not self._finished.done():
      return 0.0
    return max(now - max(since, self._finished.result()), 0.0)
