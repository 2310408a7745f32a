"""What a person sees while a sweep goes on."""

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
from bn_repro.sweep.runner import Trial

# Seconds between two tables on a terminal, and between two lines elsewhere.
_TABLE_INTERVAL = 1.0
_LINE_INTERVAL = 30.0
# Rows of a terminal that the table leaves to the rest.
_MARGIN = 8


class SweepProgress(runner_lib.Progress):
  """A table on a terminal, plain lines elsewhere; both on standard output.

  The time that remains is an estimate from what has been trained in this start.
  """

  def __init__(self, trials: Sequence[Trial], jobs: int):
    """Shows trials.

    Args:
      trials: all with something left to do.
      jobs: how many run at a time.
    """
    self._trials = trials
    self._jobs = jobs
    self._console = _Console(file=sys.stdout, soft_wrap=True, highlight=False)
    self._begin = time.monotonic()
    self._next_look = self._begin
    self._begun: dict[str, tuple[float, int]] = {}
    self._looks: dict[str, _Look] = {}
    self._live: Live | None = None
    if self._console.is_terminal:
      self._live = Live(console=self._console, auto_refresh=False)
      self._live.start()

  def started(self, trial: Trial) -> None:
    """Says so, where there is no table."""
    self._begun[trial.name] = time.monotonic(), trial.step
    if self._live is None:
      self._say(f'{trial.name}: runs, from step {trial.step}')

  def found_elsewhere(self, trial: Trial) -> None:
    """Says so."""
    holder = workdir_lib.Workdir(str(trial.workdir)).holder()
    self._say(f'{trial.name}: is waited for, {holder or "a process"} has it')

  def ended(self, trial: Trial, code: int) -> None:
    """Says how, and when all will have."""
    self._looks[trial.name] = _Look(trial)
    how = trial.state
    if how == runner_lib.WAITING:
      how = f'exit code {code}, is started again'
    elif how == workdir_lib.Status.FAILED:
      how = f'failed with exit code {code}, {runner_lib.last_words(trial)}'
    facts = self._looks[trial.name].facts
    self._say(
      f'{trial.name}: {how}{facts}, {duration(trial.seconds)}; '
      f'{self._counts()}, ETA {self._remaining()}'
    )

  def tick(self) -> None:
    """Draws the table, or says how the running trials stand."""
    now = time.monotonic()
    if now < self._next_look:
      return
    interval = _LINE_INTERVAL if self._live is None else _TABLE_INTERVAL
    self._next_look = now + interval
    running = [t for t in self._trials if t.state == workdir_lib.Status.RUNNING]
    for trial in running:
      self._looks[trial.name] = _Look(trial)
    if self._live is not None:
      self._live.update(self._table(), refresh=True)
    elif now > self._begin + interval:
      for trial in running:
        look = self._looks[trial.name]
        self._say(
          f'{trial.name}: step {look.step}/{trial.total_steps}{look.facts}, '
          f'ETA {self._remaining_of(trial)}'
        )

  def stopping(self) -> None:
    """Says that it may take a moment."""
    self._say('stopping: the running trials save')

  def close(self) -> None:
    """Leaves the last table as it is, and says how long all took."""
    if self._live is not None:
      self._live.update(self._table(), refresh=True)
      self._live.stop()
    wall = time.monotonic() - self._begin
    own = sum(trial.seconds for trial in self._trials)
    if own:
      self._say(
        f"{duration(wall)} of wall time; the trials' own {duration(own)} over "
        f'{self._jobs} at a time: {wall * self._jobs / own:.2f} times as long'
      )

  def _say(self, text: str) -> None:
    self._console.print(text, markup=False)

  def _counts(self) -> str:
    counts = Counter(trial.state for trial in self._trials)
    return ', '.join(f'{number} {state}' for state, number in counts.items())

  def _table(self) -> Table:
    room = max(self._console.height - _MARGIN, 3)
    order = {workdir_lib.Status.RUNNING: 0, runner_lib.WAITING: 2}
    # Those that have ended last stand next to those that run.
    ended = list(self._looks)
    rows = sorted(
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
    for trial in rows[:room]:
      look = self._looks.get(trial.name)
      running = trial.state == workdir_lib.Status.RUNNING
      table.add_row(
        trial.name,
        trial.state,
        f'{look.step if look else trial.step}/{trial.total_steps}',
        f'{look.accuracy:.4f}' if look and look.accuracy is not None else '',
        self._remaining_of(trial) if running else duration(trial.seconds),
      )
    if len(rows) > room:
      table.caption = f'and {len(rows) - room} more'
    return table

  def _remaining_of(self, trial: Trial) -> str:
    begin, first = self._begun[trial.name]
    step = self._looks[trial.name].step
    if step <= first:
      return '?'
    elapsed = time.monotonic() - begin
    return duration(elapsed / (step - first) * (trial.total_steps - step))

  def _remaining(self) -> str:
    """From images seen in this start; a trial that has ended has seen all."""
    seen = total = 0.0
    for trial in self._trials:
      _, first = self._begun.get(trial.name, (0.0, trial.step))
      look = self._looks.get(trial.name)
      step = look.step if look else first
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
  """A console whose reader may go away; trials go on without."""

  def on_broken_pipe(self) -> None:
    """Says nothing any more, here and elsewhere."""
    self.quiet = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Look:
  """What a trial's `metrics.jsonl` says of it.

  Attributes:
    step: the furthest.
    accuracy: of the last evaluation; None if there was none.
  """

  def __init__(self, trial: Trial):
    lines = runner_lib.last_lines(trial.workdir)
    self.step = max([trial.step, *(line['step'] for line in lines)])
    # Not of the test images, where there are others: nobody is to choose by it.
    evaluated: list[Any] = [x for x in lines if x['split'] == 'validation'] or [
      x for x in lines if x['split'] == 'test'
    ]
    self.accuracy = evaluated[-1]['accuracy'] if evaluated else None

  @property
  def facts(self) -> str:
    """The accuracy, as a part of a line."""
    return '' if self.accuracy is None else f', accuracy {self.accuracy:.4f}'
