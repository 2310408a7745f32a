"""Searching among the values of a sweep with Optuna instead of trying them all.

Optuna suggests trials and says which to end early; they are trained as those of
a grid are. What it knows lies in `optuna.db` in the sweep's directory.
"""

from collections.abc import Iterable, Iterator
import dataclasses
from pathlib import Path
import statistics
import time

try:
  import optuna
except ModuleNotFoundError:
  from bn_repro.errors import UserError

  raise UserError(
    '--search=optuna: Optuna is not installed. Run: pip install -r '
    'requirements-search.txt'
  ) from None

from bn_repro.report import runs
from bn_repro.runtime import workdir as workdir_lib
from bn_repro.sweep import grid
from bn_repro.sweep import runner as runner_lib
from bn_repro.sweep.grid import Axis, Sweep, Value
from bn_repro.sweep.progress import SweepProgress
from bn_repro.sweep.runner import Trial

# Seconds between two looks at how running trials learn.
_INTERVAL = 1.0
# The share of a trial before which it is not ended early. Our choice.
_WARM_UP = 0.5
# Suggested numbers are rounded to so many digits, as they are in names.
_DIGITS = 4


class Search(SweepProgress):
  """Suggests trials, shows them, and ends early those that fall behind.

  Of the axis that repeats settings, the first value alone is trained. A trial
  is worth its best accuracy, `Run.best`, and is ended early where the median of
  the others was higher after as many steps.
  """

  def __init__(self, sweep: Sweep, folder: Path, jobs: int, number: int):
    """Opens the search of a directory, or begins one.

    Args:
      sweep: whose axes are searched.
      folder: directory of the sweep.
      jobs: how many trials run at a time.
      number: trials in all.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    self._study = optuna.create_study(
      storage=f'sqlite:///{folder / "optuna.db"}',
      study_name='sweep',
      direction='maximize',
      load_if_exists=True,
      # After five trials; our choice, with the warm-up below.
      pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
    )
    # One that goes on must not suggest again what it began with.
    self._study.sampler = optuna.samplers.TPESampler(
      seed=len(self._study.get_trials(deepcopy=False))
    )
    unfinished = self._unfinished()
    ended = len(self._study.get_trials(deepcopy=False)) - len(unfinished)
    super().__init__((), jobs, number - ended)
    self._sweep, self._folder, self._total = sweep, folder, number
    self._suggested: dict[str, optuna.trial.Trial] = {}
    self._running: list[Trial] = []
    self._reported: dict[str, int] = {}
    self._next_report = time.monotonic()

  def suggestions(self) -> Iterator[Trial]:
    """Those that a runner has left, then new ones, until there are enough."""
    for frozen in self._unfinished():
      suggested = optuna.trial.Trial(self._study, frozen._trial_id)
      yield from self._unless_known(suggested)
    while len(self._study.get_trials(deepcopy=False)) < self._total:
      yield from self._unless_known(self._study.ask())

  def _unless_known(self, suggested: optuna.trial.Trial) -> Iterator[Trial]:
    """The trial of a suggestion, unless it has been made before."""
    trial = self._create(suggested)
    if trial.name in self._names():
      # Among a few values it happens; it counts, so that all of them end.
      self._study.tell(suggested, state=optuna.trial.TrialState.FAIL)
      return
    self._suggested[trial.name] = suggested
    suggested.set_user_attr('name', trial.name)
    yield trial

  def _names(self) -> set[str]:
    """Names of all trials but of those that a runner has left."""
    return {
      frozen.user_attrs['name']
      for frozen in self._study.get_trials(deepcopy=False)
      if 'name' in frozen.user_attrs
      and (
        frozen.state.is_finished()
        or frozen.user_attrs['name'] in self._suggested
      )
    }

  def _unfinished(self) -> list[optuna.trial.FrozenTrial]:
    return self._study.get_trials(states=(optuna.trial.TrialState.RUNNING,))

  def _create(self, suggested: optuna.trial.Trial) -> Trial:
    trial = self._trial(
      {axis.name: self._suggest(suggested, axis) for axis in self._sweep.axes}
    )
    suggested.set_user_attr('values', dict(trial.values))
    return trial.in_folder(self._folder)

  def _suggest(self, suggested: optuna.trial.Trial, axis: Axis) -> Value:
    if axis.name == self._sweep.repeat or len(axis.values) == 1:
      return axis.values[0]
    if self._sweep.expansion.is_continuous(axis):
      low, high = (float(end(axis.values)) for end in (min, max))
      value = suggested.suggest_float(axis.name, low, high, log=True)
      return float(f'{value:.{_DIGITS}g}')
    chosen = suggested.suggest_categorical(axis.name, axis.values)
    return axis.values[axis.values.index(chosen)]

  def _trial(self, values: dict[str, Value]) -> grid.Trial:
    return self._sweep.expansion.trial(self._sweep.axes, values)

  def started(self, trial: Trial) -> None:
    """Looks after it from now on."""
    super().started(trial)
    self._running.append(trial)

  def ended(self, trial: Trial, code: int) -> None:
    """Tells Optuna what has come out; what has not is tried again later."""
    super().ended(trial, code)
    if trial in self._running:
      self._running.remove(trial)
    # Others are measured by its whole curve.
    self._report(trial)
    states = optuna.trial.TrialState
    number = self._suggested[trial.name].number
    if trial.state in workdir_lib.ENDED:
      # One that diverged may not have been evaluated at all.
      best = runs.read_run(trial.workdir).best() or 0.0
      self._study.tell(number, best)
    elif trial.state == runner_lib.PRUNED:
      self._study.tell(number, state=states.PRUNED)

  def tick(self) -> Iterable[Trial]:
    """Reports evaluations; returns the trials that have fallen behind."""
    super().tick()
    now = time.monotonic()
    if now < self._next_report:
      return []
    self._next_report = now + _INTERVAL
    return [
      trial
      for trial in self._running
      if self._report(trial)
      # High rates are slow at first, and end high.
      and self._reported[trial.name] >= _WARM_UP * trial.total_steps
      and self._suggested[trial.name].should_prune()
    ]

  def _report(self, trial: Trial) -> bool:
    """Reports evaluations that are new; returns whether there are any."""
    if not (trial.workdir / 'config.json').exists():
      return False
    lines = runs.read_run(trial.workdir).evaluations()
    reported = self._reported.get(trial.name, 0)
    if not lines or lines[-1]['step'] <= reported:
      return False
    suggested = self._suggested[trial.name]
    for number, line in enumerate(lines, start=1):
      if line['step'] > reported:
        # As `Run.best` takes them together.
        window = lines[max(number - runs.WINDOW, 0) : number]
        mean = statistics.fmean(each['accuracy'] for each in window)
        suggested.report(mean, line['step'])
    self._reported[trial.name] = lines[-1]['step']
    return True

  def sweep(self) -> tuple[Sweep, dict[str, str]]:
    """What has been trained, as a sweep, and which trials were pruned."""
    suggested = [
      (frozen, self._trial(frozen.user_attrs['values']))
      for frozen in self._study.get_trials(deepcopy=False)
      if 'name' in frozen.user_attrs
    ]
    found = {trial.name: trial for _, trial in suggested}
    axes = []
    for axis in self._sweep.axes:
      values = {trial.values[axis.name] for trial in found.values()}
      if self._sweep.expansion.is_continuous(axis):
        order = sorted(values)
      else:
        order = [value for value in axis.values if value in values]
      axes.append(dataclasses.replace(axis, values=tuple(order)))
    pruned = {
      trial.name: runner_lib.PRUNED
      for frozen, trial in suggested
      if frozen.state == optuna.trial.TrialState.PRUNED
    }
    sweep = dataclasses.replace(
      self._sweep, axes=tuple(axes), trials=tuple(found.values())
    )
    return sweep, pruned
