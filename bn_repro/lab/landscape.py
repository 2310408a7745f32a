"""The landscape of the loss, and the measured internal covariate shift.

Santurkar et al. ("How Does Batch Normalization Help Optimization?", 2018) say
that BN helps because it makes the loss smoother, and not because it reduces
internal covariate shift, as section 2 of our paper says: as they measure it,
BN does not reduce it, and noise after BN, which adds to it, does little harm.

`smoothness.py` has the measures, `descent.py` the networks. They are trained at
a rate that suits a network without BN, and at one ten times as high, as BN is
to allow (section 3.3).
"""

from collections.abc import Sequence
import functools
import itertools
import math
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from bn_repro.errors import UserError
from bn_repro.lab import descent
from bn_repro.lab.findings import Finding, Result
from bn_repro.lab.smoothness import along_gradient, covariate_shift
from bn_repro.report import drawing

_RATES = ('low', 'high')
# What is measured; the first two are ranges.
_FIGURES = {
  'loss': 'loss along\nthe gradient',
  'change': 'change of\nthe gradient',
  'smoothness': 'effective\nsmoothness',
  'shift': 'shift',
  'cosine': 'cosine',
  'training': 'training loss',
}


def median(result: Result, rate: str, name: str, figure: str) -> float:
  """A figure of a network, or the width of a range: its median over steps."""
  values = np.array(result[rate][name][figure])
  return float(np.median(np.ptp(values, 1) if values.ndim == 2 else values))


def _ratio(
  rate: str, figure: str, name: str, others: Sequence[str], result: Result
) -> float:
  """A figure of a network, over the mean of those of others."""
  over = np.mean([median(result, rate, other, figure) for other in others])
  return median(result, rate, name, figure) / float(over) if over else math.inf


_SANTURKAR = 'Santurkar et al. 2018'
_IOFFE = "Ioffe & Szegedy 2015, section 2; in Santurkar's measure"
_BN = ('BN', ['no BN'], 'BN / no BN')
_NOISY = ('noisy BN', ['no BN'], 'noisy BN / no BN')
_NEAR = ('noisy BN', ['BN', 'no BN'], 'our bound: noisy / mean of both')
_LESS, _NOT_LESS = (-math.inf, 1.0), (1.0, math.inf)
_CLAIMS = (
  ('The loss ranges less with BN', _SANTURKAR, 'loss', _BN, _LESS),
  ('The gradient ranges less with BN', _SANTURKAR, 'change', _BN, _LESS),
  ('The loss is smoother with BN', _SANTURKAR, 'smoothness', _BN, _LESS),
  ('BN does not reduce covariate shift', _SANTURKAR, 'shift', _BN, _NOT_LESS),
  ('BN reduces covariate shift', _IOFFE, 'shift', _BN, _LESS),
  ('Noisy BN trains better than no BN', _SANTURKAR, 'training', _NOISY, _LESS),
  ('Noisy BN trains as well as BN', _SANTURKAR, 'training', _NEAR, _LESS),
)
FINDINGS = tuple(
  Finding(
    f'{claim}, at the {rate} rate.',
    f'{source}, {text} {"<" if bounds == _LESS else "not <"} 1',
    functools.partial(_ratio, rate, figure, name, others),
    *bounds,
  )
  for rate in _RATES
  for claim, source, figure, (name, others, text), bounds in _CLAIMS
)


def check(config: ConfigDict) -> None:
  """Loads the data, and checks that all figures are defined.

  Raises:
    UserError: if they are not, or the data are missing.
  """
  low, high = (config.learning_rate[rate] for rate in _RATES)
  if not 0 < low < high:
    raise UserError(
      f'config.learning_rate: needs 0 < low < high, not {low} and {high}.'
    )
  descent.check(config)


def run(config: ConfigDict, seed: int) -> Result:
  """The figures of each network at each rate, as lists over steps.

  Raises:
    UserError: if a network diverges.
  """
  result: dict[str, dict[str, Any]] = {rate: {} for rate in _RATES}
  for rate, name in itertools.product(_RATES, descent.NETWORKS):
    value = config.learning_rate[rate]
    rows = [
      {
        'step': step.number,
        'training': step.loss,
        **along_gradient(step.gradient, step.w, value),
        **covariate_shift(step.gradient, step.w, step.updated, step.layers),
      }
      for step in descent.descend(config, name, value, seed)
    ]
    result[rate][name] = {key: [row[key] for row in rows] for key in rows[0]}
  return result


def table(results: Sequence[Result]) -> str:
  """Each figure: the median over steps, then over seeds."""
  lines = ['rate | network | ' + ' | '.join(_FIGURES)]
  lines.append('|'.join(['---'] * (2 + len(_FIGURES))))
  for rate, name in itertools.product(_RATES, descent.NETWORKS):
    cells = [
      np.median([median(result, rate, name, figure) for result in results])
      for figure in _FIGURES
    ]
    lines.append(' | '.join([rate, name, *(f'{cell:.3g}' for cell in cells)]))
  return ''.join(f'| {line} |\n' for line in lines)


def draw(results: Sequence[Result]) -> Any:
  """Figures over steps; of a range, the medians of both ends."""
  figure, panels = drawing.plt.subplots(
    len(_FIGURES), 2, sharex=True, sharey='row', layout='constrained'
  )
  figure.set_size_inches(drawing.WIDTH, 10)
  styles = drawing.styles(['inception', 'bn_baseline', None])
  for rate, column in zip(_RATES, panels.T, strict=True):
    column[0].set_title(f'{rate} rate')
    for axes, (key, label) in zip(column, _FIGURES.items(), strict=True):
      for name, style in zip(descent.NETWORKS, styles, strict=True):
        values = np.array([result[rate][name][key] for result in results])
        at_each = np.median(values, 0) if values.ndim == 3 else values.T
        steps = results[0][rate][name]['step']
        drawing.draw_spread(axes, steps, list(at_each), style, name, marker='')
      scale = 'linear' if key == 'cosine' else 'log'
      axes.set(xlabel='step', ylabel=label, yscale=scale)
      axes.label_outer()
  drawing.draw_legend(figure, panels[0, 0])
  return figure
