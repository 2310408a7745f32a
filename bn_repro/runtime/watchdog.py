"""Ends a process that hangs, so that it can be restarted.

A process whose peer has stopped without exiting waits in a collective for ever,
and the runtime does not notice: the process of the peer still exists.
"""

from collections import deque
from collections.abc import Callable
import faulthandler
import statistics
import sys
import threading
import time

# Shortest timeouts, our choice. An evaluation, a checkpoint or a slow disk may
# take minutes between steps; restoring and compiling, before the first step.
MIN_SECONDS = 300
SECONDS_TO_FIRST_STEP = 3600


class Watchdog:
  """Watches the time between steps in a thread; a context manager."""

  def __init__(self, multiple: float, on_timeout: Callable[[], None]):
    """Creates a watchdog, which starts when its context is entered.

    Args:
      multiple: timeout in median step times; 0 disables the watchdog.
      on_timeout: called in the watchdog's thread, after the stacks of all
        threads are written to standard error.
    """
    self._multiple = multiple
    self._on_timeout = on_timeout
    self._intervals: deque[float] = deque(maxlen=100)
    self._last: float | None = None
    # Counted in seconds of this process's own life: suspending it is no hang.
    self._silent = 0
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def beat(self) -> None:
    """Records the end of a step, or of a batch of an evaluation."""
    now = time.monotonic()
    if self._last is not None:
      self._intervals.append(now - self._last)
    self._last = now
    self._silent = 0

  def timeout(self) -> float:
    """The time without a step that counts as a hang, in seconds."""
    if self._last is None:
      return SECONDS_TO_FIRST_STEP
    median = statistics.median([*self._intervals] or [0.0])
    return max(self._multiple * median, MIN_SECONDS)

  def __enter__(self) -> 'Watchdog':
    if self._multiple:
      self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self.stop()

  def stop(self) -> None:
    """Stops watching."""
    self._stopped.set()

  def _watch(self) -> None:
    while not self._stopped.wait(1):
      self._silent += 1
      if self._silent < self.timeout():
        continue
      try:
        print(
          f'error: no step for {self.timeout():.0f} s; stacks of all threads:',
          file=sys.stderr,
          flush=True,
        )
        faulthandler.dump_traceback(sys.stderr)
      finally:  # Standard error may be closed.
        self._on_timeout()
      return
