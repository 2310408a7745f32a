"""Shows how the trials of a sweep advance."""

from collections import Counter
from collections.abc import Sequence
import time

from rich.live import Live
from rich.table import Table

from bn_repro.runtime import workdir as workdir_lib
from bn_repro.runtime.progress import duration, terminal
from bn_repro.runtime.workdir import Status
from bn_repro.sweep import runner as runner_lib
from bn_repro.sweep.runner import TrialProcess
from bn_repro.sweep.sweep import TrialStatus

# Seconds between updates of the table on a terminal, and between lines.
_TABLE_INTERVAL = 1.0
_LINE_INTERVAL = 30.0
# Rows of a terminal that the table does not use.
_MARGIN = 8


class SweepProgress(runner_lib.Progress):
  """A table on a terminal, or else plain lines, on standard output.

  Remaining times are extrapolated from what this runner has trained. That of
  all trials assumes that each of them takes equally long.
  """

  def __init__(self, trials: Sequence[TrialProcess], jobs: int):
    """Starts the display.

    Args:
      trials: trials that are not complete.
      jobs: number of trials that run at once.
    """
    self._trials = trials
    self._jobs = jobs
    self._first_done = sum(map(_fraction_done, trials))
    self._live: Live | None = None
    self._interval = _LINE_INTERVAL
    console = terminal()
    if console is not None:
      self._live = Live(console=console, auto_refresh=False)
      self._live.start()
      self._interval = _TABLE_INTERVAL
    self._start = time.monotonic()
    self._next_update = self._start + self._interval

  def changed(self, trial: TrialProcess) -> None:
    """Prints the new state of a trial; with a table, not that it started."""
    if trial.state == Status.RUNNING:
      if self._live is None:
        _say(f'{trial.name}: running from step {trial.step}')
      return
    if trial.state == TrialStatus.ELSEWHERE:
      holder = workdir_lib.Workdir(str(trial.workdir)).holder()
      _say(
        f'{trial.name}: waiting: workdir locked by '
        f'{holder or "another process"}'
      )
      return
    state = trial.state
    if state == TrialStatus.WAITING:
      state = f'exit code {trial.code}, will be restarted'
    elif state == Status.FAILED:
      state = f'failed with exit code {trial.code}, {trial.failure_reason()}'
    _say(
      f'{trial.name}: {state}{_accuracy(trial)}, {duration(trial.seconds)}; '
      f'{self._summary()}'
    )

  def stopping(self) -> None:
    """Prints that the trials are saving, which takes a moment."""
    _say('stopping: the running trials are saving')

  def tick(self) -> None:
    """Updates the table, or prints a line for each running trial, when due."""
    now = time.monotonic()
    if now < self._next_update:
      return
    self._next_update = now + self._interval
    running = [t for t in self._trials if t.state == Status.RUNNING]
    for trial in running:
      trial.update()
    if self._live is not None:
      self._live.update(self._table(self._live.console.height), refresh=True)
      return
    for trial in running:
      _say(
        f'{trial.name}: step {trial.step}/{trial.total_steps}'
        f'{_accuracy(trial)}, ETA {_remaining(trial)}'
      )

  def close(self) -> None:
    """Leaves the last table on the terminal, and prints the total times.

    The overhead is wall time in excess of the trials' own time divided by the
    number of trials at once.
    """
    if self._live is not None:
      self._live.update(self._table(self._live.console.height), refresh=True)
      self._live.stop()
    wall = time.monotonic() - self._start
    total = sum(trial.seconds for trial in self._trials)
    if total:
      overhead = max(wall * self._jobs / total - 1, 0.0)
      _say(
        f'Wall {duration(wall)}; trials {duration(total)} in total; '
        f'overhead {100 * overhead:.0f} %'
      )

  def _summary(self) -> str:
    """The number of trials in each state, and the remaining time of all."""
    counts = Counter(trial.state for trial in self._trials)
    states = ', '.join(f'{number} {state}' for state, number in counts.items())
    done = sum(map(_fraction_done, self._trials))
    left = len(self._trials) - done
    return f'{states}, ETA {_eta(self._start, done - self._first_done, left)}'

  def _table(self, height: int) -> Table:
    """Running trials, then ended ones, the latest first, then the others."""
    places: dict[str, int] = {Status.RUNNING: 0, TrialStatus.WAITING: 2}
    trials = sorted(
      self._trials, key=lambda trial: (places.get(trial.state, 1), -trial.start)
    )
    table = Table(title=self._summary(), title_justify='left')
    for head in ('trial', 'state', 'step', 'accuracy', 'ETA or time'):
      table.add_column(head)
    room = max(height - _MARGIN, 3)
    for trial in trials[:room]:
      table.add_row(
        trial.name,
        trial.state,
        f'{trial.step}/{trial.total_steps}',
        '' if trial.accuracy is None else f'{trial.accuracy:.4f}',
        _remaining(trial)
        if trial.state == Status.RUNNING
        else duration(trial.seconds),
      )
    if trials[room:]:
      table.caption = f'and {len(trials) - room} more'
    return table


def _say(text: str) -> None:
  """Prints a line at once, which Rich moves above the table."""
  print(text, flush=True)


def _accuracy(trial: TrialProcess) -> str:
  """The accuracy of a trial, as a part of a printed line."""
  return '' if trial.accuracy is None else f', accuracy {trial.accuracy:.4f}'


def _fraction_done(trial: TrialProcess) -> float:
  # An ended trial needs no more time, however early it ended.
  if trial.state in (*workdir_lib.ENDED, Status.FAILED):
    return 1.0
  return trial.step / trial.total_steps


def _remaining(trial: TrialProcess) -> str:
  """The remaining time of a running trial."""
  done = trial.step - trial.first_step
  return _eta(trial.start, done, trial.total_steps - trial.step)


def _eta(start: float, done: float, left: float) -> str:
  """The time that `left` takes if `done` took the time since `start`."""
  if done <= 0:
    return '?'
  return duration((time.monotonic() - start) / done * left)
