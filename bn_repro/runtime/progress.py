"""Shows the progress of a run on standard output."""

from collections.abc import Mapping
import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

# Seconds between lines about the images of an evaluation. Our choice.
_LINE_INTERVAL = 30.0
# Fraction of the time spent waiting for data above which a warning is printed.
# Our choice.
_MAX_WAITING = 0.1


def terminal() -> Console | None:
  """Returns a console on standard output; None if that is no terminal.

  The stream decides whether it is one, and TERM whether its cursor can move.
  Rich alone would also ask FORCE_COLOR, TTY_COMPATIBLE and other variables,
  which some environments set for all programs.
  """
  dumb = os.environ.get('TERM', '').lower() in ('dumb', 'unknown')
  if dumb or not sys.stdout.isatty():
    return None
  console = Console(
    file=sys.stdout,
    force_terminal=True,
    force_interactive=True,
    soft_wrap=True,
    highlight=False,
  )
  if not console.width:  # As with COLUMNS=0, which would hide all text.
    console.width = 80
  return console


class ProgressDisplay:
  """A bar on a terminal, plain lines elsewhere.

  The remaining time (ETA) is extrapolated from this start of the run, without
  compilation but with evaluations and checkpoints.
  """

  def __init__(self, total_steps: int, *, silent: bool = False):
    """Creates the display of a run; a silent one prints nothing."""
    self._total_steps = total_steps
    self._first_step = 0
    self._start = time.monotonic()
    self._bar: Progress | None = None
    self._input_bound = False
    self._silent = silent

  def say(self, text: str) -> None:
    """Prints a line."""
    if not self._silent:
      print(text, flush=True)  # Rich moves it above the bar.

  def start(self, step: int) -> None:
    """Starts the clock, and the bar, at the first step of this start."""
    self._first_step = step
    self._start = time.monotonic()
    console = terminal()
    if console is not None and not self._silent:
      self._bar = Progress(
        TextColumn('step {task.completed:.0f}/{task.total:.0f}'),
        BarColumn(),
        TextColumn('{task.description}'),
        console=console,
      )
      self._bar.start()
      self._bar.add_task('', total=self._total_steps, completed=step)

  def show(self, line: Mapping[str, Any]) -> None:
    """Shows a line of `metrics.jsonl`."""
    step = line['step']
    facts = f'loss {line["loss"]:.4f}  accuracy {line["accuracy"]:.4f}'
    if line['split'] != 'train':
      statistics = f', {line["statistics"]}' if 'statistics' in line else ''
      self.say(
        f'step {step}/{self._total_steps}  {line["split"]}{statistics}: {facts}'
        f' ({line["num_examples"]} images)'
      )
      return
    self._warn_if_input_bound(line['timing']['shares']['waiting_for_data'])
    rate = line['timing']['images_per_second']
    facts += f'  {rate:.0f} images/s  ETA {self._remaining(step)}'
    if self._bar is not None:
      self._bar.update(self._bar.task_ids[0], completed=step, description=facts)
    else:
      self.say(f'step {step}/{self._total_steps}  train: {facts}')

  def _warn_if_input_bound(self, waiting: float) -> None:
    """Warns when steps begin to wait for data, not at every line."""
    if waiting > _MAX_WAITING and not self._input_bound:
      self.say(
        f'warning: {waiting:.0%} of the time is spent waiting for data. Try '
        '--config.data.num_workers=2 or more if cores are idle, and a local '
        'disk for the data; otherwise the machine has too few cores for its '
        'accelerator.'
      )
    self._input_bound = waiting > _MAX_WAITING

  def stop(self) -> None:
    """Removes the bar."""
    if self._bar is not None:
      self._bar.stop()
      self._bar = None

  def __enter__(self) -> 'ProgressDisplay':
    return self

  def __exit__(self, *exception: object) -> None:
    self.stop()

  def _remaining(self, step: int) -> str:
    done = step - self._first_step
    if done <= 0:
      return '?'
    elapsed = time.monotonic() - self._start
    return duration(elapsed / done * (self._total_steps - step))


def duration(seconds: float) -> str:
  """Formats seconds as m:ss, h:mm:ss, or days from 48 hours on."""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours >= 48:
    return f'{hours / 24:.1f} days'
  if hours:
    return f'{hours}:{minutes:02}:{rest:02}'
  return f'{minutes}:{rest:02}'


class ImageProgress:
  """How many images of a split are done: a bar on a terminal, or else lines.

  Rates and the remaining time do not count what is done at the first call of
  `show`, which includes the compilation of the network.
  """

  def __init__(self, split: str, done: int, total: int):
    """Creates the display.

    Args:
      split: name of the split.
      done: images that an earlier command has done.
      total: images of the split.
    """
    self._split = split
    self._total = total
    self._first = self._done = done
    self._start = time.monotonic()
    self._next_line = self._start + _LINE_INTERVAL
    # The time of the first call of `show`, and the images that were done.
    self._reference: tuple[float, int] | None = None
    self._waited = 0.0
    console = terminal()
    self._bar = console and Progress(
      BarColumn(), TextColumn('{task.description}'), console=console
    )

  def __enter__(self) -> 'ImageProgress':
    if self._first:
      print(f'{self._split}: resuming at image {self._first:,}', flush=True)
    if self._bar:
      self._bar.start()
      self._bar.add_task(f'{self._split}: compiling', total=self._total)
    return self

  def __exit__(self, *exception: object) -> None:
    if self._bar:
      self._bar.stop()
    if self._done > self._first:
      seconds = duration(time.monotonic() - self._start)
      print(
        f'{self._split}: {self._done - self._first:,} images in {seconds}'
        f'{self._rates()}',
        flush=True,
      )

  def show(self, done: int, waited: float) -> None:
    """Shows that images are done.

    Args:
      done: number of images.
      waited: seconds spent waiting for images since the last call.
    """
    now = time.monotonic()
    self._done = done
    self._waited += waited
    if self._reference is None:
      self._reference, self._waited = (now, done), 0.0
    text = f'{done:,}/{self._total:,} images{self._rates()}'
    start, first = self._reference
    if done > first:
      left = (now - start) / (done - first) * (self._total - done)
      text += f', ETA {duration(left)}'
    if self._bar:
      self._bar.update(self._bar.task_ids[0], completed=done, description=text)
    elif now >= self._next_line:
      self._next_line = now + _LINE_INTERVAL
      print(f'{self._split}: {text}', flush=True)

  def _rates(self) -> str:
    if self._reference is None or self._done == self._reference[1]:
      return ''
    start, first = self._reference
    seconds = time.monotonic() - start
    return (
      f', {(self._done - first) / seconds:,.2f} images/s, '
      f'{self._waited / seconds:.0%} of the time waiting for images'
    )
