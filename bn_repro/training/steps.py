"""The computations of one step: pure functions of a state and a batch.

They run on each device under `parallel.data_parallel`.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
from ml_collections import ConfigDict
import optax

from bn_repro import parallel
from bn_repro.data import preprocess
from bn_repro.data.split import Batch
from bn_repro.training import metrics

Array = jax.Array


class TrainState(flax.struct.PyTreeNode):
  """The state of training.

  Random numbers are a function of (seed, step), so there is no other random
  state.

  Attributes:
    step: number of updates applied, int32.
    seed: seed of the run, uint32.
    params: parameters.
    batch_stats: moving averages of BN statistics; empty without BN.
    opt_state: momentum, learning rate and other constants of the optimizer.
  """

  step: Any
  seed: Any
  params: Any
  batch_stats: Any
  opt_state: Any


Step = Callable[[TrainState, Batch], Any]


def _step_keys(seed: Any, step: Any) -> tuple[Array, Array]:
  """The keys of a step's distortions and of its dropout."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  distortion_key, dropout_key = jax.random.split(key)
  return distortion_key, dropout_key


def distorted_images(
  images: Array, seed: Any, step: Any, strength: str
) -> Array:
  """The images of a training batch, distorted; call inside `data_parallel`.

  Args:
    images: uint8 (batch, height, width, channels).
    seed: seed of the run.
    step: the step that trains on them.
    strength: `config.data.distortion`.
  """
  with jax.named_scope('distortion'):
    distortion_key, _ = _step_keys(seed, step)
    keys = parallel.example_keys(distortion_key, images.shape[0])
    return preprocess.distort(images, keys, strength)


def _forward(
  model: nn.Module, config: ConfigDict, state: TrainState, batch: Batch
) -> Callable[[Any], tuple[Any, Any]]:
  """The forward pass of training, as a function of the parameters.

  The function returns logits and updated BN statistics; the statistics are
  equal on all devices.
  """
  _, dropout_key = _step_keys(state.seed, state.step)
  images = distorted_images(
    batch['image'], state.seed, state.step, config.data.distortion
  )
  images = preprocess.normalize(images, model.dtype, config.data.normalization)

  def forward(params: Any) -> tuple[Any, Any]:
    logits, updated = model.apply(
      {'params': params, 'batch_stats': state.batch_stats},
      images,
      train=True,
      mutable=['batch_stats'],
      rngs={'dropout': dropout_key},
    )
    batch_stats = updated.get('batch_stats', {})
    # Devices or groups have statistics of their own; Algorithm 2 averages them.
    if config.bn.statistics != 'global':
      batch_stats = parallel.mean(batch_stats)
    return logits, batch_stats

  return forward


def create_train_step(
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  config: ConfigDict,
) -> Step:
  """Creates the training step: `(state, batch) -> (state, sums)`."""

  def train_step(
    state: TrainState, batch: Batch
  ) -> tuple[TrainState, metrics.Sums]:
    forward = _forward(model, config, state, batch)

    def loss_fn(params: Any) -> tuple[Array, tuple[Any, Any]]:
      logits, batch_stats = forward(params)
      loss = metrics.cross_entropy(logits.main, batch['label']).mean()
      if logits.aux is not None:
        aux_loss = metrics.cross_entropy(logits.aux, batch['label']).mean()
        loss = loss + config.model.aux_loss_weight * aux_loss
      return loss, (logits.main, batch_stats)

    gradients, (logits, batch_stats) = jax.grad(loss_fn, has_aux=True)(
      state.params
    )
    gradients = parallel.mean(gradients)
    with jax.named_scope('optimizer'):
      updates, opt_state = optimizer.update(
        gradients, state.opt_state, state.params
      )
      params = optax.apply_updates(state.params, updates)
    state = state.replace(
      step=state.step + 1,
      params=params,
      batch_stats=batch_stats,
      opt_state=opt_state,
    )
    with jax.named_scope('metrics'):
      sums = parallel.total(metrics.classification_sums(logits, batch))
    return state, sums

  return train_step


def scan_steps(train_step: Step) -> Step:
  """Creates `(state, batches) -> (state, sums)`, a `lax.scan` over steps.

  Batches and sums have a leading axis of steps.
  """

  def train_steps(
    state: TrainState, batches: Batch
  ) -> tuple[TrainState, metrics.Sums]:
    if len(batches['label']) > 1:
      return jax.lax.scan(train_step, state, batches)
    # In a scan, even of one step, convolutions on CPU are three times slower.
    state, sums = train_step(state, jax.tree.map(lambda x: x[0], batches))
    return state, jax.tree.map(lambda x: x[None], sums)

  return train_steps


def create_eval_step(model: nn.Module, normalization: str) -> Step:
  """Creates inference on a batch: `(state, batch) -> (sums, probes)`.

  Probes are activations that the network stores for every example of the batch,
  by name; they may be empty.

  Args:
    model: the network.
    normalization: `config.data.normalization`.
  """

  def eval_step(
    state: TrainState, batch: Batch
  ) -> tuple[metrics.Sums, dict[str, Array]]:
    logits, stored = model.apply(
      {'params': state.params, 'batch_stats': state.batch_stats},
      preprocess.normalize(batch['image'], model.dtype, normalization),
      train=False,
      mutable=['probes'],
    )
    sums = metrics.classification_sums(logits.main, batch)
    probes = {name: x for name, (x,) in stored.get('probes', {}).items()}
    return parallel.total(sums), parallel.gather(probes)

  return eval_step


def create_residuals(model: nn.Module, config: ConfigDict) -> Step:
  """Creates `(state, batch) -> [array, ...]`: what the backward pass reads."""

  def residuals(state: TrainState, batch: Batch) -> list[Array]:
    forward = _forward(model, config, state, batch)
    _, pull_back = jax.vjp(forward, state.params)
    return jax.tree.leaves(pull_back)

  return residuals


def create_statistics_step(model: nn.Module, config: ConfigDict) -> Step:
  """Creates `(state, batch) -> batch_stats` of a batch (Algorithm 2, step 10).

  Args:
    model: the network with BN momentum 0, so that its "moving averages" after a
      batch are the mean and unbiased variance of that batch.
    config: the config of the run.
  """

  def statistics_step(state: TrainState, batch: Batch) -> Any:
    _, batch_stats = _forward(model, config, state, batch)(state.params)
    return batch_stats

  return statistics_step
