"""Checkpoints: Orbax, with a checksum of every array. No one else imports it.

The state is replicated, so that a checkpoint holds plain arrays of the host and
can be restored on any number of devices.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import dataclasses
from pathlib import Path
import sys
from typing import Any
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from bn_repro.errors import UserError


class SaveFailed(OSError):
  """A checkpoint could not be written; those before it are as they were."""


class DamagedCheckpoint(Exception):
  """A checkpoint whose arrays are not those that were saved."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
  """What commits together.

  Attributes:
    state: pytree of NumPy arrays.
    meta: JSON: `step`, `config_digest`, `data_fingerprint`, `interval_sums`.
  """

  state: Any
  meta: Mapping[str, Any]


class Checkpoints:
  """The checkpoints of one run; a context, at whose end Orbax's threads go."""

  def __init__(self, directory: Path, *, keep: int | None):
    """Opens the checkpoints of a run.

    The state is replicated, so that of several processes one saves and
    restores; it does not wait for the others.

    Args:
      directory: need not exist.
      keep: how many of them stay; None to read only, as beside a run that is
        under way: what is to be saved goes nowhere then.
    """
    self._directory = directory
    self._writes = keep is not None
    if keep is None:
      options = ocp.CheckpointManagerOptions(read_only=True)
    else:
      options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, cleanup_tmp_directories=True
      )
      directory.mkdir(parents=True, exist_ok=True)
    options.create = False
    if jax.process_count() > 1:
      index = jax.process_index()
      options.multiprocessing_options = ocp.options.MultiprocessingOptions(
        primary_host=index,
        active_processes={index},
        barrier_sync_key_prefix=f'process_{index}',
      )
    self._manager = ocp.CheckpointManager(
      directory, options=options, item_names=('state', 'meta')
    )

  def steps(self) -> list[int]:
    """Steps that have a committed checkpoint, oldest first."""
    if not self._directory.is_dir():
      return []
    self._manager.reload()
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    """Starts saving; the arrays are copied before this returns.

    Raises:
      SaveFailed: if this or an earlier save failed.
    """
    if not self._writes:
      return
    # The device may reuse the state's buffers as soon as the next step starts.
    state = jax.tree.map(lambda x: np.array(x, copy=True), state)
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      meta=ocp.args.JsonSave({**meta, 'checksums': checksums(state)}),
    )
    with self._saving():
      if not self._manager.save(step, args=args, force=True):
        raise OSError(f'step {step} was skipped')

  def check(self) -> None:
    """Raises `SaveFailed` if a save under way has failed."""
    with self._saving():
      self._manager.check_for_errors()

  def wait(self) -> None:
    """Waits for the saves under way; raises `SaveFailed` if one failed."""
    with self._saving():
      self._manager.wait_until_finished()

  def __enter__(self) -> 'Checkpoints':
    return self

  def __exit__(self, *exception: object) -> None:
    with contextlib.suppress(Exception):  # `wait` has raised it before.
      self._manager.close()

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # Orbax raises what its storage layers raise.
      raise SaveFailed(
        f'{self._directory}: a checkpoint could not be saved '
        f'({_first_line(error)}). Those before it are intact: see that there '
        'is room, then run the same command again.'
      ) from error

  def restore(self, step: int, like: Any) -> Checkpoint:
    """Restores a step onto the structure, shapes and types of `like`.

    Raises:
      DamagedCheckpoint: if it cannot be read, or a checksum differs.
    """
    try:
      meta = self._manager.restore(
        step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())
      ).meta
      abstract = jax.tree.map(lambda x: np.empty(np.shape(x), x.dtype), like)
      state = self._manager.restore(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)),
      ).state
    except Exception as error:  # Orbax raises what its storage layers raise.
      raise DamagedCheckpoint(
        f'cannot be read ({type(error).__name__}: {_first_line(error)})'
      ) from error
    found = checksums(state)
    wrong = [
      name for name in found if meta['checksums'].get(name) != found[name]
    ]
    if wrong:
      raise DamagedCheckpoint(f'checksum of {wrong[0]} differs')
    return Checkpoint(state, meta)

  def restore_variables(self) -> Mapping[str, Any]:
    """`params` and `batch_stats` of the newest, whatever the network.

    Returns:
      Nested dicts of arrays.

    Raises:
      DamagedCheckpoint: if there is none that can be read.
    """
    steps = self.steps()
    if not steps:
      raise DamagedCheckpoint('is not there')
    try:
      args = ocp.args.Composite(state=ocp.args.StandardRestore())
      state = self._manager.restore(steps[-1], args=args).state
    except Exception as error:  # Orbax raises what its storage layers raise.
      raise DamagedCheckpoint(
        f'cannot be read: {_first_line(error)}'
      ) from error
    return {name: state.get(name, {}) for name in ('params', 'batch_stats')}

  def restore_newest(
    self, like: Any, accept: Callable[[Mapping[str, Any]], None]
  ) -> Checkpoint | None:
    """Restores the newest undamaged checkpoint; None where there is none.

    Damaged ones are set aside under a name that says so, never deleted.

    Args:
      like: see `restore`.
      accept: is given each checkpoint's meta, and raises if it belongs to
        another run.

    Raises:
      UserError: if there are checkpoints and all of them are damaged.
    """
    damaged = []
    for step in reversed(self.steps()):
      try:
        checkpoint = self.restore(step, like)
      except DamagedCheckpoint as error:
        aside = self._directory.with_name(f'damaged_checkpoint_{step}')
        print(
          f'warning: checkpoint {step} {error}; going back to the one before',
          file=sys.stderr,
        )
        damaged.append((step, aside, error))
        continue
      accept(checkpoint.meta)
      for damaged_step, aside, _ in damaged:
        (self._directory / str(damaged_step)).rename(aside)
      self._manager.reload()
      return checkpoint
    if damaged:
      raise UserError(
        f'{self._directory}: all checkpoints are damaged ('
        + '; '.join(f'{step} {error}' for step, _, error in damaged)
        + '). Nothing was changed. To train from the start, use another '
        'workdir.'
      )
    return None


def checksums(tree: Any) -> dict[str, str]:
  """CRC-32 of each array by its path, such as 'params/conv1/conv/kernel'."""
  return {
    jax.tree_util.keystr(
      path, simple=True, separator='/'
    ): f'{zlib.crc32(np.asarray(x).tobytes()):08x}'
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def _first_line(error: Exception) -> str:
  """What an error of the storage layers says, without their own details."""
  line = (str(error).splitlines() or [''])[0].split(' [')[0]
  # A long one says last what went wrong; from a whole word on.
  return line if len(line) < 200 else f'... {line[-200:].partition(" ")[2]}'
