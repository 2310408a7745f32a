"""The figures of the report, and the drawing that other figures share."""

from collections.abc import Mapping, Sequence
import io
import math
from pathlib import Path
import textwrap
from typing import Any

import matplotlib as mpl

mpl.use('Agg')

from matplotlib import pyplot as plt
import numpy as np

from bn_repro import paper
from bn_repro.report import claims, runs
from bn_repro.report.runs import Run, Section

# The palette of Okabe and Ito, distinguishable with color blindness.
COLORS = (
  '#000000',
  '#0072b2',
  '#d55e00',
  '#009e73',
  '#cc79a7',
  '#999999',
  '#e69f00',
  '#56b4e9',
)
LINE_STYLES = ('-', '--', '-', '-.', '--', '-.', ':', '-')

# Images in a row of a contact sheet.
_SHEET_COLUMNS = 8
# Images in a row of a sheet of predictions.
_PREDICTION_COLUMNS = 4
# Most points of a training loss to draw.
_MAX_POINTS = 60


def style(index: int) -> dict[str, Any]:
  """Color and line style of the line number `index`."""
  return {
    'color': COLORS[index % len(COLORS)],
    'linestyle': LINE_STYLES[index % len(LINE_STYLES)],
  }


def plain_text(text: str) -> str:
  """Escapes dollar signs, so that Matplotlib does not parse mathematics."""
  return text.replace('$', r'\$')


def save(figure: Any, out: Path, name: str) -> None:
  """Writes a figure as SVG and PNG into the folder `out`, and closes it."""
  for suffix in ('svg', 'png'):
    figure.savefig(out / f'{name}.{suffix}', dpi=150)
  plt.close(figure)


def draw_spread(
  axes: Any,
  x: Sequence[float],
  values: Sequence[Sequence[float]],
  style: Mapping[str, Any],
  label: str,
  *,
  joined: bool = True,
) -> None:
  """Draws medians and ranges of several values at each place.

  Args:
    axes: axes to draw on.
    x: places.
    values: values at each place; a place with a NaN is left out.
    style: from `style`.
    label: entry of the legend.
    joined: whether to join the places, by a line in a band, or to draw points
      on bars, for places without an order.
  """
  low, high = [np.min(v) for v in values], [np.max(v) for v in values]
  medians = [np.median(v) for v in values]
  color = style['color']
  if joined:
    axes.fill_between(x, low, high, color=color, alpha=0.12, lw=0)
    axes.plot(x, medians, marker='o', ms=4, label=label, **style)
  else:
    axes.vlines(x, low, high, color=color, lw=2, alpha=0.4)
    axes.plot(x, medians, 'o', ms=5, color=color, label=label)


def contact_sheet(
  rows: Sequence[tuple[str, Sequence[np.ndarray], Sequence[str]]],
  path: Path,
) -> None:
  """Writes a PNG of captioned images under headings.

  Args:
    rows: heading, images (uint8, (height, width, 1 or 3)) and captions.
    path: path of the PNG.
  """
  lines = [math.ceil(len(images) / _SHEET_COLUMNS) for _, images, _ in rows]
  figure = plt.figure(
    figsize=(1.5 * _SHEET_COLUMNS, 1.75 * sum(lines) + 0.5 * len(rows)),
    layout='constrained',
  )
  parts = np.atleast_1d(figure.subfigures(len(rows), 1, height_ratios=lines))
  for part, line_count, (heading, images, captions) in zip(
    parts, lines, rows, strict=True
  ):
    part.suptitle(plain_text(heading), fontsize=11)
    axes = part.subplots(line_count, _SHEET_COLUMNS, squeeze=False).ravel()
    for axis in axes:
      axis.set_axis_off()
    for axis, image, caption in zip(axes, images, captions, strict=False):
      axis.imshow(image, cmap='gray', vmin=0, vmax=255)
      axis.set_title(plain_text(caption), fontsize=7, y=-0.16)
  figure.savefig(path, dpi=100)
  plt.close(figure)


def prediction_sheet(
  predictions: Sequence[tuple[str, np.ndarray, Sequence[tuple[str, float]]]],
) -> bytes:
  """Draws images, each beside bars of its largest probabilities.

  Args:
    predictions: for each image a caption, its pixels (uint8, (height, width, 1
      or 3)), and classes with their probabilities, the largest first.

  Returns:
    A PNG.
  """
  num_bars = len(predictions[0][2])
  rows = math.ceil(len(predictions) / _PREDICTION_COLUMNS)
  columns = min(len(predictions), _PREDICTION_COLUMNS)
  figure, axes = plt.subplots(
    2 * rows,
    columns,
    squeeze=False,
    figsize=(2.6 * columns, rows * (2.7 + 0.22 * num_bars)),
    height_ratios=[2.4, 0.22 * num_bars + 0.2] * rows,
    layout='constrained',
  )
  for axis in axes.ravel():
    axis.set_axis_off()
  for number, (caption, pixels, classes) in enumerate(predictions):
    row, column = divmod(number, _PREDICTION_COLUMNS)
    picture, bars = axes[2 * row, column], axes[2 * row + 1, column]
    picture.imshow(pixels, cmap='gray', vmin=0, vmax=255)
    picture.set_title(plain_text(caption), fontsize=8)
    positions = range(len(classes))
    bars.barh(positions, [p for _, p in classes], color='#56b4e9')
    bars.set_xlim(0, 1)
    bars.set_ylim(num_bars - 0.5, -0.5)
    for position, (name, probability) in zip(positions, classes, strict=True):
      text = f'{textwrap.shorten(name, 28, placeholder="…")}  {probability:.1%}'
      bars.text(0.02, position, plain_text(text), va='center', fontsize=8)
  buffer = io.BytesIO()
  figure.savefig(buffer, format='png', dpi=100)
  plt.close(figure)
  return buffer.getvalue()


def curves(section: Section, out: Path, name: str) -> None:
  """Draws Fig. 2: accuracy over steps, and below it the training loss."""
  figure, (above, below) = plt.subplots(
    2, 1, figsize=(9, 9), layout='constrained', sharex=True
  )
  for index, group in enumerate(section.groups):
    label = plain_text(section.label(group))
    for number, run in enumerate(group.runs):
      is_first = number == 0
      line_style = {**style(index), 'alpha': 1.0 if is_first else 0.45}
      accuracy = [
        (line['step'] * run.equivalent, line['accuracy'])
        for line in run.evaluations()
      ]
      if accuracy:
        # The legend names the group once, not once for each seed.
        named = {'label': label} if is_first else {}
        above.plot(*zip(*accuracy, strict=True), lw=1.6, **line_style, **named)
      moving = run.curve(run.config['eval_split'], 'accuracy', 'moving')
      if moving and is_first:
        faint = {**line_style, 'linestyle': ':', 'alpha': 0.6}
        above.plot(*zip(*moving, strict=True), lw=0.8, **faint)
      loss = run.curve('train', 'loss', None)
      if loss:
        below.plot(*zip(*_smoothed(loss), strict=True), lw=1.2, **line_style)
  above.set_title('Accuracy on the evaluation split', loc='left')
  below.set_title(
    f'Training loss, as means over at most {_MAX_POINTS} parts', loc='left'
  )
  below.set_yscale('log')
  below.set_xlabel('steps of 32 images')
  for axes in (above, below):
    axes.grid(alpha=0.3)
  if above.get_legend_handles_labels()[0]:
    figure.legend(loc='outside lower center', ncols=3, frameon=False)
  save(figure, out, name)


def _smoothed(points: Sequence[runs.Point]) -> list[runs.Point]:
  """Means of neighboring points, at most `_MAX_POINTS` of them."""
  width = math.ceil(len(points) / _MAX_POINTS)
  chunks = [points[i : i + width] for i in range(0, len(points), width)]
  return [tuple(np.mean(chunk, axis=0)) for chunk in chunks]


def fig_1(section: Section, out: Path, name: str) -> None:
  """Draws Fig. 1: accuracy, and the inputs of a typical last sigmoid."""
  figure, all_axes = plt.subplots(1, 3, figsize=(12, 4.2), layout='constrained')
  first = all_axes[0]
  for index, group in enumerate(section.groups):
    for number, run in enumerate(group.runs):
      lines = run.evaluations()
      first.plot(
        [line['step'] for line in lines],
        [line['accuracy'] for line in lines],
        lw=1.4 if number == 0 else 0.9,
        alpha=1.0 if number == 0 else 0.4,
        label=section.label(group) if number == 0 else None,
        **style(index),
      )
  first.set_ylim(0.7, 1)
  splits = dict.fromkeys(run.config['eval_split'] for run in section.runs)
  first.set_title(f'(a) {", ".join(splits)} accuracy', loc='left')
  first.legend(frameon=False, loc='lower right')
  shown = [
    group
    for group in section.groups
    if group.runs[0].percentiles(claims.FIG_1_PROBE) is not None
  ][:2]
  for axes, letter, group in zip(all_axes[1:], 'bc', shown, strict=False):
    _draw_unit(axes, group.runs[0])
    axes.set_title(f'({letter}) {section.label(group)}', loc='left')
  limits = [axes.get_ylim() for axes in all_axes[1 : 1 + len(shown)]]
  for axes in all_axes[1:]:
    if limits:
      lowest, highest = zip(*limits, strict=True)
      axes.set_ylim(min(lowest), max(highest))
  for axes in all_axes:
    axes.grid(alpha=0.3)
    axes.set_xlabel('steps')
  save(figure, out, name)


def typical_unit(run: Run) -> int:
  """The unit to draw: the one whose drift is in the middle.

  It is the lower of two in the middle. The rule is our choice; the paper says
  "a typical sigmoid".
  """
  percentiles = run.percentiles(claims.FIG_1_PROBE)
  assert percentiles is not None
  drifts = claims.drifts(percentiles)
  return int(np.argsort(drifts, kind='stable')[(len(drifts) - 1) // 2])


def _draw_unit(axes: Any, run: Run) -> None:
  percentiles = run.percentiles(claims.FIG_1_PROBE)
  assert percentiles is not None
  unit = typical_unit(run)
  steps = [line['step'] for line in run.evaluations()]
  low, middle, high = percentiles[:, :, unit].T
  axes.fill_between(steps, low, high, color='#0072b2', alpha=0.15, lw=0)
  for values, width in ((low, 0.9), (middle, 1.6), (high, 0.9)):
    axes.plot(steps, values, color='#0072b2', lw=width)
  axes.text(
    0.02,
    0.02,
    f'15th, 50th, 85th percentile; unit {unit}',
    transform=axes.transAxes,
    fontsize=8,
  )


def rates(section: Section, out: Path, name: str) -> None:
  """Draws the best accuracy over the learning rate, with ranges over seeds.

  A run that diverges before it has one is drawn at 0.
  """
  figure, axes = plt.subplots(figsize=(9, 4.8), layout='constrained')
  for index, variant in enumerate(section.variants):
    groups = section.settings_of(variant)
    x = [group.runs[0].learning_rate for group in groups]
    best = [[_best_or_zero(run) for run in group.runs] for group in groups]
    label = plain_text(paper.label(variant))
    draw_spread(axes, x, best, style(index), label)
  axes.axhline(section.runs[0].chance, color='#999', lw=0.8, ls=':')
  axes.set_xscale('log')
  ticks = sorted({run.learning_rate for run in section.runs})
  axes.set_xticks(ticks, [f'{rate:g}' for rate in ticks])
  axes.minorticks_off()
  axes.set_xlabel('initial learning rate, for batch size 32')
  over = dict.fromkeys(
    f'{runs.statistic(len(group.runs))} and range, '
    for group in section.groups
    if len(group.runs) > 1
  )
  axes.set_title(
    f'Best accuracy (highest mean of {runs.WINDOW} evaluations, 0: diverged '
    f'before), {"".join(over)}dotted: chance',
    loc='left',
    fontsize=10,
  )
  axes.grid(alpha=0.3)
  axes.legend(frameon=False)
  save(figure, out, name)


def _best_or_zero(run: Run) -> float:
  """The best accuracy; 0 if the run diverged before, NaN if it has none yet."""
  return run.best() or 0.0 if run.is_comparable else np.nan


def ensemble(panels: Mapping[str, Mapping[int, Sequence[float]]]) -> bytes:
  """Draws accuracies over the number of networks that are averaged.

  Args:
    panels: accuracies of the subsets of each size, by title.

  Returns:
    The figure, as PNG.
  """
  figure, all_axes = plt.subplots(
    1, len(panels), figsize=(5 * len(panels), 4.2), layout='constrained'
  )
  for axes, (title, by_size) in zip(all_axes, panels.items(), strict=True):
    sizes, values = list(by_size), list(by_size.values())
    low, high = [min(v) for v in values], [max(v) for v in values]
    axes.fill_between(sizes, low, high, color=COLORS[1], alpha=0.15, lw=0)
    for size, of_size in by_size.items():
      axes.plot([size] * len(of_size), of_size, '.', color='#999', ms=4)
    axes.plot(sizes, [np.mean(v) for v in values], 'o-', ms=5, color=COLORS[1])
    axes.set_title(f'{title}: mean and range over subsets', loc='left')
    axes.set_xlabel('networks')
    axes.set_xticks(sizes)
    axes.grid(alpha=0.3)
  content = io.BytesIO()
  figure.savefig(content, format='png', dpi=150)
  plt.close(figure)
  return content.getvalue()
