"""Eight devices against one, in float64: the same numbers."""

import jax
import numpy as np
import pytest
from steps_case import assert_close, experiment_of, trained

from bn_repro import config as config_lib
from bn_repro import parallel
from bn_repro.data import datasets
from bn_repro.training.experiment import create_experiment

# In one worker, so that each experiment compiles once.
pytestmark = pytest.mark.xdist_group('steps')


# The MNIST network compiles fastest; its batch is four images per device here.
MLP = ('batch_size=32', 'steps_per_call=1', 'data.distorted_copies=0')


@pytest.mark.parametrize(
  'variant, one, eight',
  [
    ('bn_baseline', (), ()),
    (
      'bn_mnist',
      (*MLP, 'bn.statistics=group', 'bn.virtual_batch_size=4'),
      (*MLP, 'bn.statistics=device'),
    ),
    (
      'bn_baseline',
      ('bn.statistics=group', 'bn.virtual_batch_size=8'),
      ('bn.statistics=group', 'bn.virtual_batch_size=8'),
    ),
    # In the last module of the small network, 3c.
    ('bn_x30', ('bn.per_activation=true',), ('bn.per_activation=true',)),
  ],
  ids=['global', 'device', 'group', 'per activation'],
)
def test_eight_devices_equal_one(variant, one, eight, x64):
  """With dropout: which units drop does not depend on the devices either."""
  expected, expected_sums = trained(1, 1, *one, variant=variant)
  found, sums = trained(8, 1, *eight, variant=variant)
  # After one step momentum is the gradient.
  assert_close(found.opt_state, expected.opt_state, 1e-10)
  assert_close(found.batch_stats, expected.batch_stats, 1e-10)
  assert sums.loss == pytest.approx(expected_sums.loss, rel=1e-12)
  assert sums.count == expected_sums.count == 32


def test_several_steps(x64):
  """Twenty of the whole network are a slow test, in `devices_test`."""
  expected, _ = trained(1, 6)
  found, _ = trained(8, 6)
  assert_close(found.params, expected.params, 1e-6)


@pytest.mark.parametrize(
  'variant', [pytest.param('bn_x5', marks=pytest.mark.slow), 'bn_mnist']
)
def test_steps_in_one_call_are_the_steps(variant, x64):
  """One trainer: a scan over five batches against five calls."""
  short = ('log_every=10', 'eval_every=10', 'checkpoint_every=10')
  (one, one_sums), (five, five_sums) = (
    trained(2, 10, f'steps_per_call={number}', *short, variant=variant)
    for number in (1, 5)
  )
  assert int(five.step) == 10
  assert_close(five.params, one.params, 1e-9)
  assert_close(five.opt_state, one.opt_state, 1e-9)
  assert five_sums.loss == pytest.approx(one_sums.loss, rel=1e-9)


def test_statistics_forms_differ(x64):
  """So that the equalities above say something."""
  shared, _ = trained(1, 1)
  grouped, _ = trained(1, 1, 'bn.statistics=group', 'bn.virtual_batch_size=4')
  with pytest.raises(AssertionError):
    assert_close(grouped.batch_stats, shared.batch_stats, 1e-3)


def test_each_step_drops_other_units(x64):
  """Of the same batch and parameters, without distortion.

  They are behind the last BN: what is dropped changes no statistic.
  """
  options = ('data.distortion=none', 'model.dropout_rate=0.5')
  experiment = experiment_of(1, options, 'bn_baseline')
  batches = next(experiment.stacked_batches(0, 1))
  losses, statistics = [], []
  for step in (0, 1, 0):
    state = experiment.initial_state().replace(step=np.int32(step))
    state = parallel.replicate(experiment.mesh, state)
    state, sums = experiment.steps.train_steps(state, batches)
    losses += [sums.loss for sums in sums.fetch_steps()]
    statistics.append(jax.device_get(state.batch_stats))
  assert losses[0] == losses[2] != losses[1]
  assert_close(statistics[1], statistics[0], 0)


def test_rates_are_not_compiled_in():
  """BN-x5 and BN-x30 are one program, so that a sweep compiles once."""
  texts = []
  for variant, seed in (('bn_x5', 0), ('bn_x30', 1)):
    config = config_lib.load(
      f'configs/{variant}.py:mini',
      ('model.name=inception_tiny', f'seed={seed}'),
    )
    experiment = create_experiment(config, datasets.check(config))
    state = parallel.replicate(experiment.mesh, experiment.initial_state())
    batches = next(experiment.stacked_batches(0, 1))
    texts.append(experiment.steps.train_steps.lower(state, batches).as_text())
  assert texts[0] == texts[1]


def test_l2_is_on_weights_only():
  """With a huge weight decay the others still get their gradients alone."""
  plain, heavy = (
    trained(
      1,
      1,
      'model.dtype=float32',
      'steps_per_call=1',
      'data.distorted_copies=0',
      f'optim.weight_decay={decay}',
      variant='bn_mnist',
    )[0]
    for decay in (0, 100)
  )
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(plain.params),
    jax.tree.leaves(heavy.params),
    strict=True,
  ):
    assert np.array_equal(a, b) == (path[-1].key != 'kernel'), path
