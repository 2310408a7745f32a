"""Momentum SGD, its schedule and its averages, as optax transformations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax

from bn_repro import paper


def applied_learning_rate(optim: ConfigDict, batch_size: int) -> float:
  """The learning rate of step 0, proportional to the batch size.

  CNTK's recipe scales it this way, and reaches the paper's accuracy.

  Args:
    optim: the `optim` sub-tree of a config, whose learning rate is for batches
      of `paper.BATCH_SIZE`.
    batch_size: images per step.
  """
  return optim.learning_rate * batch_size / paper.BATCH_SIZE


def create_schedule(
  optim: ConfigDict, steps_per_epoch: float
) -> Callable[[Any], Any]:
  """Creates the schedule, which maps a step to a factor of the learning rate.

  The factor depends on the step only, not on the length of the run, so that a
  run can be lengthened.
  """
  return optax.exponential_decay(
    init_value=1.0,
    transition_steps=optim.decay_epochs * steps_per_epoch,
    decay_rate=optim.decay_rate,
    staircase=True,
  )


def create_optimizer(
  optim: ConfigDict, batch_size: int, schedule: Callable[[Any], Any]
) -> optax.GradientTransformation:
  """Creates momentum SGD with L2 regularization.

  g <- grad + weight_decay * w;  v <- momentum * v + g;  w <- w - rate * v

  where rate is the learning rate times `schedule(step)`.

  The three constants are part of the optimizer state, not of the compiled
  program, so that runs with different rates share an executable.
  """

  def sgd(
    learning_rate: Any, momentum: Any, weight_decay: Any
  ) -> optax.GradientTransformation:
    return optax.chain(
      # The gradient of weight_decay / 2 * |w|^2 over the weights.
      optax.add_decayed_weights(weight_decay, mask=is_weight),
      optax.trace(decay=momentum),
      optax.scale_by_schedule(schedule),
      optax.scale_by_learning_rate(learning_rate),
    )

  optimizer = optax.inject_hyperparams(sgd)(
    learning_rate=applied_learning_rate(optim, batch_size),
    momentum=optim.momentum,
    weight_decay=optim.weight_decay,
  )
  if optim.polyak_decay:
    optimizer = optax.chain(optimizer, average_parameters(optim.polyak_decay))
  return optimizer


def is_weight(params: Any) -> Any:
  """True for kernels; gamma, beta and biases do not decay."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: path[-1].key == 'kernel', params
  )


class AverageState(NamedTuple):
  """State of `average_parameters`."""

  average: Any


def average_parameters(decay: float) -> optax.GradientTransformation:
  """Keeps a Polyak (exponential moving) average of the updated parameters."""

  def init(params: Any) -> AverageState:
    return AverageState(jax.tree.map(jnp.array, params))

  def update(
    updates: Any, state: AverageState, params: Any = None
  ) -> tuple[Any, AverageState]:
    updated = optax.apply_updates(params, updates)
    average = optax.incremental_update(updated, state.average, 1 - decay)
    return updates, AverageState(average)

  return optax.GradientTransformation(init, update)


def averaged_parameters(opt_state: Any) -> Any | None:
  """The Polyak average in the state of an optimizer; None without one."""
  return optax.tree.get(opt_state, 'average')
