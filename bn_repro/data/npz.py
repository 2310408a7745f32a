"""Images in a file of NumPy arrays, from `numpy.savez`.

`images` are uint8 (n, height, width) or (n, height, width, channels), with 1 or
3 channels, and `labels` are integers (n,). Optional are `test_images` and
`test_labels`, the split `test`, and `label_names`, the name of each label.
"""

from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict
import numpy as np

from bn_repro import files
from bn_repro.data.split import ArraySplit, Dataset
from bn_repro.errors import UserError

_KEYS = ('images', 'labels', 'label_names', 'test_images', 'test_labels')


def load(data: ConfigDict) -> Dataset:
  """Loads the file that `data.data_dir` names.

  Args:
    data: the `data` sub-tree of a config.

  Raises:
    UserError: if the file is missing, damaged or needs pickle; if its arrays
      have other names, types, shapes or values.
  """
  path = files.expand_data_dir(
    data.data_dir,
    'data.name=npz needs a file. Pass --config.data.data_dir=FILE.npz.',
  )
  arrays = _read(path)
  try:
    splits = {'train': _split(arrays, 'images', 'labels')}
    if 'test_images' in arrays or 'test_labels' in arrays:
      splits['test'] = _split(arrays, 'test_images', 'test_labels')
      shapes = [split.image_shape for split in splits.values()]
      if shapes[0] != shapes[1]:
        raise ValueError(
          f'test_images have the shape {shapes[1]}, not {shapes[0]}'
        )
    names = _label_names(arrays, splits['train'].labels)
  except ValueError as error:
    raise UserError(
      f'{path}: {error}. Write it with numpy.savez(FILE, images=..., '
      'labels=...); docs/data.md describes the arrays.'
    ) from error
  return Dataset(names, splits)


def _read(path: Path) -> Mapping[str, np.ndarray]:
  try:
    with path.open('rb') as file:
      archive = np.load(file, allow_pickle=False)
      if isinstance(archive, np.ndarray):
        raise ValueError('a single array')
      return dict(archive)
  except OSError as error:
    raise UserError(
      f'{path}: cannot be read ({error.strerror}). config.data.data_dir must '
      'name a file from numpy.savez.'
    ) from error
  # Damaged archives raise errors of zipfile, of zlib and of NumPy.
  except Exception as error:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    if 'pickle' in reason:  # NumPy would advise to allow it.
      reason = 'no archive, or one with objects that need pickle'
    raise UserError(
      f'{path}: not a sound file from numpy.savez ({reason}).'
    ) from error


def _split(
  arrays: Mapping[str, np.ndarray], images_key: str, labels_key: str
) -> ArraySplit:
  """Returns a split of the file.

  Raises:
    ValueError: if its arrays are missing or have other types or shapes.
  """
  unknown = sorted(arrays.keys() - set(_KEYS))
  missing = [key for key in (images_key, labels_key) if key not in arrays]
  if unknown or missing:
    problem = f'unknown array {unknown[0]}' if unknown else f'no {missing[0]}'
    raise ValueError(f'{problem}; the arrays are called {", ".join(_KEYS)}')
  images, labels = arrays[images_key], arrays[labels_key]
  if images.dtype != np.uint8:
    raise ValueError(f'{images_key} are {images.dtype}, not uint8')
  if images.ndim == 3:
    images = images[..., None]
  if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
    raise ValueError(
      f'{images_key} have the shape {arrays[images_key].shape}, not (n, '
      'height, width) or (n, height, width, 1 or 3)'
    )
  if labels.dtype.kind not in 'iu':
    raise ValueError(f'{labels_key} are {labels.dtype}, not integers')
  if labels.shape != images.shape[:1]:
    raise ValueError(
      f'{labels_key} have the shape {labels.shape}, not ({len(images)},)'
    )
  # A label that has no class must not become one in 32 bits.
  labels = np.clip(labels.astype(np.int64), -(2**31), 2**31 - 1)
  return ArraySplit(images, labels.astype(np.int32))


def _label_names(
  arrays: Mapping[str, np.ndarray], labels: np.ndarray
) -> list[str]:
  """Returns the names in the file, or the labels themselves.

  Raises:
    ValueError: if the names are not as they should be, or if without names a
      label below the largest has no images.
  """
  if 'label_names' in arrays:
    names = arrays['label_names']
    if names.ndim != 1 or names.dtype.kind != 'U':
      raise ValueError(
        f'label_names are {names.dtype} {names.shape}, not a list of strings'
      )
    if len(set(names)) < len(names):
      raise ValueError('label_names has a name twice')
    found = names.tolist()
  else:
    unique = np.unique(labels)
    for expected, label in enumerate(unique):
      if label != expected:
        raise ValueError(
          f'labels has {label} but no {expected}; labels are 0, 1, ... without '
          'gaps, unless the file has label_names'
        )
    found = [str(label) for label in unique]
  if len(found) < 2:
    raise ValueError('at least two classes are needed')
  return found
