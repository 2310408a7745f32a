"""Against PyTorch: golden files that `make_torch_golden.py` has written.

Float64, the 608 reading with torch padding; the same weights and batches. The
files hold outputs in full, and two numbers of each array of weights, gradients
and statistics.
"""

from pathlib import Path

import jax
import numpy as np
import optax
import pytest
import torch_case

from bn_repro import config as config_lib
from bn_repro import parallel
from bn_repro.data import preprocess
from bn_repro.models import factory
from bn_repro.training import optimizer as optimizer_lib
from bn_repro.training import steps

HERE = Path(__file__).resolve().parent.parent
# Relative, as the issue of the two frameworks' rounding is of 1e-13 and up.
TOLERANCE = 1e-9


@pytest.fixture(autouse=True)
def float64(x64):
  """All of it."""


def assert_close(found, expected):
  """Norm of the difference over the norm."""
  found = np.asarray(found, np.float64)
  assert found.shape == expected.shape
  difference = np.linalg.norm(found - expected)
  assert difference <= TOLERANCE * np.linalg.norm(expected)


def assert_projections_close(arrays, expected):
  """Each array's two numbers, to the norm of the array."""
  found = torch_case.projections(arrays)
  assert found.shape == expected.shape
  error = np.abs(found - expected).max(1) / expected[:, 0]
  assert error.max() <= TOLERANCE, int(error.argmax())


def create(config, image_size, num_classes):
  model = factory.create_model(
    config.model, config.bn, num_classes, axis_name=None
  )
  images = np.zeros((1, image_size, image_size, 3))
  shapes = jax.eval_shape(
    lambda key: model.init(key, images, train=True), jax.random.key(0)
  )
  variables = torch_case.draw_variables(shapes)
  assert jax.tree.map(np.shape, variables) == jax.tree.map(np.shape, shapes)
  return model, variables


@pytest.mark.slow
def test_ten_steps_of_training():
  golden = np.load(HERE / 'torch_small.npz')
  config = config_lib.load('configs/bn_baseline.py:mini', torch_case.SMALL)
  model, variables = create(config, 32, 10)
  optimizer = optimizer_lib.create_optimizer(
    config.optim,
    config.batch_size,
    optimizer_lib.create_schedule(config.optim, 1e6),
  )
  mesh = parallel.create_mesh(jax.devices()[:1])
  train_step = parallel.data_parallel(
    steps.create_train_step(model, optimizer, config), mesh, donate_state=False
  )
  state = steps.TrainState(
    np.int32(0),
    np.uint32(0),
    variables['params'],
    variables['batch_stats'],
    optimizer.init(variables['params']),
  )
  losses = []
  for images, labels in torch_case.batches(torch_case.NUM_STEPS, 32, 32, 10):
    batch = {
      'image': images,
      'label': labels,
      'mask': np.ones(32, bool),
      'replaced': np.zeros(32, bool),
    }
    state, sums = train_step(state, batch)
    losses.append(sums.fetch().means()['loss'])
    if len(losses) == 1:
      # After one step momentum is the gradient, and the L2 term of kernels.
      momentum = optax.tree.get(state.opt_state, 'trace')
      first = [
        leaf - config.optim.weight_decay * before * (before.ndim > 1)
        for leaf, before in zip(
          torch_case.leaves(momentum),
          torch_case.leaves(variables['params']),
          strict=True,
        )
      ]
  assert_close(losses, golden['losses'])
  assert_projections_close(first, golden['first_gradients'])
  assert_projections_close(torch_case.leaves(state.params), golden['params'])
  assert_projections_close(
    torch_case.statistics(state.batch_stats), golden['batch_stats']
  )
  ((images, _),) = torch_case.batches(1, 32, 32, 10)
  logits = model.apply(
    {'params': state.params, 'batch_stats': state.batch_stats},
    preprocess.normalize(images, np.float64, 'symmetric'),
    train=False,
  ).main
  assert_close(logits, golden['logits'])


@pytest.mark.slow
def test_pytorchcv_bninception():
  """The whole network at 224 pixels, in inference and in training."""
  golden = np.load(HERE / 'torch_full.npz')
  config = config_lib.load('configs/bn_baseline.py', torch_case.FULL)
  model, variables = create(config, 224, 1000)
  ((images, labels),) = torch_case.batches(1, 2, 224, 1000)
  images = preprocess.normalize(images, np.float64, 'symmetric')
  inference = jax.jit(lambda: model.apply(variables, images, train=False).main)
  assert_close(inference(), golden['inference'])

  @jax.jit
  def training(params):
    def loss_fn(params):
      logits, updated = model.apply(
        {'params': params, 'batch_stats': variables['batch_stats']},
        images,
        train=True,
        mutable=['batch_stats'],
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.main, labels
      )
      return losses.mean(), (logits.main, updated['batch_stats'])

    return jax.value_and_grad(loss_fn, has_aux=True)(params)

  (loss, (logits, batch_stats)), gradients = training(variables['params'])
  assert_close(logits, golden['training'])
  assert_close(loss, golden['loss'])
  assert_projections_close(torch_case.leaves(gradients), golden['gradients'])
  assert_projections_close(
    torch_case.statistics(batch_stats), golden['batch_stats']
  )
