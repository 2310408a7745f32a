"""Activations, Jacobians of layers, and long steps.

Section 3.3 of the paper conjectures that with BN the singular values of layer
Jacobians are close to 1. A layer is there a map between normalized values: here
nonlinearity, weights and BN. Its Jacobian is that of an example's outputs by
its inputs, in a batch: the other examples stay, the statistics change.

Bjorck et al. ("Understanding Batch Normalization", 2018) find, in residual
networks, that without BN activations grow with depth, and that steps from w to
w - a g must be short: one diverges if it multiplies the loss by 10^3. For the
growth, layers are made residual here, too: they add to their inputs.
"""

from collections.abc import Sequence
import functools
from typing import Any

from ml_collections import ConfigDict
import numpy as np

from bn_repro.lab import plain
from bn_repro.lab.findings import Finding, Result
from bn_repro.report import drawing

_WHEN = ('at first', 'trained')
_RATES = np.geomspace(0.01, 1e5, 29)
_DIVERGED = 1e3
_SHARES = np.linspace(0, 1, 21)


def _figure(name: str, when: str, figure: str, result: Result) -> float:
  return result[name][when][figure]


FINDINGS = (
  Finding(
    'Without BN, variances of activations grow with depth (last over first).',
    'Bjorck et al. 2018: they grow; our bound is 10',
    functools.partial(_figure, 'no BN, relu', 'at first', 'growth'),
    low=10,
  ),
  Finding(
    'With BN, they grow less (the same).',
    'Bjorck et al. 2018: less; our bound is 10',
    functools.partial(_figure, 'BN, relu', 'at first', 'growth'),
    high=10,
  ),
  *(
    Finding(
      f'Singular values are near 1 ({name}, {when}; share in 0.5 to 2).',
      'section 3.3, a conjecture; the range, and most, are our choice',
      functools.partial(_figure, name, when, 'near 1'),
      low=0.5,
    )
    for name in ('BN, sigmoid', 'BN, relu')
    for when in _WHEN
  ),
  Finding(
    'With BN, longer steps do not diverge (ratio to those without).',
    'Bjorck et al. 2018: longer; our bound is 1',
    lambda result: (
      result['BN, relu']['trained']['longest']
      / result['no BN, relu']['trained']['longest']
    ),
    low=1,
  ),
)


def check(config: ConfigDict) -> None:
  """Checks that what is measured is defined.

  Raises:
    UserError: if it is not.
  """
  plain.check(config)


def run(config: ConfigDict, seed: int) -> Result:
  """Measures networks before and after training, all on the same batches."""
  result = {}
  for name, network in plain.NETWORKS.items():
    batches = plain.batches(seed, config.batch_size)
    weights = plain.initial_weights(config.model, seed)
    first = _measure(network, weights, next(batches))
    weights = plain.train(config, network, weights, batches)
    trained = _measure(network, weights, next(batches))
    result[name] = {'at first': first, 'trained': trained}
  return result


def _measure(network: plain.Network, weights: Any, batch: Any) -> Result:
  x = residual = network.layer(weights[0], batch[0])
  moments, found = [], []
  for w in weights[1:-1]:
    jacobians = plain.jacobians(network, w, x)
    found.append(np.linalg.svd(jacobians, compute_uv=False))
    x, residual = network.layer(w, x), residual + network.layer(w, residual)
    moments.append((abs(residual.mean(0)).mean(), residual.var(0).mean()))
  (means, variances), values = np.transpose(moments), np.array(found)
  steps = (plain.sgd_step(network, weights, rate, batch) for rate in _RATES)
  losses = np.array([network.loss(step, batch) for step in steps])
  ratios = np.nan_to_num(losses / network.loss(weights, batch), nan=np.inf)
  count = int(np.argmax([*(ratios > _DIVERGED), True]))
  return {
    'means': means.tolist(),
    'variances': variances.tolist(),
    'growth': float(variances[-1] / variances[0]),
    'values': np.quantile(values, _SHARES).tolist(),
    'near 1': np.mean((values >= 0.5) & (values <= 2)),
    'ratios': ratios.clip(max=10 * _DIVERGED).tolist(),
    'longest': _RATES[max(count - 1, 0)],
  }


def table(results: Sequence[Result]) -> str:
  """Figures of each network; medians over the seeds."""
  lines = ['| network | figure | at first | trained |', '|---|---|---|---|']
  for name in plain.NETWORKS:
    for key in ('growth', 'near 1', 'longest'):
      found = [[r[name][when][key] for when in _WHEN] for r in results]
      cells = [f'{median:.3g}' for median in np.median(found, 0)]
      lines.append(f'| {name} | {key} | {" | ".join(cells)} |')
  return ''.join(f'{line}\n' for line in lines)


def draw(results: Sequence[Result]) -> Any:
  """Moments at first; singular values and long steps of trained networks."""
  size, names = (drawing.WIDTH, 11), list(plain.NETWORKS)
  figure, axes = drawing.plt.subplots(4, figsize=size, layout='constrained')
  layers = range(1, 1 + len(results[0][names[0]]['trained']['means']))
  panels = (
    *((layers, 'at first', key) for key in ('variances', 'means')),
    *((_SHARES, 'trained', 'values'), (_RATES, 'trained', 'ratios')),
  )
  for name, style in zip(names, drawing.styles(names), strict=True):
    label = name.replace('relu', 'ReLU')
    for panel, (x, when, key) in zip(axes, panels, strict=True):
      found = np.median([result[name][when][key] for result in results], 0)
      panel.semilogy(x, found, **style, label=label, ms=4)
  axes[0].set(xlabel='layer', ylabel='variance')
  axes[1].set(xlabel='layer', ylabel='|mean|', yscale='linear')
  axes[2].set(xlabel='share of singular values', ylabel='at most')
  axes[2].set(ylim=(0.01, 10))
  axes[2].axhspan(0.5, 2, color='#ddd')
  axes[3].set(xlabel='rate of step', ylabel='loss after / before', xscale='log')
  axes[0].legend(ncols=2)
  return figure
