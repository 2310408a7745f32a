"""Checkpoints on the disk: what comes back, and what a damaged one does."""

import errno
import json
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from bn_repro.errors import UserError
from bn_repro.training import checkpoint
from bn_repro.training.checkpoint import (
  Checkpoints,
  DamagedCheckpoint,
  SaveFailed,
  checksums,
)


def state(seed):
  """Arrays of every type that a train state has."""
  rng = np.random.default_rng(seed)
  return {
    'params': {'kernel': rng.normal(size=(3, 4)).astype(np.float32)},
    'batch_stats': {'mean': rng.normal(size=4)},
    'step': np.int32(seed),
    'seed': np.uint32(2**32 - 1),
    'half': np.asarray(jnp.arange(3, dtype=jnp.bfloat16)),
  }


def save(directory, *steps, keep=3):
  with Checkpoints(directory, keep=keep) as checkpoints:
    for step in steps:
      checkpoints.save(step, state(step), {'sums': 1.5})
    checkpoints.wait()


def restore_newest(directory):
  with Checkpoints(directory, keep=3) as checkpoints:
    return checkpoints.restore_newest(state(0))


def arrays_of(directory, step):
  """The files that hold the arrays of a checkpoint."""
  return [
    path
    for path in (directory / str(step) / 'state').rglob('*')
    if path.is_file() and path.parent.name == 'd'
  ]


def flip_a_bit(path):
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  path.write_bytes(raw)


def test_what_was_saved_comes_back(tmp_path):
  save(tmp_path / 'c', 3)
  restored = restore_newest(tmp_path / 'c')
  expected = state(3)
  assert restored.meta['step'] == 3
  assert restored.meta['sums'] == 1.5
  assert checksums(restored.state) == checksums(expected)
  for name in ('step', 'seed', 'half'):
    assert restored.state[name].dtype == expected[name].dtype


@pytest.mark.parametrize(
  'name', ['lr[0.1]', '[!a]', 'a*b?', 'back\\slash', 'gs:', ' ', 'é\n$x']
)
def test_any_name_of_a_folder(name, tmp_path):
  """Orbax takes brackets for a pattern, TensorStore a backslash for a slash."""
  folder = tmp_path / name
  (tmp_path / 'a-bc' / 'c').mkdir(parents=True)  # Matches a*b?.
  save(folder / 'c', 1, 2)
  assert checksums(restore_newest(folder / 'c').state) == checksums(state(2))
  with Checkpoints(folder / 'c', keep=None) as checkpoints:
    found = checkpoints.restore_variables()
  np.testing.assert_array_equal(
    found['params']['kernel'], state(2)['params']['kernel']
  )
  assert {path.name for path in tmp_path.iterdir()} == {name, 'a-bc'}
  assert {path.name for path in (folder / 'c').iterdir()} == {'1', '2'}


def test_donated_arrays_may_be_reused_at_once(tmp_path):
  """As the next step does with the state's buffers, while the save goes on."""
  overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
  kernel = np.random.default_rng(0).normal(size=(500, 500)).astype('f')
  mine = {'params': jnp.array(kernel)}
  with Checkpoints(tmp_path / 'c', keep=3) as checkpoints:
    checkpoints.save(1, mine, {})
    for _ in range(5):
      mine = jax.tree.map(overwrite, mine)
    checkpoints.wait()
    restored = checkpoints.restore(1, mine)
  np.testing.assert_array_equal(restored.state['params'], kernel)


def test_oldest_go(tmp_path):
  save(tmp_path / 'c', 1, 2, 3, 4, keep=2)
  with Checkpoints(tmp_path / 'c', keep=None) as checkpoints:
    assert checkpoints.steps() == [3, 4]


def test_nothing_there(tmp_path):
  assert restore_newest(tmp_path / 'c') is None
  with (
    Checkpoints(tmp_path / 'd', keep=None) as checkpoints,
    pytest.raises(DamagedCheckpoint, match='does not exist'),
  ):
    checkpoints.restore_variables()


def test_an_unfinished_save_is_no_checkpoint(tmp_path):
  directory = tmp_path / 'c'
  save(directory, 1, 2)
  # What a kill in the middle of a save leaves: another name, or no commit mark.
  (directory / '2').rename(directory / '2.orbax-checkpoint-tmp-1')
  with Checkpoints(directory, keep=3) as checkpoints:
    assert checkpoints.restore_newest(state(0)).meta['step'] == 1
    # Orbax removes it in the background, before the next save.
    checkpoints.save(2, state(2), {})
    checkpoints.wait()
  assert not list(directory.glob('*tmp*'))


def test_a_flipped_bit_is_found(tmp_path):
  """In the middle of many values, where Orbax restores it without a word."""
  directory = tmp_path / 'c'
  kernel = np.random.default_rng(0).normal(size=(500, 500)).astype('f')
  with Checkpoints(directory, keep=3) as checkpoints:
    checkpoints.save(2, {'params': kernel}, {'step': 2})
    checkpoints.wait()
  flip_a_bit(max(arrays_of(directory, 2), key=lambda path: path.stat().st_size))
  with (
    Checkpoints(directory, keep=None) as checkpoints,
    pytest.raises(DamagedCheckpoint, match='not match its checksum of params'),
  ):
    checkpoints.restore(2, {'params': kernel})


def truncate(path):
  path.write_bytes(path.read_bytes()[:-1])


def change_sums(path):
  path.write_text(path.read_text().replace('"sums": 1.5', '"sums": 2.5'))


@pytest.mark.parametrize(
  'pattern, damage',
  [
    ('state/d/*', flip_a_bit),
    ('state/d/*', truncate),
    ('state/manifest.ocdbt', os.remove),
    ('meta/metadata', change_sums),
    ('meta/metadata', truncate),
  ],
)
def test_files_that_differ_are_no_checkpoint(
  pattern, damage, tmp_path, monkeypatch
):
  """They change after they were written and before they are read back."""
  directory = tmp_path / 'c'
  read = checkpoint.read

  def read_damaged(path, like):
    if path.name.startswith('2.'):
      damage(max(path.glob(pattern), key=lambda path: path.stat().st_size))
    return read(path, like)

  monkeypatch.setattr(checkpoint, 'read', read_damaged)
  with Checkpoints(directory, keep=1) as checkpoints:
    checkpoints.save(1, state(1), {'sums': 1.5})
    checkpoints.save(2, state(2), {'sums': 1.5})
    with pytest.raises(SaveFailed, match='read back .*Earlier checkpoints'):
      checkpoints.wait()
    # The one before is kept, and the step can be saved again.
    assert checkpoints.steps() == [1]
    monkeypatch.setattr(checkpoint, 'read', read)
    checkpoints.save(3, state(3), {'sums': float('nan')})
    checkpoints.wait()
    assert 3 in checkpoints.steps()


def test_a_failed_save_is_told_between_steps(tmp_path, monkeypatch):
  """Before the next save, which may be hours later."""

  def fail(path, like):
    raise DamagedCheckpoint('is not the same')

  monkeypatch.setattr(checkpoint, 'read', fail)
  with Checkpoints(tmp_path / 'c', keep=1) as checkpoints:
    checkpoints.save(1, state(1), {})
    with pytest.raises(SaveFailed, match='read back is not the same'):
      while not checkpoints.steps():
        checkpoints.check()


@pytest.mark.parametrize(
  'error',
  [
    ValueError(
      'PERMISSION_DENIED: Error reading local file "state/d/1": Failed to '
      f'open: "state/d/1": {os.strerror(errno.EACCES)}'
    ),
    OSError(errno.EMFILE, os.strerror(errno.EMFILE)),
  ],
)
def test_what_the_system_refuses_is_not_damage(error, tmp_path, monkeypatch):
  """No older checkpoint is taken in its place, and nothing is moved."""

  def refuse(*arguments, **options):
    raise error

  save(tmp_path / 'c', 1, 2)
  monkeypatch.setattr(ocp.StandardCheckpointHandler, 'restore', refuse)
  with pytest.raises(UserError, match=r'c/2: cannot be read .*Nothing'):
    restore_newest(tmp_path / 'c')
  assert [path.name for path in tmp_path.iterdir()] == ['c']


def test_storage_that_fails_twice(tmp_path, monkeypatch):
  """As a network file system may: two starts fail, and nothing is lost."""
  save(tmp_path / 'c', 1, 2)
  restore = ocp.StandardCheckpointHandler.restore
  failures = [errno.ETIMEDOUT, errno.ESTALE]

  def restore_or_fail(*arguments, **options):
    if failures:
      number = failures.pop()
      raise OSError(number, os.strerror(number))
    return restore(*arguments, **options)

  monkeypatch.setattr(ocp.StandardCheckpointHandler, 'restore', restore_or_fail)
  for _ in range(2):
    with pytest.raises(UserError, match=r'c/2: cannot be read .*Nothing'):
      restore_newest(tmp_path / 'c')
  assert restore_newest(tmp_path / 'c').meta['step'] == 2


class Pickled:
  """Creates a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return open, (str(self.path), 'w')


def test_a_pickle_is_not_loaded(tmp_path):
  """In the place of any file of a checkpoint."""
  save(tmp_path / 'c', 1)
  files = [x for x in (tmp_path / 'c' / '1').rglob('*') if x.is_file()]
  assert len(files) > 5
  for file in files:
    file.write_bytes(pickle.dumps(Pickled(tmp_path / 'created')))
  with (
    Checkpoints(tmp_path / 'c', keep=None) as checkpoints,
    pytest.raises(DamagedCheckpoint),
  ):
    checkpoints.restore_variables()
  assert not (tmp_path / 'created').exists()
  pickle.loads(file.read_bytes()).close()
  assert (tmp_path / 'created').exists()


def edit_meta(directory, change, *, is_old=False):
  """Changes the meta of a checkpoint; without a checksum if it is old."""
  path = directory / 'meta' / 'metadata'
  meta = json.loads(path.read_text())
  if is_old:
    del meta['checksum']
  change(meta)
  path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
  'change',
  [
    lambda meta: meta.update(sums=2.5),
    lambda meta: meta.update(step=3),
    lambda meta: meta.update(config_digest='b'),
    lambda meta: meta.pop('sums'),
    lambda meta: meta.pop('checksums'),
    lambda meta: meta.update(checksum='sha256:0'),
    lambda meta: meta.update(checksum=None),
    lambda meta: meta.update(chEcksum=meta.pop('checksum')),
    lambda meta: meta['checksums'].pop('params/kernel'),
  ],
)
def test_a_changed_meta_is_damage(change, tmp_path, capsys):
  """It is not another run's: the checkpoint before it is used."""
  directory = tmp_path / 'c'
  with Checkpoints(directory, keep=3, identity={'config_digest': 'a'}) as c:
    for step in (1, 2):
      c.save(step, state(step), {'sums': 1.5})
    c.wait()
    edit_meta(directory / '2', change)
    assert c.restore_newest(state(0)).meta['step'] == 1
  assert 'warning: checkpoint 2 ' in capsys.readouterr().err


@pytest.mark.parametrize(
  'change, expected',
  [
    (lambda meta: meta['checksums'].pop('params/kernel'), 'params/kernel'),
    (lambda meta: meta['checksums'].update(more='00000000'), 'more'),
    (lambda meta: meta.pop('checksums'), 'KeyError'),
    (lambda meta: meta.update(checksums={}), 'checksum of '),
    (lambda meta: meta.update(checksums=3), 'TypeError'),
    (lambda meta: meta.update(step='x'), 'ValueError'),
    (lambda meta: meta.update(step=2), 'has step 2, its state step 1'),
  ],
)
def test_an_old_meta_is_checked_as_far_as_it_goes(change, expected, tmp_path):
  """Up to revision 3a68ec7 it has no checksum of its own."""
  save(tmp_path / 'c', 1)
  edit_meta(tmp_path / 'c' / '1', change, is_old=True)
  with Checkpoints(tmp_path / 'c', keep=None) as checkpoints:
    with pytest.raises(DamagedCheckpoint, match=expected):
      checkpoints.restore_variables()
    with pytest.raises(DamagedCheckpoint, match=expected):
      checkpoints.restore(1, state(0))


def test_an_old_meta_is_read_with_a_warning(tmp_path, capsys):
  save(tmp_path / 'c', 1)
  edit_meta(tmp_path / 'c' / '1', lambda meta: None, is_old=True)
  assert restore_newest(tmp_path / 'c').meta['sums'] == 1.5
  (warning,) = capsys.readouterr().err.splitlines()
  assert 'c/1: written by an earlier version' in warning


def test_a_meta_that_is_no_object_is_damage(tmp_path):
  save(tmp_path / 'c', 1)
  for text in ('[]', '3', 'null', '{', ''):
    (tmp_path / 'c' / '1' / 'meta' / 'metadata').write_text(text)
    with (
      Checkpoints(tmp_path / 'c', keep=None) as checkpoints,
      pytest.raises(DamagedCheckpoint),
    ):
      checkpoints.restore_variables()


def test_a_renamed_checkpoint_is_damage(tmp_path):
  save(tmp_path / 'c', 1, 2)
  (tmp_path / 'c' / '2').rename(tmp_path / 'c' / '9999')
  assert restore_newest(tmp_path / 'c').meta['step'] == 1
  assert (tmp_path / 'damaged_checkpoint_9999').is_dir()


def test_falls_back_and_sets_the_damaged_one_aside(tmp_path, capsys):
  directory = tmp_path / 'c'
  save(directory, 1, 2)
  for path in arrays_of(directory, 2):
    path.write_bytes(path.read_bytes()[:-3])
  assert restore_newest(directory).meta['step'] == 1
  assert (tmp_path / 'damaged_checkpoint_2').is_dir()
  assert 'checkpoint 2' in capsys.readouterr().err
  # The step can be saved again, as the run will when it comes there.
  save(directory, 2)
  assert restore_newest(directory).meta['step'] == 2


def test_all_damaged_is_an_error_and_nothing_moves(tmp_path, capsys):
  directory = tmp_path / 'c'
  save(directory, 1, 2)
  for path in [*arrays_of(directory, 1), *arrays_of(directory, 2)]:
    path.write_bytes(b'')
  with pytest.raises(UserError, match='all checkpoints are damaged'):
    restore_newest(directory)
  # No older one is used, so no warning says so.
  assert 'warning' not in capsys.readouterr().err
  assert {path.name for path in directory.iterdir()} == {'1', '2'}


def test_refused_checkpoints_stay(tmp_path):
  save(tmp_path / 'c', 1)
  with (
    Checkpoints(
      tmp_path / 'c', keep=3, identity={'data_fingerprint': 'a'}
    ) as checkpoints,
    pytest.raises(UserError, match='step 1 has a different data fingerprint'),
  ):
    checkpoints.restore_newest(state(0))
  assert restore_newest(tmp_path / 'c').meta['step'] == 1


def test_same_step_twice_is_an_error(tmp_path):
  """Never a silent skip: the caller would take its state for saved."""
  with (
    Checkpoints(tmp_path / 'c', keep=3) as checkpoints,
    pytest.raises(SaveFailed, match='could not be saved'),
  ):
    for seed in (1, 2):
      checkpoints.save(5, {**state(seed), 'step': np.int32(5)}, {})
      checkpoints.wait()
  restored = restore_newest(tmp_path / 'c').state
  np.testing.assert_array_equal(
    restored['params']['kernel'], state(1)['params']['kernel']
  )


def test_checksums_name_their_arrays():
  assert checksums({'a': {'b': np.zeros(2)}}).keys() == {'a/b'}
  assert checksums({'a': np.float32(0)}) != checksums({'a': np.float32(-0.0)})
