"""Batch, group, layer and no normalization at high learning rates.

The paper multiplies the learning rate by 5 and 30 (section 4.2.2): with BN,
Inception trains faster; without it, its parameters overflow at 5. Is that due
to the batch, or does it hold for norms that look at one example? Group
normalization (Wu & He, 2018) takes mean and variance over the locations and a
group of channels of each example, layer normalization over all of its channels.
Neither depends on the size of the batch; BN's statistics do.

The network has convolutions with ReLUs, every other one with stride 2. The
speed of training is the mean of the test accuracy over its course.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from bn_repro.errors import UserError
from bn_repro.lab import rates
from bn_repro.lab.findings import Finding, Result
from bn_repro.lab.group_norm import GroupNorm
from bn_repro.models.batch_norm import BatchNorm
from bn_repro.models.inception import ConvUnit
from bn_repro.models.layers import Logits, NoNorm, classifier
from bn_repro.report import drawing

# Those of section 4.2.2.
_FACTORS = (1, 5, 30)
_STYLES = ('bn_baseline', None, None, 'inception')

FINDINGS = (
  Finding(
    'With BN, the network trains at 30 times the rate: above twice chance.',
    'section 4.2.2',
    lambda result: rates.speeds(result['usual']['accuracy']['BN'])[2],
    low=0.2,
  ),
  Finding(
    'Without a norm it does not train at 5 times the rate.',
    'section 4.2.2: parameters overflow',
    lambda result: rates.speeds(result['usual']['accuracy']['no norm'])[1],
    high=0.2,
  ),
  Finding(
    'With few images in a batch, group normalization is better than BN, each '
    'at its best rate.',
    'Wu & He 2018',
    lambda result: best(result, 'small', 'group') - best(result, 'small', 'BN'),
    low=0,
    unit=' points',
  ),
)


class Network(nn.Module):
  """Convolutions of one width, the mean over locations, and a classifier."""

  depth: int
  width: int
  norm: Any
  dtype: Any

  @nn.compact
  def __call__(self, images: jax.Array, *, train: bool) -> Logits:
    """Logits of (batch, height, width, channels) images."""
    x = images.astype(self.dtype)
    for number in range(self.depth):
      x = ConvUnit(
        self.width,
        3,
        conv=functools.partial(nn.Conv, use_bias=self.norm is NoNorm),
        norm=functools.partial(self.norm, use_running_average=not train),
        nonlinearity=nn.relu,
        strides=2 - number % 2,
      )(x)
    return Logits(classifier(10, self.dtype)(x.mean((1, 2))), None)


def check(config: ConfigDict) -> None:
  """Checks that the norms are defined.

  Raises:
    UserError: if they are not.
  """
  rates.check(config)
  if config.model.width % config.model.groups:
    raise UserError(
      f'config.model.groups={config.model.groups}: does not divide '
      f'config.model.width={config.model.width}.'
    )


def run(config: ConfigDict, seed: int) -> Result:
  """Test accuracies with usual and small batches, by norm, rate and step."""
  digits = rates.load_digits(config.data)
  norms: Mapping[str, Any] = {
    'BN': functools.partial(BatchNorm, momentum=0.9),
    'group': functools.partial(GroupNorm, num_groups=config.model.groups),
    'layer': functools.partial(GroupNorm, num_groups=1),
    'no norm': NoNorm,
  }
  tried = [factor * config.learning_rate for factor in _FACTORS]
  result = {}
  for batch, size in (
    ('usual', config.batch_size),
    ('small', config.small_batch_size),
  ):
    accuracy = {}
    for name, norm in norms.items():
      model = Network(
        config.model.depth, config.model.width, norm, config.model.dtype
      )
      accuracy[name], _ = rates.train(
        model, digits, config, tried, batch_size=size, seed=seed
      )
    result[batch] = {'size': size, 'rates': tried, 'accuracy': accuracy}
  return result


def best(result: Result, batch: str, name: str) -> float:
  """The speed of training at the best rate, in percent."""
  return 100 * max(rates.speeds(result[batch]['accuracy'][name]))


def table(results: Sequence[Result]) -> str:
  """The speeds of training with both batch sizes."""
  return '\n'.join(
    f'Batches of {results[0][batch]["size"]}:\n\n'
    + rates.table([result[batch] for result in results])
    for batch in ('usual', 'small')
  )


def draw(results: Sequence[Result]) -> Any:
  """The speeds of training over the rate, with both batch sizes."""
  figure, panels = drawing.plt.subplots(
    1, 2, sharey=True, figsize=(drawing.WIDTH, 3.8), layout='constrained'
  )
  for axes, batch in zip(panels, ('usual', 'small'), strict=True):
    rates.draw(axes, [result[batch] for result in results], _STYLES)
    axes.set_title(f'batches of {results[0][batch]["size"]}')
  drawing.draw_legend(figure, panels[0])
  return figure
