"""SIGTERM and Ctrl-C become a question that long work asks between its parts.

A handler that raised would cut through saves and collectives. Instead a thread
notes the signal, and `check` raises at the next place where stopping is safe. A
second one ends the process at once, even if it hangs; but not within a second
of the first: a machine that shuts down may send one to the process and one
through whatever has started it.
"""

from collections.abc import Callable
import os
import signal
import socket
import threading
import time
from typing import Any, TypeVar

T = TypeVar('T')

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# For so long after the first one, another is taken for the same; our choice.
SAME_SIGNAL_SECONDS = 1.0


class Preempted(Exception):
  """Raised by `Preemption.check` after a signal; the message names it."""


def _reason(number: int) -> str:
  return f'stopped by {signal.Signals(number).name}'


class Preemption:
  """Remembers whether the process has been asked to stop."""

  def __init__(self) -> None:
    self._signal: signal.Signals | None = None
    self._thread: threading.Thread | None = None

  def listen(self) -> None:
    """Takes over SIGTERM and SIGINT; call in the main thread."""
    if self._thread is None:
      reader, self._writer = socket.socketpair()
      self._writer.settimeout(0)
      self._thread = threading.Thread(
        target=self._note, args=(reader,), daemon=True
      )
      self._thread.start()
      signal.set_wakeup_fd(self._writer.fileno())
    for number in SIGNALS:
      # That it has a handler is enough: its number goes to the thread.
      signal.signal(number, lambda number, frame: None)

  @property
  def signal(self) -> int:
    """The number of the signal that has come; 0 if none has."""
    return 0 if self._signal is None else self._signal.value

  def check(self) -> None:
    """Raises `Preempted` if a signal has come."""
    if self.signal:
      raise Preempted(_reason(self.signal))

  def run(self, work: Callable[[], T]) -> T:
    """Runs work that cannot ask, such as a compilation, and asks meanwhile.

    The work goes on in a thread of its own; if a signal comes it is left
    behind, so the process must not wait for it when it exits.
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
  """The question as several processes ask it, answered alike in all of them.

  Every process asks equally often. The answer is that to the question before,
  which has come in the meantime, so that nobody waits for it.
  """

  def __init__(self, own: Preemption, maximum: Callable[[int], Any]):
    """Shares a process's own preemption with the others.

    Args:
      own: the process's own.
      maximum: of a number, over all processes; starts to find it out.
    """
    super().__init__()
    self._own = own
    self._maximum = maximum
    self._asked: Any = None

  def check(self) -> None:
    """Raises `Preempted` in all processes if one has had a signal."""
    before, self._asked = self._asked, self._maximum(self._own.signal)
    number = 0 if before is None else int(before)
    if number:
      raise Preempted(_reason(number))

  def run(self, work: Callable[[], T]) -> T:
    """Runs work to its end: nobody can be asked meanwhile."""
    return work()
