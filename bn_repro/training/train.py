"""The training loop, and nothing else: one story from start to finish.

What is due after a step is done in a fixed order: a line of training metrics,
evaluation, a checkpoint. Each of them is skipped if it has been done already,
so that a resumed run begins with what is due at its step, and a run that was
cut off in the middle of an evaluation goes on with the rest of it.
"""

from collections.abc import Iterator, Mapping
from concurrent import futures
import contextlib
import dataclasses
import math
import os
from pathlib import Path
import sys
import time
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from bn_repro import config as config_lib
from bn_repro import config_fields, parallel
from bn_repro.data import datasets
from bn_repro.errors import UserError
from bn_repro.models import factory
from bn_repro.runtime import processes
from bn_repro.runtime import workdir as workdir_lib
from bn_repro.runtime.metric_writer import MetricWriter
from bn_repro.runtime.preemption import (
  AgreedPreemption,
  Preempted,
  Preemption,
)
from bn_repro.runtime.profiling import Profile
from bn_repro.runtime.progress import ProgressDisplay
from bn_repro.runtime.watchdog import Watchdog
from bn_repro.training import checkpoint as checkpoint_lib
from bn_repro.training import evaluation, optimizer, run_info
from bn_repro.training.experiment import Program, create_program
from bn_repro.training.metrics import Sums, check_replaced
from bn_repro.training.steps import TrainState

# Share of the time in which steps may wait for data before it is said; from the
# project's design.
_WAITING_LIMIT = 0.1


# What the time of a run is spent on. `waiting_for_data` is time in which the
# device has nothing to do, for want of a batch.
_KINDS = ('compile', 'waiting_for_data', 'step', 'evaluation', 'checkpoint')


class Diverged(Exception):
  """The run has left the finite numbers, or passed `divergence_loss`."""


def train_and_evaluate(
  config: ConfigDict,
  dataset: datasets.Dataset,
  workdir: workdir_lib.Workdir,
  preemption: Preemption,
  config_file: str,
) -> workdir_lib.Status:
  """Trains until the end, a signal or divergence, and returns the status.

  Args:
    config: a checked, locked config.
    dataset: its data.
    workdir: a claimed workdir; the run goes on from its newest checkpoint.
    preemption: asked between steps, and while compiling.
    config_file: where the config comes from, for `run.json`.

  Raises:
    UserError: if the workdir holds another run, or damaged checkpoints only.
  """
  data_fingerprint = dataset.fingerprint()
  compute_type = str(factory.compute_dtype(config.model))
  processes.assert_equal(
    {
      **_agreed_fields(config),
      'data fingerprint': data_fingerprint,
      'compute type': compute_type,
      **run_info.versions(),
    }
  )
  with contextlib.ExitStack() as stack:
    watchdog = stack.enter_context(Watchdog(config.stuck_after, _give_up))
    program = create_program(config, dataset)
    identity = {
      'config_digest': config_lib.digest(config),
      'data_fingerprint': data_fingerprint,
      'compute_type': compute_type,
      'images_per_statistic': run_info.images_per_statistic(program),
    }
    checkpoints = stack.enter_context(
      checkpoint_lib.Checkpoints(
        workdir.checkpoints,
        keep=config.checkpoints_to_keep if workdir.writes else None,
      )
    )

    def restore() -> tuple[TrainState, dict[str, Any]]:
      state, sums = restore_or_initialize(
        program, checkpoints, workdir, identity
      )
      return state, dataclasses.asdict(sums)

    state, numbers = processes.broadcast_from_first(
      restore, program.initial_state()
    )
    sums = Sums(**numbers)
    step = int(state.step)
    display = ProgressDisplay(program.total_steps, silent=not workdir.writes)
    stack.callback(display.stop)
    recorder = stack.enter_context(
      contextlib.closing(
        MetricWriter(workdir, step, display, tensorboard=config.tensorboard)
      )
    )
    workdir.write_config(config)
    run_info.announce(program, workdir, step, config_file, display.say)
    workdir.write_status(workdir_lib.Status.RUNNING, step, 'under way')
    if processes.count() > 1:
      preemption = AgreedPreemption(
        preemption, parallel.create_maximum(program.mesh)
      )
    run = _Run(
      program,
      state,
      sums,
      checkpoints,
      recorder,
      display,
      preemption,
      watchdog,
      identity,
      workdir.path / 'profile',
    )
    try:
      status, reason = run.train_until_stopped()
      watchdog.stop()  # A last save may take as long as it likes.
      checkpoints.wait()
      # None leaves while another still saves: it would be ended with it.
      processes.gather('saved')
      step = run.step
    except Exception as error:
      line = f'{type(error).__name__}: {error}'.splitlines()[0]
      if not processes.is_peer_failure(error):
        with contextlib.suppress(OSError):  # The disk may be what failed.
          workdir.write_status(workdir_lib.Status.FAILED, run.step, line)
        raise
      # Nothing more can be agreed on, nor saved.
      status, reason = workdir_lib.Status.PREEMPTED, 'lost another process'
      print(f'error: {reason}: {line}', file=sys.stderr)
      step = max(checkpoints.steps(), default=0)
      processes.leave()
    display.say(run.goodput())
  workdir.write_status(status, step, reason)
  display.say(f'{status} at step {step}: {reason}')
  return status


def _agreed_fields(config: ConfigDict) -> dict[str, str]:
  """The fields that have to be the same in all processes."""
  return {
    f'config.{name}': f'{value}'
    for name, value in config_fields.flatten(config).items()
    if not config_fields.FIELDS[name].per_host
  }


def _give_up() -> None:
  """Ends a process that hangs; the same command goes on from its checkpoint."""
  os._exit(workdir_lib.EXIT_CODES[workdir_lib.Status.PREEMPTED])


def restore_or_initialize(
  program: Program,
  checkpoints: checkpoint_lib.Checkpoints,
  workdir: workdir_lib.Workdir,
  identity: Mapping[str, Any],
) -> tuple[TrainState, Sums]:
  """The state to start from, and the sums of its log interval so far.

  Raises:
    UserError: if there are checkpoints that cannot be gone on from.
  """

  def accept(meta: Mapping[str, Any]) -> None:
    wrong = [key for key in identity if meta.get(key) != identity[key]]
    if wrong:
      raise UserError(
        f'--workdir={workdir.path}: its checkpoint of step {meta["step"]} has '
        f'another {" and ".join(wrong).replace("_", " ")}. Use the config, the '
        'data and the kind of devices it was made with, or another workdir.'
      )

  state = program.initial_state()
  newest = checkpoints.restore_newest(state, accept)
  if newest is None:
    init_from = program.config.init_from
    return (warm_start(state, init_from) if init_from else state), Sums()
  step, total_steps = newest.meta['step'], program.total_steps
  if step > total_steps:
    raise UserError(
      f'--workdir={workdir.path}: the run is at step {step}, past the '
      f'{total_steps} of the config. Make it at least {step} steps long.'
    )
  return newest.state, Sums(**newest.meta['interval_sums'])


def warm_start(state: TrainState, init_from: str) -> TrainState:
  """Takes parameters and statistics from another run's newest checkpoint.

  Raises:
    UserError: if there is none, or its network has other variables.
  """
  directory = workdir_lib.Workdir(init_from).checkpoints
  try:
    with checkpoint_lib.Checkpoints(directory, keep=None) as checkpoints:
      loaded = checkpoints.restore_variables()
  except checkpoint_lib.DamagedCheckpoint as error:
    raise UserError(
      f'config.init_from={init_from}: its newest checkpoint {error}. Name the '
      'workdir of a run that has one.'
    ) from error
  return state.replace(
    params=_matching('params', state.params, loaded['params'], init_from),
    batch_stats=_matching(
      'batch_stats', state.batch_stats, loaded['batch_stats'], init_from
    ),
  )


def _matching(name: str, ours: Any, loaded: Any, init_from: str) -> Any:
  """Checks that loaded variables fit, by name and shape."""
  expected, found = (
    {
      jax.tree_util.keystr(path, simple=True, separator='/'): np.shape(leaf)
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    for tree in (ours, loaded)
  )
  for variable in sorted(expected.keys() | found.keys()):
    if expected.get(variable) != found.get(variable):
      raise UserError(
        f'config.init_from={init_from}: another network. {name}/{variable} is '
        f'{found.get(variable, "not there")}, and should be '
        f'{expected.get(variable, "not there")}.'
      )
  return jax.tree.map(lambda x, like: x.astype(like.dtype), loaded, ours)


class _Run:
  """A compiled run under way.

  Attributes:
    step: updates applied to the state, and equal to its `step`.
  """

  def __init__(
    self,
    program: Program,
    state: TrainState,
    interval_sums: Sums,
    checkpoints: checkpoint_lib.Checkpoints,
    recorder: MetricWriter,
    display: ProgressDisplay,
    preemption: Preemption,
    watchdog: Watchdog,
    identity: Mapping[str, Any],
    profile_directory: Path,
  ):
    self._program = program
    self._config = program.config
    self._checkpoints = checkpoints
    self._recorder = recorder
    self._display = display
    self._preemption = preemption
    self._watchdog = watchdog
    self._identity = identity
    self.step = int(state.step)
    self._state = parallel.replicate(program.mesh, state)
    # The sums since the last line of training metrics, and those of the last
    # call's steps, which may not have been computed yet.
    self._interval_sums = interval_sums
    self._pending: Sums | None = None
    self._clock = _Clock(self.step)
    self._device = _Device()
    self._profile = Profile(
      profile_directory,
      self._config.profile_first_step,
      self._config.profile_steps,
    )
    self._advised = False
    self._differing_replicas = parallel.create_replica_check(program.mesh)

  def train_until_stopped(self) -> tuple[workdir_lib.Status, str]:
    """Compiles and trains; returns how it ended, and why."""
    try:
      try:
        self._keep_warm_start()
        with self._clock.spending('compile'):
          self._compile()
        self._train()
      except Preempted as error:
        self._save()
        return workdir_lib.Status.PREEMPTED, str(error)
    except Diverged as error:
      return workdir_lib.Status.DIVERGED, str(error)
    return workdir_lib.Status.DONE, 'reached the last step'

  def _keep_warm_start(self) -> None:
    """Saves what a run starts from, if another run may change it later."""
    if self._config.init_from and self.step == 0:
      self._save()
      self._checkpoints.wait()

  def _compile(self) -> None:
    self._display.say('compiling ...')
    started = time.monotonic()
    self._program = self._preemption.run(
      lambda: self._program.compile(self._state)
    )
    # Nobody's step waits, with the watchdog looking on, for another's compiler.
    processes.gather('compiled')
    self._display.say(f'compiled in {time.monotonic() - started:.0f} s')

  def _train(self) -> None:
    self._display.start(self.step)
    self._do_what_is_due()
    total_steps = self._program.total_steps
    stream = self._program.stacked_batches(self.step, total_steps)
    with contextlib.closing(stream), contextlib.closing(self._profile):
      while self.step < total_steps:
        self._profile.before_call(self.step, self._config.steps_per_call)
        with (
          self._clock.spending('step'),
          jax.profiler.StepTraceAnnotation('train', step_num=self.step),
        ):
          asked = time.monotonic()
          batches = next(stream)
          idle = self._device.idle_seconds(asked)
          self._state, sums = self._program.train_steps(self._state, batches)
          self._device.works_on(sums)
          # The sums of the call before are read while this one runs.
          self._absorb_pending()
        self._clock.move('step', 'waiting_for_data', idle)
        self._pending = sums
        self.step += self._config.steps_per_call
        self._do_what_is_due()
        self._checkpoints.check()
        self._check()

  def goodput(self) -> str:
    """What the time since the start was spent on, in words."""
    return self._clock.goodput()

  def _check(self) -> None:
    """Asked between the parts of the work: goes on, or is to stop?"""
    self._watchdog.beat()
    self._preemption.check()

  def _due(self, every: int) -> bool:
    """Whether something done every so many steps is due after this one."""
    is_last = self.step == self._program.total_steps
    return self.step > 0 and (self.step % every == 0 or is_last)

  def _do_what_is_due(self) -> None:
    if self._due(self._config.log_every):
      self._write_training_line()
    if self._due(self._config.eval_every):
      with self._clock.spending('evaluation'):
        self._evaluate()
    if self._due(self._config.checkpoint_every):
      with self._clock.spending('checkpoint'):
        self._save()

  def _absorb_pending(self) -> None:
    """Adds the sums of the last call to the interval, unless it diverged."""
    if self._pending is None:
      return
    pending, self._pending = self._pending.fetch_steps(), None
    first = self.step - len(pending)
    for step, sums in enumerate(pending, start=first + 1):
      reason = self._divergence(sums)
      if reason:
        self.step = step
        raise Diverged(reason)
      self._interval_sums = self._interval_sums.merge(sums)

  def _divergence(self, sums: Sums) -> str | None:
    """Why a step with these sums has diverged; None if it has not."""
    loss = sums.loss / sums.count
    if sums.nonfinite or not math.isfinite(loss):
      return (
        f'loss {loss:g}, {sums.nonfinite} values of the parameters and '
        'statistics not finite'
      )
    limit = self._config.divergence_loss
    return (
      f'loss {loss:g} above divergence_loss={limit:g}'
      if (loss > limit)
      else None
    )

  def _write_training_line(self) -> None:
    with self._clock.spending('step'):
      self._absorb_pending()
    sums, self._interval_sums = self._interval_sums, Sums()
    if not sums.count or self._recorder.has(self.step, 'train', None):
      return
    check_replaced(
      sums, self._config.data.max_replaced, f'training up to step {self.step}'
    )
    timing = self._clock.lap(self.step, self._config.batch_size)
    self._advise(timing['shares']['waiting_for_data'])
    factor = float(self._program.schedule(self.step - 1))
    rate = optimizer.applied_learning_rate(
      self._config.optim, self._config.batch_size
    )
    self._recorder.write(
      {
        'step': self.step,
        'split': 'train',
        **sums.means(),
        'learning_rate': rate * factor,
        'timing': timing,
      }
    )

  def _advise(self, waiting: float) -> None:
    """Says once when steps begin to wait for data, and what may help."""
    if waiting > _WAITING_LIMIT and not self._advised:
      self._display.say(
        f'warning: {waiting:.0%} of the time is spent waiting for data. Try '
        '--config.data.num_workers=2 or more where cores are idle, and data on '
        'a local disk; else the machine has too few cores for its accelerator'
      )
    self._advised = waiting > _WAITING_LIMIT

  def _evaluate(self) -> None:
    """Evaluates what has no line yet; test images after the last step only."""
    self._absorb_pending()
    splits = [self._config.eval_split]
    if self.step == self._program.total_steps:
      splits += {'test'} & self._program.dataset.splits.keys() - {*splits}
    for statistics in evaluation.forms(self._program):
      missing = [
        split
        for split in splits
        if not self._recorder.has(self.step, split, statistics)
      ]
      if not missing:
        continue
      state = evaluation.inference_state(
        self._program, self._state, statistics, self._check
      )
      for split in missing:
        started = time.monotonic()
        sums, percentiles = evaluation.evaluate(
          self._program, state, split, self._check
        )
        # Parameters may be finite and yet too large to compute with.
        if not np.isfinite([sums.loss, *_values(percentiles)]).all():
          raise Diverged(f'{split} loss {sums.loss:g}, or inputs not finite')
        self._recorder.write(
          {
            'step': self.step,
            'split': split,
            **({'statistics': statistics} if statistics else {}),
            **sums.means(),
            **({'percentiles': percentiles} if percentiles else {}),
            'timing': {'seconds': time.monotonic() - started},
          }
        )

  def _save(self) -> None:
    """Saves this step, after every line up to it, unless it is saved."""
    self._absorb_pending()
    self._see_that_replicas_are_equal()
    if self.step in self._checkpoints.steps():
      return
    self._recorder.sync()
    self._checkpoints.save(
      self.step,
      self._state,
      {
        'step': self.step,
        **self._identity,
        'interval_sums': dataclasses.asdict(self._interval_sums),
      },
    )

  def _see_that_replicas_are_equal(self) -> None:
    """Keeps a state that has come apart from being saved."""
    if self._program.mesh.devices.size == 1:
      return
    wrong = self._differing_replicas(self._state)
    if wrong:
      raise RuntimeError(
        f'step {self.step}: {wrong[0]} and {len(wrong) - 1} other arrays are '
        'not equal on all devices; not saved'
      )


def _values(percentiles: Mapping[str, list[list[float]]]) -> Iterator[float]:
  for rows in percentiles.values():
    for row in rows:
      yield from row


class _Device:
  """Notices when the device has nothing left to do."""

  def __init__(self) -> None:
    self._watcher = futures.ThreadPoolExecutor(1)
    self._finished: futures.Future[float] | None = None

  def works_on(self, results: Any) -> None:
    """Takes note of the newest call, by its results."""

    def finish() -> float:
      jax.block_until_ready(results)
      return time.monotonic()

    self._finished = self._watcher.submit(finish)

  def idle_seconds(self, since: float) -> float:
    """For how long until now, at most from `since` on, it has been idle."""
    now = time.monotonic()
    if self._finished is None:
      return now - since
    if not self._finished.done():
      return 0.0
    return max(now - max(since, self._finished.result()), 0.0)


class _Clock:
  """Where the time goes: what it is spent on, of each interval and in all."""

  def __init__(self, step: int):
    self._total = dict.fromkeys(_KINDS, 0.0)
    self._first_start = time.monotonic()
    self._begin(step)

  def _begin(self, step: int) -> None:
    self._step = step
    self._start = time.monotonic()
    self._spent = dict.fromkeys(_KINDS, 0.0)

  @contextlib.contextmanager
  def spending(self, kind: str) -> Iterator[None]:
    """Counts what happens in this context as one of `_KINDS`."""
    entered = time.monotonic()
    try:
      yield
    finally:
      seconds = time.monotonic() - entered
      self._spent[kind] += seconds
      self._total[kind] += seconds

  def move(self, from_kind: str, to_kind: str, seconds: float) -> None:
    """Counts seconds of one of `_KINDS` as of another one."""
    for spent in (self._spent, self._total):
      spent[from_kind] -= seconds
      spent[to_kind] += seconds

  def lap(self, step: int, batch_size: int) -> dict[str, Any]:
    """The `timing` of a training line; starts the next interval.

    Images per second, and the seconds they are of, leave out what is no
    training. Shares are of all the time since the line before.
    """
    wall = time.monotonic() - self._start
    besides = ('compile', 'evaluation', 'checkpoint')
    seconds = wall - sum(self._spent[kind] for kind in besides)
    timing = {
      'images_per_second': (step - self._step) * batch_size / seconds,
      'seconds': seconds,
      'shares': _shares(self._spent, wall),
    }
    self._begin(step)
    return timing

  def goodput(self) -> str:
    """What the time since the start was spent on, in words."""
    shares = _shares(self._total, time.monotonic() - self._first_start)
    return 'time: ' + ', '.join(
      f'{kind.replace("_", " ")} {share:.1%}' for kind, share in shares.items()
    )


def _shares(spent: Mapping[str, float], wall: float) -> dict[str, float]:
  """Shares of the time; what nothing was spent on is idle."""
  shares = {kind: seconds / wall for kind, seconds in spent.items()}
  return {**shares, 'idle': max(1 - sum(shares.values()), 0.0)}
