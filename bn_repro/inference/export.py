"""Other forms of a trained network: with BN folded, and as StableHLO."""

import dataclasses

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from bn_repro.errors import UserError
from bn_repro.inference import forward
from bn_repro.training import model_file

# Random images on which the error of folding is measured. Our choice.
_FOLDING_IMAGES = 8
# The platforms that an exported program runs on.
PLATFORMS = ('cpu', 'cuda', 'tpu')


def fold(file: model_file.ModelFile) -> model_file.ModelFile:
  """Merges each BN layer into the layer before it (section 3.1, step 11).

  In inference y = gamma * (Wu - E[x]) / sqrt(Var[x] + epsilon) + beta is an
  affine function of Wu. The result is the network without BN, whose layers have
  the scaled weights and a bias. The products are computed in float64.

  Args:
    file: a network with BN.

  Raises:
    UserError: if it has no BN, or BN per activation, which is no convolution.
  """
  bn = file.config.bn
  if not bn.enabled:
    raise UserError('--fold: the network has no batch normalization to fold.')
  if bn.per_activation:
    raise UserError(
      '--fold: batch normalization per activation cannot be folded into a '
      'convolution.'
    )
  params = traverse_util.flatten_dict(dict(file.variables['params']))
  statistics = traverse_util.flatten_dict(dict(file.variables['batch_stats']))
  for *unit, name in [path for path in statistics if path[-1] == 'mean']:
    scale = params.pop((*unit, 'scale')).astype(np.float64)
    shift = params.pop((*unit, 'bias')).astype(np.float64)
    mean, var = (
      statistics[(*unit, name)].astype(np.float64) for name in ('mean', 'var')
    )
    layer = _layer_before(unit)
    kernel = params[(*layer, 'kernel')]
    factor = scale / np.sqrt(var + bn.epsilon)
    params[(*layer, 'kernel')] = (kernel * factor).astype(kernel.dtype)
    params[(*layer, 'bias')] = (shift - mean * factor).astype(kernel.dtype)
  config = file.config.copy_and_resolve_references()
  with config.unlocked():
    config.bn.enabled = False
  return dataclasses.replace(
    file,
    variables={
      'params': traverse_util.unflatten_dict(params),
      'batch_stats': {},
    },
    config=config,
    facts={**file.facts, 'folded': True},
  )


def _layer_before(bn: list[str]) -> tuple[str, ...]:
  """Returns the path of the layer that a BN layer follows.

  These are `conv` before `bn` in Inception, and `hidden1` before `hidden1_bn`
  in the MNIST network.
  """
  *parents, name = bn
  return (*parents, 'conv' if name == 'bn' else name.removesuffix('_bn'))


def folding_error(file: model_file.ModelFile) -> float:
  """Returns the largest change of a logit that folding causes.

  Args:
    file: a network with BN.

  Returns:
    The largest difference on some images of random pixels, as a fraction of the
    largest logit.
  """
  images = np.random.default_rng(0).integers(
    0, 256, (_FOLDING_IMAGES, *file.image_shape), np.uint8
  )
  expected, found = (
    np.asarray(jax.jit(forward.create_logits(each))(each.variables, images))
    for each in (file, fold(file))
  )
  return float(abs(found - expected).max() / abs(expected).max())


def to_stablehlo(file: model_file.ModelFile) -> bytes:
  """Returns a program in the format of `jax.export`.

  It maps uint8 (batch, height, width, channels) to float32 (batch, classes),
  for any batch, and contains the variables and the normalization of pixels. It
  computes in float32 on all `PLATFORMS`.

  Args:
    file: the network.
  """
  from jax import export

  config = file.config.copy_and_resolve_references()
  with config.unlocked():
    config.model.dtype = 'float32'
  file = dataclasses.replace(file, config=config)
  # A network in float64 has set JAX up for it.
  with jax.enable_x64(False):  # noqa: FBT003
    probabilities = forward.create_probabilities(file)
    variables = jax.tree.map(
      lambda x: jnp.asarray(x, jnp.float32), file.variables
    )

    (batch,) = export.symbolic_shape('batch')
    images = jax.ShapeDtypeStruct((batch, *file.image_shape), np.uint8)
    program = jax.jit(lambda images: probabilities(variables, images))
    exported = export.export(program, platforms=PLATFORMS)(images)
  return bytes(exported.serialize())
