"""Inference with a trained network."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from bn_repro import parallel
from bn_repro.data import preprocess
from bn_repro.models import factory
from bn_repro.training.model_file import ModelFile

# Maps variables and uint8 images (batch, height, width, channels) to an array
# (batch, classes), at least float32.
Forward = Callable[[Any, Any], jax.Array]


def create_logits(model: ModelFile) -> Forward:
  """Creates the pure function from variables and images to logits."""
  config = model.config
  network: Any = factory.create_model(
    config.model, config.bn, len(model.label_names)
  )

  def logits(variables: Any, images: Any) -> jax.Array:
    images = preprocess.normalize(
      images, network.dtype, config.data.normalization
    )
    found = network.apply(variables, images, train=False).main
    return found.astype(jnp.promote_types(found.dtype, jnp.float32))

  return logits


def create_probabilities(model: ModelFile) -> Forward:
  """Creates the pure function from variables and images to probabilities."""
  logits = create_logits(model)
  return lambda variables, images: jax.nn.softmax(logits(variables, images))


def create_predict(
  model: ModelFile, mesh: Mesh | None = None
) -> Callable[[np.ndarray], jax.Array]:
  """Creates the function from images to class probabilities.

  Args:
    model: a trained network, whose BN statistics are used.
    mesh: the devices, which share each batch; all devices by default.

  Returns:
    A function of uint8 (batch, height, width, channels) that returns float32
    (batch, classes). It is compiled for each size of a batch.
  """
  mesh = parallel.create_mesh() if mesh is None else mesh
  probabilities = create_probabilities(model)

  def gathered(variables: Any, images: jax.Array) -> jax.Array:
    return parallel.gather(probabilities(variables, images).astype(jnp.float32))

  compiled = parallel.data_parallel(gathered, mesh, donate_state=False)
  variables = parallel.replicate(mesh, dict(model.variables))

  def predict(images: np.ndarray) -> jax.Array:
    padding = -len(images) % mesh.devices.size
    padded = np.pad(images, [(0, padding), (0, 0), (0, 0), (0, 0)])
    batch = parallel.shard_batch(mesh, padded)
    return compiled(variables, batch)[: len(images)]

  return predict
