"""Batch normalization: Algorithms 1 and 2 of the paper, and a linen module.

The functions use the paper's symbols: `x` holds the values of activations over
a batch, `mu` and `var` their mean and biased variance, `gamma` and `beta` the
learned scale and shift, and `m` the number of values that a statistic is
computed over (m' = m * p * q for a convolution, section 3.2). They reduce over
any set of array axes and, optionally, over the devices of a mesh axis.

**One reduction per layer.** E[x^2] - E[x]^2 in float32 loses the variance where
|mean| >> std. Here the moments are taken about a pivot that all devices share,
the running mean: E[(x - pivot)^2] - E[x - pivot]^2 needs one all-reduce of two
numbers per feature. It keeps the variance within 1e-3 while the pivot is within
100 standard deviations of the batch mean. Beyond that, for example for inputs
that start at mean 1e4 while the running mean is still 0, use the form with two
reductions (`use_fast_variance=False`), which has no such limit.

**The backward pass** (section 3) is written out. It keeps only the input, and
sends two numbers per feature through one all-reduce. Forward-mode
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
  """The values that share a statistic: array axes, and devices of a mesh axis.

  Attributes:
    axes: array axes that are reduced.
    axis_name: mesh axis over which sums are added up, or None.
    axis_index_groups: groups of devices that share, as in `jax.lax.psum`; None
      for all devices.
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
    """The number of values that a statistic is computed over: m, or m'."""
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
    pivot: value near the mean, broadcastable to `x`, equal on all devices.
    mask: True where a value counts, broadcastable to `x`; None for everywhere.
    sharing: axes and devices to reduce over.
    one_reduction: compute the moments about the pivot in one all-reduce;
      otherwise the variance about the mean takes a second one.

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
    centered = d - offset if mask is None else (d - offset) * weight
    (sum_c2,) = sharing.total(add(centered * centered))
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
) -> tuple[Array, Array, Array]:
  """The gradients of section 3, in the compact form.

  The paper's six equations reduce, because the sum of xhat is zero, to
  dx = gamma / sqrt(var + eps) * (dy - mean(dy) - xhat * mean(dy * xhat)).

  Args:
    x: values, float32 or float64.
    gamma: scale, broadcastable to `x`.
    mu: mean, from `batch_moments`.
    var: biased variance, likewise.
    m: number of values, likewise.
    dy: gradient of the loss with respect to the output, of the shape of `x`.
    mask: as in `batch_moments`.
    sharing: as in `batch_moments`.
    epsilon: constant added to the variance.

  Returns:
    `(dx, dgamma, dbeta)`. `dx` includes what the losses of other devices
    contribute through the shared statistics. `dgamma` and `dbeta` are sums of
    this device alone, to be averaged with all other gradients; they keep the
    reduced axes with length 1.
  """
  inverse_std = lax.rsqrt(var + epsilon)
  xhat = (x - mu) * inverse_std
  dbeta = jnp.sum(dy, axis=sharing.axes, keepdims=True)
  dgamma = jnp.sum(dy * xhat, axis=sharing.axes, keepdims=True)
  sum_dy, sum_dy_xhat = sharing.total(dbeta, dgamma)
  through_statistics = (sum_dy + xhat * sum_dy_xhat) / m
  if mask is not None:
    through_statistics = jnp.where(mask, through_statistics, 0)
  return gamma * inverse_std * (dy - through_statistics), dgamma, dbeta


class Settings(NamedTuple):
  """The static arguments of `batch_norm`.

  Attributes:
    sharing: the values that share a statistic.
    epsilon: constant added to the variance.
    one_reduction: see `batch_moments`.
  """

  sharing: Sharing
  epsilon: float = 1e-5
  one_reduction: bool = True


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def batch_norm(
  x: Array,
  gamma: Array,
  beta: Array,
  pivot: Array,
  mask: Array | None,
  settings: Settings,
) -> tuple[Array, Array, Array, Array | int]:
  """Algorithm 1: the batch normalizing transform, differentiable.

  Args:
    x: values of any float type; the arithmetic is in at least float32.
    gamma: scale, broadcastable to `x` and of its rank.
    beta: shift, likewise.
    pivot: see `batch_moments`.
    mask: see `batch_moments`; masked values are normalized too, but do not
      enter the statistics.
    settings: static arguments.

  Returns:
    `(y, mu, var, m)`, with `y` in at least float32. `mu` and `var` serve the
    running averages; no gradient flows out of them.
  """
  return _forward(x, gamma, beta, pivot, mask, settings)[0]


def _at_least_float32(x: Array) -> Array:
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _forward(
  x: Array,
  gamma: Array,
  beta: Array,
  pivot: Array,
  mask: Array | None,
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
  y = gamma * lax.rsqrt(var + settings.epsilon) * (values - mu) + beta
  return (y, mu, var, m), (x, gamma, beta, mu, var, m, mask)


def _backward(settings: Settings, residuals: Any, cotangents: Any) -> Any:
  x, gamma, beta, mu, var, m, mask = residuals
  dx, dgamma, dbeta = batch_norm_gradients(
    _at_least_float32(x),
    gamma,
    mu,
    var,
    m,
    cotangents[0],
    mask,
    settings.sharing,
    settings.epsilon,
  )
  return (
    dx.astype(x.dtype),
    _sum_to(dgamma, gamma.shape).astype(gamma.dtype),
    _sum_to(dbeta, beta.shape).astype(beta.dtype),
    None,
    None,
  )


batch_norm.defvjp(_forward, _backward)


def _sum_to(values: Array, shape: tuple[int, ...]) -> Array:
  """Reverses a broadcast from `shape`, which has the rank of `values`."""
  axes = tuple(
    i for i, n in enumerate(shape) if n == 1 and values.shape[i] != 1
  )
  return values.sum(axes, keepdims=True)


def unbiased_variance(var: Array, m: Array | int) -> Array:
  """Var[x] = m / (m - 1) * E[var] (Algorithm 2); m * p * q for convolutions."""
  return var * m / jnp.maximum(m - 1, 1)


def moving_average(old: Array, new: Array, momentum: float) -> Array:
  """The running statistic; `momentum` is the weight of the old average."""
  return momentum * old + (1 - momentum) * new


def inference_transform(
  gamma: Array, beta: Array, mean: Array, var: Array, epsilon: float
) -> tuple[Array, Array]:
  """Algorithm 2, step 11: BN with frozen statistics is y = a * x + c."""
  a = gamma * lax.rsqrt(var + epsilon)
  return a, beta - a * mean


class BatchNorm(nn.Module):
  """Batch normalization with the interface of `flax.linen.BatchNorm`.

  It can replace Flax's layer in any linen model. The constructor arguments, the
  call, and the names of the variables (`params`: scale, bias; `batch_stats`:
  mean, var) are the same, and so are the values with `unbiased=False`. The
  differences from Flax's layer are:

  - The running variance is unbiased (Algorithm 2 of the paper) by default.
  - The variance is computed about the running mean, so that it survives
    |mean| >> std; see the docstring of this module for the limit.
  - With a mask, devices are weighted by their numbers of unmasked values.
  - Groups of examples can share statistics (`virtual_batch_size`).
  - The running statistics are float64 if `param_dtype` is; Flax's are float32.
  - Statistics are always computed in at least float32, complex inputs are
    refused, and so is a single value per statistic in training.
  - Forward-mode differentiation (`jax.jvp`, `jax.linearize`) of the training
    mode is not available, because the backward pass is written out. Inference
    mode supports both modes.

  Attributes:
    use_running_average: normalize with the running statistics (inference).
    axis: feature axes. -1 gives one statistic per feature map (section 3.2),
      (1, 2, 3) one per activation.
    momentum: weight of the old running average.
    epsilon: constant added to the variance.
    dtype: dtype of the result; None infers it from the input and parameters.
    param_dtype: dtype of scale and bias.
    use_bias: learn a shift (beta).
    use_scale: learn a scale (gamma).
    bias_init: initializer of the shift.
    scale_init: initializer of the scale.
    axis_name: mesh axis whose devices share statistics.
    axis_index_groups: groups of devices of `axis_name` that share; None for
      all devices.
    use_fast_variance: compute mean and variance in one reduction, about the
      running mean; False uses two reductions.
    force_float32_reductions: must be True.
    unbiased: keep the unbiased variance in the running average.
    virtual_batch_size: number of examples that share a statistic: a divisor of
      the examples of a device, or a multiple of them that divides the global
      batch. The running statistics are then averages over the groups of this
      device; the caller averages them over devices.

  Raises:
    ValueError: for an unsupported argument, a group size that does not fit, or
      one value per statistic in training (its variance would be 0, and the
      output would not depend on the input).
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
    use_running_average: bool | None = None,  # noqa: FBT001 As in Flax.
    *,
    mask: Array | None = None,
  ) -> Array:
    """Normalizes `x`; returns an array of the same shape.

    Args:
      x: values, with the examples along the first axis.
      use_running_average: see the attribute.
      mask: True where a value enters the statistics, broadcastable to `x`.
    """
    use_running_average = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    self._check_arguments(x)
    features = (self.axis,) if isinstance(self.axis, int) else self.axis
    features = tuple(sorted(axis % x.ndim for axis in features))
    shape = [x.shape[axis] for axis in features]
    # Of the rank of `x`, so that it broadcasts against it.
    broadcast = [n if i in features else 1 for i, n in enumerate(x.shape)]

    statistics_dtype = jnp.promote_types(self.param_dtype, jnp.float32)
    running_mean = self.variable(
      'batch_stats', 'mean', jnp.zeros, shape, statistics_dtype
    )
    running_var = self.variable(
      'batch_stats', 'var', jnp.ones, shape, statistics_dtype
    )
    gamma = jnp.ones(shape, statistics_dtype)
    beta = jnp.zeros(shape, statistics_dtype)
    dtypes = [x.dtype]
    if self.use_scale:
      gamma = self.param('scale', self.scale_init, shape, self.param_dtype)
      dtypes.append(gamma.dtype)
    if self.use_bias:
      beta = self.param('bias', self.bias_init, shape, self.param_dtype)
      dtypes.append(beta.dtype)
    dtype = self.dtype or jnp.result_type(*dtypes)
    gamma = _at_least_float32(gamma).reshape(broadcast)
    beta = _at_least_float32(beta).reshape(broadcast)
    mean = running_mean.value.reshape(broadcast)

    if use_running_average:
      var = running_var.value.reshape(broadcast)
      a, c = inference_transform(gamma, beta, mean, var, self.epsilon)
      return (a * _at_least_float32(x) + c).astype(dtype)

    axes = tuple(axis for axis in range(x.ndim) if axis not in features)
    y, mu, var = self._normalize(x, gamma, beta, mean, mask, axes)
    if not self.is_initializing():
      for running, batch in ((running_mean, mu), (running_var, var)):
        running.value = moving_average(
          running.value, batch.reshape(shape), self.momentum
        )
    return y.astype(dtype)

  @nn.nowrap
  def _check_arguments(self, x: Array) -> None:
    if not self.force_float32_reductions:
      raise ValueError(
        'BatchNorm keeps its statistics in at least float32: '
        'force_float32_reductions=False is not supported.'
      )
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
      raise ValueError('BatchNorm does not support complex inputs.')

  @nn.nowrap
  def _normalize(
    self,
    x: Array,
    gamma: Array,
    beta: Array,
    running_mean: Array,
    mask: Array | None,
    axes: tuple[int, ...],
  ) -> tuple[Array, Array, Array]:
    """Normalizes with batch statistics.

    Returns:
      `(y, mu, var)`, with `mu` and `var` averaged over the groups of this
      device; `var` is unbiased if `self.unbiased`.
    """
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

    y, mu, var, m = batch_norm(
      grouped(x),
      gamma[None],
      beta[None],
      lax.stop_gradient(running_mean)[None],
      None if mask is None else grouped(jnp.broadcast_to(mask, x.shape)),
      Settings(
        sharing._replace(axes=tuple(axis + 1 for axis in axes)),
        self.epsilon,
        self.use_fast_variance,
      ),
    )
    if self.unbiased:
      var = unbiased_variance(var, m)
    return y.reshape(x.shape), mu.mean(0), var.mean(0)

  @nn.nowrap
  def _sharing(
    self, shape: tuple[int, ...], axes: tuple[int, ...]
  ) -> tuple[int, Sharing]:
    """The number of groups on this device, and what a group shares."""
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
        f'virtual_batch_size={group} must divide the {examples} examples of a '
        f'device, or be a multiple of them that divides the '
        f'{examples * num_devices} examples of all {num_devices} devices.'
      )
    devices_per_group = group // examples
    devices = tuple(range(num_devices))
    groups = tuple(
      devices[first : first + devices_per_group]
      for first in range(0, num_devices, devices_per_group)
    )
    return 1, Sharing(axes, self.axis_name, groups)
