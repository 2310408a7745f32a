"""The experiment of a config: model, optimizer, compiled steps and batches."""

from collections.abc import Callable, Generator, Iterator
import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
import numpy as np
import optax

from bn_repro import config as config_lib
from bn_repro import parallel
from bn_repro.data import input_pipeline
from bn_repro.data.split import Batch, Dataset
from bn_repro.models import factory
from bn_repro.training import optimizer as optimizer_lib
from bn_repro.training import steps as steps_lib


class Steps(NamedTuple):
  """The computations of an experiment, jitted or compiled.

  Attributes:
    train_steps: `(state, batches) -> (state, sums)` over `steps_per_call`
      steps; donates the state.
    eval_step: `(state, batch) -> (sums, probes)`.
    statistics_step: `(state, batch) -> batch_stats` of that batch.
  """

  train_steps: Any
  eval_step: Any
  statistics_step: Any


@dataclasses.dataclass(frozen=True)
class Experiment:
  """What a config describes, on a mesh of devices.

  Attributes:
    config: a checked config.
    dataset: its data set.
    mesh: the devices.
    model: the network.
    optimizer: momentum SGD, see `optimizer.create_optimizer`.
    steps: the computations.
  """

  config: ConfigDict
  dataset: Dataset
  mesh: Mesh
  model: nn.Module
  optimizer: optax.GradientTransformation
  steps: Steps

  @property
  def total_steps(self) -> int:
    """Steps of the whole run."""
    return config_lib.total_steps(
      self.config, len(self.dataset.splits['train'])
    )

  def learning_rate(self, step: int) -> float:
    """The learning rate of the update from `step` to `step` + 1."""
    schedule = _create_schedule(self.config, self.dataset)
    initial = optimizer_lib.applied_learning_rate(
      self.config.optim, self.config.batch_size
    )
    return initial * float(schedule(step))

  def initial_state(self) -> steps_lib.TrainState:
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
    state = steps_lib.TrainState(
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
    steps_per_call = self.config.steps_per_call
    for batch in self._train_batches(
      first,
      last,
      steps_per_batch=steps_per_call,
      num_workers=self.config.data.num_workers,
    ):
      stacked = jax.tree.map(
        lambda x: x.reshape(steps_per_call, -1, *x.shape[1:]), batch
      )
      yield parallel.shard_batch(self.mesh, stacked, batch_axis=1)

  def _train_batches(
    self, first: int, last: int, **options: Any
  ) -> Iterator[Batch]:
    split = self.dataset.splits['train']
    return input_pipeline.train_batches(
      split,
      input_pipeline.create_order(self.config, len(split)),
      self.config.batch_size,
      first,
      last,
      host_shard=_host_shard(),
      **options,
    )

  def eval_batches(self, split: str) -> Iterator[Any]:
    """Every example of a split once, padded and masked, on the devices."""
    batches = input_pipeline.eval_batches(
      self.dataset.splits[split], self.config.batch_size, _host_shard()
    )
    return (parallel.shard_batch(self.mesh, batch) for batch in batches)

  def compile(self, state: steps_lib.TrainState) -> 'Experiment':
    """Compiles ahead of time every step that the config needs.

    Args:
      state: a state of this experiment, for its shapes and dtypes.
    """
    compiled: dict[str, Any] = {
      name: self.lower(name, state).compile() for name in self.step_names()
    }
    return dataclasses.replace(self, steps=self.steps._replace(**compiled))

  def step_names(self) -> list[str]:
    """Names of the `steps` that the config needs."""
    names = ['train_steps', 'eval_step']
    if self.config.bn.enabled and self.config.bn.population_batches:
      names.append('statistics_step')
    return names

  def lower(self, name: str, state: steps_lib.TrainState) -> jax.stages.Lowered:
    """Lowers one of the steps.

    Args:
      name: one of `step_names`.
      state: as for `compile`. The devices of the mesh need not exist.
    """
    state = parallel.replicate_abstract(self.mesh, state)
    num_steps = self.config.steps_per_call if name == 'train_steps' else None
    batch = self.abstract_batch(num_steps)
    return getattr(self.steps, name).lower(state, batch)

  def abstract_batch(self, steps: int | None = None) -> Any:
    """Shapes and dtypes of a batch, or of `steps` batches on a leading axis."""
    leading = () if steps is None else (steps,)
    shape = (*leading, self.config.batch_size)
    batch = {
      'image': jax.ShapeDtypeStruct(
        (*shape, *self.dataset.image_shape), np.uint8
      ),
      'label': jax.ShapeDtypeStruct(shape, np.int32),
      'mask': jax.ShapeDtypeStruct(shape, np.bool_),
      'replaced': jax.ShapeDtypeStruct(shape, np.bool_),
    }
    return parallel.shard_abstract(self.mesh, batch, batch_axis=len(leading))


def _host_shard() -> input_pipeline.HostShard:
  """The part of every batch that this process loads."""
  return input_pipeline.HostShard(jax.process_index(), jax.process_count())


def create_experiment(
  config: ConfigDict,
  dataset: Dataset,
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
  optimizer = optimizer_lib.create_optimizer(
    config.optim, config.batch_size, _create_schedule(config, dataset)
  )
  train_step = steps_lib.create_train_step(model, optimizer, config)
  statistics_step = steps_lib.create_statistics_step(
    batch_statistics_model, config
  )
  steps = Steps(
    train_steps=parallel.data_parallel(
      steps_lib.scan_steps(train_step), mesh, donate_state=True, batch_axis=1
    ),
    eval_step=parallel.data_parallel(
      steps_lib.create_eval_step(model, config.data.normalization),
      mesh,
      donate_state=False,
    ),
    statistics_step=parallel.data_parallel(
      statistics_step, mesh, donate_state=False
    ),
  )
  return Experiment(config, dataset, mesh, model, optimizer, steps)


def _create_schedule(
  config: ConfigDict, dataset: Dataset
) -> Callable[[Any], Any]:
  steps_per_epoch = len(dataset.splits['train']) / config.batch_size
  return optimizer_lib.create_schedule(config.optim, steps_per_epoch)
