"""Files of probabilities: what is read, what is refused, and the metrics."""

import io
import json
import pickle

import numpy as np
import pytest

from bn_repro.errors import UserError
from bn_repro.inference import probabilities
from bn_repro.inference.probabilities import Probabilities

CLASSES = 7


def facts_of(**changes):
  return {
    'model_digest': 'a1',
    'model': 'run',
    'statistics': 'population',
    'data_fingerprint': 'b2',
    'data_name': 'noise',
    'split': 'test',
    'crops': 10,
    'label_names': [str(i) for i in range(CLASSES)],
    **changes,
  }


def test_metrics():
  """Ranks by a plain sort, in which the first of equal classes is larger."""
  rng = np.random.default_rng(0)
  rows = rng.integers(0, 6, (200, 10)) + 1e-9
  rows = (rows / rows.sum(1, keepdims=True)).astype(np.float32)
  rows[0] = [1, *[0] * 9]
  labels = rng.integers(0, 10, 200).astype(np.int32)
  labels[0] = 9
  found = Probabilities(rows, labels, {}).metrics()
  places = []
  for row, label in zip(rows, labels, strict=True):
    order = sorted(range(10), key=lambda k: (-row[k], k))
    places.append(order.index(label))
  assert found['accuracy'] == np.mean([place == 0 for place in places])
  assert found['top5_accuracy'] == np.mean([place < 5 for place in places])
  assert found['num_examples'] == 200
  losses = [
    -np.log(max(float(row[label]), 2.0**-126))
    for row, label in zip(rows, labels, strict=True)
  ]
  assert found['loss'] == pytest.approx(np.mean(losses), rel=1e-9)


def sound():
  rows = np.full((3, CLASSES), 1 / CLASSES, np.float32)
  return {
    'probabilities': rows,
    'labels': np.array([0, 1, 6], np.int32),
    'facts': np.array(json.dumps(facts_of())),
  }


def saved(**changes):
  arrays = {**sound(), **changes}
  buffer = io.BytesIO()
  np.savez(buffer, **{k: v for k, v in arrays.items() if v is not None})
  return buffer.getvalue()


def rows_with(value):
  rows = sound()['probabilities'].copy()
  rows[1, 2] = value
  return rows


def facts_with(**changes):
  return np.array(json.dumps(facts_of(**changes)))


def array_file(array):
  buffer = io.BytesIO()
  np.save(buffer, array)
  return buffer.getvalue()


def test_a_sound_file_is_read(tmp_path):
  path = tmp_path / 'x.npz'
  path.write_bytes(saved())
  found = probabilities.read(path)
  np.testing.assert_array_equal(found.labels, [0, 1, 6])
  assert found.facts == facts_of()


@pytest.mark.parametrize(
  'content, reason',
  [
    pytest.param(b'', 'no npz', id='empty'),
    pytest.param(b'text', 'no npz', id='text'),
    pytest.param(pickle.dumps([1]), 'no npz', id='a pickle'),
    pytest.param(array_file(np.zeros(3)), 'no npz', id='one array'),
    pytest.param(saved()[:-30], 'no npz', id='cut'),
    pytest.param(
      saved().replace(b'NUMPY', b'PYNUM'), 'magic string|CRC', id='damaged'
    ),
    pytest.param(saved(labels=None), 'labels', id='no labels'),
    pytest.param(saved(facts=None), 'facts', id='no facts'),
    pytest.param(
      saved(labels=np.array([0, 1, None])), 'Object arrays', id='objects'
    ),
    pytest.param(
      saved(probabilities=sound()['probabilities'].astype(np.float64)),
      'float64',
      id='float64',
    ),
    pytest.param(
      saved(probabilities=sound()['probabilities'][0]), r'\(7,\)', id='a row'
    ),
    pytest.param(saved(labels=np.zeros(3)), 'labels are float64', id='labels'),
    pytest.param(saved(labels=np.zeros(2, np.int32)), r'\(2,\)', id='length'),
    pytest.param(
      saved(labels=np.array([0, 7, 1], np.int32)),
      'image 1 has the label 7',
      id='no such class',
    ),
    *(
      pytest.param(
        saved(probabilities=rows_with(value)), 'image 1 do not add', id=name
      )
      for name, value in (
        ('NaN', np.nan),
        ('infinite', np.inf),
        ('sum', 0.5),
      )
    ),
    pytest.param(
      saved(probabilities=np.float32([[2, -1, *[0] * 5]] * 3)),
      'image 0 do not add',
      id='sign',
    ),
    pytest.param(saved(facts=np.array('{')), 'Expecting', id='no JSON'),
    pytest.param(saved(facts=np.array('[1]')), 'model_digest', id='a list'),
    pytest.param(saved(facts=np.zeros(3)), 'size 1', id='facts of numbers'),
    pytest.param(saved(facts=facts_with(crops='10')), 'crops', id='a fact'),
    pytest.param(
      saved(facts=facts_with(label_names=['a'])), '1 names', id='names'
    ),
  ],
)
def test_other_files_are_refused_in_one_line(content, reason, tmp_path):
  path = tmp_path / 'x.npz'
  path.write_bytes(content)
  with pytest.raises(UserError, match=reason) as caught:
    probabilities.read(path)
  (problem,) = caught.value.problems
  assert problem.startswith(f'{path}: not a file of probabilities: ')
  assert '\n' not in problem


def test_a_missing_file(tmp_path):
  with pytest.raises(UserError, match='No such file'):
    probabilities.read(tmp_path / 'x.npz')
