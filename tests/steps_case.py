"""Training for a few steps in float64, for the tests of steps and devices."""

import functools

import jax
import numpy as np

from bn_repro import config as config_lib
from bn_repro import parallel
from bn_repro.data import datasets
from bn_repro.training.experiment import create_experiment


@functools.cache
def experiment_of(num_devices, overrides, variant):
  """An experiment, which compiles once for all tests."""
  config = config_lib.load(
    f'configs/{variant}.py:mini',
    (
      *(() if variant == 'bn_mnist' else ('model.name=inception_tiny',)),
      'model.dtype=float64',
      'total_steps=100',
      *overrides,
    ),
  )
  mesh = parallel.create_mesh(jax.devices()[:num_devices])
  return create_experiment(config, datasets.check(config), mesh)


def trained(num_devices, num_steps, *overrides, variant='bn_baseline'):
  """The state after some steps, on the host."""
  experiment = experiment_of(num_devices, overrides, variant)
  state = parallel.replicate(experiment.mesh, experiment.initial_state())
  for batches in experiment.stacked_batches(0, num_steps):
    state, sums = experiment.steps.train_steps(state, batches)
  return jax.device_get(state), sums.fetch_steps()[-1]


def assert_close(found, expected, tolerance):
  """Norm of the difference over the norm, leaf by leaf."""
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(found),
    jax.tree.leaves(expected),
    strict=True,
  ):
    norm = np.linalg.norm(np.ravel(b).astype(np.float64))
    difference = np.linalg.norm(np.ravel(a - b).astype(np.float64))
    assert difference <= tolerance * max(norm, 1e-12), (path, difference, norm)
