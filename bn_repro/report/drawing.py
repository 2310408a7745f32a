"""Drawing that the figures of the report and of sweeps share.

A figure is 1,200 pixels wide, and legible at a third of that, on a phone.
"""

from collections.abc import Iterable, Mapping, Sequence
import io
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use('Agg')

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import offset_copy
import numpy as np
from PIL import Image

from bn_repro import paper
from bn_repro.report import runs, sections
from bn_repro.runtime.workdir import replace_file

# Inches and dots per inch. Text of 11 points is 10 pixels high at a third.
WIDTH = 6.0
_DPI = 200
mpl.rcParams.update(
  {
    'font.size': 11,
    'axes.labelsize': 11,
    'axes.titlesize': 11,
    'axes.grid': True,
    'grid.alpha': 0.3,
    'legend.frameon': False,
    'legend.fontsize': 10.5,
  }
)

# Names that have a color in all figures: the variants of section 4.2, then the
# members of the ensemble. Those of Fig. 1 are never in a figure with these.
_NAMED = (*paper.FIG_3, *paper.ENSEMBLE)
_POSITIONS: Mapping[object, int] = {
  **{name: position for position, name in enumerate(_NAMED)},
  'mnist': _NAMED.index('inception'),
  'bn_mnist': _NAMED.index('bn_baseline'),
}
# The palette of Okabe and Ito, for section 4.2, and "muted" of Tol, for the
# rest. Both are distinguishable with color blindness.
_COLORS = (
  *('#000000', '#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00'),
  *('#56b4e9', '#332288', '#999933', '#882255', '#44aa99', '#cc6677'),
  *('#117733', '#aa4499', '#661100'),
)
# Dots are for lines of reference and moving averages, diamonds and crosses for
# `MATCH` and `_DIVERGED`.
_LINE_STYLES = ('-', '--', '-.', (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
_MARKERS = ('o', 's', '^', 'v', 'P', '<', '>')

MATCH: Mapping[str, Any] = {
  'marker': 'D',
  'ms': 9,
  'mec': 'black',
  'ls': 'none',
}
_DIVERGED: Mapping[str, Any] = {'marker': 'x', 'ms': 9, 'mew': 2, 'ls': 'none'}
ONE_RUN: Mapping[str, Any] = {'marker': '.', 'ms': 4, 'ls': 'none'}
THIN: Mapping[str, Any] = {'lw': 0.7, 'alpha': 0.7}
REFERENCE: Mapping[str, Any] = {'color': '#555', 'lw': 1.3, 'ls': ':'}
# Most points of a line.
_MAX_POINTS = 400


def styles(names: Iterable[str | None]) -> list[dict[str, Any]]:
  """Colors, line styles and markers of the lines of a figure.

  Args:
    names: name of each line's variant, or None.

  Returns:
    The style of each line. The first line of a known variant has the same one
    in all figures; all others have one that no known variant has.
  """
  others = itertools.count(len(_NAMED))
  positions: list[int] = []
  for name in names:
    position = _POSITIONS.get(name)
    if position is None or position in positions:
      position = next(others)
    positions.append(position)
  return [_style(position) for position in positions]


def color_of(name: object) -> str | None:
  """The color of a known variant, or None."""
  position = _POSITIONS.get(name)
  return None if position is None else _COLORS[position]


def _style(position: int) -> dict[str, Any]:
  known, total = len(paper.FIG_3), len(_COLORS)
  if position >= total:  # The colors of section 4.2 are its own.
    color = _COLORS[known + (position - known) % (total - known)]
  else:
    color = _COLORS[position]
  return {
    'color': color,
    'linestyle': _LINE_STYLES[position % len(_LINE_STYLES)],
    'marker': _MARKERS[position % len(_MARKERS)],
  }


def plain_text(text: str) -> str:
  """Escapes dollar signs, so that Matplotlib does not parse mathematics."""
  return text.replace('$', r'\$')


def to_png(figure: Any) -> bytes:
  """Draws a figure of lines as PNG, and closes it.

  The PNG has a palette of 256 colors, which makes it a third as large.
  """
  drawn, reduced = io.BytesIO(), io.BytesIO()
  figure.savefig(drawn, format='png', dpi=_DPI)
  plt.close(figure)
  picture = Image.open(drawn).convert('RGB').quantize(256)
  picture.save(reduced, format='png', optimize=True)
  return reduced.getvalue()


def save(figure: Any, out: Path, name: str) -> None:
  """Writes a figure as PNG into the folder `out`, and closes it."""
  replace_file(out / f'{name}.png', to_png(figure))


def draw_spread(
  axes: Any,
  x: Sequence[Any],
  values: Sequence[np.ndarray | Sequence[float]],
  style: Mapping[str, Any],
  label: str | None,
  **line: Any,
) -> None:
  """Draws a line of medians in a band from the lowest to the highest value.

  Args:
    axes: axes to draw on.
    x: places, numbers.
    values: values at each place; a place with a NaN interrupts the line.
    style: from `styles`.
    label: entry of the legend; None for no entry.
    **line: further properties of the line.
  """
  low, high = [np.min(v) for v in values], [np.max(v) for v in values]
  axes.fill_between(x, low, high, color=style['color'], alpha=0.15, lw=0)
  medians = [np.median(v) for v in values]
  axes.plot(x, medians, label=label, **{'lw': 1.6, 'ms': 5, **style, **line})


def small_multiples(
  count: int, row_height: float, below: float
) -> tuple[Any, list[Any]]:
  """A figure of panels in two columns, which share their axes.

  The lowest panel of each column has tick labels; it is among the last two.

  Args:
    count: number of panels.
    row_height: height of a row of panels, in inches.
    below: room for labels and the legend, in inches.

  Returns:
    The figure, and the axes of the panels.
  """
  rows = math.ceil(count / 2)
  figure, all_axes = plt.subplots(
    rows,
    2,
    squeeze=False,
    sharex=True,
    sharey=True,
    figsize=(WIDTH, row_height * rows + below),
    layout='constrained',
  )
  panels = list(all_axes.flat)
  for axes in panels[count:]:
    axes.set_axis_off()
  for axes in panels[:count][-2:]:
    axes.tick_params(labelbottom=True)
  return figure, panels[:count]


def draw_curves(
  axes: Any,
  curves: Sequence[Sequence[runs.Point]],
  style: Mapping[str, Any],
  label: str | None,
  **line: Any,
) -> None:
  """Draws the medians and ranges of curves, on the grid of all their points.

  Both end where the first curve does: the median of fewer would jump, although
  no curve does. The others go on as thin lines.
  """
  end = min(curve[-1][0] if curve else -math.inf for curve in curves)
  for curve in curves:
    rest = [point for point in curve if point[0] >= end]
    if len(rest) > 1:
      axes.plot(*np.transpose(rest), **{**style, 'marker': '', **THIN})
  if not all(curves):
    axes.plot([], [], label=label, **style)  # For the legend.
    return
  grid = np.unique([x for curve in curves for x, _ in curve if x <= end])
  if len(grid) > _MAX_POINTS:
    grid = grid[np.linspace(0, len(grid) - 1, _MAX_POINTS).astype(int)]
  columns = (np.transpose(curve) for curve in curves)
  values = np.array([np.interp(grid, x, y, left=np.nan) for x, y in columns])
  at_each = list(values.T)
  draw_spread(axes, list(grid), at_each, style, label, markevery=0.15, **line)


def draw_diverged(
  axes: Any, x: float | None, y: float | None, color: str, shift: float = 0
) -> None:
  """Marks a run that diverged.

  Args:
    axes: axes to draw on.
    x: place; None is the lower end of the axis.
    y: the same.
    color: color of the mark.
    shift: distance from the place along x, in points.
  """
  transform, is_inside = axes.transData, True
  if x is None:
    transform, is_inside = axes.get_yaxis_transform(), False
  elif y is None:
    transform, is_inside = axes.get_xaxis_transform(), False
  (mark,) = axes.plot(
    *(x or 0, y or 0),
    color=color,
    clip_on=is_inside,
    transform=transform,
    **_DIVERGED,
  )
  # Not before, as the limits of the axes are to include the place.
  shifted = offset_copy(transform, axes.figure, shift, units='points')
  mark.set_transform(shifted)


def draw_legend(
  figure: Any, axes: Any, spread: str = '', *, any_diverged: bool = False
) -> None:
  """Draws the legend of a figure below it.

  Args:
    figure: the figure.
    axes: axes with all of its lines.
    spread: what lines and bands are, such as 'median of 5 and range'.
    any_diverged: whether a run has diverged.
  """
  handles, _ = axes.get_legend_handles_labels()
  if spread:
    handles.append(Patch(color='#555', alpha=0.25, label=spread))
  if any_diverged:
    handles.append(Line2D([], [], color='#555', label='diverged', **_DIVERGED))
  widest = max((len(handle.get_label()) for handle in handles), default=0)
  figure.legend(
    handles=handles,
    loc='outside lower center',
    ncols=1 if widest > 32 else 2,
  )


def spread_text(counts: Iterable[int]) -> str:
  """What lines and bands are, given the numbers of runs of their places."""
  several = sorted({count for count in counts if count > 1})
  if len(several) == 1:
    return f'{sections.statistic(several[0])} and range'
  return 'median and range of runs' if several else ''


class Outcome(NamedTuple):
  """What figures of the best accuracy show of a run.

  Attributes:
    best: the best accuracy; None without one.
    learns: `claims.learns`; None if it is not known yet.
    diverged: whether it has diverged.
  """

  best: float | None
  learns: bool | None
  diverged: bool


class Line(NamedTuple):
  """A line of a figure of the best accuracy.

  Attributes:
    label: entry of the legend.
    style: from `styles`.
    outcomes: the outcomes at each place, a number or a name.
  """

  label: str
  style: Mapping[str, Any]
  outcomes: Mapping[Any, Sequence[Outcome]]


def draw_best(axes: Any, lines: Sequence[Line], chance: float) -> None:
  """Draws best accuracies over the places.

  Where a run has no best accuracy there is no median, as in the tables.

  Args:
    axes: axes to draw on.
    lines: the lines.
    chance: accuracy of guessing.
  """
  for row, (label, style, outcomes) in enumerate(lines):
    best = [
      [math.nan if one.best is None else one.best for one in of_place]
      for of_place in outcomes.values()
    ]
    draw_spread(axes, list(outcomes), best, style, plain_text(label))
    for (x, of_place), values in zip(outcomes.items(), best, strict=True):
      axes.plot([x] * len(values), values, color=style['color'], **ONE_RUN)
      for one in of_place:
        if one.diverged:
          shift = 8 * (row - (len(lines) - 1) / 2)  # Lines side by side.
          draw_diverged(axes, x, one.best, style['color'], shift)
  axes.plot([], [], label='one run', color='#555', **ONE_RUN)
  axes.axhline(chance, label='chance', **REFERENCE)
  axes.set_ylim(0, 1)


def draw_shares(axes: Any, lines: Sequence[Line]) -> None:
  """Writes the shares of runs that learn: a row for each line, over places."""
  for row, line in enumerate(lines):
    for x, of_place in line.outcomes.items():
      draw_share(axes, x, row, of_place)
  axes.grid(visible=False)
  axes.set_ylim(len(lines) - 0.5, -0.5)
  axes.set_yticks(range(len(lines)), [plain_text(line.label) for line in lines])
  axes.set_title('runs that learn: at least twice chance', loc='left')


def draw_share(
  axes: Any, x: float, y: float, outcomes: Sequence[Outcome]
) -> None:
  """Writes how many of some runs learn, in bold if not all of them do."""
  count = sum(bool(one.learns) for one in outcomes)
  is_known = all(one.learns is not None for one in outcomes)
  is_all = count == len(outcomes)
  axes.text(
    x,
    y,
    f'{count}/{len(outcomes)}' if is_known else '?',
    ha='center',
    va='center',
    color='#777' if is_all else 'black',
    weight='normal' if is_all else 'bold',
  )
