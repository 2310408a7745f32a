"""The optimizer against the update rule written out in float64 NumPy."""

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest

from bn_repro.training import optimizer as optimizer_lib


def settings(**changes):
  return ConfigDict(
    {
      'learning_rate': 0.2,
      'momentum': 0.9,
      'weight_decay': 0.03,
      'decay_rate': 0.5,
      'decay_epochs': 2.0,
      'polyak_decay': 0.0,
      **changes,
    }
  )


STEPS_PER_EPOCH = 1.5
# A rate of 0.2, halved after every three steps.
RATES = (0.2,) * 3 + (0.1,) * 3 + (0.05,) * 3 + (0.025,)


def parameters():
  rng = np.random.default_rng(0)
  return {
    'conv': {'kernel': rng.normal(size=(3, 4)), 'bias': rng.normal(size=4)},
    'bn': {'scale': rng.normal(size=4), 'bias': rng.normal(size=4)},
  }


def gradients():
  rng = np.random.default_rng(1)
  return [
    jax.tree.map(lambda x: rng.normal(size=x.shape), parameters())
    for _ in RATES
  ]


def optimize(config, batch_size):
  """Parameters, and their Polyak averages, after each step."""
  schedule = optimizer_lib.create_schedule(config, STEPS_PER_EPOCH)
  optimizer = optimizer_lib.create_optimizer(config, batch_size, schedule)
  params = jax.tree.map(jnp.asarray, parameters())
  state = optimizer.init(params)
  history = []
  for gradient in gradients():
    updates, state = optimizer.update(gradient, state, params)
    params = jax.tree.map(jnp.add, params, updates)
    history.append((params, optimizer_lib.averaged_parameters(state)))
  return history


def expected_history(scale, weight_decay, momentum=0.9):
  """Leaf by leaf: g + wd * w, then v, then w (A11 of docs/reading_guide.md)."""
  history = []
  weights = {
    (module, name): value.copy()
    for module, leaves in parameters().items()
    for name, value in leaves.items()
  }
  velocity = dict.fromkeys(weights, 0.0)
  for rate, gradient in zip(RATES, gradients(), strict=True):
    for (module, name), w in weights.items():
      decay = weight_decay if name == 'kernel' else 0.0
      g = gradient[module][name] + decay * w
      velocity[module, name] = momentum * velocity[module, name] + g
      weights[module, name] = w - scale * rate * velocity[module, name]
    history.append(dict(weights))
  return history


def assert_close(found, expected):
  for (module, name), value in expected.items():
    np.testing.assert_allclose(found[module][name], value, rtol=1e-6)


@pytest.mark.parametrize('batch_size, scale', [(32, 1), (256, 8), (8, 0.25)])
def test_ten_steps(batch_size, scale, x64):
  found = optimize(settings(), batch_size)
  expected = expected_history(scale, 0.03)
  for (params, average), values in zip(found, expected, strict=True):
    assert_close(params, values)
    assert average is None


def test_without_momentum_and_decay(x64):
  found = optimize(settings(momentum=0.0, weight_decay=0.0), 32)
  expected = expected_history(1, weight_decay=0.0, momentum=0.0)
  assert_close(found[-1][0], expected[-1])


def test_polyak_average(x64):
  found = optimize(settings(polyak_decay=0.8), 32)
  values = expected_history(1, 0.03)
  for step, (params, average) in enumerate(found, start=1):
    assert_close(params, values[step - 1])
    for (module, name), last in values[step - 1].items():
      # The initial value, and each later one, weighted in closed form.
      initial = parameters()[module][name]
      expected = 0.8**step * initial + sum(
        0.2 * 0.8 ** (step - 1 - i) * values[i][module, name]
        for i in range(step)
      )
      np.testing.assert_allclose(average[module][name], expected, rtol=1e-6)
      assert not np.allclose(average[module][name], last, rtol=1e-4)


def test_rate_is_the_paper_s_at_batch_32():
  assert optimizer_lib.applied_learning_rate(settings(), 32) == 0.2
  assert optimizer_lib.applied_learning_rate(settings(), 256) == pytest.approx(
    1.6
  )


@pytest.mark.parametrize(
  'decay_rate, decay_epochs, epoch, factor',
  [
    # About 0.019, 0.0097 and 0.20 of the start, in whole intervals.
    (0.96, 8.0, 774.3, 0.01986),
    (0.94, 2.0, 150.1, 0.00965),
    (0.94, 2.0, 52.5, 0.2001),
  ],
)
def test_what_is_left_at_the_end(decay_rate, decay_epochs, epoch, factor):
  config = settings(decay_rate=decay_rate, decay_epochs=decay_epochs)
  schedule = optimizer_lib.create_schedule(config, 1_281_167 / 32)
  step = np.int32(epoch * 1_281_167 / 32)
  assert float(schedule(step)) == pytest.approx(factor, rel=1e-3)


@pytest.mark.parametrize('decay_epochs', [1.2, 1.2 / 6])
def test_staircase_falls_at_whole_intervals(decay_epochs):
  """Of 150 and 25 steps; their floating-point lengths are not whole."""
  config = settings(decay_rate=0.85, decay_epochs=decay_epochs)
  schedule = optimizer_lib.create_schedule(config, 4000 / 32)
  found = [float(schedule(np.int32(step))) for step in range(500)]
  interval = round(decay_epochs * 125)
  expected = [0.85 ** (step // interval) for step in range(500)]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_schedule_depends_on_the_step_alone():
  """A state's count of steps, and not the length of the run, sets the rate."""
  schedule = optimizer_lib.create_schedule(settings(), STEPS_PER_EPOCH)
  factors = [float(schedule(step)) for step in range(10)]
  assert [0.2 * factor for factor in factors] == pytest.approx(RATES)
