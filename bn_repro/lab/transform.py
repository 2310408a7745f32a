"""Whitening, and BN in its place.

Section 2 would like to whiten the inputs of layers, as networks train faster on
whitened inputs. BN, in section 3, is simpler: it normalizes each unit by
itself, over the mini-batch. Is that enough, and what does it save?

Networks on digits have hidden layers of few sigmoids, which are whitened,
normalized or left alone, and are trained at several learning rates. The speed
of training is the mean of the test accuracy over its course. Whitening takes
(x - E[x]) Cov[x]^(-1/2), with the symmetric root; see `whitening.py`.
"""

from collections.abc import Mapping, Sequence
import functools
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from bn_repro.errors import UserError
from bn_repro.lab import rates
from bn_repro.lab.findings import Finding, Result
from bn_repro.lab.whitening import Whitening
from bn_repro.models.batch_norm import BatchNorm
from bn_repro.models.layers import NoNorm
from bn_repro.report import drawing

_NORMS: Mapping[str, Any] = {
  'no norm': NoNorm,
  'BN': functools.partial(BatchNorm, momentum=0.9),
  'whitening': Whitening,
}
_STYLES = ('inception', 'bn_baseline', None)

FINDINGS = (
  Finding(
    'Whitened layers train faster, with each network at its best rate.',
    'section 2: the idea that the paper starts from',
    lambda result: gain(result, 'whitening'),
    low=0,
    unit=' points above no norm',
  ),
  Finding(
    'So do layers whose units are normalized but not decorrelated.',
    'section 3: the simplification that it makes',
    lambda result: gain(result, 'BN'),
    low=0,
    unit=' points above no norm',
  ),
)


def check(config: ConfigDict) -> None:
  """Checks that the layers can be whitened.

  Raises:
    UserError: if they cannot.
  """
  rates.check(config)
  if config.model.dtype not in ('float32', 'float64'):
    raise UserError(
      f'config.model.dtype={config.model.dtype}: eigenvectors need float32 or '
      'float64.'
    )
  if config.batch_size <= config.model.width:
    raise UserError(
      f'config.batch_size={config.batch_size}: the covariance of '
      f'{config.model.width} units is singular. Use more images.'
    )


def run(config: ConfigDict, seed: int) -> Result:
  """Test accuracies by rate and step, and CPU times of a step."""
  digits = rates.load_digits(config.data)
  tried = rates.tried(config)
  accuracy, timing = {}, {}
  for name, norm in _NORMS.items():
    model = rates.sigmoids(config.model, norm, use_bias=norm is NoNorm)
    accuracy[name], timing[name] = rates.train(
      model, digits, config, tried, seed
    )
  return {'rates': tried, 'accuracy': accuracy, 'timing': timing}


def gain(result: Result, name: str) -> float:
  """Speed of a network above that without a norm, each at its best rate."""
  accuracy = result['accuracy']
  best, without = (max(rates.speeds(accuracy[n])) for n in (name, 'no norm'))
  return 100 * (best - without)


def table(results: Sequence[Result]) -> str:
  """The speeds of training, and the CPU time of a step."""
  times = (
    f'{name} {np.median([result["timing"][name] for result in results]):.2f} ms'
    for name in _NORMS
  )
  return f'{rates.table(results)}\nCPU time of a step: {", ".join(times)}.\n'


def draw(results: Sequence[Result]) -> Any:
  """Accuracies by step at each best rate, and the speed of training by rate."""
  figure, (left, right) = drawing.plt.subplots(
    1, 2, sharey=True, figsize=(drawing.WIDTH, 3.8), layout='constrained'
  )
  for name, style in zip(_NORMS, drawing.styles(_STYLES), strict=True):
    curves = [max(result['accuracy'][name], key=sum) for result in results]
    x = [point / rates.POINTS for point in range(1, rates.POINTS + 1)]
    drawing.draw_spread(
      left, x, list(np.transpose(curves)), style, name, marker=''
    )
  left.set(xlabel='share of the steps', ylabel='test accuracy, best rate')
  rates.draw(right, results, _STYLES)
  drawing.draw_legend(figure, right)
  return figure
