"""Facts about ImageNet (ILSVRC2012).

At import this module needs the standard library alone. The lists are read from
the files of the package tensorflow-datasets, without importing it.
"""

import importlib.util
from pathlib import Path
import runpy

# The name in tfds and in `data.name`.
NAME = 'imagenet2012'
# The `data.name` of a small copy from `scripts/make_stand_in.py`, which has any
# number of images and classes. On disk it is called `NAME`.
STAND_IN = 'imagenet_stand_in'
# The builder's version in tfds 4.9.10.
VERSION = '5.1.0'
NUM_EXAMPLES = {'train': 1_281_167, 'validation': 50_000}
NUM_CLASSES = 1_000


def shard_path(folder: Path, split: str, shard: int, num_shards: int) -> Path:
  """Returns the file of shard `shard`, from 0, in the folder of a copy."""
  name = f'{NAME}-{split}.array_record'
  return folder / f'{name}-{shard:05}-of-{num_shards:05}'


def synsets() -> list[str]:
  """The WordNet id of each label, such as n01440764."""
  return _lines('labels.txt')


def validation_synsets() -> list[str]:
  """The WordNet id of each validation image, in the order of their numbers."""
  return _lines('validation_labels.txt')


def validation_number(name: str) -> int | None:
  """The number of a validation image, from 1; None if it is not one.

  Args:
    name: file name, such as ILSVRC2012_val_00000001.JPEG.
  """
  stem = name.removesuffix('.JPEG')
  number = stem.removeprefix('ILSVRC2012_val_')
  if number == stem or not number.isdecimal():
    return None
  found = int(number)
  return found if 1 <= found <= NUM_EXAMPLES['validation'] else None


def class_names() -> list[str]:
  """The English name of each label, such as tench."""
  names = runpy.run_path(str(_package() / 'siscore' / 'labels.py'))
  return [name.split(',')[0] for name in names['IMAGENET_LABELS_LIST']]


def _lines(name: str) -> list[str]:
  return (_package() / NAME / name).read_text().split()


def _package() -> Path:
  """The folder of tensorflow-datasets that describes data sets."""
  package = importlib.util.find_spec('tensorflow_datasets')
  assert package is not None and package.submodule_search_locations
  return Path(package.submodule_search_locations[0]) / 'datasets'
