"""Ensembles and their scores against loops in plain Python, and by hand."""

import itertools
import math

import numpy as np
import pytest
from written_probabilities import content, predicting, random

from bn_repro.inference import averaging


def plain_scores(values, labels):
  """Accuracies, log-loss and calibration error, an image at a time."""
  top1 = top5 = 0
  losses = []
  bins = [[] for _ in range(15)]
  for row, label in zip(values.tolist(), labels.tolist(), strict=True):
    order = sorted(range(len(row)), key=lambda k: (-row[k], k))
    top1 += order[0] == label
    top5 += label in order[:5]
    losses.append(-math.log(row[label]))
    confidence = max(row)
    (place,) = [i for i in range(15) if i / 15 < confidence <= (i + 1) / 15]
    bins[place].append((confidence, order[0] == label))
  error = 0.0
  for of_bin in filter(None, bins):
    confidences, correct = zip(*of_bin, strict=True)
    distance = sum(confidences) / len(of_bin) - sum(correct) / len(of_bin)
    error += len(of_bin) / len(labels) * abs(distance)
  return top1, top5, math.fsum(losses) / len(labels), error


def test_every_subset_against_a_plain_loop():
  """More images than are scored at a time, and fewer in the last part."""
  drawn = [random(seed) for seed in range(3)]
  labels = drawn[0][1]
  members = [content(values, labels) for values, _ in drawn]
  subsets = [s for n in (1, 2, 3) for s in itertools.combinations(range(3), n)]
  for subset, found in zip(
    subsets, averaging.score(members, subsets), strict=True
  ):
    total = sum(np.float64(drawn[index][0]) for index in subset)
    top1, top5, loss, error = plain_scores(total / len(subset), labels)
    assert (found.count, found.top1, found.top5) == (1_230, top1, top5)
    assert found.accuracy == top1 / 1_230
    assert found.top5_accuracy == top5 / 1_230
    assert found.log_loss == pytest.approx(loss, rel=1e-12)
    assert found.calibration_error == pytest.approx(error, rel=1e-9)
  # They are not all the same.
  assert len({scores.top1 for scores in averaging.score(members, subsets)}) > 4


def test_one_network_has_the_metrics_of_its_evaluation():
  member = content(*random(0))
  (found,) = averaging.score([member], [[0]])
  expected = {
    'loss': pytest.approx(found.log_loss, rel=1e-6),
    'accuracy': found.accuracy,
    'top5_accuracy': found.top5_accuracy,
    'num_examples': found.count,
  }
  assert member.metrics() == expected


def score(values, labels):
  (found,) = averaging.score([content(np.float32(values), labels)], [[0]])
  return found


def test_the_mean_is_of_probabilities():
  """The mean of logarithms, or of votes, would choose the other class."""
  sure, unsure = [[0.9, 0.1]], [[0.3, 0.7]]
  labels = np.int32([0])
  members = [content(np.float32(x), labels) for x in (sure, unsure, unsure)]
  (found,) = averaging.score(members, [[0, 1, 2]])
  assert found.top1 == 1
  assert found.log_loss == pytest.approx(-math.log(0.5), rel=1e-6)


def test_calibration_by_hand():
  """Four images of confidence 0.75, one of them right, and four of 0.5, two."""
  labels = np.int32([0] * 8)
  sure = predicting([0, 1, 1, 1], 0.75, labels[:4])
  unsure = predicting([0, 0, 1, 1], 0.5, labels[:4])
  found = score(np.concatenate([sure, unsure]), labels)
  assert found.top1 == 3
  assert found.calibration_error == pytest.approx((0.75 - 0.25) / 2)


def test_errors_of_a_bin_cancel_and_those_of_two_do_not():
  labels = np.int32([0, 0])
  # Both in the bin of (14/15, 1]: one is right, one is wrong.
  same = score([[0.95, 0.05], [0.05, 0.95]], labels)
  assert same.calibration_error == pytest.approx(0.45)
  # 0.55 is wrong and 0.95 is right: 0.55 / 2 + 0.05 / 2.
  two = score([[0.95, 0.05], [0.45, 0.55]], labels)
  assert two.calibration_error == pytest.approx(0.3)


@pytest.mark.parametrize(
  'confidence, place',
  [(1, 14), (1.0000001, 14), (0.5, 7), (0.59, 8), (0.61, 9)],
)
def test_bins_contain_their_upper_end(confidence, place):
  """A confidence above 1 is one of 1, rounded."""
  found = score([[confidence, 0.3]], np.int32([0]))
  assert found.bins[:, place].tolist() == [np.float32(confidence), 1]


def test_of_equal_probabilities_the_first_is_the_largest():
  values = np.full((6, 6), 1 / 6, np.float32)
  found = score(values, np.arange(6, dtype=np.int32))
  assert (found.top1, found.top5) == (1, 5)


def test_a_label_with_probability_0_has_a_finite_loss():
  found = score([[0.0, 1.0]], np.int32([0]))
  assert found.log_loss == pytest.approx(126 * math.log(2))
