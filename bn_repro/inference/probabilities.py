"""Class probabilities of every image of a split, and the file that holds them.

The probabilities of an image are averaged over its crops. A file holds those of
one network: an ensemble is an average over files (section 4.2.3). While it is
computed, `FILE.partial` collects the images that are done, so that an
interrupted command resumes.
"""

import collections
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
import contextlib
import dataclasses
import functools
import io
import json
from pathlib import Path
import tempfile
import time
from typing import IO, Any
import zipfile
import zlib

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn

from bn_repro import files
from bn_repro.data.split import Split
from bn_repro.errors import UserError
from bn_repro.inference import crops as crops_lib
from bn_repro.runtime import workdir
from bn_repro.runtime.progress import duration, terminal

# Takes uint8 (batch, height, width, channels); returns class probabilities,
# float32 (batch, classes), as any array.
Predict = Callable[[np.ndarray], Any]

# Crops that the network takes at once, a third of 144. Our choice: Inception
# needs 1 GB for them.
BATCH_SIZE = 48
# Threads that decode and crop images. Each has 144 crops, 22 MB, in memory. Our
# choice.
_MAX_THREADS = 8
# Seconds between lines of progress. Our choice.
_LINE_INTERVAL = 30.0
# Tolerance of the sum of an image's probabilities: float32, 1,000 classes.
_TOLERANCE = 1e-3

# The facts of a file, and their types.
_FACTS: Mapping[str, Any] = {
  'model_digest': str,
  'model': str,
  'statistics': str | None,
  'data_fingerprint': str,
  'data_name': str,
  'split': str,
  'crops': int,
  'label_names': list,
}
# Facts on which the probabilities do not depend.
_NAMES = ('model', 'data_name', 'label_names', 'replaced_examples')


@dataclasses.dataclass(frozen=True)
class Probabilities:
  """What a network computes for every image of a split, in order.

  Attributes:
    probabilities: float32 (images, classes).
    labels: int32 (images,).
    facts: a JSON object. `model_digest` identifies the network, and `model` is
      a name of it for people; `statistics` are those of BN (None without BN);
      then `data_fingerprint`, `data_name`, `split`, `crops` and `label_names`.
      Files of this version also have `image_size`, `evaluation_box` (None for
      several crops), and `replaced_examples` if any image could not be decoded.
  """

  probabilities: np.ndarray
  labels: np.ndarray
  facts: Mapping[str, Any]

  def metrics(self) -> dict[str, float | int]:
    """The means, as in a line of `metrics.jsonl`.

    Of equal probabilities the first class counts as the larger one. The loss of
    a probability of 0 is that of the smallest float32.
    """
    count = len(self.labels)
    labels = self.labels[:, None]
    own = np.take_along_axis(self.probabilities, labels, 1)
    is_before = np.arange(self.probabilities.shape[1]) < labels
    rank = (self.probabilities > own).sum(1)
    rank += ((self.probabilities == own) & is_before).sum(1)
    logs = np.log(own.clip(np.finfo(np.float32).tiny), dtype=np.float64)
    replaced = self.facts.get('replaced_examples')
    return {
      'loss': -float(logs.mean()),
      'accuracy': int((rank == 0).sum()) / count,
      'top5_accuracy': int((rank < 5).sum()) / count,
      'num_examples': count,
      **({'replaced_examples': replaced} if replaced else {}),
    }


def write(path: Path, content: Probabilities) -> None:
  """Writes a file atomically, as an uncompressed npz."""
  buffer = io.BytesIO()
  np.savez(
    buffer,
    probabilities=content.probabilities,
    labels=content.labels,
    facts=np.array(json.dumps(content.facts)),
  )
  workdir.replace_file(path, buffer.getvalue())


def read(path: Path) -> Probabilities:
  """Reads a file that `write` has written.

  Raises:
    UserError: if it does not exist, or is damaged or another file.
  """
  try:
    with path.open('rb') as raw:
      if not zipfile.is_zipfile(raw):
        raise ValueError('it is no npz archive')
      raw.seek(0)
      file = np.load(raw)
      arrays = {x.name: file[x.name] for x in dataclasses.fields(Probabilities)}
    content = Probabilities(
      arrays['probabilities'],
      arrays['labels'],
      json.loads(arrays['facts'].item()),
    )
    _check(content)
  except OSError as error:
    raise UserError(
      f'{path}: cannot be read ({error.strerror or error}).'
    ) from error
  # NumPy and zipfile raise these for damaged and for other files.
  except (
    *(ValueError, TypeError, LookupError, AttributeError, MemoryError),
    *(EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error),
  ) as error:
    reason = ' '.join(str(error).split()).rstrip('.')
    raise UserError(
      f'{path}: not a file of probabilities: {reason}.'
    ) from error
  return content


def _check(content: Probabilities) -> None:
  """Raises ValueError if arrays or facts are not those of `Probabilities`."""
  probabilities, labels, facts = (
    content.probabilities,
    content.labels,
    content.facts,
  )
  if probabilities.dtype != np.float32 or probabilities.ndim != 2:
    raise ValueError(
      f'its probabilities are {probabilities.dtype} {probabilities.shape}'
    )
  if labels.dtype != np.int32 or labels.shape != probabilities.shape[:1]:
    raise ValueError(f'its labels are {labels.dtype} {labels.shape}')
  for name, kind in _FACTS.items():
    if name not in facts or not isinstance(facts[name], kind):
      raise ValueError(f'the fact {name} is missing or has another type')
  num_classes = probabilities.shape[1]
  if len(facts['label_names']) != num_classes or not len(labels):
    raise ValueError(
      f'{len(labels)} images, {num_classes} classes and '
      f'{len(facts["label_names"])} names of classes'
    )
  wrong = np.flatnonzero(~_are_distributions(probabilities))
  if len(wrong):
    raise ValueError(
      f'the probabilities of image {wrong[0]} do not add up to 1'
    )
  wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if len(wrong):
    raise ValueError(f'image {wrong[0]} has the label {labels[wrong[0]]}')


def _are_distributions(probabilities: np.ndarray) -> np.ndarray:
  """Whether each row is finite, not negative, and adds up to 1."""
  sums = probabilities.sum(1, dtype=np.float64)
  return (probabilities >= 0).all(1) & (abs(sums - 1) <= _TOLERANCE)


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
  from bn_repro.training import metrics  # Imports JAX.

  name = facts['split']
  if path is not None and path.exists():
    found = read(path)
    _check_facts(path, found.facts, facts)
    _partial(path).unlink(missing_ok=True)
    print(f'{path}: complete, nothing to compute')
    return found
  group = _group_size(facts['crops'])
  with (
    _explain_system_errors(path),
    _open_partial(path, facts, group) as (file, records),
    _Display(name, len(records), len(split)) as display,
  ):
    groups = [
      np.arange(first, min(first + group, len(split)))
      for first in range(len(records), len(split), group)
    ]
    done, replaced = len(records), int(records['replaced'].sum())
    load = functools.partial(_load, split, facts['crops'], image_shape)
    threads = min(num_threads, _MAX_THREADS)
    with contextlib.closing(_load_ahead(load, groups, threads)) as loaded:
      for _ in groups:
        with display.waiting():
          views, labels, is_replaced = next(loaded)
        new = np.zeros(len(labels), records.dtype)
        new['probabilities'] = _averages(predict, views, facts['crops'])
        new['label'], new['replaced'] = labels, is_replaced
        if not _are_distributions(new['probabilities']).all():
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
        display.show(done)
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
      write(path, content)
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
  path: Path | None, facts: Mapping[str, Any], group: int
) -> Iterator[tuple[IO[bytes], np.ndarray]]:
  """Opens the file of finished images for appending.

  The file begins with a line of JSON, the facts. Then each image has a record.
  Records are flushed but not synchronized: after a power failure the last ones
  may be cut or zero, and are computed again. So are those of a group that is
  not complete, because a result may depend on its place in a batch.

  Args:
    path: the file to compute; None for a temporary one.
    facts: those of `Probabilities`.
    group: number of images that are appended at once.

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
    valid = _are_distributions(records['probabilities'])
    count = len(valid) if valid.all() else int(valid.argmin())
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
      f'({error.strerror}). Free some space or change its permissions, and run '
      'the command again: it resumes.'
    ) from error


class _Display:
  """A bar on a terminal, a line now and then elsewhere.

  Rates do not count the first group, for which the network is compiled.
  """

  def __init__(self, split: str, done: int, total: int):
    self._split = split
    self._total = total
    self._first = self._done = done
    self._started = time.monotonic()
    # When the first group was done, how many images that were, and the time
    # spent waiting since then.
    self._reference: tuple[float, int] | None = None
    self._waited = 0.0
    self._next_line = self._started + _LINE_INTERVAL
    console = terminal()
    self._bar = console and Progress(
      BarColumn(), TextColumn('{task.description}'), console=console
    )

  def __enter__(self) -> '_Display':
    if self._first:
      print(f'{self._split}: resuming at image {self._first:,}', flush=True)
    if self._bar:
      self._bar.start()
      self._bar.add_task(f'{self._split}: compiling', total=self._total)
    return self

  def __exit__(self, *exception: object) -> None:
    if self._bar:
      self._bar.stop()
    if self._done > self._first:
      seconds = duration(time.monotonic() - self._started)
      print(
        f'{self._split}: {self._done - self._first:,} images in {seconds}'
        f'{self._rates()}',
        flush=True,
      )

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Counts the time spent in the context as waiting for images."""
    started = time.monotonic()
    yield
    self._waited += time.monotonic() - started

  def show(self, done: int) -> None:
    """Shows that this many images are done."""
    now = time.monotonic()
    self._done = done
    if self._reference is None:
      self._reference, self._waited = (now, done), 0.0
    text = f'{done:,}/{self._total:,} images{self._rates()}'
    if done > self._reference[1]:
      start, first = self._reference
      left = (now - start) / (done - first) * (self._total - done)
      text += f', ETA {duration(left)}'
    if self._bar:
      self._bar.update(self._bar.task_ids[0], completed=done, description=text)
    elif now >= self._next_line:
      self._next_line = now + _LINE_INTERVAL
      print(f'{self._split}: {text}', flush=True)

  def _rates(self) -> str:
    if self._reference is None or self._done == self._reference[1]:
      return ''
    seconds = time.monotonic() - self._reference[0]
    rate = (self._done - self._reference[1]) / seconds
    return (
      f', {rate:,.1f} images/s, {self._waited / seconds:.0%} of the time '
      'waiting for images'
    )
