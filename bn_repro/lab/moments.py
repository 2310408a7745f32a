"""The variance of a batch in float32.

How exact is the variance by which Algorithm 1 divides? E[x^2] - E[x]^2 takes
one reduction. It is the difference of two numbers of the size of the squared
mean, each rounded to 6e-8 of its size: the relative error grows with (mean /
std)^2. About a pivot, E[(x - pivot)^2] - E[x - pivot]^2, the distance of the
pivot takes the place of the mean; `BatchNorm` takes its running mean. The other
form of `batch_moments` subtracts the mean in a second pass. Errors are those of
the worst activation, against NumPy in float64 on the same float32 values.
Where the variance is lost, outputs are limited to std / sqrt(epsilon).
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from bn_repro.errors import UserError
from bn_repro.lab.findings import Finding, Result
from bn_repro.models.batch_norm import Sharing, batch_moments
from bn_repro.report import drawing

NAIVE, TWO = 'E[x²]-E[x]²', 'two passes'
# Distance of the pivot from the mean, in standard deviations; None is pivot 0.
FORMS = {NAIVE: None, 'pivot 1 std off': 1, 'pivot 100 std off': 100, TWO: None}
# Those of PyTorch and TF-Slim. Our choice: the mean / std of batches by size.
_EPSILONS, _MEAN = (1e-5, 1e-3), 100.0

_CLAIMED = '`models/batch_norm.py`, before this was measured'
FINDINGS = (
  Finding(
    'The error of E[x²] - E[x]² grows with the square of mean / std.',
    'derived above: 2',
    lambda result: growth(result),
    *(1.5, 2.5),
  ),
  Finding(
    'About a pivot up to 100 std off, the variance is within 1e-3.',
    _CLAIMED,
    lambda result: max(result['values']['pivot 100 std off']),
    high=1e-3,
  ),
  Finding(
    'With two passes the mean has no such limit.',
    _CLAIMED,
    lambda result: max(result['values'][TWO]),
    high=1e-3,
  ),
)


def check(config: ConfigDict) -> None:
  """Checks that the errors are defined.

  Raises:
    UserError: if they are not.
  """
  if config.model.dtype != 'float32':
    raise UserError(
      f'config.model.dtype={config.model.dtype}: the errors are those of '
      'float32. Leave it as it is.'
    )
  if config.batch_size < 8:
    raise UserError(
      f'config.batch_size={config.batch_size}: the figure needs at least 8.'
    )


def run(config: ConfigDict, seed: int) -> Result:
  """Errors by mean and size of a batch, and the largest variance of outputs."""
  rng = np.random.default_rng(seed)
  places = [(10.0**n, config.batch_size) for n in range(config.decades + 1)]
  while (size := places[-1][1] // 4) > 1:
    places.append((_MEAN, size))
  values: dict[str, list[float]] = {}
  for mean, size in places:
    x = rng.standard_normal((size, config.features)) + mean
    x = (rng.uniform(0.5, 2, config.features) * x).astype(config.model.dtype)
    exact = x.astype(np.float64).var(0)
    for form in FORMS:
      errors = abs(variance(x, form) / exact - 1)
      values.setdefault(form, []).append(errors.max().item())
    for epsilon in _EPSILONS:
      outputs = exact / (variance(x, NAIVE) + epsilon)
      values.setdefault(f'epsilon {epsilon:g}', []).append(outputs.max().item())
  return {'places': places, 'values': values}


@functools.partial(jax.jit, static_argnames='one_reduction')
def _variance(x: Any, pivot: Any, *, one_reduction: bool) -> jax.Array:
  columns = Sharing((0,))
  return batch_moments(x, pivot, None, columns, one_reduction=one_reduction)[1]


def variance(x: np.ndarray, form: str) -> np.ndarray:
  """Variances of the columns of a batch, in one of the `FORMS`, as float64."""
  pivot = np.zeros((1, x.shape[1]), x.dtype)
  if (distance := FORMS[form]) is not None:
    pivot[0] = x.mean(0, np.float64) + distance * x.std(0, np.float64)
  found = _variance(x, pivot, one_reduction=form != TWO)
  return np.asarray(found, np.float64)[0]


def growth(result: Result) -> float:
  """The power of the mean with which the error of E[x²] - E[x]² grows."""
  decades = sum(m == result['places'][0][1] for _, m in result['places']) - 1
  first, last = (max(result['values'][NAIVE][i], 2**-24) for i in (0, decades))
  return float(np.log10(last / first) / decades)


def table(results: Sequence[Result]) -> str:
  """Largest errors of all seeds, and variances of outputs, by epsilon."""
  names = ['mean / std', 'm', *results[0]['values']]
  lines = [f'| {" | ".join(names)} |', '|---' * len(names) + '|']
  worst = np.max([list(result['values'].values()) for result in results], 0)
  for place, values in zip(results[0]['places'], worst.T, strict=True):
    cells = [*(f'{n:g}' for n in place), *(f'{value:.1e}' for value in values)]
    lines.append(f'| {" | ".join(cells)} |')
  return ''.join(f'{line}\n' for line in lines)


def draw(results: Sequence[Result]) -> Any:
  """Errors by mean and by size of the batch, and outputs by mean."""
  figure, panels = drawing.plt.subplot_mosaic(
    'AA;BC', figsize=(drawing.WIDTH, 6.4), layout='constrained'
  )
  means, sizes = np.transpose(results[0]['places'])
  names = list(results[0]['values'])
  for name, style in zip(names, drawing.styles([None] * 6), strict=True):
    values = np.transpose([result['values'][name] for result in results])
    for panel, x, shown in (
      ('A' if name in FORMS else 'C', means, sizes == sizes[0]),
      ('B', sizes, (means == _MEAN) & (name in FORMS)),
    ):
      at_each = list(values[shown])
      drawing.draw_spread(panels[panel], x[shown], at_each, style, name)
  panels['B'].set_xlabel('m, mean / std 100')
  for name, axes in panels.items():
    axes.set(xscale='log', yscale='log', ylabel='relative error')
    if name != 'B':
      axes.set_xlabel('mean / std')
      axes.legend()
  panels['C'].set_ylabel(f'variance of output,\nby {NAIVE}')
  return figure
