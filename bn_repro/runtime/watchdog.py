"""Ends a process that hangs, so that it can be started again.

A process whose peers have stopped answering waits for ever in a collective. The
others' runtime does not notice: the process is alive.
"""

from collections import deque
from collections.abc import Callable
import faulthandler
import statistics
import sys
import threading
import time

# However short steps are, an evaluation, a slow disk or a checkpoint is not
# taken for a hang before; nor are restoring and compiling, which take minutes,
# before the first step. Our choice.
LEAST_SECONDS = 300
LEAST_SECONDS_TO_FIRST_STEP = 3600


class Watchdog:
  """Measures the time between steps, in a thread of its own; a context."""

  def __init__(self, multiple: float, give_up: Callable[[], None]):
    """Watches from entering the context on.

    Args:
      multiple: of the median time of a step, after which `give_up` is called;
        0 never does.
      give_up: called in the watchdog's thread, after the stacks of all threads
        were written to standard error.
    """
    self._multiple = multiple
    self._give_up = give_up
    self._intervals: deque[float] = deque(maxlen=100)
    self._last: float | None = None
    # Counted second by second: a process that is suspended does not hang.
    self._silent = 0
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def beat(self) -> None:
    """Says that a step, or a batch of an evaluation, is done."""
    now = time.monotonic()
    if self._last is not None:
      self._intervals.append(now - self._last)
    self._last = now
    self._silent = 0

  def limit(self) -> float:
    """Seconds without a step that are taken for a hang."""
    if self._last is None:
      return LEAST_SECONDS_TO_FIRST_STEP
    median = statistics.median([*self._intervals] or [0.0])
    return max(self._multiple * median, LEAST_SECONDS)

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
      if self._silent < self.limit():
        continue
      print(
        f'error: no step for {self.limit():.0f} s; the stacks of all threads:',
        file=sys.stderr,
        flush=True,
      )
      faulthandler.dump_traceback(sys.stderr)
      self._give_up()
      return
