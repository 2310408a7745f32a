"""Probabilities of a split against plain loops; interruptions; bad files."""

import dataclasses
import io
import json
import pickle
import threading

import numpy as np
import pytest

from bn_repro.data.split import ArraySplit
from bn_repro.errors import UserError
from bn_repro.inference import crops, probabilities
from bn_repro.inference.probabilities import Probabilities

SHAPE = (8, 8, 1)
CLASSES = 7
# With 10 crops, four images at a time: three times, and one alone.
COUNT = 13


def split_of(count=COUNT, shape=(12, 9, 1)):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (count, *shape), np.uint8)
  return ArraySplit(images, (np.arange(count) % CLASSES).astype(np.int32))


def facts_of(num_crops, **changes):
  return {
    'model_digest': 'a1',
    'model': 'run',
    'statistics': 'population',
    'data_fingerprint': 'b2',
    'data_name': 'noise',
    'split': 'test',
    'crops': num_crops,
    'label_names': [str(i) for i in range(CLASSES)],
    **changes,
  }


class Network:
  """A linear classifier in NumPy that counts its batches and may fail."""

  def __init__(self, fail_at=None, error=KeyboardInterrupt):
    self.weights = np.random.default_rng(1).normal(0, 1, (64, CLASSES))
    self.batches = []
    self.fail_at = fail_at
    self.error = error

  def __call__(self, images):
    if len(self.batches) == self.fail_at:
      raise self.error
    self.batches.append(images)
    return self.softmax(images).astype(np.float32)

  def softmax(self, images):
    logits = (images.reshape(len(images), -1) / 255.0) @ self.weights
    powers = np.exp(logits)
    return powers / powers.sum(1, keepdims=True)


def compute(network, num_crops=10, path=None, split=None, **options):
  return probabilities.compute(
    network,
    split or split_of(),
    facts_of(num_crops),
    SHAPE,
    path,
    **{'num_threads': 2, 'max_replaced': 0.0, **options},
  )


@pytest.mark.parametrize('num_crops', [10, 144])
def test_probabilities_are_averages_over_crops(num_crops):
  network = Network()
  found = compute(network, num_crops)
  split = split_of()
  for row, image in zip(found.probabilities, split.images, strict=True):
    total = np.zeros(CLASSES)
    for view in crops.views(image, num_crops, 8):
      total += network.softmax(view[None])[0]
    np.testing.assert_allclose(row, total / num_crops, rtol=1e-6)
  np.testing.assert_array_equal(found.labels, split.labels)
  assert found.probabilities.dtype == np.float32


def test_one_crop_is_the_view_of_evaluation():
  """In batches of 48, of which the last one is padded."""
  network = Network()
  split = split_of(100, SHAPE)
  found = compute(network, 1, split=split)
  np.testing.assert_allclose(
    found.probabilities, network.softmax(split.images), rtol=1e-6
  )
  assert [len(batch) for batch in network.batches] == [48, 48, 48]


@pytest.mark.parametrize('damage', ['none', 'cut', 'zeros', 'cut header'])
@pytest.mark.parametrize('num_crops', [1, 10, 144])
def test_an_interrupted_file_is_resumed(num_crops, damage, tmp_path):
  """No batch is computed twice, and the file is equal to the byte."""
  split = split_of(150, SHAPE) if num_crops == 1 else split_of()
  whole, path = tmp_path / 'whole.npz', tmp_path / 'a' / 'b.npz'
  network = Network()
  compute(network, num_crops, whole, split)
  first = Network(fail_at=2)
  with pytest.raises(KeyboardInterrupt):
    compute(first, num_crops, path, split)
  partial = tmp_path / 'a' / 'b.npz.partial'
  assert partial.is_file() and not path.exists()
  content = partial.read_bytes()
  # The crops of an image are three batches of 48.
  done = 2 // 3 if num_crops == 144 else 2
  if damage == 'cut':
    content = content[:-5]
  elif damage == 'zeros':
    content = content + bytes(300)
  elif damage == 'cut header':
    content = content[:20]
  partial.write_bytes(content)
  second = Network()
  compute(second, num_crops, path, split)
  lost = {'none': 0, 'zeros': 0, 'cut': 1 if done else 0, 'cut header': done}
  assert len(second.batches) == len(network.batches) - done + lost[damage]
  assert path.read_bytes() == whole.read_bytes()
  assert not partial.exists()


def test_a_complete_file_is_not_computed_again(tmp_path):
  path = tmp_path / 'x.npz'
  expected = compute(Network(), path=path)
  found = compute(Network(fail_at=0), path=path)
  np.testing.assert_array_equal(found.probabilities, expected.probabilities)
  assert found.facts == expected.facts


@pytest.mark.parametrize('is_complete', [False, True])
@pytest.mark.parametrize(
  'name, value',
  [
    ('model_digest', 'c3'),
    ('data_fingerprint', 'c3'),
    ('split', 'train'),
    ('crops', 144),
  ],
)
def test_other_probabilities_are_left_alone(name, value, is_complete, tmp_path):
  path = tmp_path / 'x.npz'
  if is_complete:
    compute(Network(), path=path)
  else:
    with pytest.raises(KeyboardInterrupt):
      compute(Network(fail_at=2), path=path)
  (file,) = tmp_path.iterdir()
  content = file.read_bytes()
  with pytest.raises(UserError) as caught:
    probabilities.compute(
      Network(fail_at=0),
      split_of(),
      facts_of(10, **{name: value}),
      SHAPE,
      path,
      num_threads=1,
      max_replaced=0.0,
    )
  (problem,) = caught.value.problems
  assert problem.startswith(f'{file}: holds other probabilities ({name}: ')
  assert '--save_probabilities' in problem
  assert file.read_bytes() == content


def test_the_name_of_the_model_may_change(tmp_path):
  """A moved workdir resumes; its longer name stays that of the start."""
  path = tmp_path / 'x.npz'
  with pytest.raises(KeyboardInterrupt):
    compute(Network(fail_at=2), path=path)
  network = Network()
  probabilities.compute(
    network,
    split_of(),
    facts_of(10, model='another_name'),
    SHAPE,
    path,
    num_threads=1,
    max_replaced=0.0,
  )
  assert len(network.batches) == 2
  np.testing.assert_array_equal(
    probabilities.read(path).probabilities,
    compute(Network()).probabilities,
  )


def test_a_foreign_file_is_not_overwritten(tmp_path):
  partial = tmp_path / 'x.npz.partial'
  partial.write_text('notes of mine')
  with pytest.raises(UserError, match='holds other probabilities'):
    compute(Network(), path=tmp_path / 'x.npz')
  assert partial.read_text() == 'notes of mine'


def test_two_processes_do_not_write_one_file(tmp_path):
  """The network of one computation starts another one of the same file."""
  path = tmp_path / 'x.npz'

  class Second(Network):
    def __call__(self, images):
      if not self.batches:
        with pytest.raises(UserError, match='another process'):
          compute(Network(), path=path)
      return super().__call__(images)

  compute(Second(), path=path)
  probabilities.read(path)


def test_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot be written'):
    compute(Network(), path=tmp_path / 'file' / 'x.npz')


@dataclasses.dataclass(frozen=True)
class Replacing(ArraySplit):
  """Every fourth image is replaced."""

  def whole_image(self, index, shorter_side):
    image = super().whole_image(index, shorter_side)
    return image._replace(replaced=index % 4 == 0)


def test_replaced_images_are_counted_and_limited(tmp_path):
  """4 of 13, also if the computation was interrupted."""
  split = Replacing(*dataclasses.astuple(split_of()))
  path = tmp_path / 'x.npz'
  with pytest.raises(KeyboardInterrupt):
    compute(Network(fail_at=2), path=path, split=split, max_replaced=0.31)
  # Twice: the images of the last group are not taken for good.
  for _ in range(2):
    with pytest.raises(UserError, match='4 of 13 images could not be decoded'):
      compute(Network(), path=path, split=split, max_replaced=0.3)
  found = compute(Network(), path=path, split=split, max_replaced=0.31)
  assert found.metrics()['replaced_examples'] == 4
  assert probabilities.read(path).facts['replaced_examples'] == 4
  assert 'replaced_examples' not in compute(Network()).metrics()


def test_a_diverged_network_writes_nothing(tmp_path):
  path = tmp_path / 'x.npz'

  class Diverged(Network):
    def softmax(self, images):
      return super().softmax(images) * (np.nan if self.batches[1:] else 1)

  with pytest.raises(UserError, match='test image 4 or later are not finite'):
    compute(Diverged(), path=path)
  assert not path.exists()
  # The sound images stay.
  network = Network()
  compute(network, path=path)
  assert len(network.batches) == 3


def test_few_images_are_in_memory():
  """Threads load at most one group each, and one more, ahead of the network."""
  lock = threading.Lock()
  loaded = 0
  ahead = []

  class Counting(ArraySplit):
    def whole_image(self, index, shorter_side):
      nonlocal loaded
      with lock:
        loaded += 1
      return super().whole_image(index, shorter_side)

  class Watching(Network):
    def __call__(self, images):
      ahead.append(loaded - len(self.batches) // 3)
      return super().__call__(images)

  split = Counting(*dataclasses.astuple(split_of(40)))
  compute(Watching(), 144, split=split, num_threads=3)
  assert loaded == 40
  assert max(ahead) <= 4


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
    'facts': np.array(json.dumps(facts_of(10))),
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
  return np.array(json.dumps(facts_of(10, **changes)))


def array_file(array):
  buffer = io.BytesIO()
  np.save(buffer, array)
  return buffer.getvalue()


def test_a_sound_file_is_read(tmp_path):
  path = tmp_path / 'x.npz'
  path.write_bytes(saved())
  found = probabilities.read(path)
  np.testing.assert_array_equal(found.labels, [0, 1, 6])
  assert found.facts == facts_of(10)


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
        ('sign', -1),
      )
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
