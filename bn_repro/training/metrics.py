"""Metrics as sums and counts, which are divided once at the end."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bn_repro.data.split import Batch
from bn_repro.errors import UserError

Array = jax.Array


class Sums(flax.struct.PyTreeNode):
  """Sums over examples, as device arrays or Python numbers.

  Attributes:
    loss: cross-entropy in nats, without the L2 term and the auxiliary head.
    correct: examples whose label has the largest logit.
    top5: examples whose label is among the five largest.
    count: examples.
    replaced: examples that replace images which could not be decoded.
  """

  loss: Any = 0.0
  correct: Any = 0
  top5: Any = 0
  count: Any = 0
  replaced: Any = 0

  def merge(self, other: 'Sums') -> 'Sums':
    """The sums over both sets of examples."""
    return jax.tree.map(lambda a, b: a + b, self, other)

  def fetch(self) -> 'Sums':
    """Waits for the device and returns Python numbers."""
    return jax.tree.map(lambda x: np.asarray(x).item(), jax.device_get(self))

  def fetch_steps(self) -> list['Sums']:
    """Waits for the device; returns one `Sums` per step of the leading axis."""
    columns, structure = jax.tree.flatten(jax.device_get(self))
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [jax.tree.unflatten(structure, row) for row in rows]

  def means(self) -> dict[str, float | int]:
    """The means, as they are written to `metrics.jsonl`."""
    return {
      'loss': self.loss / self.count,
      'accuracy': self.correct / self.count,
      'top5_accuracy': self.top5 / self.count,
      'num_examples': self.count,
      **({'replaced_examples': self.replaced} if self.replaced else {}),
    }


def check_replaced(sums: Sums, limit: float, what: str) -> None:
  """Checks that not too many images had to be replaced.

  Args:
    sums: sums over the images of all processes.
    limit: allowed fraction, `config.data.max_replaced`.
    what: name of the images for the error, such as 'validation images'.

  Raises:
    UserError: if a larger fraction was replaced.
  """
  if sums.replaced > limit * sums.count:
    raise UserError(
      f'{what}: {sums.replaced} of {sums.count} images could not be decoded, '
      f'more than config.data.max_replaced={limit:g}. They are named above. '
      'Fix the data, or raise the limit.'
    )


def cross_entropy(logits: Array, labels: Array) -> Array:
  """Softmax cross-entropy of each example, in at least float32."""
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def classification_sums(logits: Array, batch: Batch) -> Sums:
  """Sums over the examples of one device where `mask` is True.

  Args:
    logits: (batch, classes).
    batch: `label`, int (batch,); `mask` and `replaced`, (batch,), bool or of
      another dtype, where nonzero is True.
  """
  labels = batch['label']
  mask, replaced = batch['mask'].astype(bool), batch['replaced'].astype(bool)
  top = jax.lax.top_k(logits, min(5, logits.shape[-1]))[1] == labels[:, None]
  return Sums(
    loss=jnp.where(mask, cross_entropy(logits, labels), 0).sum(),
    correct=(mask & top[:, 0]).sum(),
    top5=(mask & top.any(-1)).sum(),
    count=mask.sum(),
    replaced=(mask & replaced).sum(),
  )


def count_nonfinite(tree: Any) -> int:
  """Waits for the device; returns the number of values that are not finite."""
  leaves = jax.device_get(jax.tree.leaves(tree))
  return sum(int((~np.isfinite(leaf)).sum()) for leaf in leaves)
