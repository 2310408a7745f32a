"""Ensembles: means of the class probabilities of several networks. No JAX.

Section 4.2.3: the prediction of the ensemble is the arithmetic mean of the
class probabilities of its members.
"""

from collections.abc import Iterator, Sequence
import dataclasses
from pathlib import Path

import numpy as np

from bn_repro.errors import UserError
from bn_repro.inference.probabilities import Probabilities, rank_of_labels

# Bins of the calibration error, of equal width (those of Guo et al. 2017).
CALIBRATION_BINS = 15
# A label with a probability of 0 counts as one with this, so that its log-loss
# is finite: 87.3 nats. Our choice.
_SMALLEST = float(np.finfo(np.float32).tiny)
# Images that are averaged at a time: so few that their probabilities stay in
# the cache of the processor. Our choice.
_IMAGES_AT_A_TIME = 100


@dataclasses.dataclass(frozen=True)
class Scores:
  """How well probabilities predict the labels of some images.

  Attributes:
    count: number of images.
    top1: images whose label has the highest probability. Of equal ones, that of
      the lowest label counts as the highest, as in `training/metrics.py`.
    top5: images whose label has one of the five highest.
    log_losses: sum of -ln(probability of the label) over the images.
    bins: (2, bins): of the images in each bin of confidence, the sum of the
      confidences and the number that counts in `top1`. The confidence is the
      highest probability. Bin i holds those in (i / 15, (i + 1) / 15].
  """

  count: int
  top1: int
  top5: int
  log_losses: float
  bins: np.ndarray

  def merge(self, other: 'Scores') -> 'Scores':
    """The scores on both sets of images."""
    return Scores(
      self.count + other.count,
      self.top1 + other.top1,
      self.top5 + other.top5,
      self.log_losses + other.log_losses,
      self.bins + other.bins,
    )

  @property
  def accuracy(self) -> float:
    """Top-1 accuracy, a fraction."""
    return self.top1 / self.count

  @property
  def top5_accuracy(self) -> float:
    """Top-5 accuracy, a fraction."""
    return self.top5 / self.count

  @property
  def log_loss(self) -> float:
    """Mean of -ln(probability of the label), in nats."""
    return self.log_losses / self.count

  @property
  def calibration_error(self) -> float:
    """Expected calibration error, a fraction.

    The distance between mean confidence and accuracy in a bin, averaged over
    bins with the number of their images as weight.
    """
    confidences, correct = self.bins
    return float(np.abs(confidences - correct).sum() / self.count)


def check_same_images(
  paths: Sequence[Path], members: Sequence[Probabilities]
) -> None:
  """Checks that files can be averaged.

  Args:
    paths: the files, for messages.
    members: their content.

  Raises:
    UserError: if files are of other images, classes or crops than the first, or
      of a network that an earlier file is of; with a line for each.
  """
  problems = []
  digests: dict[str, Path] = {}
  for path, member in zip(paths, members, strict=True):
    difference = _difference(members[0], member)
    if difference:
      problems.append(
        f'{path}: not of the same images as {paths[0]}: {difference}.'
      )
    first = digests.setdefault(member.facts['model_digest'], path)
    if first is not path:
      problems.append(
        f'{path}: of the same network as {first}. Name each network once.'
      )
  if problems:
    raise UserError(*problems)


def _difference(first: Probabilities, other: Probabilities) -> str | None:
  """Why two files cannot be averaged; None if they can."""
  for name in ('data_fingerprint', 'split', 'crops'):
    if first.facts[name] != other.facts[name]:
      return f'{name} {other.facts[name]}, not {first.facts[name]}'
  for what, theirs, ours in zip(
    ('images', 'classes'),
    first.probabilities.shape,
    other.probabilities.shape,
    strict=True,
  ):
    if theirs != ours:
      return f'{ours:,} {what}, not {theirs:,}'
  if not np.array_equal(first.labels, other.labels):
    return 'the labels differ, or their order'
  return None


def score(
  members: Sequence[Probabilities], subsets: Sequence[Sequence[int]]
) -> list[Scores]:
  """Scores of the ensembles of some subsets of members.

  Args:
    members: probabilities of the same images; see `check_same_images`.
    subsets: indices into `members`.

  Returns:
    The scores of each subset, computed in float64.
  """
  found: list[Scores] = []
  for probabilities, labels in _parts(members):
    scores = [
      _score(probabilities[list(subset)].mean(0), labels) for subset in subsets
    ]
    found = (
      [a.merge(b) for a, b in zip(found, scores, strict=True)]
      if found
      else scores
    )
  return found


def _parts(
  members: Sequence[Probabilities],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Yields probabilities (members, images, classes), float64, and labels."""
  labels = members[0].labels
  for start in range(0, len(labels), _IMAGES_AT_A_TIME):
    part = slice(start, start + _IMAGES_AT_A_TIME)
    stacked = [member.probabilities[part] for member in members]
    yield np.stack(stacked).astype(np.float64), labels[part]


def _score(probabilities: np.ndarray, labels: np.ndarray) -> Scores:
  """Scores of probabilities (images, classes)."""
  of_label, rank = rank_of_labels(probabilities, labels)
  confidence = probabilities.max(1)
  place = np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1
  place = place.clip(0, CALIBRATION_BINS - 1)
  bins = [
    np.bincount(place, weights, CALIBRATION_BINS)
    for weights in (confidence, rank == 0)
  ]
  return Scores(
    count=len(labels),
    top1=int((rank == 0).sum()),
    top5=int((rank < 5).sum()),
    log_losses=float(-np.log(of_label.clip(_SMALLEST)).sum()),
    bins=np.stack(bins),
  )
