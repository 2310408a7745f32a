"""Files of class probabilities: those of one network, for a split.

The probabilities of an image are averages over its crops. An ensemble is an
average over files (section 4.2.3).
"""

from collections.abc import Mapping
import dataclasses
import io
import json
from pathlib import Path
from typing import Any
import zipfile
import zlib

import numpy as np

from bn_repro.errors import UserError
from bn_repro.runtime import workdir

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
    own, rank = rank_of_labels(self.probabilities, self.labels)
    logs = np.log(own.clip(np.finfo(np.float32).tiny), dtype=np.float64)
    replaced = self.facts.get('replaced_examples')
    return {
      'loss': -float(logs.mean()),
      'accuracy': int((rank == 0).sum()) / count,
      'top5_accuracy': int((rank < 5).sum()) / count,
      'num_examples': count,
      **({'replaced_examples': replaced} if replaced else {}),
    }


def rank_of_labels(
  probabilities: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the probability and the rank of each image's label.

  Args:
    probabilities: (images, classes).
    labels: int (images,).

  Returns:
    The probability of the label, and the number of classes before it in
    descending order, both (images,). Of equal probabilities the first class
    comes first, as in `jax.lax.top_k`.
  """
  own = np.take_along_axis(probabilities, labels[:, None], 1)
  is_lower = np.arange(probabilities.shape[1]) < labels[:, None]
  before = (probabilities > own) | ((probabilities == own) & is_lower)
  return own[:, 0], before.sum(1)


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
  wrong = np.flatnonzero(~are_distributions(probabilities))
  if len(wrong):
    raise ValueError(
      f'the probabilities of image {wrong[0]} do not add up to 1'
    )
  wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
  if len(wrong):
    raise ValueError(f'image {wrong[0]} has the label {labels[wrong[0]]}')


def are_distributions(probabilities: np.ndarray) -> np.ndarray:
  """Returns whether each row is finite, not negative, and adds up to 1.

  Args:
    probabilities: float32 (images, classes).

  Returns:
    bool (images,).
  """
  with np.errstate(invalid='ignore'):  # Infinities may cancel.
    sums = probabilities.sum(1, dtype=np.float64)
  return (probabilities >= 0).all(1) & (abs(sums - 1) <= _TOLERANCE)
