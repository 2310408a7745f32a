"""The pictures of the report. The only module that imports Matplotlib."""

from collections.abc import Mapping, Sequence
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use('Agg')

from matplotlib import pyplot as plt
import numpy as np

from bn_repro import paper
from bn_repro.report import claims, runs
from bn_repro.report.runs import Group, Run, Section

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLOURS = (
  '#000000',
  '#0072b2',
  '#d55e00',
  '#009e73',
  '#cc79a7',
  '#999999',
  '#e69f00',
  '#56b4e9',
)
# Images side by side in a contact sheet.
_SHEET_COLUMNS = 8

STYLES = ('-', '--', '-', '-.', '--', '-.', ':', '-')


def group_label(section: Section, group: Group) -> str:
  """Name of a group's variant, and what tells it from others of that name."""
  varies = section.what_varies(group)
  name = paper.label(group.variant)
  return f'{name}, {varies}' if varies else name


def plain_text(text: str) -> str:
  """Text that Matplotlib does not take for mathematics."""
  return text.replace('$', r'\$')


def style(index: int) -> dict[str, Any]:
  """Colour and line style of the line number `index`."""
  return {
    'color': COLOURS[index % len(COLOURS)],
    'linestyle': STYLES[index % len(STYLES)],
  }


def save(figure: Any, out: Path, name: str) -> None:
  """Writes a figure as SVG and PNG into the folder `out`, and closes it."""
  for suffix in ('svg', 'png'):
    figure.savefig(out / f'{name}.{suffix}', dpi=150)
  plt.close(figure)


def contact_sheet(
  rows: Sequence[tuple[str, Sequence[np.ndarray], Sequence[str]]],
  path: Path,
) -> None:
  """Images with a line below each, under headings.

  Args:
    rows: heading, images (uint8, (height, width, 1 or 3)) and their lines.
    path: of a PNG.
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


def curves(section: Section, out: Path, name: str) -> None:
  """Fig. 2: accuracy over steps, and below it the training loss."""
  figure, (above, below) = plt.subplots(
    2, 1, figsize=(9, 9), layout='constrained', sharex=True
  )
  for index, group in enumerate(section.groups):
    label = plain_text(group_label(section, group))
    for number, run in enumerate(group.runs):
      # One entry of the legend for all seeds.
      named = {'label': label} if number == 0 else {}
      line_style = {**style(index), 'alpha': 1.0 if number == 0 else 0.45}
      accuracy = [
        (step, line['accuracy'])
        for line in run.quoted_lines()
        for step in [line['step'] * run.equivalent]
      ]
      if accuracy:
        above.plot(*zip(*accuracy, strict=True), lw=1.6, **line_style, **named)
      moving = run.curve(run.config['eval_split'], 'accuracy', 'moving')
      if moving and number == 0:
        faint = {**line_style, 'linestyle': ':', 'alpha': 0.6}
        above.plot(*zip(*moving, strict=True), lw=0.8, **faint)
      loss = run.curve('train', 'loss', None)
      if loss:
        below.plot(*zip(*_smoothed(loss), strict=True), lw=1.2, **line_style)
  above.set_title('Accuracy on the images evaluated', loc='left')
  below.set_title('Training loss', loc='left')
  below.set_yscale('log')
  below.set_xlabel('steps of 32 images')
  for axes in (above, below):
    axes.grid(alpha=0.3)
  if above.get_legend_handles_labels()[0]:
    figure.legend(loc='outside lower center', ncols=3, frameon=False)
  save(figure, out, name)


def _smoothed(points: Sequence[tuple[float, float]]) -> Any:
  """Means of neighbours, so that at most 60 points are drawn."""
  width = math.ceil(len(points) / 60)
  chunks = [points[i : i + width] for i in range(0, len(points), width)]
  return [tuple(np.mean(chunk, axis=0)) for chunk in chunks]


def fig_1(section: Section, out: Path, name: str) -> None:
  """Fig. 1: test accuracy, and what a typical last sigmoid receives."""
  figure, all_axes = plt.subplots(1, 3, figsize=(12, 4.2), layout='constrained')
  first = all_axes[0]
  for index, group in enumerate(section.groups):
    for number, run in enumerate(group.runs):
      lines = run.quoted_lines()
      first.plot(
        [line['step'] for line in lines],
        [line['accuracy'] for line in lines],
        lw=1.4 if number == 0 else 0.9,
        alpha=1.0 if number == 0 else 0.4,
        label=group_label(section, group) if number == 0 else None,
        **style(index),
      )
  first.set_ylim(0.7, 1)
  first.set_title('(a) test accuracy', loc='left')
  first.legend(frameon=False, loc='lower right')
  shown = [
    (group, group.runs[0])
    for group in section.groups
    if group.runs[0].percentiles(claims.FIG_1_PROBE) is not None
  ][:2]
  for axes, letter, (group, run) in zip(
    all_axes[1:], 'bc', shown, strict=False
  ):
    _draw_unit(axes, run)
    label = group_label(section, group)
    axes.set_title(f'({letter}) {label}', loc='left')
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
  """The unit that is drawn: of median travel, the lower one if there are two.

  The rule is ours; the paper says "a typical sigmoid".
  """
  percentiles = run.percentiles(claims.FIG_1_PROBE)
  assert percentiles is not None
  travels = claims.travels(percentiles)
  return int(np.argsort(travels, kind='stable')[(len(travels) - 1) // 2])


def _draw_unit(axes: Any, run: Run) -> None:
  percentiles = run.percentiles(claims.FIG_1_PROBE)
  assert percentiles is not None
  unit = typical_unit(run)
  steps = [line['step'] for line in run.quoted_lines()]
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
  """Best accuracy over the learning rate, with the range over seeds."""
  figure, axes = plt.subplots(figsize=(9, 4.8), layout='constrained')
  variants = list(dict.fromkeys(group.variant for group in section.groups))
  for index, variant in enumerate(variants):
    groups = section.settings_of(variant)
    x = [g.runs[0].config['optim']['learning_rate'] for g in groups]
    best = [[run.best() or 0.0 for run in group.runs] for group in groups]
    label = plain_text(paper.label(variant))
    draw_spread(axes, x, best, style(index), label)
  axes.axhline(section.runs[0].chance, color='#999', lw=0.8, ls=':')
  axes.set_xscale('log')
  ticks = sorted({r.config['optim']['learning_rate'] for r in section.runs})
  axes.set_xticks(ticks, [f'{rate:g}' for rate in ticks])
  axes.minorticks_off()
  axes.set_xlabel('learning rate at the start, at batch size 32')
  axes.set_title('Best accuracy; dotted: chance', loc='left')
  axes.grid(alpha=0.3)
  axes.legend(frameon=False)
  save(figure, out, name)


def draw_spread(
  axes: Any,
  x: Sequence[float],
  values: Sequence[Sequence[float]],
  style: Mapping[str, Any],
  label: str,
  *,
  joined: bool = True,
) -> None:
  """Medians and ranges: a line in a band, or points on bars.

  Args:
    axes: to draw on.
    x: places.
    values: at each of them; nothing is drawn where one is not a number.
    style: of the line.
    label: for the legend.
    joined: whether there is something between the places.
  """
  low, high = [np.min(v) for v in values], [np.max(v) for v in values]
  medians = [
    np.nan if np.isnan(v).any() else runs.lower_median(v) for v in values
  ]
  colour = style['color']
  if joined:
    axes.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)
    axes.plot(x, medians, marker='o', ms=4, label=label, **style)
  else:
    axes.vlines(x, low, high, color=colour, lw=2, alpha=0.4)
    axes.plot(x, medians, 'o', ms=5, color=colour, label=label)
