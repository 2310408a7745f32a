"""Processes that train together: how they find one another, and agree.

The runtime is JAX's. One process is the ordinary case: it has nobody to agree
with, and nothing here costs it anything.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import glob
import importlib.util
import json
import os
import socket
import time
from typing import Any, TypeVar

import numpy as np

from bn_repro.config import UserError

T = TypeVar('T')

# All our choice, in seconds: until a process that waits for others gives up,
# and until those that are left give up one that has died.
CONNECT_TIMEOUT = 120
HEARTBEAT_TIMEOUT = 30
DISCONNECT_TIMEOUT = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of a run in several processes."""
  group = parser.add_argument_group(
    'several processes',
    'found out by themselves on Cloud TPU and under SLURM; elsewhere start the '
    'same command for each process, with all three of these',
  )
  group.add_argument(
    '--coordinator', metavar='HOST:PORT', help='where process 0 listens'
  )
  group.add_argument('--num_processes', type=int, metavar='N')
  group.add_argument('--process_id', type=int, metavar='I', help='from 0')


def connect(flags: argparse.Namespace) -> None:
  """Joins the other processes, if there are to be any; imports JAX then.

  Raises:
    UserError: if flags are missing, or the others cannot be reached.
  """
  explicit = (flags.coordinator, flags.num_processes, flags.process_id)
  given = [value is not None for value in explicit]
  if any(given) and not all(given):
    raise UserError(
      '--coordinator, --num_processes and --process_id: give all three or none.'
    )
  if all(given):
    host, _, port = flags.coordinator.rpartition(':')
    if not host or not port.isdecimal():
      raise UserError(f'--coordinator={flags.coordinator}: give HOST:PORT.')
    if not 0 <= flags.process_id < flags.num_processes:
      raise UserError(
        f'--process_id={flags.process_id}: must be from 0 to '
        f'{flags.num_processes - 1}.'
      )
    if flags.process_id:
      _wait_for_listener(host, int(port))
  elif not (_is_slurm() or _is_cloud_tpu()):
    return
  import jax

  names = ('coordinator_address', 'num_processes', 'process_id')
  try:
    jax.distributed.initialize(
      **(dict(zip(names, explicit, strict=True)) if all(given) else {}),
      initialization_timeout=CONNECT_TIMEOUT,
      heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
      shutdown_timeout_seconds=DISCONNECT_TIMEOUT,
    )
  except Exception as error:  # The runtime raises what its transport raises.
    reason = ' '.join(str(error).split())[:200]
    raise UserError(
      f'the other processes could not be joined in {CONNECT_TIMEOUT} s '
      f'({reason}). See that all of them are started.'
    ) from error
  _Membership.index = jax.process_index()
  _Membership.count = jax.process_count()


def _wait_for_listener(host: str, port: int) -> None:
  """Waits until process 0 listens: JAX would abort where it does not."""
  give_up = time.monotonic() + CONNECT_TIMEOUT
  while True:
    try:
      with socket.create_connection((host, port), timeout=5):
        return
    except OSError as error:
      if time.monotonic() > give_up:
        raise UserError(
          f'--coordinator={host}:{port}: could not be reached in '
          f'{CONNECT_TIMEOUT} s ({error}). See that process 0 is started '
          'there, and that nothing blocks the port.'
        ) from error
      time.sleep(0.5)


def _is_slurm() -> bool:
  """Whether this is one of several tasks that srun has started."""
  return (
    'SLURM_STEP_NODELIST' in os.environ
    and int(os.environ.get('SLURM_NTASKS', 1)) > 1
  )


def _is_cloud_tpu() -> bool:
  """Whether this is a TPU VM, whose runtime knows the other hosts."""
  chips = glob.glob('/dev/accel*') or glob.glob('/dev/vfio/[0-9]*')
  return bool(chips) and importlib.util.find_spec('libtpu') is not None


def abandon() -> None:
  """Gives the others up, of whom one is lost."""
  _Membership.index, _Membership.count = 0, 1


def disconnect() -> None:
  """Waits for the others to have finished, and leaves them."""
  if count() > 1:
    import jax

    jax.distributed.shutdown()


class _Membership:
  """The processes that this one has joined: at first itself alone."""

  index = 0
  count = 1


def is_first() -> bool:
  """Whether this is the process that writes."""
  return _Membership.index == 0


def count() -> int:
  """The number of processes."""
  return _Membership.count


def gather(text: str) -> list[str]:
  """The texts of all processes, in their order; every process must call it."""
  if count() == 1:
    return [text]
  from jax.experimental import multihost_utils

  raw = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array(len(raw), np.int32))
  padded = np.zeros(int(lengths.max()), np.uint8)
  padded[: len(raw)] = raw
  rows = multihost_utils.process_allgather(padded)
  return [
    bytes(row[:length]).decode()
    for row, length in zip(rows, lengths, strict=True)
  ]


def together(work: Callable[[], T]) -> T:
  """Does work on which all processes have to succeed.

  Raises:
    UserError: if it failed here or elsewhere, on every process; with what was
      wrong here, or where it was.
  """
  problems: Sequence[str] = ()
  try:
    result = work()
  except UserError as error:
    problems = error.problems
  reports = gather(json.dumps([socket.gethostname(), *problems]))
  if problems:
    raise UserError(*problems)
  for number, (host, *elsewhere) in enumerate(map(json.loads, reports)):
    if elsewhere:
      raise UserError(f'process {number} on {host} has failed: {elsewhere[0]}')
  return result


def agree(facts: Mapping[str, str]) -> None:
  """Sees that these facts are the same in all processes.

  Raises:
    UserError: on every process, with the first fact that differs.
  """
  reports = [json.loads(report) for report in gather(json.dumps(dict(facts)))]
  for name, value in reports[0].items():
    for number, report in enumerate(reports):
      if report[name] != value:
        raise UserError(
          f'process {number} has another {name} than process 0: '
          f'{report[name]}, not {value}. Start all processes alike.'
        )


def from_first(
  work: Callable[[], tuple[T, dict[str, Any]]], like: T
) -> tuple[T, dict[str, Any]]:
  """Does work in process 0 alone, and gives its result to all.

  Args:
    work: returns a pytree of arrays, and a dict that can be written as JSON.
    like: arrays of the same structure, shapes and types.

  Raises:
    UserError: on every process, if the work raises it.
  """
  if count() == 1:
    return work()
  from jax.experimental import multihost_utils

  def first() -> Any:
    return work() if is_first() else None

  done = together(first)
  tree = multihost_utils.broadcast_one_to_all(like if done is None else done[0])
  facts = '' if done is None else json.dumps(done[1])
  return tree, json.loads(gather(facts)[0])
