"""Facts of ImageNet (ILSVRC2012). Imports nothing that has to be installed.

The lists come with the package tensorflow-datasets and are read from its files.
"""

import importlib.util
from pathlib import Path
import runpy

NAME = 'imagenet2012'
NUM_EXAMPLES = {'train': 1_281_167, 'validation': 50_000}
NUM_CLASSES = 1_000


def synsets() -> list[str]:
  """The WordNet id of each label, such as n01440764."""
  return _lines('labels.txt')


def validation_synsets() -> list[str]:
  """The class of ILSVRC2012_val_00000001.JPEG and on."""
  return _lines('validation_labels.txt')


def words() -> list[str]:
  """A word for each label, such as tench."""
  names = runpy.run_path(str(_package() / 'siscore' / 'labels.py'))
  return [name.split(',')[0] for name in names['IMAGENET_LABELS_LIST']]


def _lines(name: str) -> list[str]:
  return (_package() / NAME / name).read_text().split()


def _package() -> Path:
  """The data sets of tensorflow-datasets, without importing it."""
  package = importlib.util.find_spec('tensorflow_datasets')
  assert package is not None and package.submodule_search_locations
  return Path(package.submodule_search_locations[0]) / 'datasets'
