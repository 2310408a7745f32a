"""Notices that another process of a run no longer answers.

JAX notices it too, but then aborts the process with the stacks of its threads.
Here a thread of each process increments a counter once a second in the
key-value store of JAX's coordination service, which process 0 hosts, and reads
the counters of the others.
"""

from collections.abc import Callable
import math
import threading
from typing import Any

# Seconds between two increments.
INTERVAL = 1

_DIRECTORY = 'bn_repro_heartbeats'
# In place of the counter of a process that has finished.
_FINISHED = 'finished'


class Heartbeats:
  """Watches the other processes in threads that do not wait for JAX."""

  def __init__(
    self,
    store: Any,
    index: int,
    count: int,
    timeout: float,
    on_silence: Callable[[int], None],
  ):
    """Creates the threads; `start` starts them.

    Args:
      store: client of JAX's coordination service.
      index: index of this process.
      count: number of processes.
      timeout: time without an answer after which a process is lost, in seconds
        during which this process runs: suspending it is no silence of others.
      on_silence: called once, in a thread, with the index of a lost process.
    """
    self._store = store
    self._key = f'{_DIRECTORY}/{index}'
    self._timeout = timeout
    self._on_silence = on_silence
    self._counter = 0
    # Of each other process: its last counter, and the seconds since it changed.
    self._counters: dict[str, str] = {}
    self._silent = {
      f'{_DIRECTORY}/{other}': 0.0 for other in range(count) if other != index
    }
    self._finished = threading.Event()
    self._stopped = threading.Event()
    # Two threads: the first waits while process 0 does not answer.
    self._exchanging = threading.Thread(target=self._exchange, daemon=True)
    self._watching = threading.Thread(target=self._watch, daemon=True)

  def start(self) -> None:
    """Starts to count and to watch."""
    self._exchanging.start()
    self._watching.start()

  def finish(self) -> None:
    """Tells the others that this process has finished, and stops."""
    self._finished.set()
    self._exchanging.join()
    self.stop()

  def stop(self) -> None:
    """Stops without a word, after which this process counts as lost."""
    self._stopped.set()

  def _exchange(self) -> None:
    finished = False
    while not finished and not self._stopped.is_set():
      finished = self._finished.wait(INTERVAL)
      self._exchange_counters(finished=finished)

  def _exchange_counters(self, *, finished: bool) -> None:
    """Writes the counter of this process, and reads those of the others."""
    self._counter += 1
    own = _FINISHED if finished else str(self._counter)
    try:
      self._store.key_value_set(self._key, own, allow_overwrite=True)
      found = self._store.key_value_dir_get(_DIRECTORY)
    except RuntimeError:  # Process 0 is gone, and stays silent.
      return
    for key, counter in found:
      if key in self._silent and counter != self._counters.get(key):
        self._counters[key] = counter
        self._silent[key] = -math.inf if counter == _FINISHED else 0

  def _watch(self) -> None:
    while not self._stopped.wait(INTERVAL):
      lost = self._lost_in(INTERVAL)
      if lost is not None:
        self._on_silence(lost)
        return

  def _lost_in(self, seconds: float) -> int | None:
    """Adds seconds of silence; returns the first process that is lost."""
    for key in self._silent:
      self._silent[key] += seconds
      if self._silent[key] >= self._timeout:
        return int(key.rpartition('/')[2])
    return None
