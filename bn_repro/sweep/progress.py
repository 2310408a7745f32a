"""Shows how the trials of a sweep advance."""

from collections import Counter
from collections.abc import Sequence
import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from bn_repro.runtime import workdir as workdir_lib
from bn_repro.runtime.progress import duration
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

  Remaining times are extrapolated from what this runner has trained.
  """

  def __init__(self, trials: Sequence[TrialProcess], jobs: int):
    """Shows the first table.

    Args:
      trials: trials that are not complete.
      jobs: number of trials that run at once.
    """
    self._trials = trials
    self._jobs = jobs
    self._console = _Console(file=sys.stdout, soft_wrap=True, highlight=False)
    self._begin = time.monotonic()
    self._next_update = self._begin
    # Time and step at which each trial started.
    self._starts: dict[str, tuple[float, int]] = {}
    self._metrics: dict[str, _Metrics] = {}
    self._live: Live | None = None
    if self._console.is_terminal:
      self._live = Live(console=self._console, auto_refresh=False)
      self._live.start()

  def started(self, trial: TrialProcess) -> None:
    """Prints a line, unless there is a table."""
    self._starts[trial.name] = time.monotonic(), trial.step
    if self._live is None:
      self._print(f'{trial.name}: running from step {trial.step}')

  def found_elsewhere(self, trial: TrialProcess) -> None:
    """Prints which process has locked the workdir."""
    holder = workdir_lib.Workdir(str(trial.workdir)).holder()
    self._print(
      f'{trial.name}: waiting: workdir locked by {holder or "another process"}'
    )

  def ended(self, trial: TrialProcess, code: int) -> None:
    """Prints the state of the trial, and the remaining time of all."""
    metrics = self._metrics[trial.name] = _Metrics(trial)
    state = trial.state
    if state == TrialStatus.WAITING:
      state = f'exit code {code}, will be restarted'
    elif state == workdir_lib.Status.FAILED:
      state = (
        f'failed with exit code {code}, {runner_lib.failure_reason(trial)}'
      )
    self._print(
      f'{trial.name}: {state}{metrics.text}, {duration(trial.seconds)}; '
      f'{self._counts()}, ETA {self._remaining()}'
    )

  def tick(self) -> None:
    """Updates the table, or prints a line for each running trial, when due."""
    now = time.monotonic()
    if now < self._next_update:
      return
    interval = _LINE_INTERVAL if self._live is None else _TABLE_INTERVAL
    self._next_update = now + interval
    running = [t for t in self._trials if t.state == workdir_lib.Status.RUNNING]
    for trial in running:
      self._metrics[trial.name] = _Metrics(trial)
    if self._live is not None:
      self._live.update(self._table(), refresh=True)
    elif now > self._begin + interval:
      for trial in running:
        metrics = self._metrics[trial.name]
        self._print(
          f'{trial.name}: step {metrics.step}/{trial.total_steps}'
          f'{metrics.text}, ETA {self._remaining_of(trial)}'
        )

  def stopping(self) -> None:
    """Prints that the trials are saving, which takes a moment."""
    self._print('stopping: the running trials are saving')

  def close(self) -> None:
    """Leaves the last table on the terminal, and prints the total times.

    The overhead is wall time in excess of the trials' own time divided by the
    number of trials at once.
    """
    if self._live is not None:
      self._live.update(self._table(), refresh=True)
      self._live.stop()
    wall = time.monotonic() - self._begin
    total = sum(trial.seconds for trial in self._trials)
    if total:
      overhead = max(wall * self._jobs / total - 1, 0.0)
      self._print(
        f'Wall {duration(wall)}; trials {duration(total)} in total; '
        f'overhead {100 * overhead:.0f} %'
      )

  def _print(self, text: str) -> None:
    self._console.print(text, markup=False)

  def _counts(self) -> str:
    counts = Counter(trial.state for trial in self._trials)
    return ', '.join(f'{number} {state}' for state, number in counts.items())

  def _table(self) -> Table:
    """Running trials, then ended ones, the latest first, then the others."""
    order: dict[str, int] = {
      workdir_lib.Status.RUNNING: 0,
      TrialStatus.WAITING: 2,
    }
    ended = list(self._metrics)
    trials = sorted(
      self._trials,
      key=lambda trial: (
        order.get(trial.state, 1),
        -ended.index(trial.name) if trial.name in ended else 0,
      ),
    )
    table = Table(
      title=f'{self._counts()}; ETA {self._remaining()}', title_justify='left'
    )
    for head in ('trial', 'state', 'step', 'accuracy', 'ETA or time'):
      table.add_column(head)
    room = max(self._console.height - _MARGIN, 3)
    for trial in trials[:room]:
      metrics = self._metrics.get(trial.name)
      accuracy = metrics.accuracy if metrics else None
      running = trial.state == workdir_lib.Status.RUNNING
      table.add_row(
        trial.name,
        trial.state,
        f'{metrics.step if metrics else trial.step}/{trial.total_steps}',
        '' if accuracy is None else f'{accuracy:.4f}',
        self._remaining_of(trial) if running else duration(trial.seconds),
      )
    if len(trials) > room:
      table.caption = f'and {len(trials) - room} more'
    return table

  def _remaining_of(self, trial: TrialProcess) -> str:
    start, first = self._starts[trial.name]
    step = self._metrics[trial.name].step
    if step <= first:
      return '?'
    elapsed = time.monotonic() - start
    return duration(elapsed / (step - first) * (trial.total_steps - step))

  def _remaining(self) -> str:
    """Remaining time, from the images that this runner has trained on."""
    seen = total = 0.0
    for trial in self._trials:
      _, first = self._starts.get(trial.name, (0.0, trial.step))
      metrics = self._metrics.get(trial.name)
      step = metrics.step if metrics else first
      # An ended trial needs no more time, however early it ended.
      if trial.state in (*workdir_lib.ENDED, workdir_lib.Status.FAILED):
        step = trial.total_steps
      images = trial.images / trial.total_steps
      seen += max(step - first, 0) * images
      total += (trial.total_steps - first) * images
    if not seen:
      return '?'
    elapsed = time.monotonic() - self._begin
    return duration(elapsed / seen * (total - seen))


class _Console(Console):
  """A console that stays silent after its reader has closed the pipe."""

  def on_broken_pipe(self) -> None:
    """Discards all further output of the process; the trials continue."""
    self.quiet = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Metrics:
  """The latest values in a trial's `metrics.jsonl`.

  Attributes:
    step: last step.
    accuracy: accuracy of the last evaluation; None if there is none.
  """

  def __init__(self, trial: TrialProcess):
    lines = runner_lib.last_lines(trial.workdir)
    self.step = max([trial.step, *(line['step'] for line in lines)])
    # Test images only where there are no others, so that no choice relies on
    # them.
    evaluations: list[Any] = [
      line for line in lines if line['split'] == 'validation'
    ] or [line for line in lines if line['split'] == 'test']
    self.accuracy = evaluations[-1]['accuracy'] if evaluations else None

  @property
  def text(self) -> str:
    """The accuracy, as a part of a printed line."""
    return '' if self.accuracy is None else f', accuracy {self.accuracy:.4f}'
