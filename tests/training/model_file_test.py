"""Model files: what is written is read, and nothing else is."""

import json

import numpy as np
import pytest
import safetensors.numpy

from bn_repro import config as config_lib
from bn_repro.errors import UserError
from bn_repro.training import model_file


def written(path, **changes):
  """Writes a model of two arrays."""
  content = {
    'variables': {
      'params': {'a': {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3)}},
      'batch_stats': {'a': {'mean': np.zeros(3, np.float64)}},
    },
    'config': config_lib.load('bn_x5:mini'),
    'label_names': ('cat', 'dog'),
    'image_shape': (32, 32, 1),
    'unpadded_shape': (28, 28),
    'facts': {'statistics': 'population'},
    **changes,
  }
  model = model_file.ModelFile(**content)
  model_file.write(path, model)
  return model


@pytest.mark.parametrize('changes', [{}, {'unpadded_shape': None}])
def test_reads_what_it_wrote(tmp_path, changes):
  model = written(tmp_path / 'm', **changes)
  found = model_file.read(tmp_path / 'm')
  assert found.config == model.config
  for name in ('label_names', 'image_shape', 'unpadded_shape', 'facts'):
    assert getattr(found, name) == getattr(model, name)
  assert found.digest == model.digest
  for kind, leaf in (('params', 'kernel'), ('batch_stats', 'mean')):
    array, expected = (m.variables[kind]['a'][leaf] for m in (found, model))
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)
  # Any reader of the format finds the arrays.
  arrays = safetensors.numpy.load_file(tmp_path / 'm')
  assert arrays.keys() == {'params/a/kernel', 'batch_stats/a/mean'}


def test_every_changed_byte_is_noticed(tmp_path):
  path = tmp_path / 'm'
  written(path)
  content = path.read_bytes()
  rng = np.random.default_rng(0)
  for position in (*range(16), *rng.integers(16, len(content), 300)):
    damaged = bytearray(content)
    damaged[position] ^= 1 << rng.integers(8)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=str(path)):
      model_file.read(path)


def test_every_shorter_file_is_refused(tmp_path):
  path = tmp_path / 'm'
  written(path)
  content = path.read_bytes()
  for length in (0, 7, 8, 100, len(content) - 1):
    path.write_bytes(content[:length])
    with pytest.raises(UserError, match='not a sound model file'):
      model_file.read(path)


def with_header(path, header, body=b''):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, 'little') + text + body)


@pytest.mark.parametrize(
  'header, message',
  [
    # A terabyte that the file does not hold is not allocated.
    (
      {
        'a': {
          'dtype': 'F32',
          'shape': [250_000_000_000],
          'data_offsets': [0, 10**12],
        }
      },
      'claims 1,000,000,000,000 bytes',
    ),
    (b' ' * 10_000_001, 'header has 10,000,001 bytes'),
    (b'{"a"', 'header is damaged'),
    ([1], 'header is damaged'),
    ({'a': [1]}, 'header is damaged'),
    ({'a': {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 0]}}, 'a'),
    ({}, 'of another project'),
    ({'__metadata__': {'bn_repro': '{}'}}, 'digest'),
  ],
)
def test_foreign_headers_are_refused(tmp_path, header, message):
  path = tmp_path / 'm'
  with_header(path, header)
  with pytest.raises(UserError, match='not a sound model file') as error:
    model_file.read(path)
  assert message in str(error.value)


def test_missing_file(tmp_path):
  with pytest.raises(UserError, match='No such file'):
    model_file.read(tmp_path / 'm')


def test_mismatches_are_listed_together():
  expected = {'a': np.zeros(2), 'b': np.zeros((2, 3)), 'c': np.zeros(1)}
  found = {'a': np.zeros(2), 'b': np.zeros((3, 2)), 'd': np.zeros(1)}
  assert model_file.mismatches(expected, expected) == []
  assert model_file.mismatches(expected, found) == [
    'b: shape (3, 2), not (2, 3)',
    'c: missing',
    'd: not a variable of the network',
  ]
