"""Batch, group, layer and no normalization at high learning rates.

The paper multiplies the learning rate by 5 and 30 (section 4.2.2): with BN,
Inception trains faster; without it, its parameters overflow at 5. Is that due
to the batch? Group normalization (Wu & He, 2018) takes mean and variance over
the locations and a group of channels of each example, layer normalization over
all of its channels. Neither depends on the batch, as BN and Batch Renorm do.

The network has convolutions with ReLUs, each with stride 2. The speed of
training is the mean of the test accuracy over its course.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from bn_repro.errors import UserError
from bn_repro.lab import rates
from bn_repro.lab.batch_renorm import BatchRenorm
from bn_repro.lab.conv_network import ConvNetwork
from bn_repro.lab.findings import Finding, Result
from bn_repro.lab.group_norm import GroupNorm
from bn_repro.models.batch_norm import BatchNorm
from bn_repro.models.layers import NoNorm
from bn_repro.report import drawing

# Those of section 4.2.2.
_FACTORS = (1, 5, 30)
_STYLES = ('bn_baseline', None, None, None, 'inception')
# r_max and d_max of Batch Renorm: the last ones of Ioffe, whose limits grow.
_LIMITS = 3.0, 5.0
# One test digit in four is evaluated, to save time. Our choice.
_SHARE = 4

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


def _norms(config: ConfigDict, size: int) -> Mapping[str, Any]:
  # Moving averages cover as many images with batches of any size.
  momentum = config.bn_momentum ** (size / config.batch_size)
  return {
    'BN': functools.partial(BatchNorm, momentum=momentum),
    'Batch Renorm': functools.partial(
      BatchRenorm, *_LIMITS, virtual_batch_size=size, momentum=momentum
    ),
    'group': functools.partial(GroupNorm, config.model.groups),
    'layer': functools.partial(GroupNorm, 1),
    'no norm': NoNorm,
  }


def check(config: ConfigDict) -> None:
  """Checks that the norms and both trainings are defined.

  Raises:
    UserError: if they are not.
  """
  rates.check(config)
  groups, width = config.model.groups, config.model.width
  values = width // groups * (-(-28 // 2**config.model.depth)) ** 2
  if width % groups or values < 2:
    raise UserError(
      f'config.model.groups={groups}: must divide config.model.width={width}, '
      'and the last layer needs two values in a group.'
    )
  small, size = config.small_batch_size, config.batch_size
  if small < 2 or size % small:
    raise UserError(
      f'config.small_batch_size={small}: BN needs 2 images, and it must divide '
      f'config.batch_size={size}, so that both see as many.'
    )


def run(config: ConfigDict, seed: int) -> Result:
  """Test accuracies with usual and small batches, by norm, rate and step.

  Both take as many images, and rates in proportion to the size of the batch.
  """
  train, test = rates.load_digits(config.data)
  chosen = np.argsort(test.labels, kind='stable')[::_SHARE]
  digits = train, rates.Images(*(values[chosen] for values in test))
  result, sizes = {}, config.model
  for batch, size in (
    ('usual', config.batch_size),
    ('small', config.small_batch_size),
  ):
    share = size / config.batch_size
    tried = [factor * config.learning_rate * share for factor in _FACTORS]
    plan = {**config, 'batch_size': size, 'steps': round(config.steps / share)}
    accuracy = {}
    for name, norm in _norms(config, size).items():
      model = ConvNetwork(sizes.depth, sizes.width, norm, sizes.dtype)
      found, _ = rates.train(model, digits, ConfigDict(plan), tried, seed)
      accuracy[name] = np.round(found, 4).tolist()
    result[batch] = {'size': size, 'rates': tried, 'accuracy': accuracy}
  return result


def best(result: Result, batch: str, name: str) -> float:
  """The speed of training at the best rate, in percent."""
  return 100 * max(rates.speeds(result[batch]['accuracy'][name]))


def table(results: Sequence[Result]) -> str:
  """The speeds of training with both sizes of batches."""
  return '\n'.join(
    f'Batches of {results[0][batch]["size"]}:\n\n'
    + rates.table([result[batch] for result in results])
    for batch in ('usual', 'small')
  )


def draw(results: Sequence[Result]) -> Any:
  """The speeds of training over the rate, with both sizes of batches."""
  figure, panels = drawing.plt.subplots(
    1, 2, sharey=True, figsize=(drawing.WIDTH, 4), layout='constrained'
  )
  for axes, batch in zip(panels, ('usual', 'small'), strict=True):
    found = [result[batch] for result in results]
    rates.draw(axes, found, _STYLES)
    axes.minorticks_off()
    axes.set_xticks(found[0]['rates'], [f'{x:g}' for x in found[0]['rates']])
    axes.set(title=f'batches of {found[0]["size"]}', xmargin=0.1)
    axes.label_outer()
  drawing.draw_legend(figure, panels[0])
  return figure
