"""Prepares ImageNet (ILSVRC2012) as ArrayRecord from its two archives, once.

  bash scripts/prepare_imagenet.sh --manual_dir=ARCHIVES --data_dir=DATA

Put ILSVRC2012_img_train.tar (138 GB) and ILSVRC2012_img_val.tar (6.3 GB), as
image-net.org gives them to registered users, into ARCHIVES. The archives are
looked through before anything is written; what is prepared is read at the end,
and counted, as are images that are there twice. After an interruption the same
command starts again.

  bash scripts/prepare_imagenet.sh --from_tfrecord=OLD --data_dir=DATA

converts what tfds has prepared as TFRecord under OLD. --stand_in takes archives
of `scripts/make_stand_in.py`.
"""

import argparse
from collections.abc import Iterable, Iterator
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
from pathlib import Path
import re
import shutil
import sys
import tarfile
from typing import Any, TextIO

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bn_repro.data.imagenet_metadata import (
  NAME,
  NUM_CLASSES,
  NUM_EXAMPLES,
  synsets,
)
from bn_repro.errors import UserError, require_open_files

# What the builder of tfds 4.9.10 states of both archives.
ARCHIVES = {
  'ILSVRC2012_img_train.tar': 147_897_477_120,
  'ILSVRC2012_img_val.tar': 6_744_924_160,
}
# Images without labels, which the builder would make a third split of.
UNUSED = 'ILSVRC2012_img_test.tar'
# Where a conversion goes on; no name that tfds looks at.
UNFINISHED = 'being_converted'
# Beyond 1 GB tfds writes everything twice: shuffled in buckets, and at last.
SPACE_OVER_ARCHIVES = 2.1
SPACE_OVER_TFRECORD = 1.05
# Of the builder, measured on 7,440 images of a stand-in of 60 kB each: 600 on a
# busy machine. Real images are twice as large.
IMAGES_PER_SECOND = 300
# Measured on 5,436 images of 110 kB, in memory: 1,200. Disks are slower.
CONVERTED_PER_SECOND = 600
# Of both splits, as tfds cuts ImageNet. ArrayRecord keeps each of them open.
NUM_SHARDS = 1_024 + 64
# Libraries, threads and sockets besides, as for training.
OTHER_FILES = 400
# What a disk without room says, or one that takes no larger file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Of the images of a split: as many may be the same, byte for byte, as others.
# ImageNet has a few; in its validation images 29 are known, at 32 pixels. Our
# choice.
MAX_SAME = 0.01
AGAIN = 'Delete it and run the same command again, or copy it again.'


@contextlib.contextmanager
def one_line(what: str, advice: str) -> Iterator[None]:
  """Has a library say in one line what is wrong, and show progress as we do.

  Raises:
    UserError: for whatever is raised, with what to do.
  """
  try:
    with contextlib.redirect_stderr(sys.stdout):
      yield
  except Exception as error:
    reason = ' '.join(str(error).split()) or type(error).__name__
    if any(os.strerror(number) in reason for number in FULL):
      advice = (
        'Make room, or name another disk, and run the same command again.'
      )
    if (
      len(reason) > 300
    ):  # Of tfds, with the image in it; the cause comes last.
      reason = f'... {reason[-300:]}'
    raise UserError(f'{what} ({reason}). {advice}') from error


def progress(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
  """Passes items on, and shows how many and how long it will take."""
  from tqdm import tqdm

  yield from tqdm(items, what, total, mininterval=1, file=sys.stdout)


def check_archives(manual_dir: Path, *, stand_in: bool) -> dict[str, int]:
  """Looks through both archives, and returns their numbers of images.

  Raises:
    UserError: if one is missing, cut off, or holds something else.
  """
  for name, size in ARCHIVES.items():
    path = manual_dir / name
    if not path.is_file():
      raise UserError(
        f'{path}: not there. Get it from image-net.org (it takes an account), '
        f'and put it into {manual_dir}.'
      )
    found = path.stat().st_size
    if not stand_in and found != size:
      raise UserError(
        f'{path}: {found:,} bytes, not {size:,}. Download it again, or go on '
        'with the download.'
      )
  train, validation = (manual_dir / name for name in ARCHIVES)
  known = set(synsets())
  counts = {'train': 0, 'validation': 0}
  classes = set()
  for synset, names in progress(
    training_images(train), NUM_CLASSES, 'training archive'
  ):
    wrong = [n for n in names if not re.fullmatch(rf'{synset}_\d+\.JPEG', n)]
    if synset not in known or synset in classes or wrong:
      what = wrong[0] if wrong else f'{synset}.tar'
      raise UserError(f'{train}: holds {what}, which does not belong.')
    classes.add(synset)
    counts['train'] += len(names)
  for member in progress(
    members(validation), NUM_EXAMPLES['validation'], 'validation archive'
  ):
    if not re.fullmatch(r'ILSVRC2012_val_\d{8}\.JPEG', member.name):
      raise UserError(
        f'{validation}: holds {member.name}, which does not belong.'
      )
    counts['validation'] += 1
  if not stand_in and (counts != NUM_EXAMPLES or len(classes) != NUM_CLASSES):
    raise UserError(
      f'{manual_dir}: {counts} images of {len(classes)} classes, not '
      f'{NUM_EXAMPLES} of {NUM_CLASSES}. Download the archives again.'
    )
  return counts


def members(path: Path) -> Iterator[tarfile.TarInfo]:
  """The members of an archive.

  Raises:
    UserError: if it is damaged or cut off.
  """
  try:
    with tarfile.open(path, 'r:') as archive:
      for member in archive:
        if member.offset_data + member.size > path.stat().st_size:
          raise tarfile.ReadError(f'{member.name} is cut off')
        yield member
  except tarfile.TarError as error:
    raise UserError(f'{path}: damaged ({error}). Download it again.') from error


def training_images(path: Path) -> Iterator[tuple[str, list[str]]]:
  """Each class of the training archive with the names of its images."""
  with path.open('rb') as file:
    for member in members(path):
      content: Any = Slice(file, member)
      try:
        with tarfile.open(fileobj=content, mode='r:') as of_class:
          names = of_class.getnames()
      except tarfile.TarError as error:
        raise UserError(
          f'{path}: {member.name} is damaged ({error}). Download it again.'
        ) from error
      yield member.name.removesuffix('.tar'), names


class Slice:
  """A member of an archive as a file, without copying it."""

  def __init__(self, file: Any, member: tarfile.TarInfo):
    self._file, self._start, self._size = file, member.offset_data, member.size
    self._at = 0

  def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
    """Moves; from the start, from here, or from the end."""
    base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}
    self._at = base[whence] + offset
    return self._at

  def tell(self) -> int:
    """Where it is."""
    return self._at

  def read(self, size: int = -1) -> bytes:
    """Reads on."""
    rest = max(self._size - self._at, 0)
    self._file.seek(self._start + self._at)
    content = self._file.read(rest if size < 0 else min(size, rest))
    self._at += len(content)
    return content


def check_space(
  data_dir: Path, size: int, over: float, num_images: int, per_second: int
) -> None:
  """Says what it will take, and refuses if the disk has too little.

  Args:
    data_dir: where it will be.
    size: in bytes, of what is read, and about that of what is written.
    over: how many times that it takes for a while.
    num_images: of all splits.
    per_second: images.

  Raises:
    UserError: if there is too little room.
  """
  needed = over * size
  free = shutil.disk_usage(data_dir).free
  print(
    f'{num_images:,} images: up to {bytes_in_words(needed)} of disk for a '
    f'while, {bytes_in_words(size)} at the end, about '
    f'{time_in_words(num_images / per_second)}',
    flush=True,
  )
  if free < needed:
    raise UserError(
      f'--data_dir={data_dir}: {bytes_in_words(free)} are free, and it takes '
      f'{bytes_in_words(needed)}. Make room, or name another disk.'
    )


def bytes_in_words(size: float) -> str:
  """Such as 147.9 GB."""
  return f'{size / 1e9:,.1f} GB' if size >= 1e9 else f'{size / 1e6:,.1f} MB'


def time_in_words(seconds: float) -> str:
  """Such as 1.2 hours."""
  if seconds >= 3600:
    return f'{seconds / 3600:.1f} hours'
  minutes = math.ceil(seconds / 60)
  return f'{minutes} minutes' if minutes > 1 else 'a minute'


def prepare(data_dir: Path, manual_dir: Path, *, stand_in: bool) -> None:
  """Has the builder of tfds do it.

  Raises:
    UserError: if the archives or the disk are not fit for it.
  """
  import tensorflow_datasets as tfds

  counts = check_archives(manual_dir, stand_in=stand_in)
  size = sum((manual_dir / name).stat().st_size for name in ARCHIVES)
  check_space(
    data_dir, size, SPACE_OVER_ARCHIVES, sum(counts.values()), IMAGES_PER_SECOND
  )
  if (manual_dir / UNUSED).exists():
    print(f'{manual_dir / UNUSED}: not used, as it has no labels', flush=True)
  own = data_dir / NAME / 'incomplete.downloads'
  archives = own / 'archives'
  # Shards of about 1/1024 of the whole, as tfds has them for ImageNet.
  shards = {'num_shards': 4} if stand_in else {}
  try:
    with one_line(
      f'--data_dir={data_dir}: could not be prepared, and what was written is '
      'removed',
      'Run the same command again; if it ends here again, download the '
      'archives again.',
    ):
      # The builder takes what it finds: it is shown links to the two. And tfds
      # wants a folder for downloads; one of its own, as people keep archives in
      # data_dir/downloads.
      archives.mkdir(parents=True)
      for name in ARCHIVES:
        (archives / name).symlink_to(manual_dir / name)
      builder = tfds.builder(
        NAME, data_dir=data_dir, file_format='array_record'
      )
      builder.download_and_prepare(
        download_dir=own,
        download_config=tfds.download.DownloadConfig(
          manual_dir=archives, **shards
        ),
      )
  finally:
    shutil.rmtree(own, ignore_errors=True)


def check_tfrecord(
  from_tfrecord: Path, version: str, *, stand_in: bool
) -> tuple[Path, int]:
  """Looks at a copy as TFRecord; returns its folder and number of images.

  Raises:
    UserError: if it is not there or not whole.
  """
  source = from_tfrecord / NAME / version
  flag = f'--from_tfrecord={from_tfrecord}'
  if not any(source.glob(f'{NAME}-train.tfrecord-*')):
    if any(source.glob(f'{NAME}-train.array_record-*')):
      raise UserError(
        f'{flag}: is ArrayRecord already. Train on it with '
        f'--config.data.data_dir={from_tfrecord}.'
      )
    found = sorted(path.name for path in (from_tfrecord / NAME).glob('[0-9]*'))
    raise UserError(
      f'{flag}: no TFRecord files in {source}; '
      + (
        f'found version {", ".join(found)}, and only {version} can be '
        'converted. Prepare it from the archives with --manual_dir.'
        if found
        else f'name the folder that holds {NAME}/{version}.'
      )
    )
  with one_line(f'{source}/dataset_info.json: damaged', 'Copy it again.'):
    splits = {
      split['name']: [int(length) for length in split['shardLengths']]
      for split in json.loads((source / 'dataset_info.json').read_text())[
        'splits'
      ]
    }
  for split, lengths in splits.items():
    files = sum(1 for _ in source.glob(f'{NAME}-{split}.tfrecord-*'))
    if files != len(lengths):
      raise UserError(
        f'{source}: {files} TFRecord files of {split}, not {len(lengths)}. '
        'Copy it again.'
      )
  for split, expected in NUM_EXAMPLES.items():
    count = sum(splits.get(split, []))
    if not count or (not stand_in and count != expected):
      raise UserError(
        f'{source}: {count:,} {split} images, not {expected:,}. Prepare it '
        'from the archives with --manual_dir.'
      )
  return source, sum(map(sum, splits.values()))


def convert(
  from_tfrecord: Path, data_dir: Path, version: str, *, stand_in: bool
) -> None:
  """Converts a copy that tfds has prepared as TFRecord.

  Raises:
    UserError: if there is none, or no room, or it is damaged.
  """
  source, num_images = check_tfrecord(from_tfrecord, version, stand_in=stand_in)
  size = sum(path.stat().st_size for path in source.glob('*.tfrecord-*'))
  check_space(
    data_dir, size, SPACE_OVER_TFRECORD, num_images, CONVERTED_PER_SECOND
  )
  print(f'{source}: converting TFRecord to ArrayRecord', flush=True)
  unfinished = data_dir / NAME / UNFINISHED
  try:
    with one_line(
      f'{source}: could not be converted to --data_dir={data_dir}, and what '
      'was written is removed',
      'Run the same command again; if it ends here again, copy it again.',
    ):
      convert_in(unfinished, source)
    unfinished.rename(data_dir / NAME / version)
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def convert_in(unfinished: Path, source: Path) -> None:
  """Makes the first folder, of what the second one holds, as ArrayRecord."""
  from tensorflow_datasets.scripts.cli import convert_format_utils

  # Into another folder tfds converts wrongly: it counts what is in the first
  # one. So it gets a folder of links to convert in, which are then removed.
  unfinished.mkdir(parents=True)
  for path in source.iterdir():
    if '.tfrecord-' in path.name:
      (unfinished / path.name).symlink_to(path)
    else:
      shutil.copyfile(path, unfinished / path.name)
  convert_format_utils.convert_dataset(
    out_dir=None,
    out_file_format='array_record',
    dataset_version_dir=str(unfinished),
    num_workers=1,  # With more it loses what goes wrong.
  )
  for link in unfinished.glob('*.tfrecord-*'):
    link.unlink()
  info_file = unfinished / 'dataset_info.json'
  info = json.loads(info_file.read_text())
  info.pop('alternativeFileFormats')
  info_file.write_text(json.dumps({**info, 'fileFormat': 'array_record'}))


def verify(data_dir: Path, version_dir: Path, *, stand_in: bool) -> str:
  """Reads what was prepared, every example; returns what is there.

  Raises:
    UserError: if examples or classes are missing, or are there twice.
  """
  import tensorflow_datasets as tfds

  with one_line(f'{version_dir}: cannot be read', AGAIN):
    builder = tfds.builder(NAME, data_dir=data_dir, file_format='array_record')
    class_names = builder.info.features['label'].names
    splits = builder.info.splits
  if class_names != synsets():
    raise UserError(f'{version_dir}: has other classes. {AGAIN}')
  missing = [split for split in NUM_EXAMPLES if split not in splits]
  if missing:
    raise UserError(f'{version_dir}: has no {missing[0]} images. {AGAIN}')
  shards = {
    split: [
      (Path(path), int(length))
      for path, length in zip(
        splits[split].filepaths, splits[split].shard_lengths, strict=True
      )
    ]
    for split in NUM_EXAMPLES
  }
  require_open_files(sum(map(len, shards.values())) + OTHER_FILES)
  check_shards([shard for of_split in shards.values() for shard in of_split])
  said = []
  contents = {}
  for split, expected in NUM_EXAMPLES.items():
    with one_line(f'{version_dir}: cannot be read', AGAIN):
      source = tfds.data_source(
        NAME,
        split=split,
        data_dir=data_dir,
        download=False,
        decoders={'image': tfds.decode.SkipDecoding()},
      )
    count = len(source)
    names, images = np.empty(count, np.uint64), np.empty(count, np.uint64)
    labels = set()
    for index, example in progress(
      examples(source, shards[split]), count, f'reading {split}'
    ):
      if not example['image']:
        raise UserError(f'{version_dir}: {split} {index} is empty. {AGAIN}')
      names[index] = digest(example['file_name'])
      images[index] = digest(example['image'])
      labels.add(int(example['label']))
    if not stand_in and (count, len(labels)) != (expected, NUM_CLASSES):
      raise UserError(
        f'{version_dir}: {count:,} {split} images of {len(labels)} classes, '
        f'not {expected:,} of {NUM_CLASSES}. {AGAIN}'
      )
    if len(np.unique(names)) != count:
      raise UserError(
        f'{version_dir}: {count:,} {split} images have '
        f'{len(np.unique(names)):,} names, and each should have its own. '
        f'{AGAIN}'
      )
    contents[split] = images
    said.append(f'{count:,} {split} images of {len(labels)} classes')
  check_overlap(version_dir, **contents)
  return f'{version_dir}: {", ".join(said)}'


def check_shards(shards: list[tuple[Path, int]]) -> None:
  """Opens each shard, and compares its number of images.

  Raises:
    UserError: for the first that is missing or damaged.
  """
  from array_record.python import array_record_module

  for path, length in shards:
    if not path.is_file():
      raise UserError(
        f'{path}: missing. Copy it again, or delete {path.parent} and run the '
        'same command again.'
      )
    with damaged(path):
      reader = array_record_module.ArrayRecordReader(str(path))
      found = reader.num_records()
      reader.close()
      if found != length:
        raise ValueError(f'{found} images, not {length}')


def damaged(path: Path) -> contextlib.AbstractContextManager[None]:
  """Says which shard it is that cannot be read."""
  return one_line(
    f'{path}: damaged',
    f'Copy it again, or delete {path.parent} and run the same command again.',
  )


def examples(
  source: Any, shards: list[tuple[Path, int]]
) -> Iterator[tuple[int, dict[str, Any]]]:
  """The examples of a split with their numbers, as training reads them."""
  index = 0
  for path, length in shards:
    for _ in range(length):
      with damaged(path):
        example = source[index]
      yield index, example
      index += 1


def digest(content: bytes | str) -> int:
  """64 bits of a hash: two of 1.3 million agree once in 20 million times."""
  raw = content.encode() if isinstance(content, str) else content
  return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), 'little')


def check_overlap(
  version_dir: Path, train: np.ndarray, validation: np.ndarray
) -> None:
  """Refuses images that are there again, but for the few that ImageNet has.

  Args:
    version_dir: of the copy.
    train: a digest of each training image.
    validation: a digest of each validation image.

  Raises:
    UserError: if there are more.
  """

  def repeated(images: np.ndarray) -> int:
    return len(images) - len(np.unique(images))

  for split, total, what, count in (
    (
      'validation',
      len(validation),
      'are training images as well',
      int(np.isin(validation, train).sum()),
    ),
    (
      'validation',
      len(validation),
      'repeat others of them',
      repeated(validation),
    ),
    ('train', len(train), 'repeat others of them', repeated(train)),
  ):
    most = int(MAX_SAME * total)
    if count > most:
      raise UserError(
        f'{version_dir}: {count:,} of {total:,} {split} images {what}, byte '
        f'for byte; expected at most {most:,}. Delete it, and prepare it from '
        'archives that image-net.org gave you.'
      )


def run(flags: argparse.Namespace) -> None:
  """Prepares or converts what is needed, and verifies it."""
  import tensorflow_datasets as tfds

  data_dir = Path(flags.data_dir).expanduser().absolute()
  source = Path(flags.manual_dir or flags.from_tfrecord).expanduser().absolute()
  if not source.is_dir():
    raise UserError(f'{source}: no such folder.')
  if not flags.stand_in:  # Known before hours are spent.
    require_open_files(NUM_SHARDS + OTHER_FILES)
  with lock_file(data_dir) as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise UserError(
        f'--data_dir={data_dir}: being prepared by another process.'
      ) from error
    # What an interruption has left, and nobody would take for whole.
    for left in (data_dir / NAME).glob('incomplete.*'):
      shutil.rmtree(left)
    shutil.rmtree(data_dir / NAME / UNFINISHED, ignore_errors=True)
    # Of the class: a copy that is damaged has no builder.
    version = str(tfds.builder_cls(NAME).VERSION)
    version_dir = data_dir / NAME / version
    if any(version_dir.glob(f'{NAME}-train.tfrecord-*')):
      raise UserError(
        f'--data_dir={data_dir}: holds a copy prepared as TFRecord. Convert it '
        f'with --from_tfrecord={data_dir} and another --data_dir.'
      )
    if version_dir.is_dir():
      if not (version_dir / 'dataset_info.json').is_file():
        raise UserError(
          f'{version_dir}: not whole, as it has no dataset_info.json. {AGAIN}'
        )
      print(f'{version_dir}: prepared already', flush=True)
    elif flags.from_tfrecord:
      convert(source, data_dir, version, stand_in=flags.stand_in)
    else:
      prepare(data_dir, source, stand_in=flags.stand_in)
    print(verify(data_dir, version_dir, stand_in=flags.stand_in))


def lock_file(data_dir: Path) -> TextIO:
  """Makes the folder if need be, and opens the file that a process holds.

  Raises:
    UserError: if nothing can be written there.
  """
  try:
    data_dir.mkdir(parents=True, exist_ok=True)
    return (data_dir / f'.{NAME}.lock').open('w')
  except FileExistsError as error:
    raise UserError(f'--data_dir={data_dir}: a file. Name a folder.') from error
  except OSError as error:
    raise UserError(
      f'--data_dir={data_dir}: nothing can be written there '
      f'({error.strerror}). Name a folder on a disk with room, and yours.'
    ) from error


def main() -> int:
  """Runs the command; returns its exit code."""
  parser = argparse.ArgumentParser(
    prog='bash scripts/prepare_imagenet.sh',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  sources = parser.add_mutually_exclusive_group(required=True)
  sources.add_argument('--manual_dir', metavar='DIR', help='of the archives')
  sources.add_argument(
    '--from_tfrecord', metavar='DIR', help='data_dir of a copy as TFRecord'
  )
  parser.add_argument('--data_dir', required=True, metavar='DIR')
  parser.add_argument(
    '--stand_in', action='store_true', help='archives of any size and number'
  )
  flags = parser.parse_args()
  # What tfds and Beam warn of is as intended.
  logging.disable(logging.WARNING)
  try:
    run(flags)
    return 0
  except (UserError, OSError) as error:
    problem = str(error)
  except KeyboardInterrupt:
    problem = (
      'interrupted, and what was half-written is removed. Run the same command '
      'again.'
    )
  # Only now: with what was raised, bars that were under way have gone.
  print(f'error: {problem}', file=sys.stderr)
  return 1


if __name__ == '__main__':
  sys.exit(main())
