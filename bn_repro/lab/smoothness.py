"""How much a loss and its gradient change when the weights move.

These are measures of Santurkar et al. ("How Does Batch Normalization Help
Optimization?", 2018). A `Gradient` maps weights to the loss and its gradient,
as `jax.value_and_grad` does.
"""

from collections.abc import Callable, Mapping, Sequence
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

Gradient = Callable[[Any], tuple[Any, Any]]

# Steps along the gradient, over the learning rate: from half to four times.
# Their number is our choice.
STEPS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)


def along_gradient(gradient: Gradient, w: Any, rate: float) -> dict[str, Any]:
  """Measures a loss L around weights, in the direction g = grad L(w).

  Args:
    gradient: L and its gradient.
    w: the weights, a tree of arrays.
    rate: the learning rate; in what follows, a is `rate` times `STEPS`.

  Returns:
    loss: minimum and maximum of L(w - a g) over a.
    change: minimum and maximum of |g - grad L(w - a g)|.
    smoothness: maximum of |g - grad L(w - a g)| / |a g|.
  """
  _, g = gradient(w)
  rates = [rate * step for step in STEPS]
  losses, changes = [], []
  for a in rates:
    loss, there = gradient(optax.tree.add_scale(w, -a, g))
    losses.append(float(loss))
    changes.append(float(optax.tree.norm(optax.tree.sub(g, there))))
  slopes = np.divide(changes, float(optax.tree.norm(g)) * np.array(rates))
  # Unlike Python's, these minima and maxima keep NaN.
  return {
    'loss': [float(np.min(losses)), float(np.max(losses))],
    'change': [float(np.min(changes)), float(np.max(changes))],
    'smoothness': float(np.max(slopes)),
  }


def covariate_shift(
  gradient: Gradient,
  w: Mapping[str, Any],
  updated: Mapping[str, Any],
  layers: Sequence[Sequence[str]],
) -> dict[str, float]:
  """Measures internal covariate shift as a change of gradients.

  G is the gradient of the kernel of a layer, and G' is the same after the
  layers before it have been updated.

  Args:
    gradient: the loss and its gradient.
    w: the weights, by module.
    updated: the weights after a step of training.
    layers: the modules of each layer, the one with a kernel first.

  Returns:
    shift: |G - G'|, the median over the layers after the first.
    cosine: that of G and G', likewise; 0 if one of them is 0.
  """
  _, here = gradient(w)
  mixed, shifts, cosines = dict(w), [], []
  for before, (layer, *_) in itertools.pairwise(layers):
    mixed |= {module: updated[module] for module in before}
    _, there = gradient(mixed)
    g, shifted = (jnp.ravel(of[layer]['kernel']) for of in (here, there))
    shifts.append(float(jnp.linalg.norm(g - shifted)))
    cosines.append(float(optax.cosine_similarity(g, shifted, epsilon=1e-30)))
  return {
    'shift': float(np.median(shifts)),
    'cosine': float(np.median(cosines)),
  }
