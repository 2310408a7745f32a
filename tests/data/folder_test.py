"""A folder of images: its splits, order and fingerprint, and what is wrong."""

import os
import shutil

import numpy as np
from PIL import Image
import pytest
import support
import written_images

from bn_repro import config as config_lib
from bn_repro.data import datasets, split
from bn_repro.errors import UserError


def config(data_dir, *overrides):
  return config_lib.load(
    'configs/bn_x5.py',
    (
      'data.name=folder',
      f'data.data_dir={data_dir}',
      'data.num_shards=1',
      'data.image_size=32',
      'batch_size=4',
      'eval_split=train',
      *overrides,
    ),
  )


def check(data_dir, *overrides):
  return datasets.check(config(data_dir, *overrides))


def names(examples):
  return [examples.name_of(i) for i in range(len(examples))]


@pytest.fixture
def images(tmp_path):
  """30 images in three classes."""
  return written_images.write_folder(tmp_path / 'data', 30)


def test_every_image_has_the_label_of_its_folder(images, tmp_path):
  dataset = check(tmp_path / 'data')
  assert tuple(dataset.label_names) == written_images.CLASSES
  assert dataset.unpadded_shape is None
  train = dataset.splits['train']
  assert sorted(names(train)) == sorted(images)
  batch = train.evaluation_batch(np.arange(30))
  assert not batch['replaced'].any()
  for i, name in enumerate(names(train)):
    assert train.label_of(i) == batch['label'][i] == train.labels[i]
    assert name.split('/')[0] == dataset.label_names[train.labels[i]]
    # The central square, enlarged.
    mean = images[name][3:-3, 1:-1].mean((0, 1))
    assert np.abs(batch['image'][i].mean((0, 1)) - mean).max() < 5
  # Classes are mixed.
  assert len(np.unique(train.labels[:10])) == 3


def test_the_order_does_not_depend_on_the_file_system(
  images, tmp_path, monkeypatch
):
  before = check(tmp_path / 'data')
  scan = os.scandir

  class Reversed:
    def __init__(self, path):
      with scan(path) as entries:
        self.entries = sorted(entries, key=lambda x: x.name, reverse=True)

    def __enter__(self):
      return iter(self.entries)

    def __exit__(self, *error):
      pass

  monkeypatch.setattr(os, 'scandir', Reversed)
  after = check(tmp_path / 'data')
  assert names(after.splits['train']) == names(before.splits['train'])
  assert after.fingerprint == before.fingerprint


def test_hidden_files_are_left_out(images, tmp_path):
  before = check(tmp_path / 'data').fingerprint
  (tmp_path / 'data' / '.cache').mkdir()
  (tmp_path / 'data' / 'apple' / '.DS_Store').write_bytes(b'?')
  (tmp_path / 'data' / 'LICENSE').write_text('free')
  assert check(tmp_path / 'data').fingerprint == before


def rename(folder):
  (folder / 'apple' / '0.png').rename(folder / 'apple' / '00.png')


def move(folder):
  (folder / 'apple' / '0.png').rename(folder / 'zebra' / '0.png')


def delete(folder):
  (folder / 'apple' / '0.png').unlink()


def rename_class(folder):
  (folder / 'apple').rename(folder / 'apples')


def flip_a_bit(folder):
  raw = bytearray((folder / 'apple' / '0.png').read_bytes())
  raw[len(raw) // 2] ^= 1
  (folder / 'apple' / '0.png').write_bytes(raw)


@pytest.mark.parametrize(
  'change', [rename, move, delete, rename_class, flip_a_bit]
)
def test_the_fingerprint_follows_the_files(change, images, tmp_path):
  before = check(tmp_path / 'data').fingerprint
  moved = shutil.copytree(tmp_path / 'data', tmp_path / 'moved')
  assert check(moved).fingerprint == before
  change(moved)
  assert check(moved).fingerprint != before


def test_holdout_is_stratified(images, tmp_path):
  splits = check(tmp_path / 'data', 'data.holdout=7').splits
  found = {name: names(splits[name]) for name in splits}
  assert found.keys() == {'train', 'validation'}
  assert sorted(found['train'] + found['validation']) == sorted(images)
  counts = np.bincount(splits['validation'].labels)
  assert sorted(counts) == [2, 2, 3]
  again = check(tmp_path / 'data', 'data.holdout=7', 'seed=3').splits
  assert names(again['validation']) == found['validation']
  with pytest.raises(UserError, match='leaves no training images of'):
    check(tmp_path / 'data', 'data.holdout=28')


def test_a_folder_for_each_split(tmp_path):
  train = written_images.write_folder(tmp_path / 'train', 30)
  validation = written_images.write_folder(tmp_path / 'validation', 12, seed=1)
  splits = check(tmp_path, 'eval_split=validation').splits
  assert sorted(names(splits['train'])) == sorted(train)
  assert sorted(names(splits['validation'])) == sorted(validation)
  held_out = check(tmp_path, 'data.holdout=6').splits
  assert names(held_out['test']) == names(splits['validation'])
  assert len(held_out['validation']) == 6 and len(held_out['train']) == 24
  shutil.rmtree(tmp_path / 'validation')
  assert set(check(tmp_path).splits) == {'train'}


def test_training_images_are_shown_upright(tmp_path):
  """The top of the stored image is its right side."""
  stored = np.zeros((40, 60, 3), np.uint8)
  stored[:20] = 255
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(stored if name == 'a' else stored // 2)
    image.save(tmp_path / name / 'x.jpg', exif=exif.tobytes())
  train = check(tmp_path, 'batch_size=2').splits['train']
  image = train.evaluation_batch(np.arange(2))['image'][int(train.labels[0])]
  assert image[:, :14].mean() < 10 < 110 < image[:, 18:].mean()


def test_an_image_that_cannot_be_decoded_is_replaced(images, tmp_path, capfd):
  path = tmp_path / 'data' / 'apple' / '0.png'
  path.write_bytes(path.read_bytes()[:200])
  train = check(tmp_path / 'data').splits['train']
  batch = train.evaluation_batch(np.arange(30))
  index = names(train).index('apple/0.png')
  assert np.flatnonzero(batch['replaced']) == [index]
  assert batch['label'][index] == train.label_of((index + 1) % 30)
  assert 'apple/0.png: left out' in capfd.readouterr().err


def test_copies_within_a_class(images, tmp_path):
  """They are allowed where they cannot be set aside."""
  folder = tmp_path / 'data'
  shutil.copy(folder / 'apple' / '0.png', folder / 'apple' / 'copy.png')
  assert len(check(folder).splits['train']) == 31
  with pytest.raises(UserError, match='copy.png: the same image as .*0.png'):
    check(folder, 'data.holdout=6')


def test_overlap_counts_equal_files(tmp_path):
  """As many as there are, on encoded images and on pixels."""
  for name, count, seed in (('a', 30, 0), ('b', 12, 1)):
    written_images.write_folder(tmp_path / name, count, seed=seed)
  one, two = (check(tmp_path / name).splits['train'] for name in 'ab')
  assert split.overlap(one, two) == 0
  for number in (0, 3, 6):
    source = tmp_path / 'a' / 'apple' / f'{number}.png'
    shutil.copy(source, tmp_path / 'b' / 'apple' / f'x{number}.png')
  # One of them is there twice.
  shutil.copy(source, tmp_path / 'b' / 'apple' / 'y.png')
  two = check(tmp_path / 'b').splits['train']
  assert split.overlap(one, two) == 4
  assert split.overlap(two, one) == 3
  pixels = [
    split.ArraySplit(batch['image'], batch['label'])
    for batch in (x.evaluation_batch(np.arange(len(x))) for x in (one, two))
  ]
  assert split.overlap(*pixels) == 4
  # A file that cannot be read is no copy.
  (tmp_path / 'b' / 'apple' / 'y.png').unlink()
  assert split.overlap(one, two) == 3


def nothing(folder):
  shutil.rmtree(folder)


def empty(folder):
  nothing(folder)
  folder.mkdir()


def a_file(folder):
  nothing(folder)
  folder.write_text('')


def one_class(folder):
  shutil.rmtree(folder / 'apple')
  shutil.rmtree(folder / 'zebra')


def empty_class(folder):
  (folder / 'banana').mkdir()


def folder_in_a_class(folder):
  (folder / 'apple' / 'inner').mkdir()


def unprintable_class(folder):
  (folder / 'apple').rename(folder / 'ap\nple')


def in_two_classes(folder):
  shutil.copy(folder / 'apple' / '0.png', folder / 'zebra')


def other_layout(folder):
  """`val` is no split: both are classes, with folders in them."""
  shutil.copytree(folder, folder / 'train')
  shutil.copytree(folder / 'train', folder / 'val')
  for name in written_images.CLASSES:
    shutil.rmtree(folder / name)


def both_splits(folder):
  other_layout(folder)
  (folder / 'val').rename(folder / 'validation')


def other_classes(folder):
  both_splits(folder)
  shutil.rmtree(folder / 'validation' / 'zebra')


BAD_FOLDERS = {
  nothing: 'cannot be read (No such file or directory)',
  a_file: 'cannot be read (Not a directory)',
  empty: 'the number of folders is 0',
  one_class: 'the number of folders is 1',
  empty_class: 'banana: is empty',
  folder_in_a_class: 'apple: contains the folder inner',
  unprintable_class: r'ap\nple: rename it',
  in_two_classes: 'zebra/0.png: the same image as',
  both_splits: 'the same image as',
  other_layout: 'train: contains the folder apple',
  other_classes: 'validation: the folder zebra is missing',
}


def test_bad_folders(tmp_path):
  """One line each, before JAX is imported, and nothing is written."""
  commands = []
  for damage in BAD_FOLDERS:
    folder = tmp_path / damage.__name__
    written_images.write_folder(folder, 12)
    damage(folder)
    commands.append(
      (
        '--config=bn_x5:mini',
        f'--workdir={tmp_path / "run"}',
        '--config.data.name=folder',
        f'--config.data.data_dir={folder}',
        '--config.data.holdout=0',
      )
    )
  results = support.run_without_jax(*commands)
  for result, (damage, expected) in zip(
    results, BAD_FOLDERS.items(), strict=True
  ):
    assert result.code == 1, damage
    (line,) = result.err.splitlines()
    assert line.startswith('error: ') and expected in line, damage
    assert damage.__name__ in line
  assert not (tmp_path / 'run').exists()


def test_no_folder_is_named():
  with pytest.raises(UserError, match=r'^config.data.data_dir: .* needs the'):
    check('')
