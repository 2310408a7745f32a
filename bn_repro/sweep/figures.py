"""The figure of a sweep."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
import numpy as np

from bn_repro import paper
from bn_repro.report import drawing
from bn_repro.report.drawing import Line, Outcome, plain_text
from bn_repro.runtime.workdir import Status
from bn_repro.sweep.comparison import Comparison, Result, Setting, label_of
from bn_repro.sweep.sweep import Value, to_text

# Marks a target that not all runs of a setting reach.
_MISSED = {'marker': r'$\infty$', 'ms': 11, 'ls': 'none'}
_STEPS_LABEL = 'steps of 32\nto the target'
# Most lines that can be told apart in one panel. Our choice.
_MAX_LINES = 12


def sweep(comparison: Comparison, out: Path, name: str) -> None:
  """Draws accuracy, and steps to the target, over x: a line for each net.

  If there are many lines over numbers, they are in panels, without the steps.
  """
  draw = draw_names
  if comparison.sweep.is_numeric:
    is_crowded = len(comparison.lines) > _MAX_LINES
    draw = draw_panels if is_crowded else draw_numbers
  drawing.save(draw(comparison), out, name)


def draw_panels(comparison: Comparison) -> Any:
  """Draws best accuracies over numbers: a panel for each value of an axis.

  That is the first axis of `Sweep.lines`; the others make the lines of a panel.
  """
  first, *others = comparison.sweep.lines
  in_panel = list(dict.fromkeys(line[1:] for line in comparison.lines))
  styles = drawing.styles(map(_variant, in_panel))
  style_of = dict(zip(in_panel, styles, strict=True))
  panels: dict[Value, list[Line]] = {}
  for line, (value, *rest) in zip(
    _lines(comparison), comparison.lines, strict=True
  ):
    label = label_of(dict(zip(others, rest, strict=True)))
    panels.setdefault(value, []).append(
      line._replace(label=label, style=style_of[tuple(rest)])
    )
  figure, all_axes = drawing.small_multiples(
    len(panels), row_height=2.2, below=0.25 * len(in_panel) + 1.2
  )
  for axes, (value, lines) in zip(all_axes, panels.items(), strict=True):
    drawing.draw_best(axes, lines, comparison.chance)
    axes.set_title(plain_text(label_of({first: value})), loc='left')
    _set_ticks(axes, comparison)
  for axes in all_axes[-2:]:
    axes.set_xlabel(comparison.sweep.x)
  label = f'best accuracy, {comparison.eval_split} images'
  figure.supylabel(label, fontsize=11)
  _draw_legend(figure, all_axes[0], comparison)
  return figure


def draw_numbers(comparison: Comparison) -> Any:
  """Draws the figure of a sweep over numbers."""
  lines = _lines(comparison)
  figure, (best, shares, steps) = plt.subplots(
    3,
    1,
    sharex=True,
    figsize=(drawing.WIDTH, 7.6 + 0.3 * len(lines)),
    height_ratios=[4, 0.3 * len(lines), 2.4],
    layout='constrained',
  )
  x = comparison.sweep.x
  base = comparison.sweep.axes[x][0]
  drawing.draw_best(best, lines, comparison.chance)
  drawing.draw_shares(shares, lines)
  best.axvline(base, color='#555', lw=1, label=f'first {x}: {to_text(base)}')
  best.set_ylabel(f'best accuracy, {comparison.eval_split} images')
  for row, (line, settings) in enumerate(
    zip(lines, comparison.lines.values(), strict=True)
  ):
    # A None becomes a NaN, which interrupts the line.
    drawing.draw_spread(
      steps,
      list(line.outcomes),
      [np.array(setting.steps_to_target, float) for setting in settings],
      line.style,
      None,
    )
    for setting in settings:
      if _is_never(comparison, setting):
        # One below the other, for different lines.
        y, transform = 0.93 - 0.1 * row, steps.get_xaxis_transform()
        color = line.style['color']
        steps.plot(setting.x, y, color=color, transform=transform, **_MISSED)
  steps.set_ylim(bottom=0)
  steps.set_ylabel(_STEPS_LABEL)
  _set_ticks(steps, comparison)
  steps.set_xlabel(x)
  _explain_missed(best, comparison)
  _draw_legend(figure, best, comparison)
  return figure


def draw_names(comparison: Comparison) -> Any:
  """Draws the figure of a sweep over names, which are below each other."""
  names = comparison.sweep.axes[comparison.sweep.x]
  lines = _lines(comparison)
  figure, (best, shares, steps) = plt.subplots(
    1,
    3,
    sharey=True,
    figsize=(drawing.WIDTH, 0.3 * len(names) * len(lines) + 2.6),
    width_ratios=[4, 1, 3],
    layout='constrained',
  )
  for row, (line, settings) in enumerate(
    zip(lines, comparison.lines.values(), strict=True)
  ):
    for place, setting in enumerate(settings):
      y = place + (row + 0.5) / len(lines) - 0.5
      color = line.style['color']
      if not comparison.sweep.lines:
        color = drawing.color_of(setting.x) or '#555'
      label = line.label if place == 0 else ''
      outcomes = [_outcome(result) for result in setting.results]
      _draw_bar(best, y, [one.best for one in outcomes], color, label)
      for one in outcomes:
        if one.diverged:
          drawing.draw_diverged(best, one.best, y, color)
      drawing.draw_share(shares, 0, y, outcomes)
      _draw_bar(steps, y, setting.steps_to_target, color)
      if _is_never(comparison, setting):
        transform = steps.get_yaxis_transform()
        steps.plot(0.9, y, color=color, transform=transform, **_MISSED)
  first = next(iter(comparison.lines.values()))[0]
  if first.best >= 0:
    best.axvline(first.best, label=_name(first.x), **drawing.REFERENCE)
  best.plot([], [], label='one run', color='#555', **drawing.ONE_RUN)
  best.set_ylim(len(names) - 0.5, -0.5)
  best.set_yticks(range(len(names)), [_name(name) for name in names])
  best.set_xlabel(f'best accuracy,\n{comparison.eval_split} images')
  shares.grid(visible=False)
  shares.tick_params(length=0)
  shares.set_xlim(-1, 1)
  shares.set_xticks([])
  shares.set_xlabel('learn')
  steps.margins(x=0.12)
  steps.set_xlim(left=0)
  steps.set_xlabel(_STEPS_LABEL)
  _explain_missed(best, comparison)
  _draw_legend(figure, best, comparison)
  return figure


def _set_ticks(axes: Any, comparison: Comparison) -> None:
  """Makes x logarithmic, with a tick at each of its values."""
  axes.set_xscale('log')
  ticks = sorted(comparison.sweep.axes[comparison.sweep.x])
  axes.set_xticks(ticks, [to_text(value) for value in ticks])
  axes.minorticks_off()


def _variant(line: Sequence[Value]) -> str | None:
  """The first text of a line, which may be the name of a variant."""
  return next((value for value in line if isinstance(value, str)), None)


def _lines(comparison: Comparison) -> list[Line]:
  """The lines, those of known variants in their colors."""
  return [
    Line(
      comparison.label(line),
      style,
      {s.x: [_outcome(result) for result in s.results] for s in settings},
    )
    for (line, settings), style in zip(
      comparison.lines.items(),
      drawing.styles(map(_variant, comparison.lines)),
      strict=True,
    )
  ]


def _outcome(result: Result) -> Outcome:
  """What is drawn of a result; nothing of a trial that has not ended."""
  if not result.ended:
    return Outcome(None, None, diverged=False)
  is_diverged = result.status == Status.DIVERGED
  return Outcome(result.best, result.learns, is_diverged)


def _is_never(comparison: Comparison, setting: Setting) -> bool:
  """Whether there is a target that a trial has ended without reaching."""
  ended = all(result.ended for result in setting.results)
  return comparison.has_targets and ended and None in setting.steps_to_target


def _draw_bar(
  axes: Any,
  y: float,
  values: Sequence[float | None],
  color: str,
  label: str = '',
) -> None:
  """Draws values, and their median and range if all of them are known."""
  known = [value for value in values if value is not None]
  axes.plot(known, [y] * len(known), color=color, **drawing.ONE_RUN)
  if known and len(known) == len(values):
    axes.hlines(y, min(known), max(known), color=color, lw=3, alpha=0.4)
    axes.plot(np.median(known), y, 'o', color=color, ms=6, label=label or None)


def _settings(comparison: Comparison) -> list[Setting]:
  return [s for line in comparison.lines.values() for s in line]


def _explain_missed(axes: Any, comparison: Comparison) -> None:
  """Adds the mark of missed targets to the legend, if there are any."""
  if any(_is_never(comparison, one) for one in _settings(comparison)):
    label = 'target not reached by all'
    axes.plot([], [], color='#555', label=label, **_MISSED)


def _draw_legend(figure: Any, axes: Any, comparison: Comparison) -> None:
  drawing.draw_legend(
    figure,
    axes,
    drawing.spread_text(
      len(setting.results) for setting in _settings(comparison)
    ),
    any_diverged=any(r.status == Status.DIVERGED for r in comparison.results),
  )


def _name(value: Value) -> str:
  """A name on the axis, without the underscores of file names."""
  text = to_text(value)
  label = paper.ENSEMBLE.get(text) or paper.label(text).replace('_', ' ')
  return plain_text(label)
