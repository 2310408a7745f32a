"""Runs trials, each the ordinary command in its own process, a few at a time.

All state is in the workdirs of the trials. After a kill, a new runner continues
from there.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
import ctypes
import dataclasses
import json
import os
from pathlib import Path
import signal
import subprocess
import sys
import time
from typing import Any

from bn_repro import files, host
from bn_repro.errors import UserError
from bn_repro.runtime import workdir as workdir_lib
from bn_repro.runtime.preemption import Preemption
from bn_repro.sweep.sweep import Trial, TrialStatus

# Seconds between two polls of the processes.
_INTERVAL = 0.1
# Bytes at the end of a `metrics.jsonl` that include the last evaluation.
_TAIL_BYTES = 20_000

# What the seconds of a training line are spent on: see `timing.Clock.lap`.
_TRAINING = ('waiting_for_data', 'step', 'idle')

# From linux/prctl.h.
_PR_SET_PDEATHSIG = 1

_STATES = {code: state for state, code in workdir_lib.EXIT_CODES.items()}


@dataclasses.dataclass(eq=False)
class TrialProcess:
  """A trial as the runner sees it: a command, and its progress.

  Attributes:
    name: name of the trial.
    workdir: directory of the run.
    command: command that trains the trial, and that resumes it.
    total_steps: steps of the whole run.
    state: status of the run, or a `TrialStatus`.
    step: last recorded step, as of the last `update`.
    accuracy: accuracy of the last evaluation; None if there is none.
    first_step: `step` when its last process started.
    start: `time.monotonic()` when its last process started.
    seconds: total run time of its processes, in this runner.
    failures: number of successive processes that ended without progress.
    code: exit code of its last process.
    problem: reason why the process could not be started; empty if it could.
  """

  name: str
  workdir: Path
  command: Sequence[str]
  total_steps: int
  state: str = TrialStatus.WAITING
  step: int = 0
  accuracy: float | None = None
  first_step: int = 0
  start: float = 0.0
  seconds: float = 0.0
  failures: int = 0
  code: int = 0
  problem: str = ''

  @property
  def log(self) -> Path:
    """The output of its processes, next to the workdir."""
    return self.workdir.with_name(f'{self.workdir.name}.log')

  def update(self, workdir: Path | None = None) -> None:
    """Reads the last step and accuracy that the run has recorded.

    Args:
      workdir: copy of its workdir to read, if not the workdir itself.
    """
    lines = last_lines(workdir or self.workdir)
    self.step = max([self.step, *(line['step'] for line in lines)])
    # Test images only where there are no others, so that no choice relies on
    # them.
    for split in ('test', 'validation'):
      for line in lines:
        if line['split'] == split:
          self.accuracy = line['accuracy']

  def failure_reason(self) -> str:
    """Why it has failed: the last line of its log."""
    if self.problem:
      return self.problem
    output = self.log.read_text(errors='replace') if self.log.is_file() else ''
    lines = output.splitlines()
    return f'see {self.log}: {lines[-1] if lines else "no output"}'


def command(trial: Trial, folder: Path) -> list[str]:
  """The command that trains a trial in the directory of a sweep."""
  return [
    *(sys.executable, '-m', 'bn_repro.main'),
    f'--config={trial.config_spec}',
    f'--workdir={files.as_given(folder / trial.name)}',
    *(f'--config.{override}' for override in trial.overrides),
  ]


def trial_process(trial: Trial, folder: Path, copy: Path) -> TrialProcess:
  """Returns the process that trains a trial.

  Args:
    trial: the trial.
    folder: directory of the sweep.
    copy: where to read what the trial has computed; `folder` itself if that is
      not in a bucket.
  """
  process = TrialProcess(
    name=trial.name,
    workdir=folder / trial.name,
    command=command(trial, folder),
    total_steps=trial.total_steps,
  )
  process.update(copy / trial.name)
  return process


def remaining(
  trials: Iterable[Trial], folder: Path, copy: Path
) -> list[TrialProcess]:
  """Returns the processes of the trials that are not complete.

  Args:
    trials: trials of a sweep.
    folder: see `trial_process`.
    copy: see `trial_process`.
  """
  return [
    trial_process(trial, folder, copy)
    for trial in trials
    if not final_status(copy / trial.name, trial.total_steps)
  ]


def failures(trials: Iterable[TrialProcess]) -> list[str]:
  """Returns a line for each trial that has failed, with the reason."""
  return [
    f'{trial.name}: failed, {trial.failure_reason()}'
    for trial in trials
    if trial.state == workdir_lib.Status.FAILED
  ]


class Progress:
  """Callbacks of a runner. These do nothing."""

  def changed(self, trial: TrialProcess) -> None:
    """A trial has started or ended, or another process has locked it."""

  def stopping(self) -> None:
    """All running trials have received SIGTERM."""

  def tick(self) -> None:
    """Called several times a second."""

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
    """Initializes a runner.

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
    self._postponed = False
    # The running processes, each with its trial and slot.
    self._running: dict[
      subprocess.Popen[bytes], tuple[TrialProcess, Mapping[str, str]]
    ] = {}

  def run(self, preemption: Preemption, check: Callable[[], None]) -> bool:
    """Runs all trials to completion.

    Args:
      preemption: signals of this process.
      check: called several times a second; if it raises an error, the running
        trials save and end.

    Returns:
      False if it was interrupted by a signal, or trials can only be resumed
      later.
    """
    stopping = False
    try:
      while self._running or self._waiting:
        check()
        if preemption.signal and not stopping:
          stopping = True
          self._waiting.clear()
          self._terminate()
        for process in [p for p in self._running if p.poll() is not None]:
          self._end(process, stopping=stopping)
        while self._free and self._start_next():
          pass
        self._progress.tick()
        if self._running or self._waiting:
          time.sleep(_INTERVAL)
    except UserError:
      if not stopping:
        self._terminate()
      for process in self._running:
        process.wait()
      raise
    finally:
      self._progress.close()
    return not (stopping or self._postponed)

  def _terminate(self) -> None:
    for process in self._running:
      process.terminate()
    self._progress.stopping()

  def _start_next(self) -> bool:
    """Starts the first trial whose workdir is free; False if there is none."""
    for trial in list(self._waiting):
      if not is_locked(trial.workdir):
        self._waiting.remove(trial)
        self._start(trial)
        return True
      if trial.state != TrialStatus.ELSEWHERE:
        trial.state = TrialStatus.ELSEWHERE
        self._progress.changed(trial)
    return False

  def _start(self, trial: TrialProcess) -> None:
    """Starts the process of a trial; the trial fails if that is impossible."""
    trial.first_step, trial.start = trial.step, time.monotonic()
    try:
      process = _start_process(trial, self._free[0])
    except OSError as error:
      trial.state, trial.problem = workdir_lib.Status.FAILED, str(error)
      trial.code = workdir_lib.EXIT_CODES[trial.state]
    else:
      trial.state = workdir_lib.Status.RUNNING
      self._running[process] = trial, self._free.popleft()
    self._progress.changed(trial)

  def _end(self, process: subprocess.Popen[bytes], *, stopping: bool) -> None:
    trial, slot = self._running.pop(process)
    self._free.append(slot)
    trial.seconds += time.monotonic() - trial.start
    trial.code = process.returncode
    trial.state = _STATES.get(trial.code, workdir_lib.Status.FAILED)
    trial.update()
    if trial.state not in workdir_lib.ENDED:
      if stopping:
        # Also if SIGTERM arrived before the trial had installed its handler.
        trial.state = workdir_lib.Status.PREEMPTED
      else:
        self._retry(trial)
    self._progress.changed(trial)

  def _retry(self, trial: TrialProcess) -> None:
    """Queues a trial again, unless it has failed too often without progress."""
    progress = trial.step > trial.first_step
    trial.failures = 0 if progress else trial.failures + 1
    if trial.failures <= self._retries:
      trial.state = TrialStatus.WAITING
      self._waiting.append(trial)
    elif trial.state == workdir_lib.Status.PREEMPTED:
      # As if another machine has its workdir, or the bucket is down.
      self._postponed = True
    else:
      trial.state = workdir_lib.Status.FAILED


def _start_process(
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
    jobs = 1 if has_tpu and not on_cpu else host.num_cores()
  return [{} for _ in range(jobs)]


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
      return not files.lock(lock, shared=True)
  except (OSError, UserError):
    # There is no lock, or `main` will report why it cannot be locked.
    return False


def final_status(workdir: Path, total_steps: int) -> str | None:
  """The status of a run that has nothing left to do; None for other runs."""
  content = workdir_lib.read_json(workdir / 'status.json') or {}
  status = content.get('status')
  is_short = content.get('step') != total_steps
  if status == workdir_lib.Status.DONE and is_short:
    return None
  return status if status in workdir_lib.ENDED else None


def last_lines(workdir: Path) -> list[dict[str, Any]]:
  """The last lines of a run's `metrics.jsonl`, at most `_TAIL_BYTES`.

  Empty if the file cannot be read or is damaged, which `main` reports.
  """
  try:
    with (workdir / 'metrics.jsonl').open('rb') as file:
      start = max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES)
      file.seek(start)
      lines = file.read().split(b'\n')
    # The first line may be cut, and the last one incomplete.
    return [json.loads(line) for line in lines[1 if start else 0 : -1]]
  except (OSError, ValueError):
    return []


def seconds_taken(workdir: Path) -> float:
  """Time that a run has taken in seconds, without the starts of its processes.

  Raises:
    UserError: if `metrics.jsonl` is damaged.
  """
  lines = workdir_lib.read_metrics(workdir / 'metrics.jsonl')
  timings = [line['timing'] for line in lines if line['split'] == 'train']
  # `seconds` are those of the shares that are training.
  return sum(
    timing['seconds'] / sum(timing['shares'][kind] for kind in _TRAINING)
    for timing in timings
  )
