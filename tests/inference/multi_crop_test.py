"""Averages over crops against plain loops, and interrupted computations."""

import dataclasses
import errno
import threading

import numpy as np
import pytest

from bn_repro.data.split import ArraySplit
from bn_repro.errors import UserError
from bn_repro.inference import crops, multi_crop, probabilities
from bn_repro.runtime import workdir

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
  return multi_crop.compute(
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


@pytest.mark.parametrize(
  'damage', ['none', 'cut', 'zeros', 'zero label', 'cut header']
)
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
  elif damage == 'zero label' and done:
    # Of the last image: its probabilities still add up to 1.
    content = content[:-12] + bytes(12)
  elif damage == 'cut header':
    content = content[:20]
  partial.write_bytes(content)
  second = Network()
  compute(second, num_crops, path, split)
  last = 1 if done else 0
  lost = {'cut': last, 'zero label': last, 'cut header': done}.get(damage, 0)
  assert len(second.batches) == len(network.batches) - done + lost
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
    multi_crop.compute(
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
  multi_crop.compute(
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


def test_a_full_disk_at_the_end(tmp_path, monkeypatch):
  """All images are done: the next start only writes them."""
  path = tmp_path / 'x.npz'

  def fail(path, content):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(workdir, 'replace_file', fail)
    with pytest.raises(UserError, match='No space left.*resumes'):
      compute(Network(), path=path)
  compute(Network(fail_at=0), path=path)
  expected = compute(Network()).probabilities
  np.testing.assert_array_equal(
    probabilities.read(path).probabilities, expected
  )


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
