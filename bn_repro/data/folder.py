"""Image files in a folder for each class.

The files are `CLASS/*`, or `train/CLASS/*` and `validation/CLASS/*`; names that
begin with a dot are left out. Labels and the order of files follow from their
names, on every file system.
"""

import collections
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any
import zlib

from ml_collections import ConfigDict
import numpy as np

from bn_repro import files
from bn_repro.data import crops, jpeg
from bn_repro.data.encoded_split import EncodedSplit
from bn_repro.data.split import Dataset, shuffled_order
from bn_repro.errors import UserError

# Bytes from the middle of each file that its key contains. Our choice.
_SAMPLE_SIZE = 4096
# Threads that read them, which wait for a network file system. Our choice.
_NUM_THREADS = 16


@dataclasses.dataclass(frozen=True)
class _Files(Sequence[Mapping[str, Any]]):
  """Examples of a split by index, read on demand.

  Attributes:
    folder: folder of the classes.
    names: `CLASS/FILE` of each example.
    labels: int32 (examples,).
  """

  folder: Path
  names: Sequence[str]
  labels: np.ndarray

  def __len__(self) -> int:
    return len(self.names)

  def __getitem__(self, index: Any) -> Any:
    return {
      'image': (self.folder / self.names[index]).read_bytes(),
      'label': self.labels[index],
      'file_name': self.names[index],
    }

  def key(self, index: int) -> tuple[int, int]:
    """The size of a file and the CRC-32 of the middle of its content."""
    with (self.folder / self.names[index]).open('rb') as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(max(size - _SAMPLE_SIZE, 0) // 2)
      return size, zlib.crc32(file.read(_SAMPLE_SIZE))


def load(data: ConfigDict) -> Dataset:
  """Opens the images in `data.data_dir`; the classes are the folders.

  Args:
    data: the `data` sub-tree of a config.

  Raises:
    UserError: if folders are missing, empty, or contain other things; if an
      image is in two classes or in both splits.
  """
  jpeg.load_turbojpeg()
  root = files.expand_data_dir(
    data.data_dir,
    'data.name=folder needs the folder of the images. Pass '
    '--config.data.data_dir=FOLDER.',
  )
  try:
    found = _folders(root)
    folders = {'train': root}
    if found in (['train'], ['train', 'validation']):
      folders = {split: root / split for split in found}
    classes = _folders(folders['train'])
    sources = {
      split: _list_files(folder, classes) for split, folder in folders.items()
    }
    keys = {split: _keys(source) for split, source in sources.items()}
    _check_copies(sources, keys, holdout=data.holdout)
  except OSError as error:
    raise _unreadable(root, error) from error
  return Dataset(
    classes,
    {
      split: _split(split, source, keys[split], data, as_shown=True)
      for split, source in sources.items()
    },
  )


def open_split(
  name: str,
  folder: Path,
  classes: Sequence[str],
  data: ConfigDict,
  *,
  as_shown: bool,
) -> EncodedSplit:
  """Opens the images of one split.

  Args:
    name: of the split.
    folder: folder of the classes.
    classes: names of the folders in `folder`, by label.
    data: the `data` sub-tree of a config.
    as_shown: see `jpeg.decode_view`.

  Raises:
    UserError: if there are other folders, or one is empty.
  """
  try:
    source = _list_files(folder, classes)
    return _split(name, source, _keys(source), data, as_shown=as_shown)
  except OSError as error:
    raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: OSError) -> UserError:
  return UserError(
    f'{error.filename or folder}: cannot be read ({error.strerror}). Check the '
    'folder, its permissions and the disk.'
  )


def _split(
  name: str,
  source: _Files,
  keys: Sequence[tuple[int, int]],
  data: ConfigDict,
  *,
  as_shown: bool,
) -> EncodedSplit:
  # Mixes the classes, as preparing a data set in shards does.
  order = shuffled_order(len(source))
  return EncodedSplit(
    source=source,
    indices=order,
    labels=source.labels[order],
    num_classes=int(source.labels.max()) + 1,
    image_size=data.image_size,
    num_threads=data.num_threads,
    evaluation_box=crops.EVALUATION_BOXES[data.evaluation_box],
    as_shown=as_shown,
    identity=_identity(name, source, keys),
  )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
  """What a folder contains and does not hide, by name."""
  with os.scandir(folder) as entries:
    shown = [entry for entry in entries if not entry.name.startswith('.')]
  return sorted(shown, key=lambda entry: entry.name)


def _folders(folder: Path) -> list[str]:
  return [entry.name for entry in _entries(folder) if entry.is_dir()]


def _list_files(folder: Path, classes: Sequence[str]) -> _Files:
  """Lists the files of each class, in the order of their names.

  Args:
    folder: folder of the classes of a split.
    classes: names of the classes by label, those of `train`.

  Raises:
    UserError: if there are fewer than two classes, or other ones; if one is
      empty, contains a folder, or has a name that cannot be printed.
  """
  found = _folders(folder)
  if len(classes) < 2:
    raise UserError(
      f'{folder}: the number of folders is {len(classes)}, and at least two '
      'classes are needed. Put the images of each into a folder of its own.'
    )
  if set(found) != set(classes):
    name = sorted(set(found) ^ set(classes))[0]
    where = 'is not one of the classes' if name in found else 'is missing'
    raise UserError(
      f'{folder}: the folder {name} {where}. Every split needs the same '
      'classes.'
    )
  names, labels = [], []
  for label, name in enumerate(classes):
    entries = _entries(folder / name)
    inner = [entry.name for entry in entries if entry.is_dir()]
    if inner or not entries:
      problem = f'contains the folder {inner[0]}' if inner else 'is empty'
      raise UserError(
        f'{folder / name}: {problem}. The folder of a class must contain its '
        'images and nothing else; folders of splits are named train and '
        'validation.'
      )
    if not name.isprintable():
      raise UserError(
        f'{folder / name}: rename it; a class needs a readable name.'
      )
    names += [f'{name}/{entry.name}' for entry in entries]
    labels += [label] * len(entries)
  return _Files(folder, names, np.array(labels, np.int32))


def _keys(source: _Files) -> list[tuple[int, int]]:
  with ThreadPoolExecutor(_NUM_THREADS) as pool:
    return list(pool.map(source.key, range(len(source))))


def _check_copies(
  sources: Mapping[str, _Files],
  keys: Mapping[str, Sequence[tuple[int, int]]],
  *,
  holdout: int,
) -> None:
  """Refuses an image in two classes, or in training and validation.

  Only files with the same key are read as a whole.

  Args:
    sources: the files of each split.
    keys: their keys.
    holdout: number of training images that will be set aside. If there are
      any, no image may be there twice: the copy could be set aside.

  Raises:
    UserError: if there are such images.
  """
  alike = collections.defaultdict(list)
  for split, of_split in keys.items():
    for index, key in enumerate(of_split):
      alike[key].append((split, index))
  originals: dict[bytes, Any] = {}
  copies = []
  for places in alike.values():
    for split, index in places if len(places) > 1 else ():
      source = sources[split]
      path, here = (
        source.folder / source.names[index],
        (split, source.labels[index]),
      )
      digest = hashlib.sha256(path.read_bytes()).digest()
      original, there = originals.setdefault(digest, (path, here))
      is_allowed = here == there and not (holdout and split == 'train')
      if path != original and not is_allowed:
        copies.append((path, original))
  if copies:
    path, original = copies[0]
    raise UserError(
      f'{path}: the same image as {original} ({len(copies)} such files). An '
      'image must have one class and be in one split. Delete one of the two.'
    )


def _identity(
  split: str, source: _Files, keys: Sequence[tuple[int, int]]
) -> str:
  """Text that changes with the name, label or key of any file.

  To read all files at every start would take minutes for a large folder.
  """
  crc = 0
  for name, key in zip(source.names, keys, strict=True):
    crc = zlib.crc32(os.fsencode(f'{name} {key}\n'), crc)
  return f'{split} {len(source)} {crc:08x}'
