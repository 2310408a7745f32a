"""Processes that train together: how they find one another, and agree.

The runtime is JAX's. One process is the ordinary case: it has nobody to agree
with, and nothing here costs it anything.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import importlib.util
import json
import os
from pathlib import Path
import re
import socket
import sys
import threading
import time
from typing import Any, TypeVar

from bn_repro.errors import UserError

T = TypeVar('T')

# Where Linux shows what is on the PCI bus.
_PCI_DEVICES = Path('/sys/bus/pci/devices')
# gVNIC, which every VM of Google's may have.
_NETWORK_CARD = '0x0042'

# What the transports and runtimes of CPU, GPU and TPU say where a process that
# takes part in a collective is gone. Read off their messages; not documented.
_LOST = re.compile(
  r'Gloo|NCCL|[Cc]onnection (closed|reset|refused)|UNAVAILABLE|ABORTED|'
  r'DEADLINE_EXCEEDED|unhealthy|[Hh]eartbeat|coordination service'
)

# All our choice, in seconds: until a process that waits for others gives up,
# and until those that are left give up one that has died; until a shared folder
# has to show what another host has written.
CONNECT_TIMEOUT = 300
HEARTBEAT_TIMEOUT = 30
DISCONNECT_TIMEOUT = 60
SHARED_TIMEOUT = 60


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


class AllProcessesError(UserError):
  """A mistake that every process reports, so that all of them end alike."""


def connect(flags: argparse.Namespace) -> None:
  """Joins the other processes, if there are to be any; imports JAX then.

  Raises:
    UserError: if flags are missing, or the others cannot be reached, or have
      other numbers of devices.
  """
  explicit = (flags.coordinator, flags.num_processes, flags.process_id)
  given = [value is not None for value in explicit]
  if any(given) and not all(given):
    raise UserError(
      '--coordinator, --num_processes and --process_id: give all three or none.'
    )
  if all(given):
    host, _, port = flags.coordinator.rpartition(':')
    host = host.strip('[]')  # Of an address of IPv6.
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
  hide_missing_tpu()
  import jax

  names = ('coordinator_address', 'num_processes', 'process_id')
  # The runtime aborts where the others do not come: before that, say so.
  give_up = threading.Timer(CONNECT_TIMEOUT, _give_up_connecting)
  give_up.daemon = True
  give_up.start()
  try:
    jax.distributed.initialize(
      **(dict(zip(names, explicit, strict=True)) if all(given) else {}),
      initialization_timeout=2 * CONNECT_TIMEOUT,
      heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
      shutdown_timeout_seconds=DISCONNECT_TIMEOUT,
    )
    counts = Counter(device.process_index for device in jax.devices())
  except Exception as error:  # The runtime raises what its transport raises.
    raise UserError(_not_joined(' '.join(str(error).split())[:200])) from error
  finally:
    give_up.cancel()
  _Membership.index = jax.process_index()
  _Membership.count = jax.process_count()
  if len({counts[index] for index in range(count())}) > 1:
    devices = ', '.join(str(counts[index]) for index in range(count()))
    raise AllProcessesError(
      f'the processes have {devices} devices. Give each as many.'
    )


def _not_joined(reason: str) -> str:
  return (
    f'the other processes could not be joined in {CONNECT_TIMEOUT} s ({reason})'
    '. See that all of them are started, and alike.'
  )


def _give_up_connecting() -> None:
  print(f'error: {_not_joined("no answer")}', file=sys.stderr, flush=True)
  os._exit(1)


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
  wanted = 'tpu' in os.environ.get('JAX_PLATFORMS', 'tpu').split(',')
  installed = importlib.util.find_spec('libtpu') is not None
  return wanted and installed and _has_chips()


def _has_chips() -> bool:
  """Whether a TPU is on the PCI bus: Google's, and not its network card."""
  for vendor in _PCI_DEVICES.glob('*/vendor'):
    if vendor.read_text().strip() == '0x1ae0':
      device = (vendor.parent / 'device').read_text().strip()
      if device != _NETWORK_CARD:
        return True
  return False


def hide_missing_tpu() -> None:
  """Keeps JAX from looking for a TPU where only its compiler is installed.

  It would look for seconds, and complain. Call before JAX is imported.
  """
  if importlib.util.find_spec('libtpu') is not None and not _has_chips():
    others = 'cuda,cpu' if os.path.exists('/dev/nvidiactl') else 'cpu'
    os.environ.setdefault('JAX_PLATFORMS', others)


def leave() -> None:
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
  import numpy as np

  raw = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array(len(raw), np.int32))
  padded = np.zeros(int(lengths.max()), np.uint8)
  padded[: len(raw)] = raw
  rows = multihost_utils.process_allgather(padded)
  return [
    bytes(row[:length]).decode()
    for row, length in zip(rows, lengths, strict=True)
  ]


def run_on_all(work: Callable[[], T]) -> T:
  """Does work on which all processes have to succeed.

  Raises:
    AllProcessesError: on every process, if it failed on any; with what was
      wrong here, or where it was.
  """
  problems: Sequence[str] = ()
  try:
    result = work()
  except UserError as error:
    problems = error.problems
  except OSError as error:
    problems = (str(error),)
  reports = gather(json.dumps([socket.gethostname(), *problems]))
  if problems:
    raise AllProcessesError(*problems)
  for number, (host, *elsewhere) in enumerate(map(json.loads, reports)):
    if elsewhere:
      raise AllProcessesError(
        f'process {number} on {host} has failed: {elsewhere[0]}'
      )
  return result


def is_peer_failure(error: Exception) -> bool:
  """Whether an error says that another process is gone."""
  # Where a call cannot even be started, JAX makes it a ValueError.
  of_runtime = isinstance(error, ValueError | RuntimeError)
  return count() > 1 and of_runtime and bool(_LOST.search(str(error)))


def assert_equal(facts: Mapping[str, str]) -> None:
  """Sees that these facts are the same in all processes.

  Raises:
    AllProcessesError: on every process, with the first fact that differs.
  """
  reports = [json.loads(report) for report in gather(json.dumps(dict(facts)))]
  for name, value in reports[0].items():
    for number, report in enumerate(reports):
      if report[name] != value:
        raise AllProcessesError(
          f'process {number} has another {name} than process 0: '
          f'{report[name]}, not {value}. Start all processes alike.'
        )


def broadcast_from_first(
  work: Callable[[], tuple[T, dict[str, Any]]], like: T
) -> tuple[T, dict[str, Any]]:
  """Does work in process 0 alone, and gives its result to all.

  Args:
    work: returns a pytree of arrays, and a dict that can be written as JSON.
    like: arrays of the same structure, shapes and types.

  Raises:
    AllProcessesError: on every process, if the work raises a UserError.
  """
  if count() == 1:
    return work()
  import jax
  from jax.experimental import multihost_utils

  def first() -> Any:
    return work() if is_first() else None

  done = run_on_all(first)
  # As integers: the broadcast is a sum, which would make 0 of -0.
  bits = multihost_utils.broadcast_one_to_all(
    jax.tree.map(_to_bits, like if done is None else done[0])
  )
  tree = jax.tree.map(lambda x, own: x.view(own.dtype), bits, like)
  facts = '' if done is None else json.dumps(done[1])
  return tree, json.loads(gather(facts)[0])


def _to_bits(x: Any) -> Any:
  return x.view(f'uint{8 * x.dtype.itemsize}')
