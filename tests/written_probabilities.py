"""Files of probabilities written by hand."""

import numpy as np

from bn_repro.inference import probabilities

LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1], np.int32)


def predicting(classes, confidence=0.5, labels=LABELS, num_classes=3):
  """Probabilities whose highest are at `classes`, in float32.

  The rest is shared evenly.
  """
  rest = (1 - confidence) / (num_classes - 1)
  found = np.full((len(labels), num_classes), rest, np.float32)
  found[np.arange(len(labels)), classes] = confidence
  return found


def correct_at(*places, labels=LABELS, num_classes=3):
  """Predicts the label at some places and the next class at the others."""
  is_correct = np.isin(np.arange(len(labels)), places)
  classes = np.where(is_correct, labels, (labels + 1) % num_classes)
  return predicting(classes, labels=labels, num_classes=num_classes)


def random(seed, count=1_230, num_classes=12):
  """Probabilities and labels of a network that is right now and then."""
  rng = np.random.default_rng(seed)
  labels = np.random.default_rng(99).integers(num_classes, size=count)
  logits = rng.normal(size=(count, num_classes))
  logits[np.arange(count), labels] += 1
  exponentials = np.exp(2 * logits)
  found = exponentials / exponentials.sum(1, keepdims=True)
  return found.astype(np.float32), labels.astype(np.int32)


def content(values, labels=LABELS, **facts):
  """Content of a file; its network is named after a fact `model`."""
  facts = {
    'model': 'net',
    'statistics': 'population',
    'data_fingerprint': 'abc',
    'data_name': 'mnist_5k',
    'split': 'test',
    'crops': 1,
    'label_names': [str(label) for label in range(values.shape[1])],
    **facts,
  }
  facts.setdefault('model_digest', f'digest of {facts["model"]}')
  return probabilities.Probabilities(values, np.asarray(labels), facts)


def write(path, values, labels=LABELS, **facts):
  """Writes a file of a network that is named after its path."""
  path.parent.mkdir(parents=True, exist_ok=True)
  facts.setdefault('model', str(path.parent))
  probabilities.write(path, content(values, labels, **facts))
  return path
