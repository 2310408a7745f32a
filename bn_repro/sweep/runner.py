"""Runs trials, each the ordinary command in its own process, a few at a time.

All state is in the workdirs of the trials. After a kill, a new runner continues
from there.
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
from bn_repro.sweep.sweep import Trial, TrialStatus

# Seconds between two polls of the processes.
_INTERVAL = 0.1
# Bytes at the end of a `metrics.jsonl` that include the last evaluation.
_TAIL_BYTES = 20_000

# From linux/prctl.h.
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass
class TrialProcess:
  """A trial as the runner sees it: a command, and its progress.

  Attributes:
    name: name of the trial.
    workdir: directory of the run.
    command: command that trains the trial, and that resumes it.
    images: images that the whole run trains on, as a measure of its length.
    total_steps: steps of the whole run.
    state: status of the run, or a `TrialStatus`.
    seconds: total run time of its processes, in this runner.
    failures: number of successive processes that ended without progress.
    step: last step known.
    problem: reason why the process could not be started; empty if it could.
  """

  name: str
  workdir: Path
  command: Sequence[str]
  images: int
  total_steps: int
  state: str = TrialStatus.WAITING
  seconds: float = 0.0
  failures: int = 0
  step: int = 0
  problem: str = ''

  @property
  def log(self) -> Path:
    """The output of its processes, next to the workdir."""
    return self.workdir.with_name(f'{self.workdir.name}.log')


def trial_process(trial: Trial, folder: Path) -> TrialProcess:
  """Returns the process that trains a trial in the directory of a sweep."""
  workdir = folder / trial.name
  return TrialProcess(
    name=trial.name,
    workdir=workdir,
    command=[
      *(sys.executable, '-m', 'bn_repro.main'),
      f'--config={trial.config_spec}',
      f'--workdir={workdir}',
      *(f'--config.{override}' for override in trial.overrides),
    ],
    images=trial.images,
    total_steps=trial.total_steps,
  )


def remaining(trials: Iterable[Trial], folder: Path) -> list[TrialProcess]:
  """Returns the processes of the trials that are not complete."""
  return [
    trial_process(trial, folder)
    for trial in trials
    if not final_status(folder / trial.name, trial.total_steps)
  ]


def failures(trials: Iterable[TrialProcess]) -> list[str]:
  """Returns a line for each trial that has failed, with the reason."""
  return [
    f'{trial.name}: failed, {failure_reason(trial)}'
    for trial in trials
    if trial.state == workdir_lib.Status.FAILED
  ]


class Progress:
  """Callbacks of a runner. These do nothing."""

  def started(self, trial: TrialProcess) -> None:
    """The process of a trial has started."""

  def ended(self, trial: TrialProcess, code: int) -> None:
    """The process of a trial has ended, or could not be started.

    Args:
      trial: trial with its new state.
      code: exit code of the process.
    """

  def found_elsewhere(self, trial: TrialProcess) -> None:
    """Another process has locked the workdir of a trial."""

  def tick(self) -> None:
    """Called several times a second."""

  def stopping(self) -> None:
    """All running trials have received SIGTERM."""

  def close(self) -> None:
    """All processes have ended."""


class Runner:
  """Runs trials, several at a time; when preempted, lets them save first."""

  def __init__(
    self,
    trials: Sequence[TrialProcess],
    slots: Sequence[Mapping[str, str]],
    retries: int,
    progress: Progress,
  ):
    """Initialises a runner.

    Args:
      trials: trials in the order in which they start.
      slots: environment variables to add, for each trial that can run at once.
      retries: times to restart a trial that fails without progress.
      progress: receiver of callbacks.
    """
    self._waiting = deque(trials)
    self._free = deque(slots)
    self._retries = retries
    self._progress = progress
    self._running: dict[subprocess.Popen[bytes], _Attempt] = {}

  def run(self, preemption: Preemption) -> bool:
    """Runs all trials to completion.

    Returns:
      False if it was interrupted by a signal.
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
    """Starts the first trial whose workdir is free; False if there is none."""
    locked = []
    started = False
    while not started and self._waiting:
      trial = self._waiting.popleft()
      if is_locked(trial.workdir):
        locked.append(trial)
        if trial.state != TrialStatus.ELSEWHERE:
          trial.state = TrialStatus.ELSEWHERE
          self._progress.found_elsewhere(trial)
      else:
        started = self._start(trial)
    self._waiting.extend(locked)
    return started

  def _start(self, trial: TrialProcess) -> bool:
    """Starts the process of a trial; the trial fails if that is impossible."""
    trial.step = max(trial.step, last_step(trial.workdir))
    try:
      process = _start(trial, self._free[0])
    except OSError as error:
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
        # Also if SIGTERM arrived before the trial had installed its handler.
        trial.state = workdir_lib.Status.PREEMPTED
      else:
        self._retry(trial)
    self._progress.ended(trial, code)

  def _retry(self, trial: TrialProcess) -> None:
    """Queues a trial again, unless it has failed too often without progress."""
    step = last_step(trial.workdir)
    trial.failures = 0 if step > trial.step else trial.failures + 1
    trial.step = max(trial.step, step)
    if trial.failures <= self._retries:
      trial.state = TrialStatus.WAITING
      self._waiting.append(trial)
    else:
      trial.state = workdir_lib.Status.FAILED


_STATES = {code: state for state, code in workdir_lib.EXIT_CODES.items()}


@dataclasses.dataclass(frozen=True)
class _Attempt:
  """A process of a trial."""

  trial: TrialProcess
  slot: Mapping[str, str]
  start: float = dataclasses.field(default_factory=time.monotonic)


def _start(
  trial: TrialProcess, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
  trial.log.parent.mkdir(parents=True, exist_ok=True)
  with trial.log.open('ab') as log:
    return subprocess.Popen(
      trial.command,
      env={**os.environ, **environment},
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      # In its own session, Ctrl-C in a terminal reaches only the runner.
      start_new_session=True,
      preexec_fn=_end_with_parent,
    )


def _end_with_parent() -> None:
  """Asks the kernel to send SIGTERM to this process when its parent dies.

  On systems other than Linux it continues, and the next runner waits for it.
  """
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def slots(jobs: int | None) -> list[dict[str, str]]:
  """Environment variables to add, for each trial that can run at once.

  Args:
    jobs: number of trials at once; None for one per NVIDIA GPU, one on a TPU,
      or one per CPU core.

  Raises:
    UserError: if there are fewer GPUs than jobs.
  """
  platforms = os.environ.get('JAX_PLATFORMS', '')
  on_cpu = platforms == 'cpu'
  if not on_cpu and (gpus := _gpus()):
    if jobs is not None and jobs > len(gpus):
      raise UserError(
        f'--jobs={jobs}: there are {len(gpus)} GPUs, and each trial takes one. '
        'Use fewer jobs, or JAX_PLATFORMS=cpu.'
      )
    if jobs == 1:
      # A single trial uses all GPUs.
      return [{}]
    return [{'CUDA_VISIBLE_DEVICES': gpu} for gpu in gpus[:jobs]]
  if jobs is None:
    has_tpu = any(Path(p).exists() for p in ('/dev/accel0', '/dev/vfio/0'))
    jobs = 1 if has_tpu and not on_cpu else _num_cores()
  return [{} for _ in range(jobs)]


def _num_cores() -> int:
  """Cores that this process may use, as limited by SLURM or taskset."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def _gpus() -> list[str]:
  """Indices of the NVIDIA GPUs that this process may use."""
  named = os.environ.get('CUDA_VISIBLE_DEVICES')
  if named is not None:
    # -1 hides all GPUs.
    return [gpu for gpu in named.split(',') if gpu and gpu != '-1']
  found = [
    path.name.removeprefix('nvidia') for path in Path('/dev').glob('nvidia*')
  ]
  return sorted((gpu for gpu in found if gpu.isdecimal()), key=int)


def is_locked(workdir: Path) -> bool:
  """Whether another process has locked a workdir."""
  try:
    with (workdir / 'lock').open() as lock:
      fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except BlockingIOError:
    return True
  except OSError:
    # There is no lock, or `main` will report that it cannot be opened.
    return False
  return False


def final_status(workdir: Path, total_steps: int) -> str | None:
  """The status of a run that has nothing left to do; None for other runs."""
  status = workdir_lib.read_json(workdir / 'status.json') or {}
  name = status.get('status')
  if name == workdir_lib.Status.DIVERGED:
    return name
  if name == workdir_lib.Status.DONE and status.get('step') == total_steps:
    return name
  return None


def last_lines(workdir: Path) -> list[dict[str, Any]]:
  """The last lines of a run's `metrics.jsonl`, at most `_TAIL_BYTES`."""
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
      # The first line may be cut.
      if number:
        raise
  return lines


def last_step(workdir: Path) -> int:
  """The last step in a run's `metrics.jsonl`; 0 if there is none."""
  return max((line['step'] for line in last_lines(workdir)), default=0)


def seconds_taken(workdir: Path) -> float | None:
  """Wall time of a completed run in seconds; None if it was interrupted."""
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


def failure_reason(trial: TrialProcess) -> str:
  """Why a trial has failed: the last line of its log."""
  if trial.problem:
    return trial.problem
  output = trial.log.read_text(errors='replace') if trial.log.is_file() else ''
  lines = output.splitlines()
  return f'see {trial.log}: {lines[-1] if lines else "no output"}'
