"""The claim of a workdir in a bucket: one process at a time trains in it.

It is the object `lock`, which its holder writes again every half minute. A
process that finds it waits for the next write. If none comes for three minutes,
the process replaces the object, on condition that nobody else has: of several,
one succeeds.

A holder that cannot write to the bucket stops after two minutes. One that was
suspended meanwhile, and does not know yet, finds out when it renews its claim,
which it has to do before it commits anything that counts. What it commits
within one request of that may still be too late.
"""

import contextlib
import json
import os
from pathlib import Path
import socket
import tempfile
import threading
import time
from typing import IO, Any
import uuid

from bn_repro import files
from bn_repro.errors import TemporaryError, UserError
from bn_repro.files import Place
from bn_repro.runtime import buckets

# Seconds after which a claim that nobody has renewed is taken over. Our choice:
# longer than most pauses of a machine, shorter than the start of another one.
EXPIRES = 180.0
# Shares of it, our choice: how often a holder renews its claim, and how long it
# goes on if it cannot. The rest is for requests that are under way.
_BEAT = 1 / 6
_PATIENCE = 2 / 3


class ClaimLost(TemporaryError):
  """Another process may continue the run, so this one has to stop."""


class Claim:
  """The claim of a workdir in a bucket, an object that a thread renews."""

  def __init__(self, workdir: Place, expires: float = EXPIRES):
    """Does not take the claim.

    Args:
      workdir: place of the workdir.
      expires: seconds after which others may take the claim over; the same for
        all processes.
    """
    self._workdir = workdir
    self._place = workdir / 'lock'
    self._expires = expires
    self._beat = _BEAT * expires
    self._patience = _PATIENCE * expires
    self._content = b''
    self._alive: IO[Any] | None = None
    self._renewed = 0.0
    self._successor: str | None = None
    self._stopped = threading.Event()
    self._thread = threading.Thread()

  def take(self) -> None:
    """Takes the claim, until it is released or lost.

    Raises:
      TemporaryError: if another process holds it, or the bucket cannot be
        reached.
      UserError: if the bucket refuses access.
    """
    # Never the same twice: `renew` recognizes what this process has written.
    id_ = uuid.uuid4().hex
    self._content = json.dumps({'holder': _this_process(), 'id': id_}).encode()
    self._alive = _alive_path(id_).open('w')
    try:
      files.lock(self._alive)
      found = self._wait_for_end()
      self._renewed = _now()
      buckets.write(
        self._place,
        self._content,
        found.generation if found else 0,
        retry_for=self._patience,
      )
    except buckets.ChangedError as error:
      self._remove_alive()
      raise _in_use(self._workdir, _holder(error.found)) from None
    except UserError:
      self._remove_alive()
      raise
    self._successor = None
    self._stopped = threading.Event()
    self._thread = threading.Thread(target=self._keep, daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Checks, without a request, that this process holds the claim.

    Raises:
      ClaimLost: if it may have lost it.
    """
    if self._successor is not None:
      raise ClaimLost(
        f'--workdir={self._workdir}: this process did not renew its claim of '
        f'the run for {self._expires:.0f} s, and {self._successor} has taken '
        'it over.'
      )
    if _now() > self._renewed + self._patience:
      raise ClaimLost(
        f'--workdir={self._workdir}: this process could not renew its claim of '
        f'the run for {self._patience:.0f} s, and another one may take it '
        'over. Run the same command again.'
      )

  def renew(self) -> None:
    """Makes sure that this process holds the claim, before it commits.

    Raises:
      ClaimLost: if another process has taken it over.
      TemporaryError: if the bucket cannot be reached.
    """
    started = _now()
    found = self._read()
    try:
      if found is None or found.content != self._content:
        raise buckets.ChangedError(found)
      buckets.write(
        self._place,
        self._content,
        found.generation,
        retry_for=self._patience,
      )
    except buckets.ChangedError as error:
      self._successor = _holder(error.found) or 'another process'
    else:
      # When the request was made: how long it took to be carried out, or its
      # answer to arrive, is not known.
      self._renewed = max(self._renewed, started)
    self.check()

  def release(self) -> None:
    """Gives the claim back; without the bucket it expires."""
    if self._alive is None:
      return
    self._stopped.set()
    self._thread.join(self._beat)
    # Otherwise the claim expires.
    with contextlib.suppress(UserError):
      found = buckets.read(self._place, retry_for=self._beat)
      if found is not None and found.content == self._content:
        buckets.remove(self._place, found.generation, retry_for=self._beat)
    self._remove_alive()

  def _read(self) -> buckets.Version | None:
    return buckets.read(self._place, retry_for=self._patience)

  def _keep(self) -> None:
    """Renews the claim until it is released or lost."""
    while not self._stopped.wait(self._beat):
      try:
        self.renew()
      except ClaimLost:
        return
      except UserError:
        pass  # Tries again; `check` raises if this lasts too long.

  def _wait_for_end(self) -> buckets.Version | None:
    """Waits until nobody holds the claim.

    Returns:
      The claim of a process that is gone; None if there is none.

    Raises:
      TemporaryError: if a process renews it.
    """
    found = self._read()
    if found is None or _has_died(found):
      return found
    print(
      f'{self._workdir}: claimed by {_holder(found) or "another process"}. '
      f'Waits {self._expires:.0f} s for a sign of it.'
    )
    end = _now() + self._expires
    while _now() < end:
      time.sleep(self._beat / 4)
      latest = self._read()
      if latest is None:
        return None
      if latest.generation != found.generation:
        raise _in_use(self._workdir, _holder(latest))
    return found

  def _remove_alive(self) -> None:
    assert self._alive is not None
    Path(self._alive.name).unlink(missing_ok=True)
    self._alive.close()
    self._alive = None


def _this_process() -> str:
  return f'process {os.getpid()} on {socket.gethostname()}'


def _in_use(workdir: Place, holder: str) -> TemporaryError:
  return TemporaryError(
    f'--workdir={workdir}: in use by {holder or "another process"}. Wait for '
    'it, stop it, or use another workdir.'
  )


def _now() -> float:
  """Seconds, also of the time for which this machine is suspended."""
  return time.clock_gettime(time.CLOCK_BOOTTIME)


def _field(found: buckets.Version | None, name: str) -> str:
  """A field of a claim; empty if there is no claim, or it was edited."""
  try:
    return str(json.loads(found.content)[name]) if found else ''
  except (ValueError, KeyError, TypeError):
    return ''


def _holder(found: buckets.Version | None) -> str:
  return _field(found, 'holder')


def _alive_path(id_: str) -> Path:
  """The path of a file that the holder of a claim locks on its machine.

  The kernel releases the lock when the process ends, however it ends, so that
  the next one on the same machine need not wait.
  """
  return Path(tempfile.gettempdir(), f'bn_repro-{id_}')


def _has_died(found: buckets.Version) -> bool:
  """Whether the holder of a claim ran on this machine, and has ended."""
  path = _alive_path(_field(found, 'id'))
  try:
    with path.open() as alive:
      has_ended = files.lock(alive)
  except (OSError, UserError):
    return False
  if has_ended:
    path.unlink(missing_ok=True)
  return has_ended
