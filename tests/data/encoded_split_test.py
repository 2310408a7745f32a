"""Batches of encoded images do not depend on threads, workers or hosts."""

import dataclasses
import io
from pathlib import Path

from ml_collections import ConfigDict
import numpy as np
from PIL import Image
import pytest

from bn_repro.data import crops
from bn_repro.data import folder as folder_lib
from bn_repro.data.crops import CropRandomness
from bn_repro.data.encoded_split import EncodedSplit
from bn_repro.data.input_pipeline import (
  ExampleOrder,
  HostShard,
  eval_batches,
  train_batches,
)
from bn_repro.errors import UserError

SIZE = 32


def picture(index, kind='JPEG'):
  """An image whose size and colors are a function of the index."""
  rng = np.random.default_rng(index)
  width, height = (int(n) for n in rng.integers(60, 200, 2))
  blocks = Image.fromarray(rng.integers(0, 256, (4, 4, 3)).astype(np.uint8))
  file = io.BytesIO()
  blocks.resize((width, height), Image.Resampling.BICUBIC).save(file, kind)
  return file.getvalue()


def example(index, **changes):
  return {
    'image': picture(index),
    'label': index % 10,
    'file_name': f'image_{index}.JPEG'.encode(),
    **changes,
  }


def of_records(count=40, num_threads=3, **damaged):
  """A split whose example i has the label i % 10, as ImageNet's is made."""
  source = [example(i) for i in range(count)]
  for name, content in damaged.items():
    source[int(name[1:])]['image'] = content
  return EncodedSplit(
    source=source,
    indices=np.arange(count),
    labels=None,
    num_classes=1000,
    image_size=SIZE,
    num_threads=num_threads,
    evaluation_box=crops.central_box,
    as_shown=False,
    identity='test',
  )


def of_folder(folder, count=40, num_threads=3, **damaged):
  """The same images, from a folder for each label, in the same order."""
  for i in range(max(count, 2)):  # There are two classes at least.
    content = damaged.get(f'_{i}', picture(i))
    path = folder / str(i % 10) / f'image_{i}.JPEG'
    path.parent.mkdir(exist_ok=True)
    # No file equals another.
    path.write_bytes(content or f'damaged {i}'.encode())
  data = ConfigDict(
    {
      'data_dir': str(folder),
      'holdout': 0,
      'image_size': SIZE,
      'num_threads': num_threads,
      'evaluation_box': 'square',
    }
  )
  split = folder_lib.load(data).splits['train']
  names = [Path(split.name_of(i)).stem for i in range(len(split))]
  numbers = [int(name.removeprefix('image_')) for name in names]
  return split.take(np.argsort(numbers)[:count])


@pytest.fixture(params=['records', 'folder'], scope='module')
def encoded_split(request, tmp_path_factory):
  """Makes a split: of `count` images, and with damaged ones as `_3=CONTENT`."""
  if request.param == 'records':
    return of_records
  return lambda *arguments, **options: of_folder(
    tmp_path_factory.mktemp('images'), *arguments, **options
  )


def stream(split, first=0, last=12, seed=0, **options):
  order = ExampleOrder(
    len(split), num_shards=4, shuffle='within_shard', seed=seed
  )
  return list(train_batches(split, order, 8, first, last, **options))


def assert_equal(found, expected):
  assert len(found) == len(expected)
  for a, b in zip(found, expected, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture(scope='module')
def whole(encoded_split):
  return stream(encoded_split())


def test_the_stream_is_a_function_of_the_seed(whole, encoded_split):
  assert_equal(stream(encoded_split()), whole)
  other = stream(encoded_split(), seed=1)
  assert any(
    (a['image'] != b['image']).any() for a, b in zip(whole, other, strict=True)
  )


@pytest.mark.parametrize('num_threads', [1, 16])
def test_threads_change_nothing(num_threads, whole, encoded_split):
  assert_equal(stream(encoded_split(num_threads=num_threads)), whole)


def test_stream_resumes_at_any_step(whole, encoded_split):
  for first in (1, 5, 7, 11):
    assert_equal(stream(encoded_split(), first), whole[first:])


def test_worker_processes_change_nothing(whole, encoded_split):
  """A run may resume with another number of workers."""
  assert_equal(stream(encoded_split(), 5, num_workers=2), whole[5:])


@pytest.mark.parametrize('count', [2, 4])
def test_hosts_have_parts_of_the_batch(count, whole, encoded_split):
  parts = [
    stream(encoded_split(), host_shard=HostShard(index, count))
    for index in range(count)
  ]
  joined = [
    {key: np.concatenate([part[key] for part in step]) for key in step[0]}
    for step in zip(*parts, strict=True)
  ]
  assert_equal(joined, whole)


@pytest.mark.parametrize('index', [0, 1])
def test_hosts_have_parts_of_each_step_of_a_call(index, whole, encoded_split):
  batches = stream(
    encoded_split(), steps_per_batch=3, host_shard=HostShard(index, 2)
  )
  found = [
    {key: np.split(batch[key], 3)[step] for key in batch}
    for batch in batches
    for step in range(3)
  ]
  part = slice(4 * index, 4 * index + 4)
  assert_equal(found, [{key: b[key][part] for key in b} for b in whole])


def test_each_view_of_an_example_is_another(encoded_split):
  views = stream(encoded_split(4), 0, 8)
  images = np.concatenate([batch['image'] for batch in views])
  labels = np.concatenate([batch['label'] for batch in views])
  for label in range(4):
    of_label = images[labels == label]
    assert len(np.unique(of_label, axis=0)) == len(of_label) == 16


def test_a_view_is_the_box_that_its_draws_choose(encoded_split):
  """Box and mirror of each row, cropped from the whole image by Pillow."""
  randomness = CropRandomness(3, np.arange(100, 112))
  batch = encoded_split(12).training_batch(np.arange(12), randomness)
  mirrored = 0
  for row, draws in enumerate(randomness.draws()):
    image = Image.open(io.BytesIO(picture(row)))
    box = crops.random_box(*image.size, draws)
    expected = np.asarray(
      image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box.corners), int
    )
    if crops.is_mirrored(draws):
      expected = expected[:, ::-1]
      mirrored += 1
    assert np.abs(batch['image'][row] - expected).mean() < 5
  assert 0 < mirrored < 12


@pytest.mark.parametrize('count', [1, 7, 8, 9, 40])
@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_evaluation_has_every_image_once_on_any_number_of_hosts(
  count, hosts, encoded_split
):
  split = encoded_split(count)
  steps = zip(
    *(eval_batches(split, 8, HostShard(i, hosts)) for i in range(hosts)),
    strict=True,
  )
  images, labels = [], []
  for step in steps:
    for batch in step:
      assert batch['image'].shape == (8 // hosts, SIZE, SIZE, 3)
      images.append(batch['image'][batch['mask']])
      labels.append(batch['label'][batch['mask']])
  expected = split.evaluation_batch(np.arange(count))
  np.testing.assert_array_equal(np.concatenate(images), expected['image'])
  np.testing.assert_array_equal(np.concatenate(labels), expected['label'])


def test_damaged_images_are_replaced_by_their_neighbors(capfd, encoded_split):
  good, bad = encoded_split(), encoded_split(_3=b'', _4=picture(4)[:300])
  expected, found = stream(good), stream(bad)
  order = ExampleOrder(40, num_shards=4, shuffle='within_shard', seed=0)
  for step, (a, b) in enumerate(zip(expected, found, strict=True)):
    examples = order.examples(np.arange(8 * step, 8 * step + 8))
    np.testing.assert_array_equal(b['replaced'], np.isin(examples, [3, 4]))
    np.testing.assert_array_equal(
      b['label'], np.where(b['replaced'], 5, a['label'])
    )
    for key in a:
      np.testing.assert_array_equal(
        a[key][~b['replaced']], b[key][~b['replaced']]
      )
  evaluated = bad.evaluation_batch(np.arange(2, 6))
  np.testing.assert_array_equal(evaluated['label'], [2, 5, 5, 5])
  np.testing.assert_array_equal(evaluated['replaced'], [0, 1, 1, 0])
  np.testing.assert_array_equal(evaluated['image'][1], evaluated['image'][3])
  # Each is named once.
  warnings = capfd.readouterr().err.splitlines()
  for name in ('image_3.JPEG', 'image_4.JPEG'):
    assert sum(f'{name}: left out' in line for line in warnings) == 1


def test_the_first_image_follows_the_last(encoded_split):
  split = encoded_split(5, _4=b'nothing')
  batch = split.evaluation_batch(np.arange(5))
  np.testing.assert_array_equal(batch['label'], [0, 1, 2, 3, 0])


def test_many_damaged_images_are_replaced(encoded_split):
  """Their number is limited over all hosts, not within a split."""
  split = encoded_split(20, **{f'_{i}': b'' for i in range(5, 17)})
  batch = split.evaluation_batch(np.arange(8))
  np.testing.assert_array_equal(batch['label'], [0, 1, 2, 3, 4, 7, 7, 7])
  np.testing.assert_array_equal(batch['replaced'], [0, 0, 0, 0, 0, 1, 1, 1])
  seventeenth = split.evaluation_batch(np.array([17]))['image']
  assert (batch['image'][5:] == seventeenth).all()


def test_records_that_cannot_be_read_are_replaced(capfd):
  good = of_records(5)

  class Damaged(list):
    def __getitem__(self, index):
      if index == 2:
        raise RuntimeError('Corrupted Riegeli/records file')
      return super().__getitem__(index)

  bad = dataclasses.replace(good, source=Damaged(good.source))
  batch = bad.evaluation_batch(np.arange(5))
  np.testing.assert_array_equal(batch['label'], [0, 1, 3, 3, 4])
  np.testing.assert_array_equal(batch['replaced'], [0, 0, 1, 0, 0])
  assert 'example 2: left out, cannot be read: Corr' in capfd.readouterr().err


@pytest.mark.parametrize('num_workers', [0, 2])
def test_errors_reach_the_consumer_of_batches(num_workers, encoded_split):
  """A worker process turns the UserError into an error of another type."""
  split = encoded_split(20, **{f'_{i}': b'' for i in range(20)})
  kind = Exception if num_workers else UserError
  with pytest.raises(kind, match='none of 20 images can be decoded'):
    stream(split, num_workers=num_workers)


def test_checksum_tells_splits_apart():
  split = of_records()
  assert split.checksum(0) == of_records(num_threads=1).checksum(0)
  assert split.checksum(0) != split.take(np.arange(39)).checksum(0)
  assert split.checksum(0) != split.checksum(1)


@pytest.mark.parametrize('label', [-1, 1000])
def test_a_label_without_a_class_is_an_error(label):
  split = of_records()
  split.source[5]['label'] = label
  indices = np.arange(8)
  for gather in (
    lambda: split.evaluation_batch(indices),
    lambda: split.training_batch(indices, CropRandomness(0, indices)),
  ):
    with pytest.raises(UserError, match=f'image_5.JPEG: has the label {label}'):
      gather()


def test_whole_images():
  """At the scale that crops need; the next one in place of a damaged one."""
  split = of_records(6, _3=b'damaged')
  for index, source in enumerate((0, 1, 2, 4, 4, 5)):
    image = Image.open(io.BytesIO(picture(source)))
    for shorter_side in (20, 1000):
      found = split.whole_image(index, shorter_side)
      assert (found.label, found.replaced) == (source, index == 3)
      height, width = found.pixels.shape[:2]
      scale = next(
        (s for s in (8, 4, 2) if min(image.size) >= s * shorter_side), 1
      )
      assert abs(image.width / scale - width) <= 0.5
      assert abs(image.height / scale - height) <= 0.5
      expected = image.resize((width, height), Image.Resampling.BOX)
      error = found.pixels.astype(float) - np.asarray(expected)
      assert np.abs(error).mean() < 3
