"""Batch normalization: Algorithms 1 and 2 of the paper, and a linen module.

The functions use the paper's symbols: `x` holds the values of activations over
a batch, `mu` and `var` their mean and biased variance, `gamma` and `beta` the
learned scale and shift, and `m` the number of values that a statistic is
computed over (m' = m * p * q for a convolution, section 3.2). They reduce over
any set of array axes and, optionally, over the devices of a mesh axis.

**One reduction per layer.** E[x^2] - E[x]^2 in float32 loses the variance where
|mean| >> std. Here the moments are taken about a pivot that all devices share,
the running mean: E[(x - pivot)^2] - E[x - pivot]^2 needs one all-reduce of two
numbers per feature. It keeps the variance within 1e-2 while the pivot is within
100 standard deviations of the batch mean (docs/lab/moments.md). Beyond that,
for example for inputs that start at mean 1e4 while the running mean is still 0,
use the form with two reductions (`use_fast_variance=False`), which is within
1e-3 up to a mean of 1e5 standard deviations.

**The backward pass** (section 3) is written out. It keeps only the input, and
sends two numbers per feature through one all-reduce. Forward-mode
differentiation of the training form is therefore not available. A nonlinearity
that follows can be part of the transform: z = g(BN(x)). Its own backward pass
would keep y = BN(x); here y is computed again from x.
"""

from collections.abc import Callable, Sequence
import functools
import math
import numbers
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from numpy.lib.array_utils import normalize_axis_tuple

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
    if self.axis_name is None:
      return m
    if self.axis_index_groups is not None:
      return m * len(self.axis_index_groups[0])
    return m * lax.axis_size(self.axis_name)


def counted(values: Array, mask: Array | None) -> Array:
  """The values that enter a statistic; 0 in place of others, which may be NaN.

  Multiplying by the mask would keep NaN.
  """
  return values if mask is None else jnp.where(mask, values, 0)


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
    mask: bool, of the shape of `x`, True where a value counts; None for
      everywhere.
    sharing: axes and devices to reduce over.
    one_reduction: compute the moments about the pivot in one all-reduce;
      otherwise the variance about the mean takes a second one.

  Returns:
    `(mu, var, m)`; `mu` and `var` keep the reduced axes with length 1. Where no
    value counts, `mu` is the pivot and `var` is 0.
  """
  d = counted(x - pivot, mask)
  add = functools.partial(jnp.sum, axis=sharing.axes, keepdims=True)
  m: Array | int = sharing.num_values(x.shape)
  if mask is not None:
    (m,) = sharing.total(add(mask, dtype=x.dtype))
  divisor = jnp.maximum(m, 1)
  if one_reduction:
    sum_d, sum_d2 = sharing.total(add(d), add(d * d))
    offset = sum_d / divisor
    var = jnp.maximum(sum_d2 / divisor - offset * offset, 0)
  else:
    (sum_d,) = sharing.total(add(d))
    offset = sum_d / divisor
    centered = counted(d - offset, mask)
    (sum_c2,) = sharing.total(add(centered * centered))
    var = sum_c2 / divisor
  return pivot + offset, var, m


def normalize(
  x: Array, gamma: Array, beta: Array, mu: Array, var: Array, epsilon: float
) -> Array:
  """The last two lines of Algorithm 1: normalize, scale and shift."""
  return gamma * lax.rsqrt(var + epsilon) * (x - mu) + beta


def batch_norm_gradients(
  x: Array,
  gamma: Array,
  mu: Array,
  var: Array,
  m: Array | int,
  dy: Array,
  dmu: Array,
  dvar: Array,
  mask: Array | None,
  sharing: Sharing,
  epsilon: float,
) -> tuple[Array, Array, Array, Array, Array]:
  """The gradients of section 3.

  With dxhat = gamma * dy written out, and because the sum of x - mu is zero,
  the paper's equations are

    dvar = -gamma / (2 * (var + eps)) * sum(dy * xhat)
    dmu = -gamma / sqrt(var + eps) * sum(dy)
    dx = gamma / sqrt(var + eps) * dy + dvar * 2 * (x - mu) / m + dmu / m
    dgamma = sum(dy * xhat)
    dbeta = sum(dy)

  A loss on the updated running averages adds its gradients to `dvar`, `dmu`.

  Args:
    x: values, float32 or float64.
    gamma: scale, broadcastable to `mu`.
    mu: mean, from `batch_moments`.
    var: biased variance, likewise.
    m: number of values, likewise.
    dy: gradient of the loss with respect to the output, of the shape of `x`.
    dmu: gradient with respect to `mu` that does not come from `dy`, summed over
      the sharing devices; 0 in ordinary training.
    dvar: gradient with respect to `var`, likewise.
    mask: as in `batch_moments`.
    sharing: as in `batch_moments`.
    epsilon: constant added to the variance.

  Returns:
    `(dx, dgamma, dbeta, dmu, dvar)`. `dx` includes what the losses of other
    devices contribute through the shared statistics. The others come from `dy`
    of this device alone and keep the reduced axes with length 1.
  """
  add = functools.partial(jnp.sum, axis=sharing.axes, keepdims=True)
  inverse_std = lax.rsqrt(var + epsilon)
  scale = gamma * inverse_std
  dy_xhat = dy * ((x - mu) * inverse_std)
  if mask is not None:
    # NaN under the mask, in a loss that does not depend on its output.
    dy_xhat = jnp.where(mask | (dy != 0), dy_xhat, 0)
  dbeta, dgamma = add(dy), add(dy_xhat)
  own_dmu = -scale * dbeta
  own_dvar = -scale * inverse_std / 2 * dgamma
  sum_dmu, sum_dvar = sharing.total(own_dmu, own_dvar)
  dmu, dvar = dmu + sum_dmu, dvar + sum_dvar
  through_statistics = (dvar * 2 * (x - mu) + dmu) / jnp.maximum(m, 1)
  dx = scale * dy + counted(through_statistics, mask)
  return dx, dgamma, dbeta, own_dmu, own_dvar


def identity(x: Array) -> Array:
  """Returns its argument: the nonlinearity of a layer without one."""
  return x


class Settings(NamedTuple):
  """The static arguments of `batch_norm`.

  Attributes:
    sharing: the values that share a statistic.
    epsilon: constant added to the variance.
    one_reduction: see `batch_moments`.
    nonlinearity: elementwise function g of the result, z = g(y).
  """

  sharing: Sharing
  epsilon: float = 1e-5
  one_reduction: bool = True
  nonlinearity: Callable[[Array], Array] = identity


def batch_norm(
  x: Array,
  gamma: Array,
  beta: Array,
  running_mean: Array,
  running_var: Array,
  mask: Array | None,
  settings: Settings,
) -> tuple[Array, Array, Array, Array | int]:
  """Algorithm 1 and the nonlinearity after it, differentiable.

  Args:
    x: values of any float type; the arithmetic is in the dtype of `gamma`.
    gamma: scale, float32 or float64, of the rank of `x`, with length 1 along
      the reduced axes.
    beta: shift, likewise.
    running_mean: pivot of `batch_moments`, likewise.
    running_var: running variance, likewise.
    mask: see `batch_moments`; masked values are normalized too, but do not
      enter the statistics. A statistic without values is the running one.
    settings: static arguments.

  Returns:
    `(z, mu, var, m)`, with `z` in the dtype of `gamma`.
  """
  z, statistics, m, shares = _batch_norm(
    x, gamma, beta, running_mean, running_var, mask, settings
  )
  mu, var = _depends_on(statistics, shares, settings.sharing)
  # The backward pass takes no gradient of m, and JAX 0.12 refuses to ask for
  # one of a value that `vmap` shares over devices.
  return z, mu, var, lax.stop_gradient(m)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _depends_on(statistics: Any, shares: Any, sharing: Sharing) -> Any:
  """The statistics, as functions of what each device contributes to them.

  The gradient of a statistic must be summed over the devices. In `vmap` the
  backward pass below cannot tell if it is that of one device or of all; JAX
  can, if it transposes the sum itself. XLA merges this all-reduce with that of
  the backward pass.
  """
  del shares, sharing
  return statistics


@_depends_on.defjvp
def _depends_on_jvp(sharing: Sharing, primals: Any, tangents: Any) -> Any:
  return primals[0], sharing.total(*tangents[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _batch_norm(*arguments: Any) -> Any:
  return _forward(*arguments)[0]


def _forward(
  x: Array,
  gamma: Array,
  beta: Array,
  running_mean: Array,
  running_var: Array,
  mask: Array | None,
  settings: Settings,
) -> tuple[Any, Any]:
  values = x.astype(gamma.dtype)
  mu, var, m = batch_moments(
    values,
    running_mean,
    mask,
    settings.sharing,
    one_reduction=settings.one_reduction,
  )
  if mask is not None:
    var = jnp.where(m == 0, running_var, var)
  y = normalize(values, gamma, beta, mu, var, settings.epsilon)
  z = settings.nonlinearity(y)
  # Only the gradient of the share of this device is used.
  share = values.sum(settings.sharing.axes, keepdims=True)
  return (z, (mu, var), m, (share, share)), (x, gamma, beta, mu, var, m, mask)


def _backward(settings: Settings, residuals: Any, cotangents: Any) -> Any:
  x, gamma, beta, mu, var, m, mask = residuals
  dz, _, _, (dmu, dvar) = cotangents
  values = x.astype(gamma.dtype)
  y = normalize(values, gamma, beta, mu, var, settings.epsilon)
  _, pull_back = jax.vjp(settings.nonlinearity, y)
  (dy,) = pull_back(dz)
  dx, dgamma, dbeta, dmu, dvar = batch_norm_gradients(
    values,
    gamma,
    mu,
    var,
    m,
    dy,
    dmu,
    dvar,
    mask,
    settings.sharing,
    settings.epsilon,
  )
  sum_groups = functools.partial(_sum_to, shape=gamma.shape)
  d_running: Any = (None, None)
  if mask is not None:
    d_running = [sum_groups(jnp.where(m == 0, d, 0)) for d in (dmu, dvar)]
  return (
    dx.astype(x.dtype),
    sum_groups(dgamma),
    sum_groups(dbeta),
    *d_running,
    None,
  )


_batch_norm.defvjp(_forward, _backward)


def _sum_to(values: Array, shape: tuple[int, ...]) -> Array:
  """Reverses a broadcast from `shape`, which has the rank of `values`."""
  axes = tuple(
    i for i, n in enumerate(shape) if n == 1 and values.shape[i] != 1
  )
  return values.sum(axes, keepdims=True)


def unbiased_variance(var: Array, m: Array | int) -> Array:
  """Var[x] = m / (m - 1) * E[var] (Algorithm 2); m * p * q for convolutions."""
  return var * m / jnp.maximum(m - 1, 1)


def moving_average(
  old: Array, new: Array, enough: Array, momentum: float
) -> Array:
  """The running statistic after a batch (Algorithm 2).

  Args:
    old: the running statistic.
    new: the statistics of groups of examples, along a leading axis; the other
      axes are those of `old`, and any of length 1.
    enough: True where a group had enough values for its statistic. The average
      leaves out other groups; if it leaves out all, `old` is returned.
    momentum: weight of `old`.
  """
  enough = jnp.broadcast_to(enough, new.shape)
  num_groups = enough.sum(0).reshape(old.shape)
  total = jnp.where(enough, new, 0).sum(0).reshape(old.shape)
  mean = total / jnp.maximum(num_groups, 1)
  return jnp.where(num_groups > 0, momentum * old + (1 - momentum) * mean, old)


def inference_transform(
  gamma: Array, beta: Array, mean: Array, var: Array, epsilon: float
) -> tuple[Array, Array]:
  """Algorithm 2, step 11: BN with frozen statistics is y = a * x + c.

  The result can be folded into an adjacent linear layer, at a price: where
  |mean| >> std, a * x and c nearly cancel. In float32 the error of y is up to
  6e-8 * |mean| / std, which is 0.06 at mean 1e3 and std 1e-3. `normalize` has
  no such error.
  """
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
  - A feature that a mask leaves without values is normalized with its running
    statistics, which stay as they are; Flax's become NaN. The unbiased variance
    needs two values: with one, the running variance stays.
  - NaN under a mask does not reach the gradients of the parameters.
  - Groups of examples can share statistics (`virtual_batch_size`).
  - A nonlinearity can be part of the layer.
  - The running statistics are float64 if `param_dtype` is; Flax's are float32.
  - Statistics are always computed in at least float32. Complex inputs are
    refused, and so are batches with no value or one value per statistic in
    training.
  - The backward pass is written out. Forward-mode differentiation (`jax.jvp`,
    `jax.linearize`, `jax.jacfwd`) of the training mode is therefore a TypeError
    of JAX about `custom_vjp`, and its gradient inside `jax.shard_map` needs
    `check_vma=False`. Inference mode has neither limit; to differentiate
    training in that way, use Flax's layer, which has the same variables.

  Attributes:
    use_running_average: normalize with the running statistics (inference).
    axis: feature axis or axes. -1 gives one statistic per feature map (section
      3.2), (1, 2, 3) one per activation.
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
    nonlinearity: elementwise function that is applied to the result. As part of
      this layer, it keeps nothing for the backward pass.

  Raises:
    ValueError: for an unsupported argument, axes or a mask that do not fit the
      input, a group size that does not fit, or no value or one value per
      statistic in training (its variance would be 0, and the output would not
      depend on the input).
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
  nonlinearity: Callable[[Array], Array] = identity

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
      mask: nonzero where a value enters the statistics, of any dtype and
        broadcastable to `x`. Other values may be NaN. Not used in inference.
    """
    use_running_average = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    x = jnp.asarray(x)
    features = self._feature_axes(x)
    shape = [x.shape[axis] for axis in features]
    statistics_dtype = jnp.promote_types(self.param_dtype, jnp.float32)
    statistic = functools.partial(self.variable, 'batch_stats')
    running_mean = statistic('mean', jnp.zeros, shape, statistics_dtype)
    running_var = statistic('var', jnp.ones, shape, statistics_dtype)
    gamma, beta = jnp.ones(shape), jnp.zeros(shape)
    parameters = []
    if self.use_scale:
      gamma = self.param('scale', self.scale_init, shape, self.param_dtype)
      parameters.append(gamma)
    if self.use_bias:
      beta = self.param('bias', self.bias_init, shape, self.param_dtype)
      parameters.append(beta)
    dtype = nn.dtypes.canonicalize_dtype(x, *parameters, dtype=self.dtype)

    # The arithmetic is in at least float32. Of the rank of `x`, the variables
    # broadcast against it.
    compute_dtype = jnp.promote_types(statistics_dtype, self.dtype or x.dtype)
    broadcast = [n if i in features else 1 for i, n in enumerate(x.shape)]
    gamma, beta, mean, var = (
      v.astype(compute_dtype).reshape(broadcast)
      for v in (gamma, beta, running_mean.value, running_var.value)
    )
    if use_running_average:
      x = x.astype(compute_dtype)
      y = normalize(x, gamma, beta, mean, var, self.epsilon)
      return self.nonlinearity(y).astype(dtype)

    z, mu, var, m = self._normalize_batch(
      x, gamma, beta, mean, var, mask, features
    )
    if not self.is_initializing():
      for running, batch, enough in (
        (running_mean, mu, jnp.greater(m, 0)),
        # One value has no unbiased variance.
        (running_var, var, jnp.greater(m, 1 if self.unbiased else 0)),
      ):
        running.value = moving_average(
          running.value, batch, enough, self.momentum
        )
    return z.astype(dtype)

  @nn.nowrap
  def _error(self, message: str) -> ValueError:
    name = f'BatchNorm {"/".join(self.path)}'.strip()
    return ValueError(f'{name}: {message}')

  @nn.nowrap
  def _feature_axes(self, x: Array) -> tuple[int, ...]:
    """Checks the arguments; returns the feature axes, in ascending order."""
    if not self.force_float32_reductions:
      raise self._error(
        'force_float32_reductions=False is not supported; statistics are kept '
        'in at least float32.'
      )
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
      raise self._error('complex inputs are not supported.')
    try:
      axes = normalize_axis_tuple(self.axis, x.ndim, allow_duplicate=True)
    except (TypeError, ValueError) as error:
      raise self._error(
        f'axis={self.axis!r} does not name axes of the input of shape '
        f'{x.shape}.'
      ) from error
    return tuple(sorted(set(axes)))

  @nn.nowrap
  def _normalize_batch(
    self,
    x: Array,
    gamma: Array,
    beta: Array,
    running_mean: Array,
    running_var: Array,
    mask: Array | None,
    features: tuple[int, ...],
  ) -> tuple[Array, Array, Array, Array | int]:
    """Normalizes with batch statistics.

    Returns:
      `(z, mu, var, m)`. All but `z` have a leading axis of the groups of this
      device; `var` is unbiased if `self.unbiased`.
    """
    axes = tuple(axis for axis in range(x.ndim) if axis not in features)
    num_groups, sharing = self._sharing(x.shape, axes)
    m = sharing.num_values(x.shape) // num_groups
    if m < 2 and not self.is_initializing():
      raise self._error(
        f'{("no values", "one value")[m]} per statistic in training '
        f'(input of shape {x.shape}). Use more examples for each statistic.'
      )
    if mask is not None:
      mask = jnp.asarray(mask, bool)
      try:
        mask = jnp.broadcast_to(mask, x.shape)
      except ValueError as error:
        raise self._error(
          f'a mask of shape {mask.shape} does not broadcast to the input of '
          f'shape {x.shape}.'
        ) from error

    def grouped(values: Array) -> Array:
      examples = x.shape[0] // num_groups
      return values.reshape(num_groups, examples, *x.shape[1:])

    z, mu, var, counts = batch_norm(
      grouped(x),
      gamma[None],
      beta[None],
      running_mean[None],
      running_var[None],
      None if mask is None else grouped(mask),
      Settings(
        sharing._replace(axes=tuple(axis + 1 for axis in axes)),
        self.epsilon,
        self.use_fast_variance,
        self.nonlinearity,
      ),
    )
    if self.unbiased:
      var = unbiased_variance(var, counts)
    return z.reshape(x.shape), mu, var, counts

  @nn.nowrap
  def _sharing(
    self, shape: tuple[int, ...], axes: tuple[int, ...]
  ) -> tuple[int, Sharing]:
    """The number of groups on this device, and what a group shares."""
    if self.is_initializing():  # Outside any mesh, on a dummy batch.
      return 1, Sharing(axes)
    group, groups = self.virtual_batch_size, self.axis_index_groups
    if group is None or 0 in shape:
      if (
        self.axis_name and groups is not None and len(set(map(len, groups))) > 1
      ):
        raise self._error(f'axis_index_groups={groups} differ in size.')
      if self.axis_name and lax.axis_size(self.axis_name) == 1:
        return 1, Sharing(axes)  # One device has nothing to add up.
      return 1, Sharing(axes, self.axis_name, groups)
    if not isinstance(group, numbers.Integral) or group < 1:
      raise self._error(
        f'virtual_batch_size={group!r} is not a positive integer.'
      )
    if groups is not None:
      raise self._error(
        'virtual_batch_size and axis_index_groups both define groups; use one.'
      )
    if 0 not in axes:
      raise self._error(
        'virtual_batch_size needs examples along the first axis, which is a '
        'feature axis here.'
      )
    examples = shape[0]
    if group <= examples and examples % group == 0:
      return examples // group, Sharing(axes)
    num_devices = lax.axis_size(self.axis_name) if self.axis_name else 1
    if group % examples or num_devices % (group // examples):
      raise self._error(
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
