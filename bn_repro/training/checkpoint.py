"""Checkpoints: Orbax, with checksums of all of it; restore and warm start.

The state is replicated, so that a checkpoint holds plain host arrays and can be
restored on any number of devices. A checkpoint counts as saved once its files
have been read back and agree with the checksums.
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import errno
import json
import os
from pathlib import Path
import re
import sys
from typing import Any, NamedTuple
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from bn_repro import files, parallel
from bn_repro.errors import UserError
from bn_repro.runtime import mirror, processes
from bn_repro.runtime.workdir import Workdir, add_checksum, remove_checksum
from bn_repro.training import model_file
from bn_repro.training.experiment import Experiment
from bn_repro.training.metrics import Sums
from bn_repro.training.steps import TrainState

# Errors that say nothing about the files of a checkpoint: of permissions, of
# limits, and of a network file system. EIO is also that of a damaged disk.
_NOT_DAMAGE = (
  *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
  *(errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN),
  *(errno.ECONNRESET, errno.EHOSTDOWN, errno.EHOSTUNREACH),
)


class SaveFailed(OSError):
  """A checkpoint could not be written; earlier ones are unchanged."""


class DamagedCheckpoint(Exception):
  """A checkpoint that cannot be read, or whose checksums differ."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """A restored checkpoint.

  Attributes:
    state: pytree of NumPy arrays.
    meta: JSON object with `step`, `checksums`, the identity of the run and the
      `meta` of `Checkpoints.save`.
  """

  state: Any
  meta: Mapping[str, Any]


class Checkpoints:
  """The checkpoints of one run; a context manager that ends Orbax's threads.

  Attributes:
    directory: where they are.
  """

  def __init__(
    self,
    directory: Path,
    *,
    keep: int | None,
    identity: Mapping[str, Any] | None = None,
  ):
    """Opens the checkpoints of a run.

    The state is replicated, so one of several processes saves and restores,
    without waiting for the others.

    Args:
      directory: need not exist.
      keep: number of checkpoints to keep; None opens them for reading only, for
        example while the run is in progress, and `save` then does nothing.
      identity: JSON object that is saved with each checkpoint, and that a
        checkpoint must share to be restored by `restore_newest`.
    """
    self.directory = directory
    self._identity = dict(identity or {})
    # The state's structure and the meta of the save in progress, as JSON.
    self._in_progress: tuple[Any, str] = (None, '')
    self._resources = contextlib.ExitStack()
    self._manager = None
    if keep is None:
      return
    directory.mkdir(parents=True, exist_ok=True)
    self._root = self._resources.enter_context(_plain_path(directory))
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep,
      cleanup_tmp_directories=True,
      create=False,
      async_options=ocp.AsyncOptions(post_finalization_callback=self._verify),
    )
    if jax.process_count() > 1:
      index = jax.process_index()
      options.multiprocessing_options = ocp.options.MultiprocessingOptions(
        primary_host=index,
        active_processes={index},
        barrier_sync_key_prefix=f'process_{index}',
      )
    self._manager = ocp.CheckpointManager(
      self._root, options=options, item_names=('state', 'meta')
    )

  def steps(self) -> list[int]:
    """Steps that have a committed checkpoint, oldest first."""
    if not self.directory.is_dir():
      return []
    # Orbax renames the directory of a step when it is complete.
    names = (path.name for path in self.directory.iterdir())
    return sorted(int(n) for n in names if re.fullmatch('0|[1-9][0-9]*', n))

  def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    """Starts saving; the arrays are copied before this returns.

    Args:
      step: updates applied to the state.
      state: pytree of arrays.
      meta: JSON object to save with it.

    Raises:
      SaveFailed: if this or an earlier save failed.
    """
    if self._manager is None:
      return
    self.wait()
    # The next step may reuse the buffers of the state.
    state = jax.tree.map(lambda x: np.array(x, copy=True), state)
    meta = {
      'step': step,
      **self._identity,
      **meta,
      'checksums': checksums(state),
    }
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    self._in_progress = like, json.dumps(meta)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      meta=ocp.args.JsonSave(add_checksum(meta)),
    )
    with self._saving():
      if not self._manager.save(step, args=args, force=True):
        raise OSError(f'step {step} was skipped')

  def _verify(self) -> None:
    """Reads the files of the save in progress, and compares them.

    Orbax calls this in the thread that saves, before it renames the directory
    of the step and deletes older checkpoints. It does neither if this raises.

    Raises:
      DamagedCheckpoint: if the files differ from what was saved.
    """
    like, meta = self._in_progress
    step = json.loads(meta)['step']
    found = read(self._root / f'{step}{ocp.utils.TMP_DIR_SUFFIX}', like)
    if json.dumps(found.meta) != meta:
      raise DamagedCheckpoint('does not match its saved meta')

  def check(self) -> None:
    """Raises `SaveFailed` if a save has failed."""
    if self._manager and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Waits for saves in progress; raises `SaveFailed` if one failed."""
    if self._manager:
      with self._saving():
        self._manager.wait_until_finished()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception: object) -> None:
    if self._manager:
      with contextlib.suppress(Exception):  # `wait` has raised it before.
        self._manager.close()
      # A start that fails leaves nothing.
      with contextlib.suppress(OSError):  # It is not empty.
        self.directory.rmdir()
    self._resources.close()

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    try:
      yield
    except DamagedCheckpoint as error:  # Of `_verify`.
      raise SaveFailed(
        f'{self.directory}: a checkpoint was written, but what was read back '
        f'{error}. Earlier checkpoints are intact: check the disk, then run '
        'the same command again.'
      ) from error
    except Exception as error:  # Orbax raises what its storage layers raise.
      is_full = files.is_system_error(error, files.DISK_FULL)
      raise SaveFailed(
        f'{self.directory}: a checkpoint could not be saved '
        f'({_short_reason(error)}). Earlier checkpoints are intact: '
        f'{"free some space, then " if is_full else ""}run the same command '
        'again.'
      ) from error

  def restore(self, step: int, like: Any) -> Checkpoint:
    """Restores a step onto the structure, shapes and dtypes of `like`.

    Raises:
      DamagedCheckpoint: if it cannot be read, or a checksum differs.
      UserError: if the system does not allow to read it.
    """
    return read(self.directory / str(step), like)

  def restore_variables(self) -> Mapping[str, Any]:
    """`params` and `batch_stats` of the newest checkpoint, of any network.

    Returns:
      Nested dicts of arrays.

    Raises:
      DamagedCheckpoint: if there is none, or it cannot be read.
      UserError: if the system does not allow to read it.
    """
    steps = self.steps()
    if not steps:
      raise DamagedCheckpoint('does not exist')
    state = read(self.directory / str(steps[-1])).state
    return {name: state.get(name, {}) for name in ('params', 'batch_stats')}

  def restore_newest(self, like: Any) -> Checkpoint | None:
    """Returns the newest undamaged checkpoint, or None without checkpoints.

    Damaged checkpoints are renamed so that they are out of the way, and never
    deleted.

    Args:
      like: see `restore`.

    Raises:
      UserError: if all checkpoints are damaged, or the newest undamaged one
        belongs to a run of a different identity.
    """
    damaged: dict[int, DamagedCheckpoint] = {}
    for step in reversed(self.steps()):
      try:
        checkpoint = self.restore(step, like)
      except DamagedCheckpoint as damage:
        damaged[step] = damage
        continue
      self._check_identity(checkpoint.meta)
      for step, error in damaged.items():
        print(
          f'warning: checkpoint {step} {error}; using the one before it',
          file=sys.stderr,
        )
        aside = self.directory.with_name(f'damaged_checkpoint_{step}')
        (self.directory / str(step)).rename(aside)
      if self._manager:
        self._manager.reload()
      return checkpoint
    if damaged:
      problems = '; '.join(f'{step} {error}' for step, error in damaged.items())
      raise UserError(
        f'{self.directory}: all checkpoints are damaged ({problems}). Nothing '
        'was changed. To train from the start, use another workdir.'
      )
    return None

  def _check_identity(self, meta: Mapping[str, Any]) -> None:
    differing = [
      key for key, value in self._identity.items() if meta.get(key) != value
    ]
    if differing:
      raise UserError(
        f'--workdir={self.directory.parent}: its checkpoint of step '
        f'{meta["step"]} has a different '
        f'{" and ".join(differing).replace("_", " ")}. Use the same config, '
        'data and kind of devices, or another workdir.'
      )


def read(directory: Path, like: Any = None) -> Checkpoint:
  """Reads a checkpoint and compares all of it with its checksums.

  Args:
    directory: directory of a checkpoint.
    like: pytree whose structure, shapes and dtypes the state has; None for the
      saved ones, in nested dicts.

  Raises:
    DamagedCheckpoint: if it cannot be read, a checksum differs, or the name of
      its directory is that of another step.
    UserError: if the system does not allow to read it.
  """
  target = jax.tree.map(lambda x: np.empty(np.shape(x), x.dtype), like)
  try:
    with (
      _plain_path(directory) as path,
      contextlib.closing(ocp.StandardCheckpointHandler()) as handler,
    ):
      saved = ocp.JsonCheckpointHandler().restore(path / 'meta')
      meta = remove_checksum(saved)
      step, expected = int(meta['step']), dict(meta['checksums'])
      state = handler.restore(
        path / 'state', args=ocp.args.StandardRestore(target)
      )
  except Exception as error:  # Orbax raises what its storage layers raise.
    if files.is_system_error(error, _NOT_DAMAGE):
      raise UserError(
        f'{directory}: cannot be read ({_short_reason(error)}). Nothing was '
        'changed.'
      ) from error
    raise DamagedCheckpoint(
      f'cannot be read ({type(error).__name__}: {_short_reason(error)})'
    ) from error
  _compare(step, expected, state, directory)
  if meta == saved:
    print(
      f'warning: {directory}: written by an earlier version, without a '
      'checksum of its meta',
      file=sys.stderr,
    )
  return Checkpoint(state, meta)


def _compare(
  step: int, expected: Mapping[str, str], state: Any, directory: Path
) -> None:
  """Compares a state with the step and the checksums of its meta.

  Raises:
    DamagedCheckpoint: if anything differs.
  """
  found = checksums(state)
  for name in sorted(found.keys() | expected.keys()):
    if found.get(name) != expected.get(name):
      raise DamagedCheckpoint(f'does not match its checksum of {name}')
  # While it is being saved, the name has a suffix.
  named = int(directory.name.partition('.')[0])
  reached = int(parallel.named_leaves(state).get('step', step))
  if not step == named == reached:
    raise DamagedCheckpoint(
      f'has step {step}, its state step {reached}, its directory step {named}'
    )


@contextlib.contextmanager
def _plain_path(directory: Path) -> Iterator[Path]:
  """Yields a path of a directory that has no special characters.

  Orbax takes brackets in a path for a pattern, and TensorStore a backslash for
  a slash. On systems without /proc, it is the same path.
  """
  descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
  try:
    alias = Path(f'/proc/self/fd/{descriptor}')
    yield alias if alias.is_dir() else directory
  finally:
    os.close(descriptor)


def checksums(tree: Any) -> dict[str, str]:
  """CRC-32 of each array by its path, such as 'params/conv1/conv/kernel'."""
  return {
    name: f'{zlib.crc32(np.asarray(x).tobytes()):08x}'
    for name, x in parallel.named_leaves(tree).items()
  }


def _short_reason(error: Exception) -> str:
  """The message of a storage layer, without its internal details."""
  line = (str(error).splitlines() or [''])[0].split(' [')[0]
  line = re.sub(r'/proc/self/fd/\d+/?', '', line)  # See `_plain_path`.
  # The cause comes last in a long one.
  return line if len(line) < 200 else f'... {line[-200:].partition(" ")[2]}'


class Start(NamedTuple):
  """What a run starts or resumes from, equal on all processes.

  Attributes:
    state: the state, as host arrays.
    interval_sums: sums of its log interval so far.
    metrics: digest of the lines of metrics before the checkpoint; None without
      one.
  """

  state: TrainState
  interval_sums: Sums
  metrics: Mapping[str, Any] | None


def restore_or_initialize(
  experiment: Experiment, checkpoints: Checkpoints
) -> Start:
  """Returns the state to start from.

  Process 0 restores it from the newest checkpoint; without a checkpoint the
  state is new, with the variables of `config.init_from` if that is set.

  Raises:
    UserError: on all processes, if a checkpoint cannot be resumed from.
  """
  initial = experiment.initial_state()

  def restore() -> tuple[TrainState, dict[str, Any]]:
    newest = checkpoints.restore_newest(initial)
    if newest is None:
      workdir = Workdir(str(checkpoints.directory.parent))
      if workdir.has_saved():
        raise UserError(
          f'{checkpoints.directory}: the checkpoints of this run are missing. '
          'Restore them from a copy. To train from the start, use another '
          'workdir.'
        )
      init_from = experiment.config.init_from
      state = warm_start(initial, init_from) if init_from else initial
      return state, {'interval_sums': {}, 'metrics': None}
    step, total_steps = newest.meta['step'], experiment.total_steps
    if step > total_steps:
      raise UserError(
        f'--workdir={checkpoints.directory.parent}: the newest checkpoint is '
        f'at step {step}, past the {total_steps} steps of the config. Train '
        f'for at least {step} steps.'
      )
    return newest.state, {
      'interval_sums': newest.meta['interval_sums'],
      # Checkpoints of revision 3a68ec7 and before do not have it.
      'metrics': newest.meta.get('metrics'),
    }

  state, meta = processes.broadcast_from_first(restore, initial)
  sums = dict(meta['interval_sums'])
  sums.pop('nonfinite', None)  # In checkpoints of earlier revisions.
  return Start(state, Sums(**sums), meta['metrics'])


def warm_start(state: TrainState, init_from: str) -> TrainState:
  """Takes parameters and statistics from a run, or from imported weights.

  Args:
    state: a new state.
    init_from: workdir of a run, whose newest checkpoint is taken; or one that
      has no checkpoints and a model file, of `scripts/import_weights.py`.

  Raises:
    UserError: if it has neither, or its network has other variables.
  """
  loaded = _trained_variables(init_from)
  own = {'params': state.params, 'batch_stats': state.batch_stats}
  expected, found = (
    {name: np.shape(x) for name, x in parallel.named_leaves(tree).items()}
    for tree in (own, loaded)
  )
  classes = [
    shapes.get('params/classifier/bias', (0,))[0]
    for shapes in (found, expected)
  ]
  if classes[0] != classes[1]:
    raise UserError(
      f'config.init_from={init_from}: its network has {classes[0]:,} classes, '
      f'and the data set {classes[1]:,}. Name one with the same classes.'
    )
  for name in sorted(expected.keys() | found.keys()):
    if expected.get(name) != found.get(name):
      raise UserError(
        f'config.init_from={init_from}: a different network. {name} is '
        f'{found.get(name, "missing")}, and should be '
        f'{expected.get(name, "missing")}.'
      )
  return state.replace(
    **jax.tree.map(lambda x, like: x.astype(like.dtype), loaded, own)
  )


def _trained_variables(init_from: str) -> Mapping[str, Any]:
  """Reads the `params` and `batch_stats` that `warm_start` takes."""
  path = files.expand('config.init_from', init_from, in_bucket=True)
  workdir = Workdir(mirror.fetch(path))
  model = workdir.path / model_file.NAME
  try:
    with Checkpoints(workdir.checkpoints, keep=None) as checkpoints:
      if not checkpoints.steps() and model.exists():
        return model_file.read(model).variables
      return checkpoints.restore_variables()
  except DamagedCheckpoint as error:
    raise UserError(
      f'config.init_from={init_from}: its newest checkpoint {error}. Name the '
      'workdir of a run that has one.'
    ) from error
