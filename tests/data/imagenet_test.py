"""A small ImageNet, and copies that are missing, damaged or wrong."""

import errno
import io
import os
from pathlib import Path

import numpy as np
from PIL import Image
import pytest
import written_imagenet

from bn_repro import config as config_lib
from bn_repro.data import datasets, imagenet_metadata
from bn_repro.errors import UserError


def config(data_dir, *overrides):
  return config_lib.load(
    'configs/bn_x5.py',
    (
      f'data.data_dir={data_dir}',
      'data.name=imagenet_stand_in',
      'data.num_shards=4',
      'data.image_size=64',
      'batch_size=8',
      *overrides,
    ),
  )


@pytest.fixture(scope='module')
def examples():
  return written_imagenet.examples()


@pytest.fixture(scope='module')
def copy(examples, tmp_path_factory):
  data_dir = tmp_path_factory.mktemp('data')
  written_imagenet.write(data_dir, examples)
  return data_dir


def problem(data_dir, *overrides):
  with pytest.raises(UserError) as error:
    datasets.check(config(data_dir, *overrides))
  (line,) = error.value.problems
  assert '\n' not in line
  return line


def test_examples_are_those_that_were_written(copy, examples):
  dataset = datasets.check(config(copy))
  assert dataset.num_classes == 1000
  assert dataset.image_shape == (64, 64, 3)
  assert set(dataset.splits) == {'train', 'validation'}
  for name, rows in examples.items():
    split = dataset.splits[name]
    assert len(split) == len(rows)
    batch = split.evaluation_batch(np.arange(len(rows)))
    assert not batch['replaced'].any()
    for index, (file_name, label, encoded) in enumerate(rows):
      assert split.name_of(index) == file_name
      assert split.label_of(index) == batch['label'][index] == label
      color = np.asarray(Image.open(io.BytesIO(encoded))).mean((0, 1))
      found = batch['image'][index].mean((0, 1))
      assert np.abs(found - color).max() < 60


def test_class_names_belong_to_the_classes(copy):
  names = datasets.check(config(copy)).label_names
  by_synset = dict(zip(imagenet_metadata.synsets(), names, strict=True))
  # Well-known pairs.
  for synset, name in {
    'n01440764': 'tench',
    'n02123045': 'tabby',
    'n02504458': 'African elephant',
    'n04254680': 'soccer ball',
    'n15075141': 'toilet tissue',
  }.items():
    assert by_synset[synset] == name
  assert len(imagenet_metadata.validation_synsets()) == 50_000
  assert set(imagenet_metadata.validation_synsets()) == set(
    imagenet_metadata.synsets()
  )


def test_holdout_cuts_a_part_of_the_training_images(copy, examples):
  splits = datasets.check(config(copy, 'data.holdout=10')).splits
  train, validation, test = (
    [splits[name].name_of(i) for i in range(len(splits[name]))]
    for name in ('train', 'validation', 'test')
  )
  assert len(train) == 30 and len(validation) == 10
  assert test == [name for name, *_ in examples['validation']]
  assert sorted(train + validation) == sorted(
    name for name, *_ in examples['train']
  )
  assert 'only 40 training images' in problem(copy, 'data.holdout=40')


@pytest.mark.parametrize('field', ['distorted_copies', 'binarize'])
def test_options_for_images_in_memory_are_refused(field, copy):
  line = problem(copy, f'data.{field}=1')
  assert line.startswith(f'config.data.{field}=') and 'from disk' in line


def test_fingerprint_tells_copies_and_splits_apart(copy, examples, tmp_path):
  of_copy = datasets.check(config(copy)).fingerprint
  one_thread = config(copy, 'data.num_threads=1')
  assert datasets.check(one_thread).fingerprint == of_copy
  held_out = config(copy, 'data.holdout=10')
  assert datasets.check(held_out).fingerprint != of_copy
  fewer = {**examples, 'train': examples['train'][:39]}
  written_imagenet.write(tmp_path, fewer)
  assert datasets.check(config(tmp_path)).fingerprint != of_copy


def test_missing_copy(tmp_path):
  line = problem(tmp_path)
  assert 'prepare_imagenet.sh' in line and str(tmp_path) in line
  (tmp_path / 'imagenet2012' / 'incomplete.X_5.1.0').mkdir(parents=True)
  assert 'found incomplete.X_5.1.0' in problem(tmp_path)


def test_a_stand_in_is_not_imagenet(copy):
  line = problem(copy, 'data.name=imagenet2012')
  assert '40 train images, not 1,281,167' in line
  assert '--config.data.name=imagenet_stand_in' in line


@pytest.mark.parametrize(
  'damage, expected',
  [
    (
      lambda text: text.replace('"array_record"', '"tfrecord"'),
      '--from_tfrecord',
    ),
    (lambda text: text[:100], 'dataset_info.json: damaged'),
  ],
)
def test_description_of_a_copy(damage, expected, examples, tmp_path):
  path = written_imagenet.write(tmp_path, examples) / 'dataset_info.json'
  path.write_text(damage(path.read_text()))
  assert expected in problem(tmp_path)


def test_no_validation_images(examples, tmp_path):
  written_imagenet.write(tmp_path, {'train': examples['train']})
  assert 'has no validation images' in problem(tmp_path)


def test_missing_shard(examples, tmp_path):
  written_imagenet.write(tmp_path, examples)
  path = written_imagenet.shard_path(tmp_path, 'train', 2)
  path.unlink()
  assert f'{path}: missing. ' in problem(tmp_path)


@pytest.mark.parametrize('keep', [0, 0.5])
def test_truncated_shards(keep, examples, tmp_path):
  written_imagenet.write(tmp_path, examples)
  for shard in (1, 3):
    path = written_imagenet.shard_path(tmp_path, 'train', shard)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(keep * len(raw))])
  line = problem(tmp_path)
  assert '00001-of-00004: damaged' in line and '2 shards' in line


def test_a_shard_that_may_not_be_read_is_not_damaged(copy, monkeypatch):
  opened = Path.open

  def refuse(path, mode='r', **options):
    if 'train.array_record-00002' in path.name:
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return opened(path, mode, **options)

  monkeypatch.setattr(Path, 'open', refuse)
  line = problem(copy)
  assert 'cannot be read (Permission denied). Check its permissions' in line
  assert 'damaged' not in line and 'again' not in line


def test_shard_of_another_copy(examples, tmp_path):
  fewer = {**examples, 'train': examples['train'][:24]}
  written_imagenet.write(tmp_path / 'a', examples)
  written_imagenet.write(tmp_path / 'b', fewer)
  shard, other = (
    written_imagenet.shard_path(tmp_path / name, 'train', 0) for name in 'ab'
  )
  shard.write_bytes(other.read_bytes())
  assert '00000-of-00004: 6 images, not 10' in problem(tmp_path / 'a')


def test_other_classes(examples, tmp_path):
  folder = written_imagenet.write(tmp_path, examples)
  names = imagenet_metadata.synsets()
  (folder / 'label.labels.txt').write_text('\n'.join(names[:999]))
  assert '999 classes, not 1000' in problem(tmp_path)
  names[3], names[4] = names[4], names[3]
  (folder / 'label.labels.txt').write_text('\n'.join(names))
  assert 'label 3 is n01494475, not n01491361' in problem(tmp_path)


def test_labels_that_contradict_the_names(examples, tmp_path):
  moved = [(n, (label + 1) % 1000, e) for n, label, e in examples['train']]
  written_imagenet.write(tmp_path / 'a', {**examples, 'train': moved})
  line = problem(tmp_path / 'a')
  assert 'has the label' in line and examples['train'][0][0] in line
  # Validation labels in another order, from another list of them.
  rows = examples['validation']
  rotated = [(n, rows[i - 1][1], e) for i, (n, _, e) in enumerate(rows)]
  written_imagenet.write(tmp_path / 'b', {**examples, 'validation': rotated})
  line = problem(tmp_path / 'b')
  assert 'ILSVRC2012_val_00000001.JPEG, has the label' in line


def test_test_images_that_are_training_images(examples, tmp_path):
  overlapping = {**examples, 'validation': examples['train'][:10]}
  written_imagenet.write(tmp_path, overlapping)
  line = problem(tmp_path)
  assert "not one of ImageNet's validation images" in line
  swapped = {**examples, 'train': examples['validation']}
  written_imagenet.write(tmp_path / 'swapped', swapped)
  assert "not one of ImageNet's train images" in problem(tmp_path / 'swapped')
