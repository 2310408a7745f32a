"""Eight devices against one on the whole network in `mini`."""

import jax
import pytest
from steps_case import assert_close, experiment_of, trained

from bn_repro import parallel

pytestmark = pytest.mark.slow

WHOLE = 'model.name=inception'
# What shares statistics on one device, and the same on eight. Of 16 images and
# more: with statistics of 4, a change of the parameters by 1e-15 grows to 1e-6
# in ten steps and to 1 in twenty, on one device as well.
FORMS = {
  'global': ((), ()),
  'device': (
    ('batch_size=128', 'bn.statistics=group', 'bn.virtual_batch_size=16'),
    ('batch_size=128', 'bn.statistics=device'),
  ),
  'group': (
    ('batch_size=128', 'bn.statistics=group', 'bn.virtual_batch_size=32'),
    ('batch_size=128', 'bn.statistics=group', 'bn.virtual_batch_size=32'),
  ),
}


@pytest.mark.parametrize('form', FORMS)
def test_the_whole_network_in_float64(form, x64):
  one, eight = FORMS[form]
  expected, _ = trained(1, 1, WHOLE, *one)
  found, _ = trained(8, 1, WHOLE, *eight)
  # After one step momentum is the gradient.
  assert_close(found.opt_state, expected.opt_state, 1e-10)
  assert_close(found.batch_stats, expected.batch_stats, 1e-10)
  # A change of the parameters by 1e-15, on one device alone, may grow to 1e-3
  # within 15 steps, where a maximum or a ReLU takes its other side.
  expected, _ = trained(1, 10, WHOLE, *one)
  found, _ = trained(8, 10, WHOLE, *eight)
  assert_close(found.params, expected.params, 1e-6)


@pytest.mark.parametrize('form', FORMS)
def test_the_whole_network_in_float32(form):
  """One step from equal states, at which no maximum or ReLU is undecided.

  At about half of the steps, rounding takes another side of one, on one device
  with parameters changed by their last bit as well; that is 1e-2 of the
  gradients below it. At the others the difference is at most 2e-5. A fault
  shows at every step, so the first that agrees ends the test.
  """
  experiments = [
    experiment_of(
      num_devices, (WHOLE, 'model.dtype=float32', *options), 'bn_baseline'
    )
    for num_devices, options in zip((1, 8), FORMS[form], strict=True)
  ]
  state = experiments[0].initial_state()
  batches = zip(*(e.stacked_batches(0, 30) for e in experiments), strict=True)
  for pair in batches:
    expected, found = (
      jax.device_get(
        experiment.steps.train_steps(
          parallel.replicate(experiment.mesh, state), batch
        )[0]
      )
      for experiment, batch in zip(experiments, pair, strict=True)
    )
    assert_close(found.batch_stats, expected.batch_stats, 1e-5)
    try:
      assert_close(found.opt_state, expected.opt_state, 1e-4)
      return
    except AssertionError as error:
      problem = error
    state = expected
  raise problem
