"""ReaL labels of ImageNet's validation images (Beyer et al., 2020).

The file is `real.json` of github.com/google-research/reassessed-imagenet: for
each of the 50,000 validation images, in the order of their numbers, the list of
all correct labels. Images with an empty list do not count.
"""

from collections.abc import Sequence
import json
from pathlib import Path

import numpy as np

from bn_repro.data import imagenet_metadata
from bn_repro.data.split import Split
from bn_repro.errors import UserError


def read(path: Path) -> list[list[int]]:
  """Reads the labels.

  Args:
    path: value of --real_labels.

  Raises:
    UserError: if the file cannot be read, or contains something else.
  """
  count = imagenet_metadata.NUM_EXAMPLES['validation']
  try:
    labels = json.loads(path.read_text())
  except OSError as error:
    raise UserError(f'--real_labels={path}: {error.strerror}.') from error
  except ValueError as error:
    raise UserError(f'--real_labels={path}: not JSON ({error}).') from error
  if not isinstance(labels, list) or len(labels) != count:
    raise UserError(
      f'--real_labels={path}: not a list of {count:,} lists of labels.'
    )
  known = set(range(imagenet_metadata.NUM_CLASSES))
  for number, of_image in enumerate(labels, start=1):
    if not isinstance(of_image, list) or not known.issuperset(of_image):
      raise UserError(
        f'--real_labels={path}: image {number} has {of_image}, not a list of '
        f'labels from 0 to {imagenet_metadata.NUM_CLASSES - 1}.'
      )
  return labels


def check_split(split: Split) -> None:
  """Checks by its first image that a split has ImageNet's validation images.

  Raises:
    UserError: if it has others.
  """
  name = split.name_of(0)
  if imagenet_metadata.validation_number(name) is None:
    raise UserError(
      f'--real_labels: {name} is not one of the validation images of ImageNet, '
      'which these labels are for.'
    )


def count_correct(
  predictions: np.ndarray, split: Split, labels: Sequence[Sequence[int]]
) -> tuple[int, int]:
  """Counts the images whose prediction is one of their labels.

  Args:
    predictions: int (images,), the predicted label of each image of `split`.
    split: ImageNet's validation images, in any order.
    labels: what `read` returns.

  Returns:
    The number of correct images, and of images that can be read and have
    labels.
  """
  correct = total = 0
  for index, predicted in enumerate(predictions):
    try:
      number = imagenet_metadata.validation_number(split.name_of(index))
    except Exception:  # ArrayRecord documents no exceptions.
      number = None
    # Without a name it cannot be read, and was replaced.
    of_image = labels[number - 1] if number else []
    correct += int(predicted) in of_image
    total += bool(of_image)
  return correct, total
