"""Creates a network from `config.model` and `config.bn`, and its variables.

The variants differ in the layer (with or without a bias), the normalization and
the nonlinearity. These are passed to a network here; the network does not know
which variant it is.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from bn_repro import parallel
from bn_repro.models import batch_norm, inception, mlp
from bn_repro.models.layers import NoNorm, parameter_dtype

# Our choice: near-zero logits, so that the initial loss is ln(classes) and a
# network without BN trains (with He-normal everywhere the initial loss is 19).
CLASSIFIER_STD = 0.01

# By `config.model.name`: the function that creates the network, and the layer
# that BN follows in it.
NETWORKS: Mapping[str, tuple[Callable[..., nn.Module], Any]] = {
  'inception': (inception.create, nn.Conv),
  'inception_tiny': (inception.create, nn.Conv),
  'mlp': (mlp.create, nn.Dense),
}


def create_model(
  model: ConfigDict, bn: ConfigDict, num_classes: int, **bn_overrides: Any
) -> nn.Module:
  """Builds the network that `config.model` and `config.bn` describe.

  Args:
    model: the `model` sub-tree of a config.
    bn: the `bn` sub-tree.
    num_classes: number of logits.
    **bn_overrides: arguments of `BatchNorm` that override the config.

  Returns:
    A linen module that maps images in [-1, 1] to `layers.Logits`.
  """
  dtype = compute_dtype(model)
  param_dtype = parameter_dtype(dtype)
  norm: Any = NoNorm
  if bn.enabled:
    shared = {
      'global': {'axis_name': parallel.AXIS},
      'device': {},
      'group': {
        'axis_name': parallel.AXIS,
        'virtual_batch_size': bn.virtual_batch_size,
      },
    }[bn.statistics]
    norm = functools.partial(
      batch_norm.BatchNorm,
      **{
        'momentum': bn.momentum,
        'epsilon': bn.epsilon,
        'dtype': dtype,
        'param_dtype': param_dtype,
        **shared,
        **bn_overrides,
      },
    )
  create, layer = NETWORKS[model.name]
  layer = functools.partial(
    layer,
    # BN's mean subtraction cancels a bias (section 3.2).
    use_bias=not bn.enabled,
    dtype=dtype,
    param_dtype=param_dtype,
  )
  last_norm = (
    functools.partial(norm, axis=(1, 2, 3)) if bn.per_activation else norm
  )
  return create(model, num_classes, layer, norm, last_norm, dtype)


def compute_dtype(model: ConfigDict, platform: str | None = None) -> Any:
  """The compute dtype that `config.model.dtype` selects.

  Args:
    model: the `model` sub-tree of a config.
    platform: cpu, gpu or tpu; None for the default backend of JAX.
  """
  if model.dtype != 'auto':
    return jnp.dtype(model.dtype)
  on_cpu = (platform or jax.default_backend()) == 'cpu'
  return jnp.dtype('float32' if on_cpu else 'bfloat16')


def variable_shapes(
  model: nn.Module, image_shape: Sequence[int]
) -> dict[str, Any]:
  """Shapes and dtypes of `params` and `batch_stats`, without computing them.

  Args:
    model: a network from `create_model`.
    image_shape: (height, width, channels).
  """
  images = jnp.zeros((1, *image_shape), jnp.float32)
  shapes = jax.eval_shape(
    lambda key: model.init({'params': key, 'dropout': key}, images, train=True),
    jax.random.key(0),
  )
  return {name: shapes.get(name, {}) for name in ('params', 'batch_stats')}


def initial_variables(
  model: nn.Module,
  image_shape: Sequence[int],
  seed: int,
  init_std: float,
  init_scale: float,
) -> dict[str, Any]:
  """Draws the initial `params` and `batch_stats`.

  Gamma and running variances are 1, kernels are random, and the rest is 0. The
  paper gives no initial values: 1 and 0 for gamma and beta are universal, the
  rest is our choice. All kernels are drawn from one stream, in the order of
  their names, so that variants that differ in BN or in the nonlinearity start
  from the same weights.

  Compiling Flax's `init` of the Inception network takes minutes on a CPU; this
  compiles one random draw.

  Args:
    model: a network from `create_model`.
    image_shape: (height, width, channels).
    seed: seed of the kernels.
    init_std: standard deviation of all kernels; 0 selects He normal (fan-in),
      and `CLASSIFIER_STD` for classifiers.
    init_scale: factor of the standard deviation.

  Returns:
    A dict of `params` and `batch_stats`, NumPy arrays.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(
    variable_shapes(model, image_shape)
  )
  num_weights = sum(
    leaf.size for path, leaf in leaves if path[-1].key == 'kernel'
  )
  draws = np.asarray(
    jax.random.normal(jax.random.key(seed), (num_weights,), jnp.float32)
  )
  position = 0
  values = []
  for path, leaf in leaves:
    name = path[-1].key
    if name == 'kernel':
      fan_in = math.prod(leaf.shape[:-1])
      is_classifier = path[-2].key == 'classifier'
      he = math.sqrt(2 / fan_in)
      std = init_std or (CLASSIFIER_STD if is_classifier else he)
      draw = draws[position : position + leaf.size].reshape(leaf.shape)
      values.append((init_scale * std * draw).astype(leaf.dtype))
      position += leaf.size
    else:
      initial = {'scale': 1, 'var': 1, 'bias': 0, 'mean': 0}[name]
      values.append(np.full(leaf.shape, initial, leaf.dtype))
  return jax.tree_util.tree_unflatten(structure, values)
