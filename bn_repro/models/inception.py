"""The Inception network as a linen module, built from the table.

The variants differ in the convolution (with or without a bias), the
normalization and the nonlinearity, which are passed in.
"""

from collections.abc import Callable
import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from bn_repro.models import inception_table
from bn_repro.models.layers import (
  NONLINEARITIES,
  Array,
  Dropout,
  Logits,
  ModuleDef,
  classifier,
  parameter_dtype,
)

# Caffe's values for both places (bvlc_googlenet), like the exponent 3/4; the
# paper gives none. Caffe divides alpha by the window, as below.
LRN_WINDOW, LRN_ALPHA = 5, 1e-4


def local_response_norm(x: Array) -> Array:
  """Local response normalization over n neighboring channels.

  Returns x / (1 + alpha / n * sum of x^2)^(3/4); n and alpha are above.
  """
  # A product with a band matrix is the fastest sum over neighbors on a CPU, and
  # two square roots are faster than a power.
  channels = jnp.arange(x.shape[-1])
  is_near = abs(channels[:, None] - channels[None]) <= LRN_WINDOW // 2
  total = x * x @ is_near.astype(x.dtype)
  root = jnp.sqrt(1 + LRN_ALPHA / LRN_WINDOW * total)
  return x / (root * jnp.sqrt(root))


class ConvUnit(nn.Module):
  """Convolution, normalization, nonlinearity: z = g(BN(Wu)), section 3.2.

  Attributes:
    features: number of output channels.
    kernel: window size.
    conv: convolution, called with (features, window, strides).
    norm: normalization, called with the nonlinearity that follows it.
    nonlinearity: applied last.
    strides: strides of the convolution.
    depth_multiplier: if not 0, a depthwise convolution with this multiplier
      comes first, and `conv` is pointwise.
  """

  features: int
  kernel: int
  conv: ModuleDef
  norm: ModuleDef
  nonlinearity: Callable[[Array], Array]
  strides: int = 1
  depth_multiplier: int = 0

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps (batch, height, width, channels) to `features` channels."""
    window = (self.kernel, self.kernel)
    strides = (self.strides, self.strides)
    if self.depth_multiplier:
      x = self.conv(
        x.shape[-1] * self.depth_multiplier,
        window,
        strides,
        feature_group_count=x.shape[-1],
        use_bias=False,
        name='depthwise',
      )(x)
      window, strides = (1, 1), (1, 1)
    x = self.conv(self.features, window, strides, name='conv')(x)
    # As part of BN, the nonlinearity keeps nothing for the backward pass.
    return self.norm(nonlinearity=self.nonlinearity, name='bn')(x)


class InceptionModule(nn.Module):
  """One row of the table: four branches, concatenated in the printed order.

  Attributes:
    row: filters and pooling.
    unit: `ConvUnit` without features, kernel and name.
    avg_pool: average pooling, as `nn.avg_pool`.
  """

  row: inception_table.Row
  unit: ModuleDef
  avg_pool: Callable[..., Array]

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps (batch, height, width, channels) to the module's channels."""
    row, unit = self.row, self.unit
    branches = []
    if row.conv_1x1:
      branches.append(unit(row.conv_1x1, 1, name='conv_1x1')(x))
    y = unit(row.reduce_3x3, 1, name='reduce_3x3')(x)
    branches.append(
      unit(row.conv_3x3, 3, strides=row.stride, name='conv_3x3')(y)
    )
    y = unit(row.reduce_double, 1, name='reduce_double')(x)
    y = unit(row.conv_double, 3, name='conv_double_1')(y)
    branches.append(
      unit(row.conv_double, 3, strides=row.stride, name='conv_double_2')(y)
    )
    pool = {'avg': self.avg_pool, 'max': nn.max_pool}[row.pool]
    y = pool(x, (3, 3), (row.stride, row.stride), padding='SAME')
    if row.projection:
      y = unit(row.projection, 1, name='projection')(y)
    return jnp.concatenate([*branches, y], axis=-1)


class AuxHead(nn.Module):
  """Auxiliary classifier on the output of 4d; training only.

  Its layers have biases and no BN in every variant, as in the implementation
  that its sizes are taken from.

  Attributes:
    num_classes: number of logits.
    nonlinearity: applied after both hidden layers.
    dtype: compute dtype.
  """

  num_classes: int
  nonlinearity: Callable[[Array], Array]
  dtype: Any

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Maps the output of 4d to logits (batch, classes)."""
    dense = functools.partial(
      nn.Dense, dtype=self.dtype, param_dtype=parameter_dtype(self.dtype)
    )
    window = tuple(min(5, size) for size in x.shape[1:3])
    x = nn.avg_pool(x, window, (3, 3), padding='VALID')
    x = nn.Conv(
      inception_table.AUX_CONV_CHANNELS,
      (1, 1),
      dtype=self.dtype,
      param_dtype=parameter_dtype(self.dtype),
      name='conv',
    )(x)
    x = self.nonlinearity(x).reshape(x.shape[0], -1)
    x = self.nonlinearity(dense(inception_table.AUX_HIDDEN, name='hidden')(x))
    return classifier(self.num_classes, self.dtype)(x)


class Inception(nn.Module):
  """The network of the paper's appendix, for NHWC images of 32 pixels and up.

  Attributes:
    num_classes: number of logits.
    rows: the Inception modules, in order.
    stem_channels: filters of the three convolutions of the stem.
    stem_kernel: window size of the first convolution.
    stem_pool: max pooling after the first convolution.
    separable_stem: make the first convolution depthwise (multiplier 8), then
      pointwise.
    conv: convolution, with or without a bias.
    norm: normalization; called with `use_running_average` and `nonlinearity`.
    last_norm: normalization in the last module.
    nonlinearity: applied after every normalization.
    torch_padding: pad strided convolutions and average pooling as Caffe and
      PyTorch do, not as TensorFlow's SAME.
    lrn: local response normalization before and after the second convolution.
    dropout_rate: fraction of the inputs of the classifier to drop.
    aux_head: add an auxiliary classifier after 4d, in training.
    dtype: compute dtype.
  """

  num_classes: int
  rows: tuple[inception_table.Row, ...]
  stem_channels: tuple[int, ...]
  stem_kernel: int
  stem_pool: bool
  separable_stem: bool
  conv: ModuleDef
  norm: ModuleDef
  last_norm: ModuleDef
  nonlinearity: Callable[[Array], Array]
  torch_padding: bool
  lrn: bool
  dropout_rate: float
  aux_head: bool
  dtype: Any

  @nn.compact
  def __call__(self, images: Array, *, train: bool) -> Logits:
    """Maps (batch, height, width, 1 or 3) images in [-1, 1] to logits."""

    def conv(
      features: int, window: tuple[int, int], *args: Any, **kwargs: Any
    ) -> nn.Module:
      padding: Any = 'SAME'
      if self.torch_padding:
        padding = tuple((size // 2, size // 2) for size in window)
      return self.conv(features, window, *args, padding=padding, **kwargs)

    unit = functools.partial(
      ConvUnit,
      conv=conv,
      norm=functools.partial(self.norm, use_running_average=not train),
      nonlinearity=self.nonlinearity,
    )
    max_pool = functools.partial(
      nn.max_pool, window_shape=(3, 3), strides=(2, 2), padding='SAME'
    )
    # Caffe and PyTorch include the padding in the average, TensorFlow does not.
    avg_pool = functools.partial(
      nn.avg_pool, count_include_pad=self.torch_padding
    )
    lrn = local_response_norm if self.lrn else (lambda x: x)

    first, reduce, second = self.stem_channels
    depth_multiplier = inception_table.DEPTH_MULTIPLIER
    # Gray images become three equal channels.
    x = jnp.broadcast_to(images.astype(self.dtype), (*images.shape[:3], 3))
    x = unit(
      first,
      self.stem_kernel,
      strides=2,
      depth_multiplier=depth_multiplier if self.separable_stem else 0,
      name='conv1',
    )(x)
    if self.stem_pool:
      x = max_pool(x)
    x = unit(reduce, 1, name='conv2_reduce')(lrn(x))
    x = max_pool(lrn(unit(second, 3, name='conv2')(x)))

    aux_logits = None
    for row in self.rows:
      if row is self.rows[-1]:
        unit = functools.partial(
          unit,
          norm=functools.partial(self.last_norm, use_running_average=not train),
        )
      x = InceptionModule(
        row, unit=unit, avg_pool=avg_pool, name=f'inception_{row.name}'
      )(x)
      if train and self.aux_head and row.name == inception_table.AUX_HEAD_AFTER:
        aux_logits = AuxHead(
          self.num_classes, self.nonlinearity, self.dtype, name='aux_head'
        )(x)

    x = x.mean(axis=(1, 2))
    if train:
      x = Dropout(self.dropout_rate, name='dropout')(x)
    return Logits(classifier(self.num_classes, self.dtype)(x), aux_logits)


def create(
  model: ConfigDict,
  num_classes: int,
  conv: ModuleDef,
  norm: ModuleDef,
  last_norm: ModuleDef,
  dtype: Any,
) -> Inception:
  """Builds the network of `config.model` around a convolution and norms."""
  rows = inception_table.rows(
    model.reading, tiny=model.name == 'inception_tiny'
  )
  return Inception(
    num_classes=num_classes,
    rows=tuple(row.scaled(model.width) for row in rows),
    stem_channels=tuple(
      round(channels * model.width)
      for channels in inception_table.STEM_CHANNELS
    ),
    stem_kernel=model.stem_kernel,
    stem_pool=model.stem_pool,
    separable_stem=model.stem == 'separable',
    conv=conv,
    norm=norm,
    last_norm=last_norm,
    nonlinearity=NONLINEARITIES[model.nonlinearity],
    torch_padding=model.padding == 'torch',
    lrn=model.lrn,
    dropout_rate=model.dropout_rate,
    aux_head=model.aux_head,
    dtype=dtype,
  )
