"""Sums against NumPy, and what masks, ties and infinities do to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_repro.training import metrics
from bn_repro.training.metrics import Sums


def sums(logits, labels, mask=None):
  logits = jnp.asarray(logits)
  labels = jnp.asarray(labels, jnp.int32)
  mask = jnp.ones(len(labels), bool) if mask is None else jnp.asarray(mask)
  replaced = labels % 2 == 0
  batch = {'label': labels, 'mask': mask, 'replaced': replaced}
  return metrics.classification_sums(logits, batch).fetch()


def random_batch(num_examples, num_classes=10, seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.normal(0, 3, (num_examples, num_classes)).astype(np.float32)
  return logits, rng.integers(0, num_classes, num_examples)


def test_against_float64():
  logits, labels = random_batch(200)
  found = sums(logits, labels)
  exact = logits.astype(np.float64)
  log_softmax = exact - np.log(np.exp(exact).sum(1, keepdims=True))
  rank = (exact > exact[np.arange(200), labels][:, None]).sum(1)
  loss = -log_softmax[np.arange(200), labels].sum()
  assert found.loss == pytest.approx(loss, rel=1e-6)
  assert found.correct == (rank == 0).sum()
  assert found.top5 == (rank < 5).sum()
  assert found.count == 200
  assert found.replaced == (labels % 2 == 0).sum()


def test_parts_add_up_to_the_whole_whatever_their_sizes():
  """Where a mean of means would not: the parts have 7, 93 and 100 examples."""
  logits, labels = random_batch(200)
  whole = sums(logits, labels).means()
  parts = Sums()
  for first, last in ((0, 7), (7, 100), (100, 200)):
    parts = parts.merge(sums(logits[first:last], labels[first:last]))
  assert parts.means() == pytest.approx(whole, rel=1e-6)
  assert parts.means()['num_examples'] == 200


@pytest.mark.parametrize(
  'true, fill',
  [
    (True, 'not finite'),
    (True, 'right'),
    (np.uint8(255), 'not finite'),
    (-1, 'right'),
    (0.5, 'not finite'),
  ],
)
def test_masked_examples_count_nowhere(true, fill):
  logits, labels = random_batch(8)
  expected = sums(logits[:5], labels[:5])
  if fill == 'right':
    logits[range(5, 8), labels[5:]] = 100
  else:
    logits[5:] = [[np.nan], [np.inf], [1e30]]
  found = sums(logits, labels, np.where(np.arange(8) < 5, true, 0))
  assert found.loss == pytest.approx(expected.loss, rel=1e-6)
  assert (found.correct, found.top5, found.count, found.replaced) == (
    expected.correct,
    expected.top5,
    5,
    expected.replaced,
  )


def test_equal_logits_are_right_once():
  """A net that says the same of every class is right at the rate of chance."""
  found = sums(np.zeros((10, 10)), np.arange(10))
  assert found.correct == 1
  assert found.top5 == 5


def test_top_5_of_fewer_classes_is_everything():
  found = sums(*random_batch(20, num_classes=3))
  assert found.top5 == found.count == 20


def test_bfloat16_logits_have_a_float32_loss():
  logits, labels = random_batch(50)
  rounded = jnp.asarray(logits, jnp.bfloat16)
  losses = metrics.cross_entropy(rounded, jnp.asarray(labels))
  assert losses.dtype == jnp.float32
  exact = metrics.cross_entropy(
    rounded.astype(jnp.float32), jnp.asarray(labels)
  )
  np.testing.assert_array_equal(losses, exact)


def test_count_nonfinite():
  tree = {
    'a': jnp.array([1.0, np.nan, np.inf]),
    'b': {'c': jnp.array([[-np.inf, 0.0]], jnp.bfloat16)},
    'integers': jnp.arange(3),
  }
  assert metrics.count_nonfinite(tree) == 3
  assert metrics.count_nonfinite({}) == 0


def test_gradient_of_the_loss_is_softmax_minus_one_hot():
  logits, labels = random_batch(6)
  found = jax.grad(
    lambda x: metrics.cross_entropy(x, jnp.asarray(labels)).sum()
  )(jnp.asarray(logits))
  softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  np.testing.assert_allclose(found, softmax - np.eye(10)[labels], atol=1e-6)
