"""Eight devices against one on the whole network in `mini`."""

import pytest
from steps_test import assert_close, trained

pytestmark = pytest.mark.slow

# What shares statistics on one device, and the same on eight.
FORMS = {
  'global': ((), ()),
  'device': (
    ('bn.statistics=group', 'bn.virtual_batch_size=4'),
    ('bn.statistics=device',),
  ),
  'group': (
    ('bn.statistics=group', 'bn.virtual_batch_size=8'),
    ('bn.statistics=group', 'bn.virtual_batch_size=8'),
  ),
}


@pytest.mark.parametrize('form', FORMS)
def test_float64(form, x64):
  one, eight = FORMS[form]
  expected, _ = trained(1, 1, *one)
  found, _ = trained(8, 1, *eight)
  # After one step momentum is the gradient.
  assert_close(found.opt_state, expected.opt_state, 1e-10)
  assert_close(found.batch_stats, expected.batch_stats, 1e-10)
  if form == 'global':
    expected, _ = trained(1, 20, *one)
    found, _ = trained(8, 20, *eight)
    assert_close(found.params, expected.params, 1e-6)


def test_float32():
  """After one step; after more, float32 is chaos."""
  one, eight = FORMS['global']
  expected, _ = trained(1, 1, 'model.dtype=float32', *one)
  found, _ = trained(8, 1, 'model.dtype=float32', *eight)
  assert_close(found.batch_stats, expected.batch_stats, 1e-5)
  assert_close(found.opt_state, expected.opt_state, 1e-4)
