"""Prepares ImageNet (ILSVRC2012) as ArrayRecord from its two archives, once.

  bash scripts/prepare_imagenet.sh --manual_dir=ARCHIVES --data_dir=DATA

Put ILSVRC2012_img_train.tar (138 GB) and ILSVRC2012_img_val.tar (6.3 GB), as
image-net.org gives them to registered users, into ARCHIVES. The archives are
looked through before anything is written; what is prepared is counted at the
end. After an interruption the same command starts again.

  bash scripts/prepare_imagenet.sh --from_tfrecord=OLD --data_dir=DATA

converts what tfds has prepared as TFRecord under OLD. --stand_in takes archives
of `scripts/make_stand_in.py`.
"""

import argparse
from collections.abc import Iterable, Iterator
import fcntl
import json
import os
from pathlib import Path
import re
import shutil
import sys
import tarfile
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bn_repro.ilsvrc2012 import (  # noqa: E402
  NAME,
  NUM_CLASSES,
  NUM_EXAMPLES,
  synsets,
)

# What the builder of tfds 4.9.10 states of both archives.
ARCHIVES = {
  'ILSVRC2012_img_train.tar': 147_897_477_120,
  'ILSVRC2012_img_val.tar': 6_744_924_160,
}
# Where a conversion goes on; no name that tfds looks at.
UNFINISHED = 'being_converted'
# Beyond 1 GB tfds writes everything twice: shuffled in buckets, and at last.
SPACE_OVER_ARCHIVES = 2.1
# Of the builder, measured on 7,440 images of a stand-in of 60 kB each: 600 on a
# busy machine. Real images are twice as large.
IMAGES_PER_SECOND = 300


class PreparationError(Exception):
  """Something is wrong, told in one line."""


def progress(items: Iterable[Any], total: int, what: str) -> Iterator[Any]:
  """Passes items on, and shows how many and how long it will take."""
  from tqdm import tqdm

  yield from tqdm(items, what, total, mininterval=1, file=sys.stdout)


def check_archives(manual_dir: Path, *, stand_in: bool) -> dict[str, int]:
  """Looks through both archives, and returns their numbers of images.

  Raises:
    PreparationError: if one is missing, cut off, or holds something else.
  """
  for name, size in ARCHIVES.items():
    path = manual_dir / name
    if not path.is_file():
      raise PreparationError(
        f'{path}: not there. Get it from image-net.org (it takes an account), '
        f'and put it into {manual_dir}.'
      )
    found = path.stat().st_size
    if not stand_in and found != size:
      raise PreparationError(
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
      raise PreparationError(f'{train}: holds {what}, which does not belong.')
    classes.add(synset)
    counts['train'] += len(names)
  for member in progress(
    members(validation), NUM_EXAMPLES['validation'], 'validation archive'
  ):
    if not re.fullmatch(r'ILSVRC2012_val_\d{8}\.JPEG', member.name):
      raise PreparationError(
        f'{validation}: holds {member.name}, which does not belong.'
      )
    counts['validation'] += 1
  if not stand_in and (counts != NUM_EXAMPLES or len(classes) != NUM_CLASSES):
    raise PreparationError(
      f'{manual_dir}: {counts} images of {len(classes)} classes, not '
      f'{NUM_EXAMPLES} of {NUM_CLASSES}. Download the archives again.'
    )
  return counts


def members(path: Path) -> Iterator[tarfile.TarInfo]:
  """The members of an archive.

  Raises:
    PreparationError: if it is damaged or cut off.
  """
  try:
    with tarfile.open(path, 'r:') as archive:
      for member in archive:
        if member.offset_data + member.size > path.stat().st_size:
          raise tarfile.ReadError(f'{member.name} is cut off')
        yield member
  except tarfile.TarError as error:
    raise PreparationError(
      f'{path}: damaged ({error}). Download it again.'
    ) from error


def training_images(path: Path) -> Iterator[tuple[str, list[str]]]:
  """Each class of the training archive with the names of its images."""
  with path.open('rb') as file:
    for member in members(path):
      content: Any = Slice(file, member)
      try:
        with tarfile.open(fileobj=content, mode='r:') as of_class:
          names = of_class.getnames()
      except tarfile.TarError as error:
        raise PreparationError(
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


def check_space(data_dir: Path, manual_dir: Path, num_images: int) -> None:
  """Says what it will take, and refuses if the disk has too little.

  Raises:
    PreparationError: if there is too little room.
  """
  size = sum((manual_dir / name).stat().st_size for name in ARCHIVES)
  needed = SPACE_OVER_ARCHIVES * size
  free = shutil.disk_usage(data_dir).free
  hours = num_images / IMAGES_PER_SECOND / 3600
  print(
    f'preparing {num_images:,} images: up to {needed / 1e9:.1f} GB of disk for '
    f'a while, {size / 1e9:.1f} GB at the end, about {hours:.1f} hours',
    flush=True,
  )
  if free < needed:
    raise PreparationError(
      f'--data_dir={data_dir}: {free / 1e9:.1f} GB are free, and it takes '
      f'{needed / 1e9:.1f}. Make room, or name another disk.'
    )


def prepare(data_dir: Path, manual_dir: Path, *, stand_in: bool) -> None:
  """Has the builder of tfds do it.

  Raises:
    PreparationError: if the archives or the disk are not fit for it.
  """
  import tensorflow_datasets as tfds

  counts = check_archives(manual_dir, stand_in=stand_in)
  check_space(data_dir, manual_dir, sum(counts.values()))
  builder = tfds.builder(NAME, data_dir=data_dir, file_format='array_record')
  # Shards of about 1/1024 of the whole, as tfds has them for ImageNet.
  shards = {'num_shards': 4} if stand_in else {}
  builder.download_and_prepare(
    download_dir=data_dir / 'downloads',
    download_config=tfds.download.DownloadConfig(
      manual_dir=manual_dir, **shards
    ),
  )
  # Empty: nothing is downloaded.
  shutil.rmtree(data_dir / 'downloads', ignore_errors=True)


def convert(from_tfrecord: Path, data_dir: Path, version: str) -> None:
  """Converts a copy that tfds has prepared as TFRecord.

  Raises:
    PreparationError: if there is none.
  """
  from tensorflow_datasets.scripts.cli import convert_format_utils

  source = from_tfrecord / NAME / version
  if not any(source.glob(f'{NAME}-train.tfrecord-*')):
    raise PreparationError(
      f'--from_tfrecord={from_tfrecord}: no TFRecord files in {source}.'
    )
  print(f'{source}: converting TFRecord to ArrayRecord', flush=True)
  # Into another folder tfds converts wrongly: it counts what is in the first
  # one. So it gets a folder of links to convert in, which are then removed.
  unfinished = data_dir / NAME / UNFINISHED
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
  unfinished.rename(data_dir / NAME / version)


def verify(data_dir: Path, *, stand_in: bool) -> str:
  """Reads what was prepared, every example; returns what is there.

  Raises:
    PreparationError: if examples or classes are missing.
  """
  import tensorflow_datasets as tfds

  builder = tfds.builder(NAME, data_dir=data_dir, file_format='array_record')
  names = builder.info.features['label'].names
  if names != synsets():
    raise PreparationError(f'{builder.data_dir}: has other classes.')
  said = []
  for split, expected in NUM_EXAMPLES.items():
    source = tfds.data_source(
      NAME,
      split=split,
      data_dir=data_dir,
      download=False,
      decoders={'image': tfds.decode.SkipDecoding()},
    )
    labels = set()
    for index in progress(range(len(source)), len(source), f'reading {split}'):
      example = source[index]
      if not example['image']:
        raise PreparationError(f'{builder.data_dir}: {split} {index} is empty.')
      labels.add(int(example['label']))
    if not stand_in and (len(source), len(labels)) != (expected, NUM_CLASSES):
      raise PreparationError(
        f'{builder.data_dir}: {len(source):,} {split} images of {len(labels)} '
        f'classes, not {expected:,} of {NUM_CLASSES}. Delete it, and prepare '
        'it again.'
      )
    said.append(f'{len(source):,} {split} images of {len(labels)} classes')
  return f'{builder.data_dir}: {", ".join(said)}'


def run(flags: argparse.Namespace) -> None:
  """Prepares or converts what is needed, and verifies it."""
  import tensorflow_datasets as tfds

  data_dir = Path(flags.data_dir).expanduser().absolute()
  source = Path(flags.manual_dir or flags.from_tfrecord).expanduser().absolute()
  if not source.is_dir():
    raise PreparationError(f'{source}: no such folder.')
  data_dir.mkdir(parents=True, exist_ok=True)
  with (data_dir / f'.{NAME}.lock').open('w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      raise PreparationError(
        f'--data_dir={data_dir}: being prepared by another process.'
      ) from error
    # What an interruption has left, and nobody would take for whole.
    for left in (data_dir / NAME).glob('incomplete.*'):
      shutil.rmtree(left)
    shutil.rmtree(data_dir / NAME / UNFINISHED, ignore_errors=True)
    version_dir = Path(tfds.builder(NAME, data_dir=data_dir).data_dir)
    if any(version_dir.glob(f'{NAME}-train.tfrecord-*')):
      raise PreparationError(
        f'--data_dir={data_dir}: holds a copy prepared as TFRecord. Convert it '
        f'with --from_tfrecord={data_dir} and another --data_dir.'
      )
    if version_dir.is_dir():
      print(f'{version_dir}: prepared already', flush=True)
    elif flags.from_tfrecord:
      convert(source, data_dir, version_dir.name)
    else:
      prepare(data_dir, source, stand_in=flags.stand_in)
    print(verify(data_dir, stand_in=flags.stand_in))


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
  try:
    run(flags)
  except (PreparationError, OSError) as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  return 0


if __name__ == '__main__':
  sys.exit(main())
