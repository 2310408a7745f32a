"""Computes class probabilities over crops, for every image of a split.

While a file is computed, `FILE.partial` collects the images that are done, so
that an interrupted command resumes.
"""

import collections
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
import contextlib
import functools
import json
from pathlib import Path
import tempfile
import time
from typing import IO, Any
import zlib

import numpy as np

from bn_repro import files
from bn_repro.data.split import Split
from bn_repro.errors import UserError
from bn_repro.inference import crops as crops_lib
from bn_repro.inference import probabilities
from bn_repro.inference.probabilities import Probabilities
from bn_repro.runtime.progress import ImageProgress
from bn_repro.training import metrics

# Takes uint8 (batch, height, width, channels); returns class probabilities,
# float32 (batch, classes), as any array.
Predict = Callable[[np.ndarray], Any]

# Crops that the network takes at once, a third of 144. Our choice: with
# Inception on a CPU the process then needs 1.2 GB.
BATCH_SIZE = 48
# Threads that decode and crop images. Each has 144 crops, 22 MB, in memory. Our
# choice.
_MAX_THREADS = 8
# Facts on which the probabilities do not depend.
_NAMES = ('model', 'data_name', 'label_names', 'replaced_examples')


def compute(
  predict: Predict,
  split: Split,
  facts: Mapping[str, Any],
  image_shape: tuple[int, int, int],
  path: Path | None,
  *,
  num_threads: int,
  max_replaced: float,
) -> Probabilities:
  """Computes the probabilities of every image of a split, once and in order.

  Args:
    predict: the network.
    split: the images.
    facts: those of `Probabilities`.
    image_shape: (height, width, channels) of the network's images.
    path: the file to write, and to resume; None writes none.
    num_threads: number of threads that decode and crop images.
    max_replaced: largest fraction of images that may be undecodable.

  Raises:
    UserError: if `path` has other probabilities or cannot be written, if the
      network yields no probabilities, or if too many images are undecodable.
    RuntimeError: if the number of images computed is wrong.
  """
  name = facts['split']
  if path is not None and path.exists():
    found = probabilities.read(path)
    _check_facts(path, found.facts, facts)
    _partial(path).unlink(missing_ok=True)
    print(f'{path}: complete, nothing to compute')
    return found
  group = _group_size(facts['crops'])
  with (
    _explain_system_errors(path),
    _open_partial(path, facts, group, len(split)) as (file, records),
    ImageProgress(name, len(records), len(split)) as progress,
  ):
    done, replaced = len(records), int(records['replaced'].sum())
    groups = [
      np.arange(first, min(first + group, len(split)))
      for first in range(done, len(split), group)
    ]
    load = functools.partial(_load, split, facts['crops'], image_shape)
    threads = min(num_threads, _MAX_THREADS)
    with contextlib.closing(_load_ahead(load, groups, threads)) as loaded:
      for indices in groups:
        asked_at = time.monotonic()
        views, labels, is_replaced = next(loaded)
        waited = time.monotonic() - asked_at
        new = np.zeros(len(indices), records.dtype)
        new['probabilities'] = _averages(predict, views, facts['crops'])
        new['label'], new['replaced'] = labels, is_replaced
        new['crc'] = _checksums(new)
        if not probabilities.are_distributions(new['probabilities']).all():
          raise UserError(
            f'{facts["model"]}: its probabilities of {name} image {done} or '
            'later are not finite. Has its training diverged?'
          )
        replaced += int(new['replaced'].sum())
        metrics.check_replaced(
          metrics.Sums(replaced=replaced, count=len(split)),
          max_replaced,
          f'{name} images',
        )
        file.write(new.tobytes())
        file.flush()
        done += len(new)
        progress.show(done, waited)
    records = _read_records(file, records.dtype)
    if len(records) != len(split):
      raise RuntimeError(
        f'{name}: computed {len(records)} images, not {len(split)}'
      )
    content = Probabilities(
      np.ascontiguousarray(records['probabilities']),
      np.ascontiguousarray(records['label']),
      {**facts, **({'replaced_examples': replaced} if replaced else {})},
    )
    if path is not None:
      probabilities.write(path, content)
      _partial(path).unlink()
  return content


def _group_size(crops: int) -> int:
  """Images whose crops are computed together."""
  return max(BATCH_SIZE // crops, 1)


def _load(
  split: Split,
  crops: int,
  image_shape: tuple[int, int, int],
  indices: np.ndarray,
) -> tuple[np.ndarray, Any, Any]:
  """Decodes and crops images.

  Returns:
    The crops, uint8 (images * crops, *image_shape), and of each image its label
    and whether it was replaced.
  """
  size, _, channels = image_shape
  if crops == 1:
    batch = split.evaluation_batch(indices)
    views = crops_lib.convert_channels(batch['image'], channels)
    return views, batch['label'], batch['replaced']
  # A JPEG whose shorter side is at least twice the largest one is decoded at a
  # smaller scale. In two photographs this changed pixels by 0.6 to 1.8 of 255
  # on average; most images of ImageNet are smaller.
  largest = crops_lib.shorter_sides(crops, size)[-1]
  examples = [split.whole_image(int(index), largest) for index in indices]
  images = (
    crops_lib.convert_channels(example.pixels, channels) for example in examples
  )
  views = np.concatenate([crops_lib.views(x, crops, size) for x in images])
  return views, [x.label for x in examples], [x.replaced for x in examples]


def _load_ahead(
  load: Callable[[np.ndarray], Any],
  groups: Iterable[np.ndarray],
  num_threads: int,
) -> Generator[Any]:
  """Yields `load(group)` in order, while threads load the next groups."""
  loading: collections.deque[Future[Any]] = collections.deque()
  pool = ThreadPoolExecutor(num_threads, thread_name_prefix='load')
  try:
    for group in groups:
      loading.append(pool.submit(load, group))
      if len(loading) > num_threads:
        yield loading.popleft().result()
    while loading:
      yield loading.popleft().result()
  finally:
    pool.shutdown(cancel_futures=True)


def _averages(predict: Predict, views: np.ndarray, crops: int) -> np.ndarray:
  """Averages the probabilities over the crops of each image.

  Every batch has the same size, for which the network is compiled: the last
  one is padded.
  """
  size = min(BATCH_SIZE, _group_size(crops) * crops)
  padding = -len(views) % size
  padded = np.pad(views, [(0, padding), (0, 0), (0, 0), (0, 0)])
  # The network may still compute a batch while it gets the next one.
  batches = [predict(x) for x in np.split(padded, len(padded) // size)]
  rows = np.concatenate([np.asarray(x) for x in batches])[: len(views)]
  return rows.reshape(-1, crops, rows.shape[-1]).mean(1, dtype=np.float64)


def _partial(path: Path) -> Path:
  return path.with_name(f'{path.name}.partial')


@contextlib.contextmanager
def _open_partial(
  path: Path | None, facts: Mapping[str, Any], group: int, total: int
) -> Iterator[tuple[IO[bytes], np.ndarray]]:
  """Opens the file of finished images for appending.

  The file begins with a line of JSON, the facts. Then each image has a record.
  Records are flushed but not synchronized: after a power failure parts of the
  last ones may be missing, and they are computed again. So are those of a group
  that is not complete, because a result may depend on its place in a batch.

  Args:
    path: the file to compute; None for a temporary one.
    facts: those of `Probabilities`.
    group: number of images that are appended at once.
    total: number of images of the split.

  Yields:
    The file, and the records of the images that are done.

  Raises:
    UserError: if the file has other facts, or another process appends to it.
  """
  dtype = np.dtype(
    [
      ('probabilities', '<f4', (len(facts['label_names']),)),
      ('label', '<i4'),
      ('replaced', '<i4'),
      ('crc', '<u4'),
    ]
  )
  header = json.dumps(facts).encode() + b'\n'
  if path is None:
    with tempfile.TemporaryFile() as file:
      file.write(header)
      yield file, np.empty(0, dtype)
    return
  partial = _partial(path)
  partial.parent.mkdir(parents=True, exist_ok=True)
  with partial.open('a+b') as file:
    if not files.lock(file):
      raise UserError(f'{partial}: another process is computing it.')
    file.seek(0)
    found = file.readline()
    if header.startswith(found) and found != header:  # New, or cut by a kill.
      file.truncate(0)
      file.write(header)
      file.flush()
    elif found != header:
      _check_facts(partial, _parse(found), facts)
      header = found
    records = _read_records(file, dtype)
    valid = records['crc'] == _checksums(records)
    count = len(valid) if valid.all() else int(valid.argmin())
    if count < total:
      count -= count % group
    file.truncate(len(header) + count * dtype.itemsize)
    yield file, records[:count]


def _parse(header: bytes) -> Mapping[str, Any]:
  """The facts of a header; none if it is that of another file."""
  try:
    found = json.loads(header)
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}


def _read_records(file: IO[bytes], dtype: np.dtype) -> np.ndarray:
  """Reads the complete records behind the header."""
  file.seek(0)
  file.readline()
  content = file.read()
  return np.frombuffer(content, dtype, len(content) // dtype.itemsize)


def _checksums(records: np.ndarray) -> np.ndarray:
  """The CRC-32 of each record without its own, uint32 (records,)."""
  content = records.copy()
  content['crc'] = 0
  return np.array([zlib.crc32(x.tobytes()) for x in content], np.uint32)


def _check_facts(
  path: Path, found: Mapping[str, Any], facts: Mapping[str, Any]
) -> None:
  """Raises UserError if a file has the facts of other probabilities."""
  differences = [
    f'{name}: {found.get(name)} -> {value}'
    for name, value in facts.items()
    if name not in _NAMES and found.get(name) != value
  ]
  if differences:
    raise UserError(
      f'{path}: holds other probabilities ({"; ".join(differences)}). Delete '
      'it, or name another file with --save_probabilities.'
    )


@contextlib.contextmanager
def _explain_system_errors(path: Path | None) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise UserError(
      f'{path or tempfile.gettempdir()}: cannot be written '
      f'({error.strerror or error}). Free some space or change its '
      'permissions, and run the command again: it resumes.'
    ) from error
