"""Sections 2 to 3.4 of the paper: a test for each equation or claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bn_repro.models import batch_norm as bn

pytestmark = pytest.mark.usefixtures('x64')

# A batch of 4 examples with 2 features, and epsilon 1e-5. The expected values
# agree with PyTorch's autograd to 4e-16.
X = np.array([[1, -2], [2, 0], [4, 2], [5, 8]], np.float64)
DY = np.array([[1, 0], [0, 2], [-1, 1], [0.5, -1]], np.float64)
GAMMA, BETA = np.array([1.5, -0.5]), np.array([0.25, 1.0])
Y = [
  [-1.6473628013792196, 1.534522292924064],
  [-0.6986814006896098, 1.267261146462032],
  [1.1986814006896098, 1.0],
  [2.1473628013792196, 0.19821656061390402],
]
DX = [
  [0.45062518321173406, 0.1622656278874185],
  [-0.30832069628203845, -0.15272068921056872],
  [-0.8775310545799738, -0.06681528661550801],
  [0.735226567650278, 0.057270347938658206],
]
DGAMMA, DBETA = [-1.2649085342528132, -2.67261146462032], [0.5, 2.0]

COLUMNS = bn.Settings(bn.Sharing((0,)), 1e-5)
TWO_REDUCTIONS = COLUMNS._replace(one_reduction=False)
IMAGES = bn.Settings(bn.Sharing((0, 1, 2)), 1e-5)


def transform(x, gamma=1.0, beta=0.0, settings=COLUMNS):
  """Algorithm 1 with pivot 0; returns y, mean, variance and count."""
  shape = [
    1 if axis in settings.sharing.axes else n for axis, n in enumerate(x.shape)
  ]
  gamma, beta = (
    jnp.broadcast_to(jnp.asarray(v, jnp.float64), shape) for v in (gamma, beta)
  )
  return bn.batch_norm(
    jnp.asarray(x),
    gamma,
    beta,
    jnp.zeros(shape),
    jnp.ones(shape),
    None,
    settings,
  )


def random(*shape, seed=0):
  return np.random.default_rng(seed).normal(0.3, 1.7, shape)


def test_algorithm_1():
  y, mu, var, m = transform(X, GAMMA[None], BETA[None])
  np.testing.assert_allclose(mu[0], [3, 2], rtol=1e-15)
  np.testing.assert_allclose(var[0], [2.5, 14], rtol=1e-15)
  np.testing.assert_allclose(y, Y, rtol=1e-14)
  assert m == 4


def test_backward_pass_golden_vector():
  def f(x, gamma, beta):
    return transform(x, gamma, beta)[0]

  _, pullback = jax.vjp(f, jnp.asarray(X), GAMMA[None], BETA[None])
  dx, dgamma, dbeta = pullback(jnp.asarray(DY))
  np.testing.assert_allclose(dx, DX, rtol=1e-13)
  np.testing.assert_allclose(dgamma[0], DGAMMA, rtol=1e-13)
  np.testing.assert_allclose(dbeta[0], DBETA, rtol=1e-13)


def test_backward_pass_six_equations():
  """The gradients as printed in the paper, computed with NumPy."""
  x, dy = random(7, 3), random(7, 3, seed=1)
  gamma, m, eps = random(3, seed=2), 7, 1e-5
  mu, var = x.mean(0), x.var(0)
  dxhat = dy * gamma
  dvar = (dxhat * (x - mu)).sum(0) * -0.5 * (var + eps) ** -1.5
  dmu = (-dxhat / np.sqrt(var + eps)).sum(0) + dvar * (-2 * (x - mu)).sum(0) / m
  dx = dxhat / np.sqrt(var + eps) + dvar * 2 * (x - mu) / m + dmu / m
  xhat = (x - mu) / np.sqrt(var + eps)
  _, pullback = jax.vjp(
    lambda x, g, b: transform(x, g, b)[0],
    jnp.asarray(x),
    gamma[None],
    np.zeros((1, 3)),
  )
  found = pullback(jnp.asarray(dy))
  for a, b in zip(
    found, (dx, (dy * xhat).sum(0)[None], dy.sum(0)[None]), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize('settings', [COLUMNS, TWO_REDUCTIONS])
def test_backward_pass_finite_differences(settings):
  """Of the output, and of a loss on the statistics."""
  x, dy = random(5, 2), random(5, 2, seed=1)
  dmu, dvar = random(2, 1, 2, seed=2)

  def loss(x):
    y, mu, var, _ = transform(x, 1.3, settings=settings)
    return jnp.sum(y * dy) + jnp.sum(mu * dmu) + jnp.sum(var * dvar)

  gradient = jax.grad(loss)(jnp.asarray(x))
  for index in np.ndindex(x.shape):
    step = np.zeros_like(x)
    step[index] = 1e-6
    difference = (loss(x + step) - loss(x - step)) / 2e-6
    np.testing.assert_allclose(gradient[index], difference, rtol=1e-6)


def test_normalized_values_have_mean_0_and_variance_1():
  settings = COLUMNS._replace(epsilon=0.0)
  xhat = transform(random(50, 4), settings=settings)[0]
  np.testing.assert_allclose(xhat.sum(0), 0, atol=1e-12)
  np.testing.assert_allclose((xhat**2).mean(0), 1, rtol=1e-13)


def test_gamma_and_beta_can_restore_the_identity():
  x = random(20, 3)
  gamma = np.sqrt(x.var(0) + 1e-5)[None]
  y = transform(x, gamma, x.mean(0)[None])[0]
  np.testing.assert_allclose(y, x, rtol=1e-12)


def test_section_2_bias_drifts_if_gradients_ignore_the_mean():
  """The bias grows without bound while the loss does not change."""
  u = jnp.asarray(random(30))
  target = jnp.asarray(random(30, seed=1)) + 3

  def train(stop):
    def loss(b):
      x = u + b
      mean = x.mean()
      return jnp.mean(
        (x - (jax.lax.stop_gradient(mean) if stop else mean) - target) ** 2
      )

    b, losses = 0.0, []
    for _ in range(50):
      losses.append(loss(b))
      b = b - 0.1 * jax.grad(loss)(b)
    return abs(b), losses

  drift, losses = train(stop=True)
  assert drift > 10
  np.testing.assert_allclose(losses[-1], losses[0], rtol=1e-12)
  assert train(stop=False)[0] < 1e-12


def test_section_2_no_gradient_of_a_shift_through_batch_norm():
  x, dy = jnp.asarray(random(9, 2)), jnp.asarray(random(9, 2, seed=1))
  gradient = jax.grad(lambda b: jnp.sum(transform(x + b)[0] * dy))(0.0)
  np.testing.assert_allclose(gradient, 0, atol=1e-12)


def layer(**kwargs):
  return bn.BatchNorm(param_dtype=jnp.float64, **kwargs)


def trained(x, **kwargs):
  """Variables of a layer after one training batch, with momentum 0.9."""
  module = layer(momentum=0.9, use_running_average=False, **kwargs)
  variables = module.init(jax.random.key(0), x)
  _, updated = module.apply(variables, x, mutable=['batch_stats'])
  return {**variables, **updated}


def test_algorithm_2_moving_average_of_the_unbiased_variance():
  variables = trained(jnp.asarray(X))
  np.testing.assert_allclose(
    variables['batch_stats']['var'], [0.9 + 1 / 3, 0.9 + 28 / 15], rtol=1e-14
  )
  np.testing.assert_allclose(
    variables['batch_stats']['mean'], [0.3, 0.2], rtol=1e-14
  )


def test_section_3_2_convolutions_share_over_locations():
  """Each feature map has one mean and variance, over m' = m * p * q values."""
  x = random(2, 3, 5, 4)
  variables = trained(jnp.asarray(x))
  m = 2 * 3 * 5
  expected = 0.9 + 0.1 * x.var((0, 1, 2)) * m / (m - 1)
  np.testing.assert_allclose(
    variables['batch_stats']['var'], expected, rtol=1e-13
  )
  assert variables['params']['scale'].shape == (4,)


def test_per_activation_form():
  x = random(6, 3, 5, 4)
  variables = trained(jnp.asarray(x), axis=(1, 2, 3))
  expected = 0.9 + 0.1 * x.var(0, ddof=1)
  np.testing.assert_allclose(
    variables['batch_stats']['var'], expected, rtol=1e-13
  )
  assert variables['params']['scale'].shape == (3, 5, 4)


def test_algorithm_2_inference_is_an_affine_map():
  x = jnp.asarray(random(6, 4))
  variables = trained(x)
  gamma, beta = jnp.asarray(random(4, seed=3)), jnp.asarray(random(4, seed=4))
  variables = {**variables, 'params': {'scale': gamma, 'bias': beta}}
  y = layer(use_running_average=True).apply(variables, x)
  stats = variables['batch_stats']
  a, c = bn.inference_transform(gamma, beta, stats['mean'], stats['var'], 1e-5)
  np.testing.assert_allclose(y, a[None] * x + c[None], rtol=1e-13)
  expected = (x - stats['mean'][None]) / np.sqrt(stats['var'] + 1e-5)[None]
  np.testing.assert_allclose(
    y, expected * gamma[None] + beta[None], rtol=1e-12, atol=1e-13
  )


def test_section_3_4_batch_mates_matter_in_training_alone():
  x = random(6, 4)
  other = np.concatenate([x[:1], random(5, 4, seed=9)])
  variables = trained(jnp.asarray(x))
  for average, same in ((True, True), (False, False)):
    module = layer(use_running_average=average)
    first, second = (
      module.apply(variables, jnp.asarray(batch), mutable=['batch_stats'])[0][0]
      for batch in (x, other)
    )
    assert np.allclose(first, second) is same


def test_section_3_2_bias_before_batch_norm_is_canceled():
  x, bias = random(8, 4), random(4, seed=5)
  np.testing.assert_allclose(
    transform(x + bias)[0], transform(x)[0], rtol=1e-11, atol=1e-13
  )


@pytest.mark.parametrize('a', [1e-2, 1.0, 37.0])
def test_section_3_3_scale_invariance(a):
  """BN((aW)u) = BN(Wu); d/du is equal, and d/d(aW) = d/dW / a."""
  u, w = jnp.asarray(random(16, 5)), jnp.asarray(random(5, 3, seed=1))
  dy = jnp.asarray(random(16, 3, seed=2))
  settings = COLUMNS._replace(epsilon=0.0)

  def output(w, u):
    return transform(u @ w, settings=settings)[0]

  y, pullback = jax.vjp(output, w, u)
  scaled_y, scaled_pullback = jax.vjp(output, a * w, u)
  np.testing.assert_allclose(scaled_y, y, rtol=1e-11, atol=1e-13)
  (dw, du), (scaled_dw, scaled_du) = pullback(dy), scaled_pullback(dy)
  np.testing.assert_allclose(scaled_du, du, rtol=1e-10, atol=1e-13)
  np.testing.assert_allclose(a * scaled_dw, dw, rtol=1e-10, atol=1e-13)


def test_training_form_equals_a_naive_one_under_autodiff():
  x, dy = jnp.asarray(random(4, 3, 3, 5)), jnp.asarray(random(4, 3, 3, 5))
  gamma = jnp.asarray(random(1, 1, 1, 5, seed=2))

  def naive(x, gamma):
    mean = x.mean((0, 1, 2), keepdims=True)
    var = ((x - mean) ** 2).mean((0, 1, 2), keepdims=True)
    return gamma * (x - mean) / jnp.sqrt(var + 1e-5)

  ours = lambda x, g: transform(x, g, settings=IMAGES)[0]  # noqa: E731
  expected = jax.vjp(naive, x, gamma)[1](dy)
  found = jax.vjp(ours, x, gamma)[1](dy)
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
