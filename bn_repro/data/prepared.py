"""Data sets that TensorFlow Datasets (tfds) has prepared as ArrayRecord.

This module is shared with `scripts/prepare_imagenet.py`, whose environment is
another one: at import it needs the standard library alone.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
import os
from pathlib import Path
from typing import Any

from bn_repro.errors import UserError, require_open_files

# Files that a process opens beside the shards. Our choice.
_OTHER_FILES = 400


def default_dir() -> Path:
  """Where tfds keeps data sets by default; with a `~` if there is no home."""
  return Path(os.path.expanduser('~/tensorflow_datasets'))


def require_open_shards(count: int) -> None:
  """Raises the limit of open files: ArrayRecord keeps each shard open.

  Raises:
    UserError: if the system does not allow `count` open shards.
  """
  require_open_files(count + _OTHER_FILES)


def check_shards(lengths: Mapping[Path, int], advice: str) -> None:
  """Opens every shard and compares its number of records.

  Args:
    lengths: expected number of records of each file.
    advice: what to do about a damaged file.

  Raises:
    UserError: if a shard is missing or damaged, or has another length.
  """
  from array_record.python import array_record_module

  def problem(path: Path) -> str | None:
    if not path.is_file():
      return f'{path}: missing'
    try:
      path.open('rb').close()
    except OSError as error:
      raise UserError(
        f'{path}: cannot be read ({error.strerror}). Check its permissions, '
        'and the disk.'
      ) from error
    try:
      reader = array_record_module.ArrayRecordReader(str(path))
      found = reader.num_records()
      reader.close()
    except Exception as error:
      return f'{path}: damaged ({" ".join(str(error).split())})'
    if found != lengths[path]:
      return f'{path}: {found} images, not {lengths[path]}'
    return None

  with ThreadPoolExecutor(16) as pool:
    problems = [p for p in pool.map(problem, lengths) if p]
  if problems:
    count = f'; {len(problems)} shards are unusable' if problems[1:] else ''
    raise UserError(f'{problems[0]}{count}. {advice}')


class EncodedExamples(Sequence[Mapping[str, Any]]):
  """Examples of a split by index; their images stay encoded.

  Each is a dict of `image` and `file_name` (bytes) and `label` (int).
  """

  def __init__(self, name: str, split: str, data_dir: Path):
    """Opens a split for random access.

    Args:
      name: name of the data set.
      split: name of the split.
      data_dir: folder that tfds prepared it in.
    """
    import tensorflow_datasets as tfds  # Takes a second to import.

    # To decode examples itself, tfds would take 70 microseconds each.
    self._records = tfds.data_source(
      name,
      split=split,
      data_dir=data_dir,
      download=False,
      deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
    )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: Any) -> Any:
    from tensorflow_datasets.proto import tf_example_pb2

    if not 0 <= index < len(self):
      raise IndexError(index)  # Ends a loop; ArrayRecord raises ValueError.
    example = tf_example_pb2.Example.FromString(self._records[index])
    feature = example.features.feature
    image, file_name = (
      feature[name].bytes_list.value[0] for name in ('image', 'file_name')
    )
    label = feature['label'].int64_list.value[0]
    return {'image': image, 'file_name': file_name, 'label': label}
