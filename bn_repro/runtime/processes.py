"""Connects the processes of one run, which JAX trains together.

A run usually is a single process. The functions of this module then return
without communication.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
import importlib.util
import json
import os
import re
import socket
import sys
import threading
import time
from typing import Any, TypeVar

from bn_repro.errors import UserError
from bn_repro.runtime import backend
from bn_repro.runtime.heartbeats import Heartbeats
from bn_repro.runtime.workdir import EXIT_CODES, Status

T = TypeVar('T')

# Errors of the transports and runtimes of CPU, GPU and TPU when a process of a
# collective is gone. Observed; not documented.
_PEER_FAILURE = re.compile(
  r'Gloo|NCCL|[Cc]onnection (closed|reset|refused)|UNAVAILABLE|ABORTED|'
  r'DEADLINE_EXCEEDED|unhealthy|[Hh]eartbeat|coordination service'
)

# Times in seconds, all our choice: to connect to the other processes, to detect
# that one no longer answers, to leave that to JAX, which aborts the process, to
# wait for the others at the end, for process 0 to end after the others when one
# has failed, and for a shared directory to show what another host wrote.
CONNECT_TIMEOUT = 300
HEARTBEAT_TIMEOUT = 30
ABORT_TIMEOUT = 600
DISCONNECT_TIMEOUT = 60
END_LAST_TIME = 5
SHARED_TIMEOUT = 60


class AllProcessesError(UserError):
  """An error that every process raises, so that all end with one status."""

  def __init__(self, *problems: str, exit_code: int = 1):
    super().__init__(*problems)
    self.exit_code = exit_code


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of a run in several processes."""
  group = parser.add_argument_group(
    'several processes',
    'detected on Cloud TPU and under SLURM; elsewhere start the same command '
    'once per process, with all three flags',
  )
  group.add_argument(
    '--coordinator', metavar='HOST:PORT', help='address of process 0'
  )
  group.add_argument('--num_processes', type=int, metavar='N')
  group.add_argument('--process_id', type=int, metavar='I', help='from 0')


def connect(flags: argparse.Namespace) -> None:
  """Connects to the other processes, if there are any; only then imports JAX.

  Args:
    flags: values of the flags of `add_arguments`.

  Raises:
    UserError: if flags are missing or invalid, if the other processes cannot be
      reached, or if processes have different numbers of devices.
  """
  address = _explicit_address(flags)
  if not (address or _is_slurm() or _is_cloud_tpu()):
    return
  backend.import_jax()
  import jax

  # JAX aborts the process where others do not connect: exit before it does.
  timer = threading.Timer(CONNECT_TIMEOUT, _exit_unconnected)
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      **address,
      initialization_timeout=2 * CONNECT_TIMEOUT,
      heartbeat_timeout_seconds=ABORT_TIMEOUT,
      shutdown_timeout_seconds=DISCONNECT_TIMEOUT,
    )
    devices = Counter(device.process_index for device in jax.devices())
  except Exception as error:  # The type depends on the transport.
    reason = ' '.join(str(error).split())[:200]
    raise UserError(_unconnected(reason)) from error
  finally:
    timer.cancel()
  _Membership.index = jax.process_index()
  _Membership.count = jax.process_count()
  _Membership.heartbeats = _start_heartbeats()
  numbers = [str(devices[index]) for index in range(count())]
  if len(set(numbers)) > 1:
    raise AllProcessesError(
      f'the processes have {", ".join(numbers)} devices. Give every process '
      'the same number.'
    )


def _start_heartbeats() -> Heartbeats:
  # Private: JAX has no public way to the store of its coordination service.
  from jax._src import distributed

  heartbeats = Heartbeats(
    distributed.global_state.client,
    _Membership.index,
    _Membership.count,
    HEARTBEAT_TIMEOUT,
    _exit_lost,
  )
  heartbeats.start()
  return heartbeats


def _exit_lost(number: int) -> None:
  """Ends this process although its main thread may wait for the lost one."""
  try:
    print(
      f'error: process {number} has not answered for {HEARTBEAT_TIMEOUT} s; '
      'the same command resumes the run',
      file=sys.stderr,
      flush=True,
    )
    _end_last()
  finally:  # Standard error may be closed.
    os._exit(EXIT_CODES[Status.PREEMPTED])


def _explicit_address(flags: argparse.Namespace) -> dict[str, Any]:
  """Checks the flags, and waits until process 0 listens.

  Returns:
    The arguments of `jax.distributed.initialize`; none without flags.
  """
  explicit = {
    'coordinator_address': flags.coordinator,
    'num_processes': flags.num_processes,
    'process_id': flags.process_id,
  }
  missing = [value is None for value in explicit.values()]
  if all(missing):
    return {}
  if any(missing):
    raise UserError(
      '--coordinator, --num_processes and --process_id: give all three or none.'
    )
  host, _, port = flags.coordinator.rpartition(':')
  host = host.strip('[]')  # An IPv6 address stands in brackets.
  if not host or not port.isdecimal():
    raise UserError(f'--coordinator={flags.coordinator}: give HOST:PORT.')
  if not 0 <= flags.process_id < flags.num_processes:
    raise UserError(
      f'--process_id={flags.process_id}: must be from 0 to '
      f'{flags.num_processes - 1}.'
    )
  if flags.process_id:
    _wait_for_listener(host, int(port))
  return explicit


def _unconnected(reason: str) -> str:
  return (
    f'could not connect to the other processes in {CONNECT_TIMEOUT} s '
    f'({reason}). Start every process with the same command.'
  )


def _exit_unconnected() -> None:
  print(f'error: {_unconnected("no answer")}', file=sys.stderr, flush=True)
  os._exit(1)


def _wait_for_listener(host: str, port: int) -> None:
  """Waits until process 0 listens; JAX would abort if it does not."""
  deadline = time.monotonic() + CONNECT_TIMEOUT
  while True:
    try:
      with socket.create_connection((host, port), timeout=5):
        return
    except OSError as error:
      if time.monotonic() > deadline:
        raise UserError(
          f'--coordinator={host}:{port}: could not be reached in '
          f'{CONNECT_TIMEOUT} s ({error}). Check that process 0 runs there, '
          'and that no firewall blocks the port.'
        ) from error
      time.sleep(0.5)


def _is_slurm() -> bool:
  """Whether this is one of several tasks of `srun`."""
  return (
    'SLURM_STEP_NODELIST' in os.environ
    and int(os.environ.get('SLURM_NTASKS', 1)) > 1
  )


def _is_cloud_tpu() -> bool:
  """Whether this is a TPU VM, whose runtime knows the other hosts."""
  wanted = 'tpu' in os.environ.get('JAX_PLATFORMS', 'tpu').split(',')
  installed = importlib.util.find_spec('libtpu') is not None
  return wanted and installed and backend.has_tpu()


def leave() -> None:
  """Leaves the other processes, after one has failed."""
  if _Membership.heartbeats:
    _Membership.heartbeats.stop()
  _end_last()
  _Membership.index, _Membership.count = 0, 1


def _end_last() -> None:
  """Lets the others end first: JAX aborts them as soon as process 0 has."""
  if count() > 1 and is_first():
    time.sleep(END_LAST_TIME)


def disconnect() -> None:
  """Waits until all processes have finished, and disconnects."""
  if count() > 1:
    import jax

    assert _Membership.heartbeats
    _Membership.heartbeats.finish()
    jax.distributed.shutdown()


class _Membership:
  """The position of this process among those it is connected to."""

  index = 0
  count = 1
  heartbeats: Heartbeats | None = None


def is_first() -> bool:
  """Whether this is process 0, the only one that writes files."""
  return _Membership.index == 0


def count() -> int:
  """The number of processes."""
  return _Membership.count


def gather(text: str) -> list[str]:
  """Gathers a text of every process; every process must call it.

  Returns:
    The texts in the order of the processes.
  """
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


def barrier() -> None:
  """Waits until every process has called it."""
  gather('')


def broadcast(value: Any) -> Any:
  """Returns the value of process 0, which JSON can represent."""
  return json.loads(gather(json.dumps(value))[0])


def run_on_all(work: Callable[[], T]) -> T:
  """Runs work that has to succeed in every process.

  Returns:
    The result of this process.

  Raises:
    AllProcessesError: on every process, if the work raises a UserError or an
      OSError on any. It has the problems of this process, or names the first
      process that failed.
  """
  problems: Sequence[str] = ()
  exit_code = 0
  try:
    result = work()
  except UserError as error:
    problems, exit_code = error.problems, error.exit_code
  except OSError as error:
    problems, exit_code = (str(error),), UserError.exit_code
  report = json.dumps([exit_code, socket.gethostname(), *problems])
  reports = [json.loads(each) for each in gather(report)]
  failed = [number for number, (code, *_) in enumerate(reports) if code]
  if not failed:
    return result
  # That of a mistake, 1, where another process can only try again later.
  exit_code = min(reports[number][0] for number in failed)
  if not problems:
    _, host, problem, *_ = reports[failed[0]]
    problems = [f'process {failed[0]} on {host} has failed: {problem}']
  raise AllProcessesError(*problems, exit_code=exit_code)


def is_peer_failure(error: Exception) -> bool:
  """Whether an error says that another process is gone."""
  # JAX raises ValueError if it cannot even start a call.
  of_runtime = isinstance(error, ValueError | RuntimeError)
  return count() > 1 and of_runtime and bool(_PEER_FAILURE.search(str(error)))


def assert_equal(facts: Mapping[str, str]) -> None:
  """Checks that facts have the same values in all processes.

  Args:
    facts: values by names. All processes give the same names.

  Raises:
    AllProcessesError: on every process, with a line for each fact that differs.
  """
  first, *others = map(json.loads, gather(json.dumps(dict(facts))))
  problems = []
  for name, value in first.items():
    for number, other in enumerate(others, start=1):
      if other[name] != value:
        problems.append(
          f'process {number} has another {name} than process 0: {other[name]}, '
          f'not {value}. Start every process with the same command.'
        )
        break
  if problems:
    raise AllProcessesError(*problems)


def broadcast_from_first(
  work: Callable[[], tuple[T, dict[str, Any]]], like: T
) -> tuple[T, dict[str, Any]]:
  """Runs work in process 0 only, and gives its result to all processes.

  Args:
    work: returns a pytree of arrays, and a dict that JSON can represent.
    like: arrays with the structure, shapes and dtypes of that pytree.

  Raises:
    AllProcessesError: on every process, if the work raises a UserError or an
      OSError.
  """
  if count() == 1:
    return work()
  import jax
  from jax.experimental import multihost_utils

  done = run_on_all(lambda: work() if is_first() else None)
  # As integers: the broadcast is a sum, which turns -0.0 into 0.0.
  bits = multihost_utils.broadcast_one_to_all(
    jax.tree.map(_to_bits, like if done is None else done[0])
  )
  tree = jax.tree.map(lambda x, own: x.view(own.dtype), bits, like)
  return tree, broadcast(None if done is None else done[1])


def _to_bits(x: Any) -> Any:
  return x.view(f'uint{8 * x.dtype.itemsize}')
