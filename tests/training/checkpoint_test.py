"""Checkpoints on the disk: what comes back, and what a damaged one does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_repro.errors import UserError
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


def test_what_was_saved_comes_back(tmp_path):
  save(tmp_path / 'c', 3)
  restored = restore_newest(tmp_path / 'c')
  expected = state(3)
  assert restored.meta['step'] == 3
  assert restored.meta['sums'] == 1.5
  assert checksums(restored.state) == checksums(expected)
  for name in ('step', 'seed', 'half'):
    assert restored.state[name].dtype == expected[name].dtype


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
  path = max(arrays_of(directory, 2), key=lambda path: path.stat().st_size)
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 1
  path.write_bytes(raw)
  with (
    Checkpoints(directory, keep=None) as checkpoints,
    pytest.raises(DamagedCheckpoint, match='checksum of params differs'),
  ):
    checkpoints.restore(2, {'params': kernel})


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


def test_all_damaged_is_an_error_and_nothing_moves(tmp_path):
  directory = tmp_path / 'c'
  save(directory, 1, 2)
  for path in [*arrays_of(directory, 1), *arrays_of(directory, 2)]:
    path.write_bytes(b'')
  with pytest.raises(UserError, match='all checkpoints are damaged'):
    restore_newest(directory)
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
      checkpoints.save(5, state(seed), {})
      checkpoints.wait()
  assert checksums(restore_newest(tmp_path / 'c').state) == checksums(state(1))


def test_checksums_name_their_arrays():
  assert checksums({'a': {'b': np.zeros(2)}}).keys() == {'a/b'}
  assert checksums({'a': np.float32(0)}) != checksums({'a': np.float32(-0.0)})
