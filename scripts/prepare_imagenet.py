"""Prepares ImageNet (ILSVRC2012) as ArrayRecord, from its two archives.

  bash scripts/prepare_imagenet.sh --manual_dir=ARCHIVES --data_dir=DATA

ARCHIVES holds ILSVRC2012_img_train.tar (138 GB) and ILSVRC2012_img_val.tar
(6.3 GB), which image-net.org gives to registered users. Both are checked before
anything is written. At the end all prepared images are read, counted and
compared with one another. After an interruption, run the same command again.

  bash scripts/prepare_imagenet.sh --from_tfrecord=OLD --data_dir=DATA

converts a copy that tfds has prepared as TFRecord in OLD. With --stand_in the
archives may be of any size, such as those of `scripts/make_stand_in.py`.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
import contextlib
import hashlib
import json
import logging
from pathlib import Path
import re
import shutil
import signal
import sys
import tarfile
import threading
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bn_repro import files
from bn_repro.data.imagenet_metadata import (
  NAME,
  NUM_CLASSES,
  NUM_EXAMPLES,
  VERSION,
  synsets,
)
from bn_repro.data.prepared import (
  EncodedExamples,
  check_shards,
  require_open_shards,
)
from bn_repro.errors import UserError
from bn_repro.runtime import streams

# Size of each archive in bytes, from the builder of tfds 4.9.10.
ARCHIVES = {
  'ILSVRC2012_img_train.tar': 147_897_477_120,
  'ILSVRC2012_img_val.tar': 6_744_924_160,
}
# Images without labels, of which the builder would make a third split.
UNUSED = 'ILSVRC2012_img_test.tar'
# Shards of both splits together, as tfds cuts ImageNet.
NUM_SHARDS = 1_024 + 64
# Folder of a conversion under way; tfds ignores this name.
CONVERTING = 'being_converted'
# Disk needed, as a multiple of the input. Above 1 GB tfds writes everything
# twice: first shuffled into buckets, then into shards.
SPACE_OVER_ARCHIVES = 2.1
SPACE_OVER_TFRECORD = 1.05
# Images per second of the builder: measured 600, for a stand-in of 7,440 images
# of 60 kB on a busy machine; real images are twice as large.
PREPARED_PER_SECOND = 300
# Images per second of a conversion: measured 1,200, for 5,436 images of 110 kB
# in memory; disks are slower.
CONVERTED_PER_SECOND = 600
# Largest share of the images of a split that may repeat others byte for byte.
# ImageNet repeats a few; among its validation images 29 are known. Our choice.
MAX_REPEATED = 0.01


@contextlib.contextmanager
def errors_in_one_line(problem: str, advice: str) -> Iterator[None]:
  """Turns the errors of a library into a `UserError`.

  What the library prints on standard error goes to standard output.

  Args:
    problem: what failed.
    advice: what to do about it; replaced if the disk is full.

  Raises:
    UserError: for any exception.
  """
  try:
    with contextlib.redirect_stderr(sys.stdout):
      yield
  except Exception as error:
    reason = ' '.join(str(error).split()) or type(error).__name__
    if files.is_system_error(error, files.DISK_FULL):
      advice = 'Free space or choose another disk, and run the command again.'
    # Some messages of tfds contain an image; the cause comes last.
    if len(reason) > 300:
      reason = f'... {reason[-300:]}'
    raise UserError(f'{problem} ({reason}). {advice}') from error


@contextlib.contextmanager
def recorded_interruption() -> Iterator[threading.Event]:
  """Yields an event that SIGINT sets before it raises KeyboardInterrupt.

  An extension module that is interrupted while Python loads it raises an
  ImportError in place of the KeyboardInterrupt.
  """
  interrupted = threading.Event()

  def interrupt(*_: Any) -> None:
    interrupted.set()
    raise KeyboardInterrupt

  previous = signal.signal(signal.SIGINT, interrupt)
  try:
    yield interrupted
  finally:
    signal.signal(signal.SIGINT, previous)


def progress(items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
  """Yields the items and shows a progress bar."""
  from tqdm import tqdm

  yield from tqdm(items, label, total, mininterval=1, file=sys.stdout)


def check_archives(manual_dir: Path, *, stand_in: bool) -> int:
  """Checks both archives and returns the number of images in them.

  Raises:
    UserError: if one is missing, truncated, or contains other files.
  """
  for name, size in ARCHIVES.items():
    path = manual_dir / name
    if not path.is_file():
      raise UserError(
        f'{path}: does not exist. Download it from image-net.org, which needs '
        f'an account, into {manual_dir}.'
      )
    found = path.stat().st_size
    if not stand_in and found != size:
      raise UserError(
        f'{path}: {found:,} bytes, not {size:,}. Resume the download, or '
        'start it again.'
      )
  train, validation = (manual_dir / name for name in ARCHIVES)
  classes = count_training_images(train)
  counts = {
    'train': sum(classes.values()),
    'validation': count_validation_images(validation),
  }
  if not stand_in and (counts != NUM_EXAMPLES or len(classes) != NUM_CLASSES):
    raise UserError(
      f'{manual_dir}: {counts} images of {len(classes)} classes, not '
      f'{NUM_EXAMPLES} of {NUM_CLASSES}. Download the archives again.'
    )
  return sum(counts.values())


def count_training_images(path: Path) -> dict[str, int]:
  """Returns the number of images of each class in the training archive.

  Raises:
    UserError: if the archive is damaged or contains other members.
  """
  known = set(synsets())
  counts: dict[str, int] = {}
  for archive, member in progress(
    members(path), NUM_CLASSES, 'training archive'
  ):
    synset = member.name.removesuffix('.tar')
    require_member(path, member, synset in known and synset not in counts)
    names: set[str] = set()
    try:
      images = archive.extractfile(member)
      with tarfile.open(fileobj=images, mode='r:') as of_class:
        for image in of_class:
          belongs = re.fullmatch(rf'{synset}_[0-9]+\.JPEG', image.name)
          require_member(path, image, belongs and image.name not in names)
          names.add(image.name)
    except tarfile.TarError as error:
      raise UserError(
        f'{path}: {member.name} is damaged ({error}). Download it again.'
      ) from error
    counts[synset] = len(names)
  return counts


def count_validation_images(path: Path) -> int:
  """Returns the number of images in the validation archive.

  Raises:
    UserError: if the archive is damaged or contains other members.
  """
  expected = NUM_EXAMPLES['validation']
  numbers: set[int] = set()
  for _, member in progress(members(path), expected, 'validation archive'):
    name = re.fullmatch(r'ILSVRC2012_val_([0-9]{8})\.JPEG', member.name)
    number = int(name[1]) if name else 0
    require_member(
      path, member, 1 <= number <= expected and number not in numbers
    )
    numbers.add(number)
  return len(numbers)


def require_member(path: Path, member: tarfile.TarInfo, belongs: Any) -> None:
  """Checks a member of an archive before the builder reads it.

  Args:
    path: the archive.
    member: must be a regular file: no link, folder or device.
    belongs: whether its name is one that the archive should contain, once.

  Raises:
    UserError: if the member is of another kind, or does not belong.
  """
  if belongs and member.isreg():
    return
  problem = (
    'does not belong, or is repeated'
    if member.isreg()
    else 'is not a regular file'
  )
  raise UserError(
    f'{path}: contains {member.name!r}, which {problem}. Download it again.'
  )


def members(path: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
  """Yields an open archive with each of its members.

  Raises:
    UserError: if the archive is damaged or truncated.
  """
  try:
    with tarfile.open(path, 'r:') as archive:
      for member in archive:
        if member.offset_data + member.size > path.stat().st_size:
          raise tarfile.ReadError(f'{member.name} is truncated')
        yield archive, member
  except tarfile.TarError as error:
    raise UserError(f'{path}: damaged ({error}). Download it again.') from error


def check_space(
  data_dir: Path, size: int, factor: float, num_images: int, rate: int
) -> None:
  """Prints the disk and the time that are needed, and checks the disk.

  Args:
    data_dir: output folder.
    size: size of the input, and roughly of the output, in bytes.
    factor: largest size during the work, as a multiple of `size`.
    num_images: number of images.
    rate: images per second.

  Raises:
    UserError: if the disk has too little space.
  """
  needed = factor * size
  print(
    f'{num_images:,} images: up to {gigabytes(needed)} of disk during the '
    f'work, {gigabytes(size)} at the end, about '
    f'{num_images / rate / 3600:.1f} hours',
    flush=True,
  )
  free = shutil.disk_usage(data_dir).free
  if free < needed:
    raise UserError(
      f'--data_dir={data_dir}: {gigabytes(free)} of disk are free, but '
      f'{gigabytes(needed)} are needed. Free space or choose another disk.'
    )


def gigabytes(size: float) -> str:
  """Formats a number of bytes, such as 147.897 GB."""
  return f'{size / 1e9:,.3f} GB'


def prepare(data_dir: Path, manual_dir: Path, *, stand_in: bool) -> None:
  """Prepares a copy from the archives, by the builder of tfds.

  Raises:
    UserError: if the archives are unusable, or the disk too small.
  """
  import tensorflow_datasets as tfds

  num_images = check_archives(manual_dir, stand_in=stand_in)
  size = sum((manual_dir / name).stat().st_size for name in ARCHIVES)
  check_space(
    data_dir, size, SPACE_OVER_ARCHIVES, num_images, PREPARED_PER_SECOND
  )
  if (manual_dir / UNUSED).exists():
    print(f'{manual_dir / UNUSED}: not used, as it has no labels', flush=True)
  # The builder takes all archives that it finds: it gets a folder with links to
  # these two. And tfds empties its folder of downloads, where some people keep
  # the archives: it gets an empty one.
  downloads = data_dir / NAME / 'incomplete.downloads'
  archives = downloads / 'archives'
  # By default the builder makes about 1,024 shards of ImageNet.
  shards = {'num_shards': 4} if stand_in else {}
  with errors_in_one_line(
    f'--data_dir={data_dir}: preparation failed, and its output is removed',
    'Run the same command again.',
  ):
    archives.mkdir(parents=True)
    for name in ARCHIVES:
      (archives / name).symlink_to(manual_dir / name)
    builder = tfds.builder(NAME, data_dir=data_dir, file_format='array_record')
    builder.download_and_prepare(
      download_dir=downloads,
      download_config=tfds.download.DownloadConfig(
        manual_dir=archives, **shards
      ),
    )


def check_tfrecord(from_tfrecord: Path, *, stand_in: bool) -> tuple[Path, int]:
  """Checks a TFRecord copy; returns its folder and number of images.

  Raises:
    UserError: if it is missing or incomplete.
  """
  source = from_tfrecord / NAME / VERSION
  flag = f'--from_tfrecord={from_tfrecord}'
  if not any(source.glob(f'{NAME}-train.tfrecord-*')):
    if any(source.glob(f'{NAME}-train.array_record-*')):
      raise UserError(
        f'{flag}: this copy is ArrayRecord already. Train on it with '
        f'--config.data.data_dir={from_tfrecord}.'
      )
    found = sorted(path.name for path in (from_tfrecord / NAME).glob('[0-9]*'))
    raise UserError(
      f'{flag}: no TFRecord files in {source}; '
      + (
        f'found version {", ".join(found)}, but only {VERSION} can be '
        'converted. Prepare it from the archives with --manual_dir.'
        if found
        else f'choose the folder that contains {NAME}/{VERSION}.'
      )
    )
  description = source / 'dataset_info.json'
  with errors_in_one_line(f'{description}: damaged', 'Copy it again.'):
    splits = {
      split['name']: [int(length) for length in split['shardLengths']]
      for split in json.loads(description.read_text())['splits']
    }
  for split, lengths in splits.items():
    files = len(list(source.glob(f'{NAME}-{split}.tfrecord-*')))
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


def convert(from_tfrecord: Path, data_dir: Path, *, stand_in: bool) -> None:
  """Converts a TFRecord copy of tfds.

  Raises:
    UserError: if the copy is unusable, or the disk too small.
  """
  source, num_images = check_tfrecord(from_tfrecord, stand_in=stand_in)
  size = sum(path.stat().st_size for path in source.glob('*.tfrecord-*'))
  check_space(
    data_dir, size, SPACE_OVER_TFRECORD, num_images, CONVERTED_PER_SECOND
  )
  print(f'{source}: converting TFRecord to ArrayRecord', flush=True)
  target = data_dir / NAME / CONVERTING
  with errors_in_one_line(
    f'{source}: conversion to --data_dir={data_dir} failed, and its output '
    'is removed',
    'Run the same command again; if that fails as well, copy it again.',
  ):
    write_converted(target, source)
  target.rename(data_dir / NAME / VERSION)


def write_converted(target: Path, source: Path) -> None:
  """Writes the TFRecord copy in `source` as ArrayRecord to `target`."""
  from tensorflow_datasets.scripts.cli import convert_format_utils

  # With an output folder tfds miscounts, as it counts the files of the input
  # folder. So `target` is both: it holds links to the TFRecord files meanwhile.
  target.mkdir(parents=True)
  for path in source.iterdir():
    if '.tfrecord-' in path.name:
      (target / path.name).symlink_to(path)
    else:
      shutil.copyfile(path, target / path.name)
  convert_format_utils.convert_dataset(
    out_dir=None,
    out_file_format='array_record',
    dataset_version_dir=str(target),
    num_workers=1,  # With more workers tfds loses their errors.
  )
  for link in target.glob('*.tfrecord-*'):
    link.unlink()
  description = target / 'dataset_info.json'
  info = json.loads(description.read_text())
  info.pop('alternativeFileFormats')
  description.write_text(json.dumps({**info, 'fileFormat': 'array_record'}))


def again(version_dir: Path) -> str:
  """What to do about a copy that is damaged or incomplete."""
  return (
    f'Copy it again, or delete {version_dir} and run the same command again.'
  )


def verify(version_dir: Path, *, stand_in: bool) -> str:
  """Reads every example of a prepared copy; returns a summary.

  Raises:
    UserError: if files are damaged, or examples or classes missing or repeated.
  """
  shards = read_description(version_dir)
  require_open_shards(sum(map(len, shards.values())))
  for lengths in shards.values():
    check_shards(lengths, again(version_dir))
  summary, digests = [], {}
  for split, expected in NUM_EXAMPLES.items():
    digests[split], num_classes = read_split(version_dir, split, shards[split])
    count = len(digests[split])
    found = f'{count:,} {split} images of {num_classes:,} classes'
    if not stand_in and (count, num_classes) != (expected, NUM_CLASSES):
      raise UserError(
        f'{version_dir}: {found}, not {expected:,} of {NUM_CLASSES:,}. '
        f'{again(version_dir)}'
      )
    summary.append(found)
  check_repeated(version_dir, **digests)
  return f'{version_dir}: {", ".join(summary)}'


def read_description(version_dir: Path) -> dict[str, dict[Path, int]]:
  """Returns the number of records of each shard, by split.

  Raises:
    UserError: if the description is damaged, or its classes or splits wrong.
  """
  import tensorflow_datasets as tfds

  advice = again(version_dir)
  with errors_in_one_line(f'{version_dir}: cannot be read', advice):
    info = tfds.builder(
      NAME, data_dir=version_dir.parents[1], file_format='array_record'
    ).info
    class_names, splits = info.features['label'].names, info.splits
  if class_names != synsets():
    raise UserError(f'{version_dir}: has other classes. {advice}')
  for split in NUM_EXAMPLES:
    if split not in splits:
      raise UserError(f'{version_dir}: has no {split} images. {advice}')
  return {
    split: {
      Path(path): int(length)
      for path, length in zip(
        splits[split].filepaths, splits[split].shard_lengths, strict=True
      )
    }
    for split in NUM_EXAMPLES
  }


def read_split(
  version_dir: Path, split: str, shards: dict[Path, int]
) -> tuple[list[int], int]:
  """Reads every example of a split, as training does.

  Returns:
    The `digest` of each image, and the number of classes.

  Raises:
    UserError: if a shard is damaged, an image empty or a name not unique.
  """
  advice = again(version_dir)
  with errors_in_one_line(f'{version_dir}: cannot be read', advice):
    source = EncodedExamples(NAME, split, version_dir.parents[1])
  # The shard of each example.
  paths = [path for path, length in shards.items() for _ in range(length)]
  images: list[int] = []
  names, labels = set(), set()
  for index, path in enumerate(progress(paths, len(paths), f'reading {split}')):
    with errors_in_one_line(f'{path}: damaged', advice):
      example = source[index]
    if not example['image']:
      raise UserError(f'{version_dir}: {split} {index} is empty. {advice}')
    images.append(digest(example['image']))
    names.add(digest(example['file_name']))
    labels.add(int(example['label']))
  if len(names) != len(paths):
    raise UserError(
      f'{version_dir}: {len(paths):,} {split} images have {len(names):,} '
      f'different names; each needs its own. {advice}'
    )
  return images, len(labels)


def digest(content: bytes | str) -> int:
  """Returns 64 bits of a hash: 1.3 million collide with probability 5e-8."""
  raw = content.encode() if isinstance(content, str) else content
  return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), 'little')


def check_repeated(
  version_dir: Path, train: Sequence[int], validation: Sequence[int]
) -> None:
  """Refuses a copy with more repeated images than ImageNet itself has.

  Args:
    version_dir: folder of the copy.
    train: digest of each training image.
    validation: digest of each validation image.

  Raises:
    UserError: if too many images repeat others.
  """

  def num_repeated(images: Sequence[int]) -> int:
    return len(images) - len(set(images))

  known = set(train)
  in_both = sum(image in known for image in validation)
  for split, total, count, relation in (
    ('validation', len(validation), in_both, 'are training images as well'),
    ('validation', len(validation), num_repeated(validation), 'repeat others'),
    ('train', len(train), num_repeated(train), 'repeat others'),
  ):
    most = int(MAX_REPEATED * total)
    if count > most:
      raise UserError(
        f'{version_dir}: {count:,} of {total:,} {split} images {relation}, '
        f'byte for byte; expected at most {most:,}. Delete it, and prepare it '
        'from the archives of image-net.org.'
      )


def run(flags: argparse.Namespace) -> None:
  """Prepares or converts a copy unless there is one, and verifies it.

  Raises:
    UserError: with the first problem.
  """
  data_dir = files.expand('--data_dir', flags.data_dir)
  source = (
    files.expand('--manual_dir', flags.manual_dir)
    if flags.from_tfrecord is None
    else files.expand('--from_tfrecord', flags.from_tfrecord)
  )
  if not source.is_dir():
    raise UserError(f'{source}: no such folder.')
  if not flags.stand_in:  # Fails now rather than after hours.
    require_open_shards(NUM_SHARDS)
  with locked(data_dir), no_leftovers(data_dir / NAME):
    version_dir = data_dir / NAME / VERSION
    if any(version_dir.glob(f'{NAME}-train.tfrecord-*')):
      raise UserError(
        f'--data_dir={data_dir}: contains a TFRecord copy. Convert it with '
        f'--from_tfrecord={data_dir} and another --data_dir.'
      )
    if version_dir.is_dir():
      if not (version_dir / 'dataset_info.json').is_file():
        raise UserError(
          f'{version_dir}: incomplete, as it has no dataset_info.json. '
          f'{again(version_dir)}'
        )
      print(f'{version_dir}: prepared already', flush=True)
    elif flags.from_tfrecord:
      convert(source, data_dir, stand_in=flags.stand_in)
    else:
      prepare(data_dir, source, stand_in=flags.stand_in)
    print(verify(version_dir, stand_in=flags.stand_in))


@contextlib.contextmanager
def no_leftovers(folder: Path) -> Iterator[None]:
  """Removes incomplete output, of an earlier run and, at the end, of this one.

  tfds removes its own folder as well, but not if a signal arrives just after
  the folder has been created.
  """

  def remove(*, ignore_errors: bool) -> None:
    for leftover in (*folder.glob('incomplete.*'), *folder.glob(CONVERTING)):
      shutil.rmtree(leftover, ignore_errors)

  remove(ignore_errors=False)
  try:
    yield
  finally:
    remove(ignore_errors=True)


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
  """Creates a folder and locks it against other preparations.

  Raises:
    UserError: if the folder cannot be written or another process holds it.
  """
  try:
    data_dir.mkdir(parents=True, exist_ok=True)
    file = (data_dir / f'.{NAME}.lock').open('w')
  except FileExistsError as error:
    raise UserError(
      f'--data_dir={data_dir}: is a file. Choose a folder.'
    ) from error
  except OSError as error:
    raise UserError(
      f'--data_dir={data_dir}: cannot be written ({error.strerror}). Choose a '
      'folder that is yours, on a disk with space.'
    ) from error
  with file:
    if not files.lock(file):
      raise UserError(f'--data_dir={data_dir}: another process prepares it.')
    yield


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = argparse.ArgumentParser(
    prog='bash scripts/prepare_imagenet.sh',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  sources = parser.add_mutually_exclusive_group(required=True)
  sources.add_argument(
    '--manual_dir', metavar='DIR', help='folder of the archives'
  )
  sources.add_argument(
    '--from_tfrecord', metavar='DIR', help='data_dir of a TFRecord copy'
  )
  parser.add_argument(
    '--data_dir', required=True, metavar='DIR', help='output folder'
  )
  parser.add_argument(
    '--stand_in',
    action='store_true',
    help='accept any number of images and classes',
  )
  flags = parser.parse_args(argv)
  # The warnings of tfds and Beam concern intended settings.
  logging.disable(logging.WARNING)
  with recorded_interruption() as interrupted:
    try:
      run(flags)
      return 0
    except (UserError, OSError) as error:
      problem = str(error)
    except KeyboardInterrupt:
      pass
  if interrupted.is_set():
    problem = (
      'interrupted, and incomplete output is removed. Run the same command '
      'again.'
    )
  # Outside the handlers: the exception, which holds the progress bars, is gone.
  print(f'error: {problem}', file=sys.stderr)
  return 1


if __name__ == '__main__':
  streams.guard()
  streams.make_output_optional()
  sys.exit(main())
