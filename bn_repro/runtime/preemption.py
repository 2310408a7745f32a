"""Turns SIGTERM, SIGHUP and Ctrl-C into a flag that long-running work polls.

A handler that raises would cut through saves and collectives. Here a thread
notes the signal, and `check` raises where stopping is safe. A second signal
ends the process at once, even if it hangs, unless it follows the first within a
second: at a shutdown a process may get one signal from the system and another
from its parent.
"""

from collections.abc import Callable
import os
import signal
import socket
import threading
import time
from typing import Any, TypeVar

T = TypeVar('T')

# The last one says that the terminal has closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Signals within this time of the first count as the same; our choice.
SAME_SIGNAL_SECONDS = 1.0


class Preempted(Exception):
  """Raised by `Preemption.check` after a signal, which the message names."""


class Preemption:
  """Whether a signal has asked this process to stop."""

  def __init__(self) -> None:
    self._signal: signal.Signals | None = None
    self._thread: threading.Thread | None = None

  def listen(self) -> None:
    """Installs the handlers of `SIGNALS`; call in the main thread.

    SIGHUP stays ignored where it is, as by `nohup`: the run then outlives its
    terminal.
    """
    if self._thread is None:
      reader, self._writer = socket.socketpair()
      self._writer.settimeout(0)
      self._thread = threading.Thread(
        target=self._note, args=(reader,), daemon=True
      )
      self._thread.start()
      signal.set_wakeup_fd(self._writer.fileno())
    for number in SIGNALS:
      ignored = signal.getsignal(number) is signal.SIG_IGN
      if number == signal.SIGHUP and ignored:
        continue
      # With any handler installed, Python writes the number to the wakeup fd.
      signal.signal(number, lambda number, frame: None)

  @property
  def signal(self) -> int:
    """The number of the signal received; 0 before one is."""
    return 0 if self._signal is None else self._signal.value

  def check(self) -> None:
    """Raises `Preempted` if a signal was received."""
    _raise_if(self.signal)

  def run(self, work: Callable[[], T]) -> T:
    """Runs work that cannot poll, such as a compilation, and polls meanwhile.

    The work runs in a thread of its own. After a signal this thread continues
    in the background, so a process must exit without waiting for it.

    Raises:
      Preempted: if a signal is received before the work is done.
    """
    result: list[T] = []
    errors: list[BaseException] = []

    def target() -> None:
      try:
        result.append(work())
      except BaseException as error:  # Raised again in the main thread.
        errors.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    while thread.is_alive():
      self.check()
      thread.join(0.1)
    if errors:
      raise errors[0]
    return result[0]

  def _note(self, reader: socket.socket) -> None:
    first = 0.0
    while numbers := reader.recv(1):
      now = time.monotonic()
      if self._signal is None:
        self._signal, first = signal.Signals(numbers[0]), now
      elif now - first > SAME_SIGNAL_SECONDS:
        os._exit(128 + numbers[0])


class AgreedPreemption(Preemption):
  """A preemption on which several processes agree, at the same step.

  Every process calls `check` equally often. A call starts an all-reduce of the
  signals and acts on the result of the call before it, so that no process waits
  for the others.
  """

  def __init__(self, own: Preemption, maximum: Callable[[int], Any]):
    """Shares the signals of this process with the others.

    Args:
      own: the preemption of this process.
      maximum: starts an all-reduce of an integer; returns its maximum over all
        processes, as a value that `int` waits for.
    """
    super().__init__()
    self._own = own
    self._maximum = maximum
    self._pending: Any = None

  def check(self) -> None:
    """Raises `Preempted` if a process had a signal at the call before."""
    previous, self._pending = self._pending, self._maximum(self._own.signal)
    _raise_if(0 if previous is None else int(previous))

  def run(self, work: Callable[[], T]) -> T:
    """Runs work to its end, because processes cannot agree meanwhile."""
    return work()


def _raise_if(number: int) -> None:
  if number:
    raise Preempted(f'stopped by {signal.Signals(number).name}')
