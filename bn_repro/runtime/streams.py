"""Standard streams whose failures do not end a run.

A terminal may vanish, the reader of a pipe may exit, a disk may be full, and
cron closes streams. Python then raises errors wherever something is printed,
and once more when the interpreter exits. A reader may also stop to read, such
as a pager: to print then blocks.
"""

import io
import os
import select
import signal
import sys
from typing import Any, ClassVar, TextIO

from bn_repro.errors import UserError

_STDOUT = 1
_STDERR = 2
# Seconds that output waits for its reader before it is discarded. Our choice.
_PATIENCE = 10.0


class _Stream(io.FileIO):
  """A standard stream, which discards what cannot be written.

  Attributes:
    required: descriptors of the streams where a failure ends the command.
  """

  required: ClassVar[set[int]] = set()
  _patience = _PATIENCE

  def write(self, data: Any) -> int:
    """Writes some of the bytes; returns the number written or discarded.

    Raises:
      SystemExit: if the stream is required, and the reader of the pipe has
        exited. The exit code is that of a tool that SIGPIPE has killed.
      UserError: if the stream is required, and fails in another way.
    """
    is_required = self.fileno() in self.required
    try:
      while self._is_ready(wait=is_required):
        # As many as do not block.
        count = super().write(memoryview(data)[: select.PIPE_BUF])
        # None if another process has made the stream non-blocking.
        if count is not None:
          return count
      return len(data)
    except OSError as error:
      if not is_required:
        return len(data)
      # The exit writes again what is still buffered.
      self.required.discard(self.fileno())
      if isinstance(error, BrokenPipeError):
        raise SystemExit(128 + signal.SIGPIPE) from None
      raise UserError(
        f'standard output: cannot be written ({error.strerror}).'
      ) from error

  def _is_ready(self, *, wait: bool) -> bool:
    """Waits for the reader; not again until it reads, if it took too long."""
    timeout = None if wait else self._patience
    is_ready = bool(select.select((), (self,), (), timeout)[1])
    self._patience = _PATIENCE if is_ready else 0.0
    return is_ready


def guard() -> None:
  """Replaces the standard streams; call before any file is opened.

  Failures of standard error are ignored. Those of standard output end the
  command, until `make_output_optional` is called. Streams that are closed
  become /dev/null: the next file that is opened would take their place, and
  what is printed would be written into it.
  """
  for number in (0, _STDOUT, _STDERR):
    try:
      os.fstat(number)
    except OSError:
      # The lowest free descriptor, which is this one.
      os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # noqa: FBT003
  sys.stdout = _open(_STDOUT, sys.stdout)
  sys.stderr = _open(_STDERR, sys.stderr)
  _Stream.required.add(_STDOUT)


def make_output_optional() -> None:
  """Lets the command go on when its output cannot be written.

  For commands whose result is a run or a file, once they begin with it.
  """
  _Stream.required.clear()


def _open(number: int, replaced: TextIO | None) -> io.TextIOWrapper:
  return io.TextIOWrapper(
    io.BufferedWriter(_Stream(number, 'w', closefd=False)),
    encoding=None if replaced is None else replaced.encoding,
    # Characters that the encoding lacks are escaped.
    errors='backslashreplace',
    line_buffering=True,
  )
