"""The figures of the report, and sheets of images."""

from collections import Counter
from collections.abc import Mapping, Sequence
import io
import math
from pathlib import Path
import statistics
import textwrap
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator
from matplotlib.transforms import offset_copy
import numpy as np

from bn_repro import paper
from bn_repro.report import claims, runs
from bn_repro.report.drawing import (
  MATCH,
  REFERENCE,
  THIN,
  WIDTH,
  Line,
  Outcome,
  draw_best,
  draw_curves,
  draw_diverged,
  draw_legend,
  draw_shares,
  plain_text,
  save,
  small_multiples,
  spread_text,
  styles,
  to_png,
)
from bn_repro.report.runs import Repetition, Run
from bn_repro.report.sections import Group, Section
from bn_repro.runtime.workdir import Status

# Images in a row of a contact sheet.
_SHEET_COLUMNS = 8
# Images in a row of a sheet of predictions.
_PREDICTION_COLUMNS = 4
# Most points of a training loss, which are means: single losses are noisy.
_MAX_MEANS = 60


def _diverged(run: Run) -> bool:
  return run.status.get('status') == Status.DIVERGED


def _accuracy_label(shown: Sequence[Run]) -> str:
  """Label of an axis: the evaluated images and their number."""
  images = dict.fromkeys(
    f'{count:,} {split}' if count else split
    for run in shown
    for split in [run.config['eval_split']]
    for count in [run.facts.get('num_examples', {}).get(split)]
  )
  return f'accuracy, {" and ".join(images)} images'


def _in_thousands(axes: Any, batch_size: object) -> None:
  """Labels an x-axis of steps."""
  axes.set_xlabel(f'thousand steps of {batch_size} images')
  axes.xaxis.set_major_formatter(lambda step, _: f'{step / 1000:g}')


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


def curves(section: Section, out: Path, name: str) -> bool:
  """Draws Fig. 2: accuracy over steps, near Inception's and in full, and loss.

  Without a run of Inception that learns there is no first part, and without
  training losses no last part.

  Returns:
    Whether there are training losses.
  """
  targets = _targets(section)
  losses = [(_smoothed(group), style) for group, style in _styled(section)]
  has_losses = any(any(of_group) for of_group, _ in losses)
  heights = [*([4] if targets else []), 3, *([3] if has_losses else [])]
  figure, all_axes = plt.subplots(
    len(heights),
    1,
    squeeze=False,
    figsize=(WIDTH, sum(heights) + 0.7),
    height_ratios=heights,
    layout='constrained',
    sharex=True,
  )
  accuracies = all_axes[: 2 if targets else 1, 0]
  for axes in accuracies:
    _draw_accuracies(axes, section, targets)
    axes.set_ylabel(_accuracy_label(section.runs))
  if targets:
    _zoom(accuracies[0], float(np.median(list(targets.values()))))
    accuracies[1].set_ylabel('accuracy, full range')
  lowest = all_axes[-1, 0]
  if has_losses:
    for of_group, style in losses:
      draw_curves(lowest, of_group, style, None)
    lowest.set_yscale('log')
    lowest.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    lowest.yaxis.set_major_formatter('{x:g}')
    lowest.minorticks_off()
    lowest.set_ylabel('training loss, smoothed')
  _in_thousands(lowest, paper.BATCH_SIZE)
  _draw_legend(figure, accuracies[0], section.groups)
  save(figure, out, name)
  return has_losses


def _draw_legend(
  figure: Any, axes: Any, groups: Sequence[Group], part: str = ''
) -> None:
  """Draws the legend of a figure of curves.

  Args:
    figure: the figure.
    axes: axes with all of its lines.
    groups: the groups that are shown.
    part: the part of the figure with medians and ranges, such as '(a) '.
  """
  diverged = [any(map(_diverged, group.runs)) for group in groups]
  if any(
    len(g.runs) > 1 for g, one in zip(groups, diverged, strict=True) if one
  ):
    label = 'one run, after another diverged'
    axes.plot([], [], color='#555', label=label, **THIN)
  spread = spread_text(len(group.runs) for group in groups)
  draw_legend(
    figure, axes, spread and f'{part}{spread}', any_diverged=any(diverged)
  )


def _styled(section: Section) -> list[tuple[Group, dict[str, Any]]]:
  groups = section.groups
  return list(zip(groups, styles(g.variant for g in groups), strict=True))


def _targets(section: Section) -> dict[Repetition, float]:
  """Best accuracy of Inception by seed and fold, for those where it learns.

  Empty if Inception has several settings.
  """
  groups = section.settings_of('inception')
  plain = groups[0].runs if len(groups) == 1 else ()
  return {
    run.repetition: best
    for run in plain
    if (best := claims.accuracy_to_match(run)) is not None
  }


def _draw_accuracies(
  axes: Any, section: Section, targets: Mapping[Repetition, float]
) -> None:
  """Draws accuracies, and the median steps to match Inception.

  Each run is to match the best accuracy of Inception with the same seed.
  """
  middle = float(np.median(list(targets.values()))) if targets else None
  placed: Counter[float] = Counter()
  for group, style in _styled(section):
    evaluations = [
      [(line['step'] * run.equivalent, line['accuracy']) for line in lines]
      for run in group.runs
      for lines in [run.evaluations()]
    ]
    draw_curves(axes, evaluations, style, plain_text(section.label(group)))
    _mark_diverged(axes, group, style)
    steps = [
      run.steps_to(targets[run.repetition]) or math.inf
      for run in group.runs
      if run.repetition in targets
    ]
    step = float(np.median(steps)) if steps else math.inf
    if math.isfinite(step):
      (diamond,) = axes.plot(step, middle, color=style['color'], **MATCH)
      # Diamonds at one step are above each other, in points.
      height = placed[step] * MATCH['ms']
      diamond.set_transform(
        offset_copy(axes.transData, axes.figure, y=height, units='points')
      )
      placed[step] += 1
  if middle is not None:
    axes.axhline(middle, label="Inception's best", **REFERENCE)
    axes.plot([], [], color='white', label='steps to match Inception', **MATCH)


def _mark_diverged(
  axes: Any,
  group: Group,
  style: Mapping[str, Any],
  *,
  in_own_steps: bool = False,
) -> None:
  """Marks the ends of runs that diverged, at their last accuracies.

  The mark is on the axis if there is no accuracy, or if it is below the axes.
  """
  lowest, _ = axes.get_ylim()
  for run in filter(_diverged, group.runs):
    last = next(reversed(run.accuracies()), None)
    if last is not None and last < lowest:
      last = None
    step = run.step * (1 if in_own_steps else run.equivalent)
    draw_diverged(axes, step, last, style['color'])


def _zoom(axes: Any, target: float) -> None:
  """Limits y to accuracies about a target; the range is our choice."""
  highest = max(np.nanmax(line.get_ydata(), initial=0) for line in axes.lines)
  above = max(highest - target, 0.01)
  axes.set_ylim(target - 3 * above, target + 1.2 * above)


def _smoothed(group: Group) -> list[list[runs.Point]]:
  """Training losses as means of neighbors, at most `_MAX_MEANS` of them.

  All means of a group are of equally many losses, so that seeds compare.
  """
  losses = [run.curve('train', 'loss', None) for run in group.runs]
  width = max(1, math.ceil(max(map(len, losses)) / _MAX_MEANS))
  return [
    [
      tuple(np.mean(points[start : start + width], axis=0))
      for start in range(0, len(points) - width + 1, width)
    ]
    for points in losses
  ]


def moving_averages(section: Section, out: Path, name: str) -> bool:
  """Draws accuracies with population statistics against moving averages.

  Returns:
    Whether a network has BN; otherwise nothing is drawn.
  """

  def accuracies(group: Group, form: str) -> list[list[runs.Point]]:
    return [
      run.curve(run.config['eval_split'], 'accuracy', form)
      for run in group.runs
    ]

  shown = [
    (group, style)
    for group, style in _styled(section)
    if any(accuracies(group, 'moving'))
  ]
  if not shown:
    return False
  figure, panels = small_multiples(len(shown), row_height=2.4, below=1.2)
  for axes, (group, style) in zip(panels, shown, strict=True):
    for form, line_style in (('population', '-'), ('moving', ':')):
      line = {**style, 'linestyle': line_style, 'marker': ''}
      draw_curves(axes, accuracies(group, form), line, None)
    _mark_diverged(axes, group, style)
    axes.set_title(plain_text(section.label(group)), loc='left')
  figure.supylabel(_accuracy_label(section.runs), fontsize=11)
  for axes in panels[-2:]:
    _in_thousands(axes, paper.BATCH_SIZE)
  for label, line_style in (
    ('population statistics', '-'),
    ('moving averages', ':'),
  ):
    panels[0].plot([], [], color='#555', ls=line_style, label=label)
  _draw_legend(figure, panels[0], [group for group, _ in shown])
  save(figure, out, name)
  return True


def fig_1(section: Section, out: Path, name: str) -> None:
  """Draws Fig. 1: accuracy, and the inputs of a typical last sigmoid."""
  shown = [
    (group, style)
    for group, style in _styled(section)
    if group.runs[0].percentiles(claims.FIG_1_PROBE) is not None
  ][:2]
  below = 'bc'[: len(shown)]
  figure = plt.figure(
    figsize=(WIDTH, 7.2 if below else 4), layout='constrained'
  )
  parts = figure.subplot_mosaic(
    [['a'] * max(1, len(below)), *([list(below)] if below else [])]
  )
  parts['a'].set_ylim(0.7, 1)
  for group, style in _styled(section):
    accuracies = [
      [(line['step'], line['accuracy']) for line in run.evaluations()]
      for run in group.runs
    ]
    draw_curves(parts['a'], accuracies, style, plain_text(section.label(group)))
    _mark_diverged(parts['a'], group, style, in_own_steps=True)
  parts['a'].set_ylabel(_accuracy_label(section.runs))
  parts['a'].set_title('(a)', loc='left')
  for letter, (group, style) in zip(below, shown, strict=True):
    unit = _draw_unit(parts[letter], group.runs[0], style['color'])
    label = plain_text(section.label(group))
    title = f'({letter}) {label}, unit {unit}'
    parts[letter].set_title(title, loc='left')
    parts[letter].set_ylabel('input to a typical sigmoid')
  limits = [parts[letter].get_ylim() for letter in below]
  for letter in below:
    parts[letter].set_ylim(min(limits)[0], max(high for _, high in limits))
  batch_sizes = dict.fromkeys(run.config['batch_size'] for run in section.runs)
  for axes in parts.values():
    _in_thousands(axes, ' or '.join(map(str, batch_sizes)))
  if below:
    for label, width in _PERCENTILES.items():
      # Not a color of a line.
      parts['a'].plot([], [], color='#999', lw=width, label=f'(b, c) {label}')
  _draw_legend(figure, parts['a'], section.groups, '(a) ')
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


# Lines of (b) and (c) in Fig. 1, by the width of the line.
_PERCENTILES = {'50th percentile': 1.8, '15th and 85th percentile': 0.9}


def _draw_unit(axes: Any, run: Run, color: str) -> int:
  """Draws percentiles of the input of the typical unit; returns the unit."""
  percentiles = run.percentiles(claims.FIG_1_PROBE)
  assert percentiles is not None
  unit = typical_unit(run)
  steps = [line['step'] for line in run.probed()]
  low, middle, high = percentiles[:, :, unit].T
  axes.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)
  wide, thin = _PERCENTILES.values()
  for values, width in ((low, thin), (middle, wide), (high, thin)):
    axes.plot(steps, values, color=color, lw=width)
  return unit


def rates(section: Section, out: Path, name: str) -> None:
  """Draws the best accuracy over the learning rate, and shares that learn."""
  # Outcomes by the variant, the label of the line and the rate.
  found: dict[tuple[str, str], dict[float, list[Outcome]]] = {}
  for group in section.groups:
    label = section.label(group, without='optim.learning_rate')
    by_rate = found.setdefault((group.variant, label), {})
    outcomes = [_outcome(run) for run in group.runs]
    by_rate[group.runs[0].learning_rate] = outcomes
  lines = [
    Line(label, style, by_rate)
    for ((_, label), by_rate), style in zip(
      found.items(), styles(variant for variant, _ in found), strict=True
    )
  ]
  figure, (axes, shares) = plt.subplots(
    2,
    1,
    sharex=True,
    figsize=(WIDTH, 5 + 0.3 * len(lines)),
    height_ratios=[4, 0.3 * len(lines)],
    layout='constrained',
  )
  draw_best(axes, lines, section.runs[0].chance)
  draw_shares(shares, lines)
  base = _best_rate(section.settings_of('inception'))
  if base is not None:
    axes.axvline(base, color='#555', lw=1, label='best rate of Inception')
  shares.set_xscale('log')
  ticks = sorted({run.learning_rate for run in section.runs})
  shares.set_xticks(ticks, [f'{rate:g}' for rate in ticks])
  shares.minorticks_off()
  shares.set_xlabel('initial learning rate, for batch size 32')
  axes.set_ylabel(f'best {_accuracy_label(section.runs)}')
  draw_legend(
    figure,
    axes,
    spread_text(len(group.runs) for group in section.groups),
    any_diverged=any(map(_diverged, section.runs)),
  )
  save(figure, out, name)


def _outcome(run: Run) -> Outcome:
  learns = claims.learns(run) if run.is_comparable else None
  return Outcome(run.best(), learns, _diverged(run))


def _best_rate(groups: Sequence[Group]) -> float | None:
  """Learning rate with the highest median of best accuracies, or None."""
  medians = []
  for group in groups:
    best = [run.best() for run in group.runs]
    known = [value for value in best if value is not None]
    if len(known) == len(best):
      rate = group.runs[0].learning_rate
      medians.append((statistics.median(known), rate))
  return max(medians)[1] if medians else None


def ensemble(panels: Mapping[str, Mapping[int, Sequence[float]]]) -> bytes:
  """Draws accuracies over the number of networks that are averaged.

  Args:
    panels: accuracies of the subsets of each size, by the name of the measure.

  Returns:
    The figure, as PNG.
  """
  figure, all_axes = plt.subplots(
    len(panels),
    1,
    sharex=True,
    figsize=(WIDTH, 3 * len(panels) + 1),
    layout='constrained',
  )
  (style,) = styles([None])
  for axes, (title, by_size) in zip(all_axes, panels.items(), strict=True):
    sizes, values = list(by_size), list(by_size.values())
    low, high = [min(v) for v in values], [max(v) for v in values]
    axes.fill_between(sizes, low, high, color=style['color'], alpha=0.15, lw=0)
    places = [size for size, v in by_size.items() for _ in v]
    subsets = [value for v in values for value in v]
    axes.plot(places, subsets, '.', color='#777', ms=5, label='one subset')
    means = [np.mean(v) for v in values]
    axes.plot(sizes, means, label='mean of subsets', **style)
    axes.set_ylabel(title)
    axes.set_xticks(sizes)
  all_axes[-1].set_xlabel('networks averaged')
  draw_legend(figure, all_axes[0], 'range of subsets')
  return to_png(figure)
