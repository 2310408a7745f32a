"""The training loop: restore, then step, log, evaluate and save.

The actions that are due after a step have a fixed order: a line of training
metrics, an evaluation, a checkpoint. A resumed run begins with the actions that
are due at its step, and skips those that have been done already.
"""

from collections.abc import Callable, Iterator
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
from bn_repro.runtime.workdir import (
  EXIT_CODES,
  Status,
  Workdir,
  read_json,
)
from bn_repro.training import evaluation, model_file, run_info
from bn_repro.training.checkpoint import Checkpoints, restore_or_initialize
from bn_repro.training.experiment import Experiment, create_experiment
from bn_repro.training.metrics import (
  Sums,
  check_replaced,
  count_nonfinite,
)
from bn_repro.training.steps import TrainState
from bn_repro.training.timing import Clock, DeviceIdleTimer


class Diverged(Exception):
  """A value is not finite, or the loss exceeds `divergence_loss`."""


def train_and_evaluate(
  config: ConfigDict,
  dataset: Dataset,
  workdir: Workdir,
  preemption: Preemption,
  config_file: str,
  *,
  accept_lost_metrics: bool = False,
) -> Status:
  """Trains until the last step, a signal or divergence.

  Args:
    config: a checked, locked config.
    dataset: the data set that it names.
    workdir: a claimed workdir; the run resumes from its newest checkpoint.
    preemption: checked between steps, and while compiling.
    config_file: value of --config, for `run.json`.
    accept_lost_metrics: resume also if lines of metrics are lost or differ.

  Returns:
    How the run ended: done, preempted or diverged.

  Raises:
    UserError: if the workdir has another run, or one that is damaged.
  """
  _check_processes_agree(config, dataset)
  with contextlib.ExitStack() as stack:
    watchdog = stack.enter_context(Watchdog(config.stuck_after, _exit_stuck))
    experiment = create_experiment(config, dataset)
    checkpoints = stack.enter_context(_open_checkpoints(experiment, workdir))
    start = restore_or_initialize(experiment, checkpoints)
    step = int(start.state.step)
    display = stack.enter_context(
      ProgressDisplay(experiment.total_steps, silent=not workdir.writes)
    )
    metrics = None if accept_lost_metrics else start.metrics
    writer = stack.enter_context(
      MetricWriter(
        workdir, step, display, metrics, tensorboard=config.tensorboard
      )
    )
    run_info.write_start(experiment, workdir, step, config_file, display.say)
    if processes.count() > 1:
      maximum = parallel.create_maximum(experiment.mesh)
      preemption = AgreedPreemption(preemption, maximum)

    def check() -> None:
      watchdog.beat()
      preemption.check()

    trainer = Trainer(
      experiment,
      start.state,
      start.interval_sums,
      workdir,
      checkpoints,
      writer,
      check,
    )
    status, step, reason = _run_to_end(
      trainer, preemption, watchdog, display, workdir
    )
    display.say(trainer.clock.summary())
  workdir.write_status(status, step, reason, writer.digest())
  display.say(f'{status} at step {step}: {reason}')
  return status


def _open_checkpoints(experiment: Experiment, workdir: Workdir) -> Checkpoints:
  keep = experiment.config.checkpoints_to_keep
  return Checkpoints(
    workdir.checkpoints,
    keep=keep if workdir.writes else None,
    identity=run_info.identity(experiment),
  )


def _check_processes_agree(config: ConfigDict, dataset: Dataset) -> None:
  """Compares what must be the same in all processes of the run."""
  processes.assert_equal(
    {
      **{
        f'config.{name}': str(value)
        for name, value in config_fields.flatten(config).items()
        if not config_fields.FIELDS[name].per_host
      },
      'data fingerprint': dataset.fingerprint,
      'compute type': str(factory.compute_dtype(config.model)),
      **run_info.versions(),
    }
  )


def _exit_stuck() -> None:
  """Ends a process that hangs; the same command resumes the run."""
  os._exit(EXIT_CODES[Status.PREEMPTED])


def _first_line(error: Exception) -> str:
  return f'{type(error).__name__}: {error}'.splitlines()[0]


def _run_to_end(
  trainer: 'Trainer',
  preemption: Preemption,
  watchdog: Watchdog,
  display: ProgressDisplay,
  workdir: Workdir,
) -> tuple[Status, int, str]:
  """Trains, and waits until the last checkpoint is on disk.

  Returns:
    `(status, step, reason)` of the end.
  """
  try:
    status, reason = _train_until_stopped(trainer, preemption, display, workdir)
    watchdog.stop()  # The last save may take as long as it needs.
    trainer.checkpoints.wait()
    # A process that left while another one saves would end it.
    processes.barrier()
    return status, trainer.step, reason
  except Exception as error:
    if not processes.is_peer_failure(error):
      with contextlib.suppress(OSError):  # The disk may be what failed.
        workdir.write_status(Status.FAILED, trainer.step, _first_line(error))
      raise
    # Nothing more can be agreed on, nor saved.
    reason = 'lost another process'
    print(f'error: {reason}: {_first_line(error)}', file=sys.stderr)
    step = max(trainer.checkpoints.steps(), default=0)
    processes.leave()
    return Status.PREEMPTED, step, reason


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
    trainer.compile(preemption)
    # No process starts to train, with its watchdog running, before all have
    # compiled.
    processes.barrier()
  display.say(f'compiled in {time.monotonic() - started:.0f} s')


def _train(
  trainer: 'Trainer', display: ProgressDisplay, workdir: Workdir
) -> None:
  """Trains to the last step; after each call logs, evaluates and saves."""
  config, total_steps = trainer.config, trainer.total_steps
  profile = Profile(
    workdir.path / 'profile', config.profile_first_step, config.profile_steps
  )
  stream = trainer.experiment.stacked_batches(trainer.step, total_steps)
  first_step = trainer.step

  def due(every: int) -> bool:
    is_last = trainer.step == total_steps
    return trainer.step > 0 and (trainer.step % every == 0 or is_last)

  display.start(first_step)
  with contextlib.closing(stream), contextlib.closing(profile):
    while True:
      if due(config.log_every):
        trainer.log()
      if due(config.eval_every):
        trainer.evaluate()
      if due(config.checkpoint_every):
        trainer.save()
      if trainer.step == total_steps:
        return
      # Not before the first step, for which the watchdog allows an hour.
      if trainer.step > first_step:
        trainer.check()
      profile.before_call(trainer.step, config.steps_per_call)
      trainer.advance(stream)


class Trainer:
  """The compiled steps of a run, and the state that they advance.

  Attributes:
    experiment: model, optimizer, steps and batches.
    config: the config of the run.
    total_steps: steps of the whole run.
    step: updates applied to the state.
    checkpoints: where the state is saved.
    clock: time spent on steps, evaluations and so on.
  """

  def __init__(
    self,
    experiment: Experiment,
    state: TrainState,
    interval_sums: Sums,
    workdir: Workdir,
    checkpoints: Checkpoints,
    writer: MetricWriter,
    check: Callable[[], None],
  ):
    """Places the state on the devices.

    Args:
      experiment: not yet compiled.
      state: arrays on the host.
      interval_sums: sums of the current log interval up to the state's step.
      workdir: where the model is written.
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
    self._workdir = workdir
    self.checkpoints = checkpoints
    self._writer = writer
    self._check = check
    self._idle_timer = DeviceIdleTimer()
    self._differing_replicas = parallel.create_replica_check(experiment.mesh)

  def compile(self, preemption: Preemption) -> None:
    """Compiles every step that the config needs, unless preempted."""
    self.experiment = preemption.run(
      lambda: self.experiment.compile(self._state)
    )

  def check(self) -> None:
    """Raises if a save has failed, or if the run is to stop."""
    self.checkpoints.check()
    self._workdir.check_claim()
    self._check()

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
      asked_at = time.monotonic()
      batches = next(stream)
      waited = self._idle_timer.idle_seconds(asked_at)
      self._state, sums = self.experiment.steps.train_steps(
        self._state, batches
      )
      self._idle_timer.works_on(sums)
      self._fetch_pending_sums()
    self.clock.move('step', 'waiting_for_data', waited)
    self._pending = sums
    self.step += self.config.steps_per_call

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

  def log(self) -> None:
    """Writes a line of training metrics and starts the next log interval.

    Raises:
      Diverged: if the state is not finite.
    """
    with self.clock.spending('step'):
      self._fetch_pending_sums()
      self._check_finite()
    sums, self._interval_sums = self._interval_sums, Sums()
    # The line may have been written before the run was resumed.
    if not sums.count or self._writer.has(self.step, 'train', None):
      return
    check_replaced(
      sums, self.config.data.max_replaced, f'training up to step {self.step}'
    )
    self._writer.write(
      {
        'step': self.step,
        'split': 'train',
        **sums.means(),
        'learning_rate': self.experiment.learning_rate(self.step - 1),
        'timing': self.clock.lap(self.step, self.config.batch_size),
      }
    )

  def evaluate(self) -> None:
    """Evaluates the splits that have no line for this step.

    Test images are evaluated after the last step only. The model is written
    before the line of its evaluation: a run that is stopped between them
    evaluates, and writes the model, again. So does one whose model is missing.

    Raises:
      Diverged: if a loss is not finite.
    """
    splits = [self.config.eval_split]
    has_test = 'test' in self.experiment.dataset.splits
    if self.step == self.total_steps and has_test and 'test' not in splits:
      splits.append('test')
    missing = {
      statistics: [
        split
        for split in splits
        if not self._writer.has(self.step, split, statistics)
      ]
      for statistics in evaluation.statistics_modes(self.experiment)
    }
    modes = list(missing)
    if not self._workdir.model.exists():
      missing[modes[-1]] = splits
    with self.clock.spending('evaluation'):
      self._fetch_pending_sums()
      for line, inference in evaluation.evaluate(
        self.experiment, self._state, missing, self._check
      ):
        # Parameters may be finite and yet too large to compute with.
        values = [line['loss'], *jax.tree.leaves(line.get('percentiles', {}))]
        if not np.isfinite(values).all():
          raise Diverged(
            f'{line["split"]} loss {line["loss"]:g}, or percentiles not finite'
          )
        if line.get('statistics') == modes[-1]:
          self._write_model(inference, line)
        statistics = line.get('statistics')
        if not self._writer.has(line['step'], line['split'], statistics):
          self._writer.write(line)

  def _write_model(self, inference: TrainState, line: dict[str, Any]) -> None:
    """Writes what `line` was computed with as the model of the workdir."""
    if not self._workdir.writes:
      return
    run = read_json(self._workdir.path / 'run.json') or {}
    evaluated = {name: x for name, x in line.items() if name != 'timing'}
    dataset = self.experiment.dataset
    model = model_file.ModelFile(
      variables=jax.device_get(
        {'params': inference.params, 'batch_stats': inference.batch_stats}
      ),
      config=self.config,
      label_names=dataset.label_names,
      image_shape=dataset.image_shape,
      unpadded_shape=dataset.unpadded_shape,
      facts={
        'statistics': line.get('statistics'),
        'evaluation': evaluated,
        'data_fingerprint': dataset.fingerprint,
        'config_file': run.get('config_file', ''),
        'revision': run.get('git_revision', ''),
      },
    )
    model_file.write(self._workdir.path / model_file.NAME, model)

  def save(self, *, wait: bool = False) -> None:
    """Saves the state, unless this step has a checkpoint.

    All metrics up to this step are on disk first.

    Args:
      wait: return only when the checkpoint is on disk.

    Raises:
      Diverged: if the state is not finite.
      RuntimeError: if the replicas of the state differ.
    """
    with self.clock.spending('checkpoint'):
      self._fetch_pending_sums()
      self._check_finite()
      self._check_replicas()
      # A save of this step may be in progress.
      self.checkpoints.wait()
      if self.step not in self.checkpoints.steps():
        self._writer.sync()
        self.checkpoints.save(
          self.step,
          self._state,
          {
            'interval_sums': dataclasses.asdict(self._interval_sums),
            'metrics': self._writer.digest(),
          },
        )
      if wait:
        self.checkpoints.wait()

  def _check_finite(self) -> None:
    """Raises if a parameter or statistic is infinite or NaN.

    A loss can be finite all the same, where a ReLU or no gradient passes it on.
    """
    count = count_nonfinite((self._state.params, self._state.batch_stats))
    if count:
      raise Diverged(f'{count} parameters and statistics are not finite')

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
  if not math.isfinite(loss):
    return f'loss {loss:g}'
  if loss > limit:
    return f'loss {loss:g} above divergence_loss={limit:g}'
  return None
