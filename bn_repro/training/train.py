"""The training loop: restore, then step, log, evaluate and save.

The actions that are due after a step have a fixed order: a line of training
metrics, an evaluation, a checkpoint. A resumed run begins with the actions that
are due at its step, and skips those that have been done already.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
import math
import os
import sys
import time
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from bn_repro import config_fields, parallel
from bn_repro.data.split import Dataset
from bn_repro.models import factory
from bn_repro.runtime import processes
from bn_repro.runtime.metric_writer import MetricWriter
from bn_repro.runtime.preemption import (
  AgreedPreemption,
  Preempted,
  Preemption,
)
from bn_repro.runtime.profiling import Profile
from bn_repro.runtime.progress import ProgressDisplay
from bn_repro.runtime.watchdog import Watchdog
from bn_repro.runtime.workdir import EXIT_CODES, Status, Workdir
from bn_repro.training import evaluation, optimizer, run_info
from bn_repro.training.checkpoint import Checkpoints, restore_or_initialize
from bn_repro.training.experiment import Experiment, create_experiment
from bn_repro.training.metrics import Sums, check_replaced
from bn_repro.training.steps import TrainState
from bn_repro.training.timing import Clock, DeviceIdleTimer

# Fraction of the time spent waiting for data above which a warning is printed.
# Our choice.
_MAX_WAITING = 0.1


class Diverged(Exception):
  """A value is not finite, or the loss exceeds `divergence_loss`."""


def train_and_evaluate(
  config: ConfigDict,
  dataset: Dataset,
  workdir: Workdir,
  preemption: Preemption,
  config_file: str,
) -> Status:
  """Trains until the last step, a signal or divergence.

  Args:
    config: a checked, locked config.
    dataset: the data set that it names.
    workdir: a claimed workdir; the run resumes from its newest checkpoint.
    preemption: checked between steps, and while compiling.
    config_file: value of --config, for `run.json`.

  Returns:
    How the run ended: done, preempted or diverged.

  Raises:
    UserError: if the workdir holds another run, or only damaged checkpoints.
  """
  _check_processes_agree(config, dataset)
  with contextlib.ExitStack() as stack:
    watchdog = stack.enter_context(Watchdog(config.stuck_after, _exit_stuck))
    experiment = create_experiment(config, dataset)
    checkpoints = stack.enter_context(
      Checkpoints(
        workdir.checkpoints,
        keep=config.checkpoints_to_keep if workdir.writes else None,
        identity=run_info.identity(experiment),
      )
    )
    state, interval_sums = restore_or_initialize(experiment, checkpoints)
    step = int(state.step)
    display = ProgressDisplay(experiment.total_steps, silent=not workdir.writes)
    stack.callback(display.stop)
    writer = stack.enter_context(
      contextlib.closing(
        MetricWriter(workdir, step, display, tensorboard=config.tensorboard)
      )
    )
    workdir.write_config(config)
    run_info.announce(experiment, workdir, step, config_file, display.say)
    workdir.write_status(Status.RUNNING, step, 'in progress')
    if processes.count() > 1:
      preemption = AgreedPreemption(
        preemption, parallel.create_maximum(experiment.mesh)
      )

    def check() -> None:
      watchdog.beat()
      preemption.check()

    trainer = Trainer(
      experiment, state, interval_sums, checkpoints, writer, check
    )
    try:
      status, reason = _train_until_stopped(
        trainer, preemption, display, workdir
      )
      watchdog.stop()  # The last save may take as long as it needs.
      checkpoints.wait()
      # A process that left while another one saves would end it.
      processes.gather('saved')
      step = trainer.step
    except Exception as error:
      if not processes.is_peer_failure(error):
        with contextlib.suppress(OSError):  # The disk may be what failed.
          workdir.write_status(Status.FAILED, trainer.step, _first_line(error))
        raise
      # Nothing more can be agreed on, nor saved.
      status, reason = Status.PREEMPTED, 'lost another process'
      print(f'error: {reason}: {_first_line(error)}', file=sys.stderr)
      step = max(checkpoints.steps(), default=0)
      processes.leave()
    display.say(trainer.clock.summary())
  workdir.write_status(status, step, reason)
  display.say(f'{status} at step {step}: {reason}')
  return status


def _check_processes_agree(config: ConfigDict, dataset: Dataset) -> None:
  """Compares what must be the same in all processes of the run."""
  processes.assert_equal(
    {
      **{
        f'config.{name}': f'{value}'
        for name, value in config_fields.flatten(config).items()
        if not config_fields.FIELDS[name].per_host
      },
      'data fingerprint': dataset.fingerprint(),
      'compute type': str(factory.compute_dtype(config.model)),
      **run_info.versions(),
    }
  )


def _exit_stuck() -> None:
  """Ends a process that hangs; the same command resumes the run."""
  os._exit(EXIT_CODES[Status.PREEMPTED])


def _first_line(error: Exception) -> str:
  return f'{type(error).__name__}: {error}'.splitlines()[0]


def _train_until_stopped(
  trainer: 'Trainer',
  preemption: Preemption,
  display: ProgressDisplay,
  workdir: Workdir,
) -> tuple[Status, str]:
  """Compiles and trains; returns how it ended, and the reason."""
  try:
    try:
      if trainer.config.init_from and trainer.step == 0:
        # The run it starts from may change later.
        trainer.save(wait=True)
      _compile(trainer, preemption, display)
      _train(trainer, display, workdir)
    except Preempted as error:
      trainer.save()
      return Status.PREEMPTED, str(error)
  except Diverged as error:
    return Status.DIVERGED, str(error)
  return Status.DONE, 'reached the last step'


def _compile(
  trainer: 'Trainer', preemption: Preemption, display: ProgressDisplay
) -> None:
  display.say('compiling ...')
  started = time.monotonic()
  with trainer.clock.spending('compile'):
    preemption.run(trainer.compile)
    # No process starts to train, with its watchdog running, before all have
    # compiled.
    processes.gather('compiled')
  display.say(f'compiled in {time.monotonic() - started:.0f} s')


def _train(
  trainer: 'Trainer', display: ProgressDisplay, workdir: Workdir
) -> None:
  """The loop."""
  config, total_steps = trainer.config, trainer.total_steps
  profile = Profile(
    workdir.path / 'profile', config.profile_first_step, config.profile_steps
  )
  stream = trainer.experiment.stacked_batches(trainer.step, total_steps)
  input_bound = False

  def due(every: int) -> bool:
    is_last = trainer.step == total_steps
    return trainer.step > 0 and (trainer.step % every == 0 or is_last)

  display.start(trainer.step)
  with contextlib.closing(stream), contextlib.closing(profile):
    while True:
      if due(config.log_every):
        waiting = trainer.log()
        if waiting > _MAX_WAITING and not input_bound:
          _warn_input_bound(waiting, display)
        input_bound = waiting > _MAX_WAITING
      if due(config.eval_every):
        trainer.evaluate()
      if due(config.checkpoint_every):
        trainer.save()
      if trainer.step == total_steps:
        return
      profile.before_call(trainer.step, config.steps_per_call)
      trainer.advance(stream)


def _warn_input_bound(waiting: float, display: ProgressDisplay) -> None:
  display.say(
    f'warning: {waiting:.0%} of the time is spent waiting for data. Try '
    '--config.data.num_workers=2 or more if cores are idle, and a local disk '
    'for the data; otherwise the machine has too few cores for its accelerator.'
  )


class Trainer:
  """The compiled steps of a run, and the state that they advance.

  Attributes:
    experiment: model, optimizer, steps and batches.
    config: the config of the run.
    total_steps: steps of the whole run.
    step: updates applied to the state.
    clock: where the time goes.
  """

  def __init__(
    self,
    experiment: Experiment,
    state: TrainState,
    interval_sums: Sums,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    check: Callable[[], None],
  ):
    """Places the state on the devices.

    Args:
      experiment: not yet compiled.
      state: arrays on the host.
      interval_sums: sums of the current log interval up to the state's step.
      checkpoints: where the state is saved.
      writer: where metrics are written.
      check: called between steps and batches; raises if the run is to stop.
    """
    self.experiment = experiment
    self.config = experiment.config
    self.total_steps = experiment.total_steps
    self.step = int(state.step)
    self.clock = Clock(self.step)
    self._state = parallel.replicate(experiment.mesh, state)
    self._interval_sums = interval_sums
    # Sums of the steps of the last call, which may not be computed yet.
    self._pending: Sums | None = None
    self._checkpoints = checkpoints
    self._writer = writer
    self._check = check
    self._device = DeviceIdleTimer()
    self._differing_replicas = parallel.create_replica_check(experiment.mesh)

  def compile(self) -> None:
    """Compiles every step that the config needs."""
    self.experiment = self.experiment.compile(self._state)

  def advance(self, stream: Iterator[Any]) -> None:
    """Dispatches the next call, of `steps_per_call` steps.

    The sums of the previous call are read while this one runs.

    Raises:
      Diverged: if a step of the previous call diverged.
    """
    with (
      self.clock.spending('step'),
      jax.profiler.StepTraceAnnotation('train', step_num=self.step),
    ):
      asked = time.monotonic()
      batches = next(stream)
      idle = self._device.idle_seconds(asked)
      self._state, sums = self.experiment.train_steps(self._state, batches)
      self._device.works_on(sums)
      self._fetch_pending_sums()
    self.clock.move('step', 'waiting_for_data', idle)
    self._pending = sums
    self.step += self.config.steps_per_call
    self._checkpoints.check()
    self._check()

  def _fetch_pending_sums(self) -> None:
    """Adds the sums of the last call to those of the log interval.

    Raises:
      Diverged: if one of its steps diverged; `step` is then that step.
    """
    if self._pending is None:
      return
    pending, self._pending = self._pending.fetch_steps(), None
    first = self.step - len(pending)
    for step, sums in enumerate(pending, start=first + 1):
      reason = _divergence(sums, self.config.divergence_loss)
      if reason:
        self.step = step
        raise Diverged(reason)
      self._interval_sums = self._interval_sums.merge(sums)

  def log(self) -> float:
    """Writes a line of training metrics and starts the next log interval.

    Returns:
      The fraction of the interval spent waiting for data.
    """
    with self.clock.spending('step'):
      self._fetch_pending_sums()
    sums, self._interval_sums = self._interval_sums, Sums()
    if not sums.count:  # The line was written before the run was resumed.
      return 0.0
    check_replaced(
      sums, self.config.data.max_replaced, f'training up to step {self.step}'
    )
    timing = self.clock.lap(self.step, self.config.batch_size)
    rate = optimizer.applied_learning_rate(
      self.config.optim, self.config.batch_size
    )
    self._writer.write(
      {
        'step': self.step,
        'split': 'train',
        **sums.means(),
        'learning_rate': rate * float(self.experiment.schedule(self.step - 1)),
        'timing': timing,
      }
    )
    return timing['shares']['waiting_for_data']

  def evaluate(self) -> None:
    """Writes the lines of this step that are missing.

    Test images are evaluated after the last step only.

    Raises:
      Diverged: if a loss is not finite.
    """
    splits = [self.config.eval_split]
    if (
      self.step == self.total_steps and 'test' in self.experiment.dataset.splits
    ):
      splits += [] if 'test' in splits else ['test']
    missing = [
      (split, statistics)
      for statistics in evaluation.statistics_modes(self.experiment)
      for split in splits
      if not self._writer.has(self.step, split, statistics)
    ]
    with self.clock.spending('evaluation'):
      self._fetch_pending_sums()
      for line in evaluation.evaluate(
        self.experiment, self._state, missing, self._check
      ):
        # Parameters may be finite and yet too large to compute with.
        if not np.isfinite([line['loss'], *_percentile_values(line)]).all():
          raise Diverged(
            f'{line["split"]} loss {line["loss"]:g}, or inputs not finite'
          )
        self._writer.write(line)

  def save(self, *, wait: bool = False) -> None:
    """Saves this step, unless it is saved; all lines up to it come first.

    Args:
      wait: return only when the checkpoint is on disk.

    Raises:
      RuntimeError: if the replicas of the state differ.
    """
    with self.clock.spending('checkpoint'):
      self._fetch_pending_sums()
      self._check_replicas()
      if self.step not in self._checkpoints.steps():
        self._writer.sync()
        self._checkpoints.save(
          self.step,
          self._state,
          {'interval_sums': dataclasses.asdict(self._interval_sums)},
        )
      if wait:
        self._checkpoints.wait()

  def _check_replicas(self) -> None:
    """Refuses to save a state whose replicas differ."""
    if self.experiment.mesh.devices.size == 1:
      return
    differing = self._differing_replicas(self._state)
    if differing:
      raise RuntimeError(
        f'step {self.step}: {differing[0]} and {len(differing) - 1} other '
        'arrays are not equal on all devices; not saved'
      )


def _divergence(sums: Sums, limit: float) -> str | None:
  """Why a step with these sums has diverged; None if it has not."""
  loss = sums.loss / sums.count
  if sums.nonfinite or not math.isfinite(loss):
    return (
      f'loss {loss:g}, {sums.nonfinite} values of the parameters and '
      'statistics not finite'
    )
  if loss > limit:
    return f'loss {loss:g} above divergence_loss={limit:g}'
  return None


def _percentile_values(line: Mapping[str, Any]) -> Iterator[float]:
  for rows in line.get('percentiles', {}).values():
    for row in rows:
      yield from row
