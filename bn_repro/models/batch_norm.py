"""Batch normalisation: Algorithms 1 and 2 of the paper, and a linen module.

The functions carry the paper's symbols: `x` are the values of one activation
over a batch, `mu` and `var` their moments, `gamma` and `beta` the learned scale
and shift, `m` the number of values a statistic is computed over (for a
convolution m' = m * p * q, section 3.2). They reduce over any set of axes and,
if asked, over the devices of a mesh axis.

**One reduction a layer.** E[x^2] - E[x]^2 in float32 loses the variance where
|mean| >> std. Here the moments are taken about a pivot that all devices share,
the running mean: E[(x - pivot)^2] - E[x - pivot]^2 needs one all-reduce of two
numbers a feature and keeps the variance within 1e-3 while the pivot lies within
100 standard deviations of the batch's mean. Farther out than that, as for
inputs that start at mean 1e4 with the running mean still at 0, use the form
with two reductions (`use_fast_variance=False`), which has no such line.

**The backward pass** (section 3) is written out: it keeps only the input, and
sends two numbers a feature through one all-reduce. Forward-mode
differentiation of the training form is therefore not available.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp

Array = jax.Array


class Sharing(NamedTuple):
  """Which values share one statistic: array axes, and devices of a mesh axis.

  Attributes:
    axes: axes of the array that are reduced.
    axis_name: mesh axis over which sums are added up, or None.
    axis_index_groups: devices that share, as in `jax.lax.psum`; None for all.
  """

  axes: tuple[int, ...]
  axis_name: str | None = None
  axis_index_groups: tuple[tuple[int, ...], ...] | None = None

  def total(self, *sums: Array) -> tuple[Array, ...]:
    """Adds each per-device sum over the sharing devices, in one all-reduce."""
    if self.axis_name is None:
      return sums
    return tuple(
      lax.psum(
        jnp.stack(sums),
        self.axis_name,
        axis_index_groups=self.axis_index_groups,
      )
    )

  def num_values(self, shape: Sequence[int]) -> int:
    """M (or m'): how many values one statistic is computed over."""
    m = math.prod(shape[axis] for axis in self.axes)
    if self.axis_index_groups is not None:
      return m * len(self.axis_index_groups[0])
    return m * (lax.axis_size(self.axis_name) if self.axis_name else 1)


def batch_moments(
  x: Array,
  pivot: Array,
  mask: Array | None,
  sharing: Sharing,
  *,
  one_reduction: bool,
) -> tuple[Array, Array, Array | int]:
  """Mean and biased variance of a batch (Algorithm 1), and their m.

  Args:
    x: values, float32 or float64.
    pivot: a value near the mean, broadcastable to `x`, equal on all devices.
    mask: True where a value counts, broadcastable to `x`; None for everywhere.
    sharing: what is reduced.
    one_reduction: moments about the pivot in one all-reduce; otherwise the
      variance about the mean in a second one.

  Returns:
    `(mu, var, m)`; `mu` and `var` keep the reduced axes with length 1.
  """
  d = x - pivot
  add = functools.partial(jnp.sum, axis=sharing.axes, keepdims=True)
  m: Array | int
  if mask is None:
    m = sharing.num_values(x.shape)
  else:
    weight = jnp.broadcast_to(mask, x.shape).astype(x.dtype)
    d = d * weight
    m = jnp.maximum(sharing.total(add(weight))[0], 1)
  if one_reduction:
    sum_d, sum_d2 = sharing.total(add(d), add(d * d))
    offset = sum_d / m
    var = jnp.maximum(sum_d2 / m - offset * offset, 0)
  else:
    (sum_d,) = sharing.total(add(d))
    offset = sum_d / m
    centred = d - offset if mask is None else (d - offset) * weight
    (sum_c2,) = sharing.total(add(centred * centred))
    var = sum_c2 / m
  return pivot + offset, var, m


def batch_norm_gradients(
  x: Array,
  gamma: Array,
  mu: Array,
  var: Array,
  m: Array | int,
  dy: Array,
  mask: Array | None,
  sharing: Sharing,
  epsilon: float,
  pooled: Array | None = None,
) -> tuple[Array, Array, Array, Array | None]:
  """The gradients of section 3, in the compact form.

  The six equations of the paper collapse, because the sum of xhat is zero, to
  dx = gamma / sqrt(var + eps) * (dy - mean(dy) - xhat * mean(dy * xhat)).

  Returns:
    `(dx, dgamma, dbeta, dpooled)`. `dx` contains what the other devices' losses
    contribute through the shared statistics; `dgamma` and `dbeta` are this
    device's sums alone, to be averaged with all other gradients, and keep the
    reduced axes with length 1. Where it is `pooled` that was normalised, `dx`
    is what goes through the statistics alone, and `dpooled` the rest.
  """
  inverse_std = lax.rsqrt(var + epsilon)
  normalized = ((x if pooled is None else pooled) - mu) * inverse_std
  dbeta = jnp.sum(dy, axis=sharing.axes, keepdims=True)
  dgamma = jnp.sum(dy * normalized, axis=sharing.axes, keepdims=True)
  sum_dy, sum_dy_xhat = sharing.total(dbeta, dgamma)
  xhat = (x - mu) * inverse_std
  through_statistics = (sum_dy + xhat * sum_dy_xhat) / m
  if mask is not None:
    through_statistics = jnp.where(mask, through_statistics, 0)
  scale = gamma * inverse_std
  if pooled is not None:
    return -scale * through_statistics, dgamma, dbeta, scale * dy
  return scale * (dy - through_statistics), dgamma, dbeta, None


class Settings(NamedTuple):
  """What stays fixed in a call of `batch_norm`.

  Attributes:
    sharing: which values share a statistic.
    epsilon: added to the variance.
    one_reduction: see `batch_moments`.
  """

  sharing: Sharing
  epsilon: float = 1e-5
  one_reduction: bool = True


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def batch_norm(
  x: Array,
  gamma: Array,
  beta: Array,
  pivot: Array,
  mask: Array | None,
  pooled: Array | None,
  settings: Settings,
) -> tuple[Array, Array, Array, Array | int]:
  """Algorithm 1: the batch normalising transform, differentiable.

  Args:
    x: values of any float type; the arithmetic is in at least float32.
    gamma: scale, broadcastable to `x` and of its rank.
    beta: shift, likewise.
    pivot: see `batch_moments`.
    mask: see `batch_moments`; masked values are normalised all the same.
    pooled: what is normalised with the statistics of `x`; None for `x` itself.
    settings: what is reduced, and how.

  Returns:
    `(y, mu, var, m)`, `y` in at least float32. `mu` and `var` serve the running
    averages; no gradient flows out of them.
  """
  return _forward(x, gamma, beta, pivot, mask, pooled, settings)[0]


def _at_least_float32(x: Array) -> Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _forward(
  x: Array,
  gamma: Array,
  beta: Array,
  pivot: Array,
  mask: Array | None,
  pooled: Array | None,
  settings: Settings,
) -> tuple[Any, Any]:
  values = _at_least_float32(x)
  mu, var, m = batch_moments(
    values,
    pivot,
    mask,
    settings.sharing,
    one_reduction=settings.one_reduction,
  )
  normalized = values if pooled is None else _at_least_float32(pooled)
  y = gamma * lax.rsqrt(var + settings.epsilon) * (normalized - mu) + beta
  return (y, mu, var, m), (x, gamma, beta, mu, var, m, mask, pooled)


def _backward(settings: Settings, residuals: Any, cotangents: Any) -> Any:
  x, gamma, beta, mu, var, m, mask, pooled = residuals
  dx, dgamma, dbeta, dpooled = batch_norm_gradients(
    _at_least_float32(x),
    gamma,
    mu,
    var,
    m,
    cotangents[0],
    mask,
    settings.sharing,
    settings.epsilon,
    None if pooled is None else _at_least_float32(pooled),
  )
  return (
    dx.astype(x.dtype),
    _sum_to(dgamma, gamma.shape).astype(gamma.dtype),
    _sum_to(dbeta, beta.shape).astype(beta.dtype),
    None,
    None,
    None if dpooled is None else dpooled.astype(x.dtype),
  )


batch_norm.defvjp(_forward, _backward)


def _sum_to(values: Array, shape: tuple[int, ...]) -> Array:
  """Undoes a broadcast from `shape`, an array of the same rank."""
  axes = tuple(
    i for i, n in enumerate(shape) if n == 1 and values.shape[i] != 1
  )
  return values.sum(axes, keepdims=True)


def unbiased_variance(var: Array, m: Array | int) -> Array:
  """Var[x] = m / (m - 1) * E[var] (Algorithm 2); m * p * q for convolutions."""
  return var * m / jnp.maximum(m - 1, 1)


def moving_average(old: Array, new: Array, momentum: float) -> Array:
  """The running statistic; `momentum` is the share of the old average."""
  return momentum * old + (1 - momentum) * new


def inference_transform(
  gamma: Array, beta: Array, mean: Array, var: Array, epsilon: float
) -> tuple[Array, Array]:
  """Algorithm 2, step 11: BN with frozen statistics is y = a * x + c."""
  a = gamma * lax.rsqrt(var + epsilon)
  return a, beta - a * mean


class BatchNorm(nn.Module):
  """Batch normalisation with the arguments of `flax.linen.BatchNorm`.

  It can replace flax's layer in any linen model: arguments, the call, and the
  names of the variables (`params`: scale, bias; `batch_stats`: mean, var) are
  the same, and with `unbiased=False` so are the values. What differs: the
  running variance is the unbiased one (Algorithm 2), the variance survives
  |mean| >> std, uneven masks are weighted by their counts over devices, and
  groups of examples can share statistics.

  Attributes:
    use_running_average: normalise with the running statistics (inference).
    axis: feature axes. -1 gives one statistic a feature map (section 3.2),
      (1, 2, 3) one an activation.
    momentum: share of the old running average.
    epsilon: added to the variance.
    dtype: type of the result; None takes it from the input and the parameters.
    param_dtype: type of scale and bias.
    use_bias: learn a shift (beta).
    use_scale: learn a scale (gamma).
    bias_init: initialiser of the shift.
    scale_init: initialiser of the scale.
    axis_name: mesh axis whose devices share statistics.
    axis_index_groups: devices of `axis_name` that share; None for all.
    use_fast_variance: one reduction, about the running mean; False for two.
    force_float32_reductions: must be True.
    unbiased: keep the unbiased variance in the running average.
    virtual_batch_size: examples that share a statistic, a divisor of the
      device's examples or a multiple of them that divides the global batch.
      The running statistics are then averages over this device's groups; the
      caller averages them over devices.

  Raises:
    ValueError: for an argument that is not supported, a group that does not
      fit, or one value per statistic in training (whose variance is 0, and
      whose output would not depend on the input).
  """

  use_running_average: bool | None = None
  axis: int | Sequence[int] = -1
  momentum: float = 0.99
  epsilon: float = 1e-5
  dtype: Any = None
  param_dtype: Any = jnp.float32
  use_bias: bool = True
  use_scale: bool = True
  bias_init: Callable[..., Array] = nn.initializers.zeros
  scale_init: Callable[..., Array] = nn.initializers.ones
  axis_name: str | None = None
  axis_index_groups: Any = None
  use_fast_variance: bool = True
  force_float32_reductions: bool = True
  unbiased: bool = True
  virtual_batch_size: int | None = None

  @nn.compact
  def __call__(
    self,
    x: Array,
    use_running_average: bool | None = None,  # noqa: FBT001 As in flax.
    *,
    mask: Array | None = None,
    max_pool: Callable[[Array], Array] | None = None,
  ) -> Array:
    """Normalises `x`, and pools the result.

    Args:
      x: values.
      use_running_average: see the attribute.
      mask: True where a value enters the statistics.
      max_pool: max pooling of the result, if any. In training it is done before
        normalising, which gives the same (the largest value stays the largest,
        or, where gamma is negative, the smallest becomes it) and leaves out a
        pass over the larger array, forward and backward.
    """
    use_running_average = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    if not self.force_float32_reductions:
      raise ValueError(
        'BatchNorm keeps its statistics in at least float32: '
        'force_float32_reductions=False is not supported.'
      )
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
      raise ValueError('BatchNorm does not support complex inputs.')
    features = (self.axis,) if isinstance(self.axis, int) else self.axis
    features = tuple(sorted(axis % x.ndim for axis in features))
    axes = tuple(axis for axis in range(x.ndim) if axis not in features)
    feature_shape = [x.shape[axis] for axis in features]
    broadcast_shape = [n if i in features else 1 for i, n in enumerate(x.shape)]

    statistics_dtype = jnp.promote_types(self.param_dtype, jnp.float32)
    running_mean = self.variable(
      'batch_stats', 'mean', jnp.zeros, feature_shape, statistics_dtype
    )
    running_var = self.variable(
      'batch_stats', 'var', jnp.ones, feature_shape, statistics_dtype
    )
    gamma = jnp.ones(feature_shape, statistics_dtype)
    beta = jnp.zeros(feature_shape, statistics_dtype)
    dtypes = [x.dtype]
    if self.use_scale:
      gamma = self.param(
        'scale', self.scale_init, feature_shape, self.param_dtype
      )
      dtypes.append(gamma.dtype)
    if self.use_bias:
      beta = self.param('bias', self.bias_init, feature_shape, self.param_dtype)
      dtypes.append(beta.dtype)
    dtype = self.dtype or jnp.result_type(*dtypes)
    gamma = _at_least_float32(gamma).reshape(broadcast_shape)
    beta = _at_least_float32(beta).reshape(broadcast_shape)

    if use_running_average:
      a, c = inference_transform(
        gamma,
        beta,
        running_mean.value.reshape(broadcast_shape),
        running_var.value.reshape(broadcast_shape),
        self.epsilon,
      )
      y = (a * _at_least_float32(x) + c).astype(dtype)
      return y if max_pool is None else max_pool(y)

    num_groups, sharing = self._sharing(x.shape, axes)
    values_per_statistic = sharing.num_values(x.shape) // num_groups
    if values_per_statistic == 1 and not self.is_initializing():
      raise ValueError(
        f'BatchNorm {"/".join(self.path)}: one value per statistic in '
        f'training (input of shape {x.shape}). Use more examples for each '
        'statistic.'
      )

    def grouped(values: Array) -> Array:
      examples = values.shape[0] // num_groups
      return values.reshape(num_groups, examples, *values.shape[1:])

    pivot = lax.stop_gradient(running_mean.value).reshape(broadcast_shape)
    sign: Array | int = 1
    if max_pool is not None:
      # BN of -x with -gamma is BN of x with gamma.
      sign = lax.stop_gradient(jnp.where(gamma < 0, -1, 1).astype(gamma.dtype))
      x, gamma, pivot = x * sign.astype(x.dtype), gamma * sign, pivot * sign
    pooled = x if max_pool is None else max_pool(x)
    y, mu, var, m = batch_norm(
      grouped(x),
      gamma[None],
      beta[None],
      pivot[None],
      None if mask is None else grouped(jnp.broadcast_to(mask, x.shape)),
      None if max_pool is None else grouped(pooled),
      Settings(
        sharing._replace(axes=tuple(axis + 1 for axis in axes)),
        self.epsilon,
        self.use_fast_variance,
      ),
    )
    if self.unbiased:
      var = unbiased_variance(var, m)
    if not self.is_initializing():
      for running, batch in (
        (running_mean, mu.mean(0) * sign),
        (running_var, var.mean(0)),
      ):
        running.value = moving_average(
          running.value, batch.reshape(feature_shape), self.momentum
        )
    return y.reshape(pooled.shape).astype(dtype)

  def _sharing(
    self, shape: tuple[int, ...], axes: tuple[int, ...]
  ) -> tuple[int, Sharing]:
    """Groups on this device, and what shares a statistic within a group."""
    if self.is_initializing():  # Outside any mesh, on a dummy batch.
      return 1, Sharing(axes)
    group = self.virtual_batch_size
    if group is None:
      return 1, Sharing(axes, self.axis_name, self.axis_index_groups)
    examples = shape[0]
    if group <= examples and examples % group == 0:
      return examples // group, Sharing(axes)
    num_devices = lax.axis_size(self.axis_name) if self.axis_name else 1
    if group % examples or num_devices % (group // examples):
      raise ValueError(
        f'virtual_batch_size={group} fits neither into the {examples} examples '
        f'of a device nor into the {examples * num_devices} of all '
        f'{num_devices}: it must divide both evenly, or be a multiple of the '
        'one that divides the other.'
      )
    run = group // examples
    devices = tuple(range(num_devices))
    groups = tuple(devices[i : i + run] for i in range(0, num_devices, run))
    return 1, Sharing(axes, self.axis_name, groups)
