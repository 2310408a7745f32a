"""The experiment of a config: model, optimizer, compiled steps and batches."""

from collections.abc import Generator, Iterator
import dataclasses
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np
import optax

from bn_repro import config as config_lib
from bn_repro import parallel
from bn_repro.data import datasets, input_pipeline
from bn_repro.data import split as split_lib
from bn_repro.models import factory
from bn_repro.training import optimizer as optimizer_lib
from bn_repro.training import steps


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a config describes, on a mesh of devices.

  Attributes:
    config: a checked config.
    dataset: its data set.
    mesh: the devices.
    model: the network.
    optimizer: momentum SGD, see `optimizer.create_optimizer`.
    schedule: maps a step to a factor of the learning rate.
    train_steps: `(state, batches) -> (state, sums)` over `steps_per_call`
      steps; donates the state.
    eval_step: `(state, batch) -> (sums, probes)`.
    statistics_step: `(state, batch) -> batch_stats` of that batch.
  """

  config: ConfigDict
  dataset: datasets.Dataset
  mesh: Mesh
  model: nn.Module
  optimizer: optax.GradientTransformation
  schedule: Any
  train_steps: Any
  eval_step: Any
  statistics_step: Any

  @property
  def total_steps(self) -> int:
    """Steps of the whole run."""
    return config_lib.total_steps(
      self.config, len(self.dataset.splits['train'])
    )

  def initial_state(self) -> steps.TrainState:
    """The state at step 0, NumPy arrays on the host."""
    config = self.config
    variables = factory.initial_variables(
      self.model,
      self.dataset.image_shape,
      config.seed,
      config.model.init_std,
      config.model.init_scale,
    )
    opt_state = self.optimizer.init(variables['params'])
    state = steps.TrainState(
      step=np.int32(0),
      seed=np.uint32(config.seed),
      params=variables['params'],
      batch_stats=variables['batch_stats'],
      opt_state=opt_state,
    )
    return jax.tree.map(np.asarray, state)

  def train_batches(self, first: int, last: int) -> Iterator[Any]:
    """Batches of training steps `first` to `last` - 1, on the devices."""
    for batch in self._train_batches(first, last):
      yield parallel.shard_batch(self.mesh, batch)

  def stacked_batches(self, first: int, last: int) -> Generator[Any]:
    """Batches for `train_steps`: arrays of shape (steps_per_call, batch, ...).

    Args:
      first: the first step, a multiple of `steps_per_call`.
      last: the step after the last one, also a multiple of it.
    """
    number = self.config.steps_per_call
    for batch in self._train_batches(
      first,
      last,
      steps_per_batch=number,
      num_workers=self.config.data.num_workers,
    ):
      stacked = jax.tree.map(
        lambda x: x.reshape(number, len(x) // number, *x.shape[1:]), batch
      )
      yield parallel.shard_batch(self.mesh, stacked, batch_axis=1)

  def _train_batches(
    self, first: int, last: int, **options: Any
  ) -> Iterator[split_lib.Batch]:
    split = self.dataset.splits['train']
    return input_pipeline.train_batches(
      split,
      input_pipeline.create_order(self.config, len(split)),
      self.config.batch_size,
      first,
      last,
      host_shard=_share(),
      **options,
    )

  def eval_batches(self, split: str) -> Iterator[Any]:
    """Every example of a split once, padded and masked, on the devices."""
    batches = input_pipeline.eval_batches(
      self.dataset.splits[split], self.config.batch_size, _share()
    )
    return (parallel.shard_batch(self.mesh, batch) for batch in batches)

  def compile(self, state: steps.TrainState) -> 'Experiment':
    """Compiles ahead of time every step that the config needs.

    Args:
      state: a state of this experiment, for its shapes and dtypes.
    """
    compiled: dict[str, Any] = {
      name: step.compile() for name, step in self.lower(state).items()
    }
    return dataclasses.replace(self, **compiled)

  def lower(self, state: steps.TrainState) -> dict[str, jax.stages.Lowered]:
    """Lowers every step that the config needs; returns them by name.

    Args:
      state: as for `compile`. The devices of the mesh need not exist.
    """
    state = parallel.replicate_abstract(self.mesh, state)
    batch = self.abstract_batch()
    batches = self.abstract_batch(self.config.steps_per_call)
    lowered = {
      'train_steps': self.train_steps.lower(state, batches),
      'eval_step': self.eval_step.lower(state, batch),
    }
    if self.config.bn.enabled and self.config.bn.population_batches:
      lowered['statistics_step'] = self.statistics_step.lower(state, batch)
    return lowered

  def abstract_batch(self, *steps: int) -> Any:
    """Shapes and dtypes of a batch, with leading axes of the sizes `steps`."""
    shape = (*steps, self.config.batch_size)
    batch = {
      'image': jax.ShapeDtypeStruct(
        (*shape, *self.dataset.image_shape), np.uint8
      ),
      'label': jax.ShapeDtypeStruct(shape, np.int32),
      'mask': jax.ShapeDtypeStruct(shape, np.bool_),
      'replaced': jax.ShapeDtypeStruct(shape, np.bool_),
    }
    return parallel.shard_abstract(self.mesh, batch, batch_axis=len(steps))


def _share() -> input_pipeline.HostShard:
  """The part of every batch that this process loads."""
  return input_pipeline.HostShard(jax.process_index(), jax.process_count())


def create_experiment(
  config: ConfigDict,
  dataset: datasets.Dataset,
  mesh: Mesh | None = None,
) -> Experiment:
  """Builds the experiment of a config, not yet compiled.

  Args:
    config: a checked config.
    dataset: the data set that it names.
    mesh: the devices; all devices by default.

  Raises:
    UserError: if the devices cannot share the batch evenly.
  """
  mesh = parallel.create_mesh() if mesh is None else mesh
  config_lib.check_divides(config, mesh.devices.size)
  model = factory.create_model(config.model, config.bn, dataset.num_classes)
  batch_statistics_model = factory.create_model(
    config.model, config.bn, dataset.num_classes, momentum=0.0
  )
  steps_per_epoch = len(dataset.splits['train']) / config.batch_size
  schedule = optimizer_lib.create_schedule(config.optim, steps_per_epoch)
  optimizer = optimizer_lib.create_optimizer(
    config.optim, config.batch_size, schedule
  )
  train_step = steps.create_train_step(model, optimizer, config)
  eval_step = steps.create_eval_step(model)
  statistics_step = steps.create_statistics_step(batch_statistics_model, config)
  return Experiment(
    config=config,
    dataset=dataset,
    mesh=mesh,
    model=model,
    optimizer=optimizer,
    schedule=schedule,
    train_steps=parallel.data_parallel(
      steps.scan_steps(train_step), mesh, donate_state=True, batch_axis=1
    ),
    eval_step=parallel.data_parallel(eval_step, mesh, donate_state=False),
    statistics_step=parallel.data_parallel(
      statistics_step, mesh, donate_state=False
    ),
  )
