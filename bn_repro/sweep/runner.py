"""Runs trials: ordinary commands in processes of their own, a few at a time.

Nothing is remembered but what the trials write into their directories, so that
a runner which was killed is simply started again.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
import ctypes
import dataclasses
import datetime
import fcntl
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any

from bn_repro.errors import UserError
from bn_repro.runtime import workdir as workdir_lib
from bn_repro.runtime.preemption import Preemption

# Seconds between two looks at the processes.
_INTERVAL = 0.1
# Of a `metrics.jsonl`, as much of its end as has the last evaluation in it.
_TAIL_BYTES = 20_000

WAITING = 'waiting'
# Another process has its workdir: one that a killed runner left, or one of
# another runner.
ELSEWHERE = 'runs elsewhere'

_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass
class Trial:
  """A run, and how it stands.

  Attributes:
    name: for people.
    workdir: its directory; what it says goes to a `.log` beside it.
    command: what trains it, and resumes it.
    images: that it sees in all, as a measure of its length.
    total_steps: in which it sees them.
    state: of `workdir.EXIT_CODES`, or waiting, or runs elsewhere.
    seconds: for which its processes have run, in this runner.
    failures: how often in a row it has ended without having got further.
    step: the furthest that it is known to have got.
    problem: why its process could not be started, if so.
  """

  name: str
  workdir: Path
  command: Sequence[str]
  images: int
  total_steps: int
  state: str = WAITING
  seconds: float = 0.0
  failures: int = 0
  step: int = 0
  problem: str = ''

  @property
  def log(self) -> Path:
    """What its processes have said."""
    return self.workdir.with_name(f'{self.workdir.name}.log')


class Progress:
  """What is told of trials as they run; by itself it says nothing."""

  def started(self, trial: Trial) -> None:
    """A trial's process has been started."""

  def ended(self, trial: Trial, code: int) -> None:
    """A trial's process has ended, with the state that the trial is in now.

    Or it could not be started, and has failed.
    """

  def found_elsewhere(self, trial: Trial) -> None:
    """Another process trains a trial, and is waited for."""

  def tick(self) -> None:
    """Called several times a second."""

  def stopping(self) -> None:
    """All have been told to save and stop."""

  def close(self) -> None:
    """No process runs any more."""


class Runner:
  """Runs trials, some at a time, and lets them save when it is to stop."""

  def __init__(
    self,
    trials: Iterable[Trial],
    slots: Sequence[Mapping[str, str]],
    retries: int,
    progress: Progress,
  ):
    """Prepares to run.

    Args:
      trials: in the order in which they are started; each is taken when there
        is room for it.
      slots: one for each trial at a time; what it adds to the environment.
      retries: how often a trial that failed is started again.
      progress: is told.
    """
    self._source = iter(trials)
    self._waiting: deque[Trial] = deque()
    self._free = deque(slots)
    self._retries = retries
    self._progress = progress
    self._running: dict[subprocess.Popen[bytes], _Attempt] = {}

  def run(self, preemption: Preemption) -> bool:
    """Runs all trials to their ends.

    Returns:
      Whether it was not told to stop.
    """
    try:
      return self._run(preemption)
    finally:
      self._progress.close()

  def _run(self, preemption: Preemption) -> bool:
    stopping = False
    while True:
      if preemption.signal and not stopping:
        stopping = True
        self._source = iter(())
        self._waiting.clear()
        for process in self._running:
          process.terminate()
        self._progress.stopping()
      for process in [p for p in self._running if p.poll() is not None]:
        self._end(process, stopping=stopping)
      while self._free and self._start_next():
        pass
      self._progress.tick()
      if not self._running and not self._waiting:
        return not stopping
      time.sleep(_INTERVAL)

  def _start_next(self) -> bool:
    """Starts the first trial that can be; False if there is none."""
    taken = []
    started = False
    while not started and (trial := self._next()) is not None:
      if is_taken(trial.workdir):
        taken.append(trial)
        if trial.state != ELSEWHERE:
          trial.state = ELSEWHERE
          self._progress.found_elsewhere(trial)
      else:
        started = self._start(trial)
    self._waiting.extend(taken)
    return started

  def _next(self) -> Trial | None:
    """A new trial, or one that is to be started again."""
    trial = next(self._source, None)
    if trial is None and self._waiting:
      trial = self._waiting.popleft()
    return trial

  def _start(self, trial: Trial) -> bool:
    """Starts a trial's process; without one it has failed."""
    trial.step = max(trial.step, last_step(trial.workdir))
    try:
      process = _start(trial, self._free[0])
    except OSError as error:
      # It has no log to say it in.
      trial.state, trial.problem = workdir_lib.Status.FAILED, str(error)
      self._progress.ended(trial, workdir_lib.EXIT_CODES[trial.state])
      return False
    self._running[process] = _Attempt(trial, self._free.popleft())
    trial.state = workdir_lib.Status.RUNNING
    self._progress.started(trial)
    return True

  def _end(self, process: subprocess.Popen[bytes], *, stopping: bool) -> None:
    attempt = self._running.pop(process)
    self._free.append(attempt.slot)
    trial, code = attempt.trial, process.returncode
    trial.seconds += time.monotonic() - attempt.start
    trial.state = _STATES.get(code, workdir_lib.Status.FAILED)
    if trial.state not in workdir_lib.ENDED:
      if stopping:
        # Also one that had not yet begun to listen to signals.
        trial.state = workdir_lib.Status.PREEMPTED
      else:
        self._try_again(trial)
    self._progress.ended(trial, code)

  def _try_again(self, trial: Trial) -> None:
    """Has a trial started once more, unless it does not get further."""
    step = last_step(trial.workdir)
    trial.failures = 0 if step > trial.step else trial.failures + 1
    trial.step = max(trial.step, step)
    if trial.failures <= self._retries:
      trial.state = WAITING
      self._waiting.append(trial)
    else:
      trial.state = workdir_lib.Status.FAILED


_STATES = {code: state for state, code in workdir_lib.EXIT_CODES.items()}


@dataclasses.dataclass(frozen=True)
class _Attempt:
  """A process of a trial."""

  trial: Trial
  slot: Mapping[str, str]
  start: float = dataclasses.field(default_factory=time.monotonic)


def _start(
  trial: Trial, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
  trial.log.parent.mkdir(parents=True, exist_ok=True)
  with trial.log.open('ab') as log:
    return subprocess.Popen(
      trial.command,
      env={**os.environ, **environment},
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      # In a session of its own: Ctrl-C reaches it through the runner alone.
      start_new_session=True,
      preexec_fn=_end_with_parent,
    )


def _end_with_parent() -> None:
  """Has the kernel tell this process to save and stop when its parent dies.

  Elsewhere than on Linux it trains on, and a runner waits for it.
  """
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def slots(jobs: int | None) -> list[dict[str, str]]:
  """What each of the trials that run at a time adds to the environment.

  Args:
    jobs: how many; None for what the machine can hold: one on each NVIDIA GPU,
      or one on a TPU, or one a core of a CPU.

  Raises:
    UserError: if there are fewer GPUs than jobs.
  """
  platforms = os.environ.get('JAX_PLATFORMS', '')
  on_cpu = platforms == 'cpu'
  if not on_cpu and (gpus := _gpus()):
    if jobs is not None and jobs > len(gpus):
      raise UserError(
        f'--jobs={jobs}: there are {len(gpus)} GPUs, and a trial takes one of '
        'them. Use fewer jobs, or JAX_PLATFORMS=cpu.'
      )
    if jobs == 1:
      # Alone, it takes them all.
      return [{}]
    return [{'CUDA_VISIBLE_DEVICES': gpu} for gpu in gpus[:jobs]]
  if jobs is None:
    has_tpu = any(Path(p).exists() for p in ('/dev/accel0', '/dev/vfio/0'))
    jobs = 1 if has_tpu and not on_cpu else _num_cores()
  return [{} for _ in range(jobs)]


def _num_cores() -> int:
  """Cores that this process may use, as SLURM or taskset have it."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _gpus() -> list[str]:
  """Numbers of the NVIDIA GPUs that this process may use."""
  named = os.environ.get('CUDA_VISIBLE_DEVICES')
  if named is not None:
    # -1 hides all.
    return [gpu for gpu in named.split(',') if gpu and gpu != '-1']
  found = [
    path.name.removeprefix('nvidia') for path in Path('/dev').glob('nvidia*')
  ]
  return sorted((gpu for gpu in found if gpu.isdecimal()), key=int)


def is_taken(workdir: Path) -> bool:
  """Whether another process has claimed a run's directory."""
  try:
    with (workdir / 'lock').open() as lock:
      fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except OSError:
    # None there, or one that cannot be opened, of which `main` will complain.
    return False
  return False


def has_ended(workdir: Path, total_steps: int) -> str | None:
  """How a run has ended, if it has nothing left to do."""
  status = workdir_lib.read_json(workdir / 'status.json') or {}
  name = status.get('status')
  if name == workdir_lib.Status.DIVERGED:
    return name
  if name == workdir_lib.Status.DONE and status.get('step') == total_steps:
    return name
  return None


def last_lines(workdir: Path) -> list[dict[str, Any]]:
  """The last lines of a run's `metrics.jsonl`, some of its end at most."""
  try:
    with (workdir / 'metrics.jsonl').open('rb') as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(max(0, size - _TAIL_BYTES))
      *whole, _ = file.read().split(b'\n')
  except (FileNotFoundError, ValueError):
    return []
  lines = []
  for number, line in enumerate(whole):
    try:
      lines.append(json.loads(line))
    except ValueError:
      # The first may be the rest of one.
      if number:
        raise
  return lines


def last_step(workdir: Path) -> int:
  """How far a run is known to have got."""
  return max((line['step'] for line in last_lines(workdir)), default=0)


def seconds_taken(workdir: Path) -> float | None:
  """Wall time of a run that is done and was never interrupted."""
  try:
    facts = workdir_lib.read_json(workdir / 'run.json') or {}
    status = workdir_lib.read_json(workdir / 'status.json') or {}
    if (
      status.get('status') != workdir_lib.Status.DONE or facts['earlier_starts']
    ):
      return None
    started = datetime.datetime.fromisoformat(facts['started'])
    ended = (workdir / 'status.json').stat().st_mtime
  except (KeyError, ValueError):
    return None
  return ended - started.timestamp()


def last_words(trial: Trial) -> str:
  """Why a trial has failed, in the last line that it has said."""
  if trial.problem:
    return trial.problem
  said = trial.log.read_text(errors='replace') if trial.log.is_file() else ''
  lines = said.splitlines()
  return f'see {trial.log}: {lines[-1] if lines else "it said nothing."}'
