"""The figure of a sweep."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
import numpy as np

from bn_repro.report.figures import draw_spread, plain_text, save, style
from bn_repro.report.runs import statistic
from bn_repro.runtime.workdir import Status
from bn_repro.sweep.comparison import Comparison
from bn_repro.sweep.sweep import TrialStatus, to_text

# Markers of trials that diverged or did not learn.
_MARKERS: Mapping[str, Mapping[str, Any]] = {
  Status.DIVERGED: {'marker': 'x', 'ms': 10, 'mew': 2},
  TrialStatus.BELOW: {'marker': 's', 'ms': 10, 'mfc': 'none'},
}


def sweep(comparison: Comparison, out: Path, name: str) -> None:
  """Draws accuracy, and steps to the target, over x: a line for each net."""
  figure, (above, below) = plt.subplots(
    2, 1, figsize=(9, 9), layout='constrained', sharex=True
  )
  is_numeric = comparison.sweep.is_numeric
  places = {
    value: float(value if is_numeric else place)
    for place, value in enumerate(comparison.sweep.axes[comparison.sweep.x])
  }
  draw_accuracies(above, comparison, places)
  _draw_steps(below, comparison, places)
  below.set_xlabel(comparison.sweep.x)
  if is_numeric:
    below.set_xscale('log')
  below.set_xticks(
    list(places.values()),
    [to_text(value) for value in places],
    rotation=0 if is_numeric else 60,
  )
  below.minorticks_off()
  for axes in (above, below):
    axes.grid(alpha=0.3)
  if comparison.sweep.lines:
    figure.legend(
      *above.get_legend_handles_labels(),
      loc='outside lower center',
      ncols=3,
      frameon=False,
    )
  save(figure, out, name)


def draw_accuracies(
  axes: Any, comparison: Comparison, places: Mapping[Any, float]
) -> None:
  """Draws the best accuracies of all settings, and markers of failed trials.

  Args:
    axes: axes to draw on.
    comparison: the results.
    places: position of each value of x.
  """
  for index, (line, settings) in enumerate(comparison.lines.items()):
    # NaN interrupts the line where a trial has not ended or has no evaluation.
    draw_spread(
      axes,
      [places[setting.x] for setting in settings],
      [
        [
          r.best if r.best is not None and r.ended else np.nan
          for r in setting.results
        ]
        for setting in settings
      ],
      style(index),
      plain_text(comparison.label(line)),
      joined=comparison.sweep.is_numeric,
    )
    for setting in settings:
      for result in setting.results:
        if result.outcome in _MARKERS:
          axes.plot(
            places[setting.x],
            result.best or 0.0,
            color=style(index)['color'],
            clip_on=False,
            **_MARKERS[result.outcome],
          )
  if comparison.sweep.is_numeric:
    axes.axhline(comparison.chance, color='#999', lw=0.8, ls=':')
    axes.set_ylim(0, 1)
  axes.set_title(
    f'Best accuracy on {comparison.eval_split} images{_over(comparison)}; '
    + ('dotted: chance; ' if comparison.sweep.is_numeric else '')
    + f'x: diverged; square: {TrialStatus.BELOW}',
    loc='left',
    fontsize=10,
  )


def _over(comparison: Comparison) -> str:
  """Name of the statistic over the repeated axis, if it has several values."""
  over = statistic(len(comparison.sweep.axes[comparison.sweep.repeat]))
  return f', {over} and range' if over else ''


def _draw_steps(
  axes: Any, comparison: Comparison, places: Mapping[Any, float]
) -> None:
  for index, (line, settings) in enumerate(comparison.lines.items()):
    reached = {
      places[setting.x]: [s for s in setting.steps_to_target if s is not None]
      for setting in settings
      if None not in setting.steps_to_target
    }
    draw_spread(
      axes,
      list(reached),
      list(reached.values()),
      style(index),
      plain_text(comparison.label(line)),
      joined=comparison.sweep.is_numeric,
    )
    for setting in settings:
      ended = all(result.ended for result in setting.results)
      has_missed = None in setting.steps_to_target and comparison.has_targets
      if ended and has_missed:
        axes.plot(
          places[setting.x],
          # One below the other, for different lines.
          0.97 - 0.04 * index,
          marker='^',
          mfc='none',
          color=style(index)['color'],
          transform=axes.get_xaxis_transform(),
        )
  axes.set_ylim(bottom=0)
  axes.set_title(
    f'Steps of 32 images to the best accuracy of the first setting'
    f'{_over(comparison)}; triangle: not all trials reach it',
    loc='left',
    fontsize=10,
  )
