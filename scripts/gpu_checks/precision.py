"""BN, and a training step, on the device against float64 on the CPU."""

from collections.abc import Mapping
import contextlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bn_repro import config as config_lib
from bn_repro.data import datasets
from gpu_checks import device
from gpu_checks.outcomes import Figure, Settings

if TYPE_CHECKING:
  from bn_repro.training.experiment import Experiment

# Bounds on the norm of a difference over the norm of what is expected; see
# results/gpu/README.md for the reasons. They were set before any run on a GPU.
BN_FLOAT32 = 1e-5
BN_BFLOAT16 = 4e-3
BN_ONE_REDUCTION, BN_TWO_REDUCTIONS = 1e-2, 1e-3  # For large means.

# Mean of the inputs in standard deviations, where the running mean is 0.
LARGE_MEAN = 100

# Images of the paper's module 3a, and of a quick check.
_SHAPE, _QUICK_SHAPE = (32, 28, 28, 192), (32, 12, 12, 8)
_EPSILON = 1e-3


class Form(NamedTuple):
  """A form of statistics, and the inputs that it is checked with.

  Attributes:
    fast: whether there is one reduction.
    group: number of examples that share statistics; None for all.
    per_activation: whether each activation has statistics, not each channel.
    mean: mean of the inputs in standard deviations.
    bound: largest error in float32.
  """

  fast: bool = True
  group: int | None = None
  per_activation: bool = False
  mean: float = 1
  bound: float = BN_FLOAT32


# All forms of one device, to which the whole batch and its own are the same.
FORMS = {
  'one reduction': Form(),
  'two reductions': Form(fast=False),
  'groups of 8': Form(group=8),
  'per activation': Form(per_activation=True),
  'one reduction, large mean': Form(mean=LARGE_MEAN, bound=BN_ONE_REDUCTION),
  'two reductions, large mean': Form(
    fast=False, mean=LARGE_MEAN, bound=BN_TWO_REDUCTIONS
  ),
}


def batch_norm(settings: Settings) -> list[Figure]:
  """Compares BN and its gradients with float64, in each form."""
  device.start(settings.platform)
  shape = _QUICK_SHAPE if settings.quick else _SHAPE
  figures = []
  for dtype in ('float32', 'bfloat16'):
    for name, form in FORMS.items():
      if form.mean == LARGE_MEAN and dtype == 'bfloat16':
        continue  # It has no digits left for the deviations.
      inputs = _inputs(shape, form, dtype)
      found, expected = _found(form, dtype, *inputs), _expected(form, *inputs)
      errors = {key: error(found[key], expected[key]) for key in expected}
      # The layer rounds only these to bfloat16.
      rounded = ('z', 'dx') if dtype == 'bfloat16' else ()
      bounds = {
        key: BN_BFLOAT16 if key in rounded else form.bound for key in errors
      }
      worst = max(errors, key=lambda key: errors[key] / bounds[key])
      figures.append(
        Figure(
          f'{dtype}, {name}: error of {worst}, the worst',
          errors[worst],
          at_most=bounds[worst],
        )
      )
  return figures


def _float64() -> contextlib.AbstractContextManager[None]:
  import jax

  return jax.enable_x64(True)  # noqa: FBT003


def error(found: Any, expected: Any) -> float:
  """Norm of the difference of two arrays, over that of the expected one."""
  found, expected = (np.asarray(x, np.float64) for x in (found, expected))
  return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _inputs(shape: tuple[int, ...], form: Form, dtype: str) -> list[Any]:
  """Draws x, gamma, beta, and the gradient of the loss by the output."""
  import jax.numpy as jnp

  rng = np.random.default_rng(0)
  features = shape[1:] if form.per_activation else shape[-1:]
  return [
    jnp.asarray(rng.normal(form.mean, 1, shape), dtype),
    jnp.asarray(rng.normal(1, 0.1, features), np.float32),
    jnp.asarray(rng.normal(0, 0.1, features), np.float32),
    jnp.asarray(rng.normal(0, 1, shape), dtype),
  ]


def _found(
  form: Form, dtype: str, x: Any, gamma: Any, beta: Any, dz: Any
) -> Mapping[str, Any]:
  """Output, batch statistics and gradients of our layer, on the device."""
  import jax

  from bn_repro.models import batch_norm as batch_norm_lib

  layer = batch_norm_lib.BatchNorm(
    use_running_average=False,
    axis=(1, 2, 3) if form.per_activation else -1,
    momentum=0.0,  # The running statistics become those of the batch.
    epsilon=_EPSILON,
    dtype=dtype,
    use_fast_variance=form.fast,
    virtual_batch_size=form.group,
  )

  @jax.jit
  def compute(params: Any, x: Any, dz: Any) -> Any:
    z, pull_back, updated = jax.vjp(
      lambda params, x: layer.apply(
        {'params': params}, x, mutable=['batch_stats']
      ),
      params,
      x,
      has_aux=True,
    )
    return z, updated['batch_stats'], pull_back(dz)

  z, statistics, (params, dx) = compute({'scale': gamma, 'bias': beta}, x, dz)
  gradients = {'dx': dx, 'dgamma': params['scale'], 'dbeta': params['bias']}
  return {'z': z, **statistics, **gradients}


def _expected(
  form: Form, x: Any, gamma: Any, beta: Any, dz: Any
) -> Mapping[str, Any]:
  """The same in float64 on the CPU: Algorithm 1 as it is printed.

  It shares no code with the layer, and JAX differentiates it.
  """
  import jax
  import jax.numpy as jnp

  groups = len(x) // (form.group or len(x))
  axes = (1,) if form.per_activation else (1, 2, 3)

  def grouped(x: Any) -> Any:
    return x.reshape(groups, -1, *x.shape[1:])

  def transform(x: Any, gamma: Any, beta: Any) -> Any:
    x = grouped(x)
    mean = x.mean(axes, keepdims=True)
    var = ((x - mean) ** 2).mean(axes, keepdims=True)
    shape = (1,) * (x.ndim - gamma.ndim) + gamma.shape
    x_hat = (x - mean) / jnp.sqrt(var + _EPSILON)
    z = gamma.reshape(shape) * x_hat + beta.reshape(shape)
    m = x.size // mean.size
    statistics = {'mean': mean, 'var': var * m / (m - 1)}
    average = {k: s.mean(0).reshape(gamma.shape) for k, s in statistics.items()}
    return z.reshape(dz.shape), average

  with _float64(), jax.default_device(jax.devices('cpu')[0]):
    x, gamma, beta, dz = (
      jnp.asarray(np.asarray(array, np.float64))
      for array in (x, gamma, beta, dz)
    )
    z, pull_back, statistics = jax.vjp(transform, x, gamma, beta, has_aux=True)
    dx, dgamma, dbeta = pull_back(dz)
    gradients = {'dx': dx, 'dgamma': dgamma, 'dbeta': dbeta}
    return jax.device_get({'z': z, **statistics, **gradients})


class Bounds(NamedTuple):
  """Bounds on the errors of a step.

  Attributes:
    loss: of the loss.
    statistics: of all running statistics, as one vector.
    gradient: of the gradient, as one vector.
  """

  loss: float
  statistics: float
  gradient: float


# By precision: the compute type, and the precision of matrix products and
# convolutions, which on GPUs from Ampere on is TF32 by default.
STEPS = {
  'float32': ('float32', 'highest', Bounds(1e-5, 1e-5, 1e-2)),
  'float32 by default': ('float32', None, Bounds(2e-3, 2e-3, 0.5)),
  'bfloat16': ('bfloat16', None, Bounds(1e-2, 1e-2, 1.2)),
}


def step(settings: Settings) -> list[Figure]:
  """Compares the first step of BN-x5 in `mini` with float64."""
  import jax

  checked = device.start(settings.platform)
  cpu = jax.devices('cpu')[0]
  with _float64():
    exact = _experiment(settings, 'float64', cpu)
    initial = exact.initial_state()
    expected = _step(exact, initial)
  figures = []
  for name, (dtype, precision, bounds) in STEPS.items():
    with jax.default_matmul_precision(precision):
      experiment = _experiment(settings, dtype, checked)
      like = experiment.initial_state()
      state = jax.tree.map(lambda x, y: np.asarray(x, y.dtype), initial, like)
      found = _step(experiment, state)
    figures += [
      Figure(
        f'{name}: error of the {what}',
        error(found[what], expected[what]),
        at_most=bound,
      )
      for what, bound in bounds._asdict().items()
    ]
  return figures


def _experiment(settings: Settings, dtype: str, on_device: Any) -> 'Experiment':
  config = config_lib.load(
    settings.config('bn_x5:mini'), [f'model.dtype={dtype}', *settings.overrides]
  )
  dataset = datasets.check(config)
  from bn_repro import parallel
  from bn_repro.training import experiment

  mesh = parallel.create_mesh([on_device])
  return experiment.create_experiment(config, dataset, mesh)


def _step(experiment: 'Experiment', state: Any) -> Mapping[str, Any]:
  """Loss, running statistics and gradient of a step on noise, as vectors.

  Digits have areas of one color, where maxima tie and rounding decides which
  one the gradient reaches.
  """
  import jax
  import optax

  from bn_repro import parallel

  mesh = experiment.mesh
  (batch,) = experiment.stacked_batches(0, 1)
  noise = np.random.default_rng(0).integers(
    0, 256, batch['image'].shape, np.uint8
  )
  batch = {**batch, 'image': parallel.shard_batch(mesh, noise, batch_axis=1)}
  state = parallel.replicate(mesh, state)
  state, sums = experiment.steps.train_steps(state, batch)
  state = jax.device_get(state)
  return {
    'loss': sums.fetch_steps()[0].means()['loss'],
    'statistics': _vector(state.batch_stats),
    # After one step the momentum is the gradient.
    'gradient': _vector(optax.tree.get(state.opt_state, 'trace')),
  }


def _vector(tree: Any) -> np.ndarray:
  import jax

  leaves = [np.ravel(x).astype(np.float64) for x in jax.tree.leaves(tree)]
  return np.concatenate(leaves)
