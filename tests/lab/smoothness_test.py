"""The measures against their formulas in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from bn_repro.lab import smoothness


def random(*shape, seed):
  return np.random.default_rng(seed).normal(size=shape)


def test_along_gradient(x64):
  """For L = sum w^4 / 4, whose gradient is w^3."""
  parts = random(3, seed=0), random(2, 2, seed=1)
  w = np.concatenate([part.ravel() for part in parts])
  rate = 0.1
  losses, changes, slopes = [], [], []
  for a in rate * np.array([0.5, 0.7, 1, 1.4, 2, 2.8, 4]):
    moved = w - a * w**3
    losses.append((moved**4).sum() / 4)
    changes.append(np.linalg.norm(w**3 - moved**3))
    slopes.append(changes[-1] / np.linalg.norm(a * w**3))

  def loss(tree):
    return sum((part**4).sum() / 4 for part in tree.values())

  found = smoothness.along_gradient(
    jax.value_and_grad(loss), dict(zip('ab', parts, strict=True)), rate
  )
  expected = {
    'loss': [min(losses), max(losses)],
    'change': [min(changes), max(changes)],
    'smoothness': max(slopes),
  }
  jax.tree.map(np.testing.assert_allclose, found, expected)


def test_covariate_shift(x64):
  """For a linear network, y = C s * (B A x), with the loss |y|^2 / 2."""
  x = random(4, seed=0)
  shapes = {'a': (3, 4), 'b': (5, 3), 's': (5,), 'c': (2, 5)}
  old, new = (
    {key: random(*shape, seed=seed) for key, shape in shapes.items()}
    for seed in (1, 2)
  )

  def gradient_of_b(a, b, s, c):
    u = a @ x
    return np.outer(s * (c.T @ (c @ (s * (b @ u)))), u)

  def gradient_of_c(a, b, s, c):
    u = s * (b @ a @ x)
    return np.outer(c @ u, u)

  pairs = (
    (gradient_of_b(**old), gradient_of_b(**{**old, 'a': new['a']})),
    (gradient_of_c(**old), gradient_of_c(**{**new, 'c': old['c']})),
  )
  shifts = [np.linalg.norm(g - shifted) for g, shifted in pairs]
  cosines = [
    (g * shifted).sum() / np.linalg.norm(g) / np.linalg.norm(shifted)
    for g, shifted in pairs
  ]

  def loss(w):
    u = w['s']['scale'] * (w['b']['kernel'] @ w['a']['kernel'] @ x)
    return ((w['c']['kernel'] @ u) ** 2).sum() / 2

  def tree(values):
    return {
      key: {'scale' if key == 's' else 'kernel': jnp.asarray(value)}
      for key, value in values.items()
    }

  found = smoothness.covariate_shift(
    jax.value_and_grad(loss), tree(old), tree(new), [['a'], ['b', 's'], ['c']]
  )
  np.testing.assert_allclose(found['shift'], np.median(shifts))
  np.testing.assert_allclose(found['cosine'], np.median(cosines))
