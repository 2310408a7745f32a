"""What figures show of runs written by hand; values follow by arithmetic."""

import itertools
import math

from matplotlib import pyplot as plt
import numpy as np
import pytest
from written_runs import add_lines, add_percentiles, read_sections, write_run

from bn_repro import paper
from bn_repro.report import drawing, figures


@pytest.fixture
def draw(monkeypatch):
  """Returns the figure that a function draws."""
  drawn = []
  monkeypatch.setattr(figures, 'save', lambda figure, *_: drawn.append(figure))

  def draw(function, section):
    function(section, None, '')
    return drawn[-1]

  yield draw
  for figure in drawn:
    plt.close(figure)


def labeled(axes):
  return {line.get_label(): line for line in axes.lines}


def thin_lines(axes):
  """Those of single runs, without the one of the legend."""
  width = drawing.THIN['lw']
  return [
    ln for ln in axes.lines if ln.get_lw() == width and len(ln.get_xdata())
  ]


def band(axes, number):
  """Lowest and highest value of a band, by place."""
  (path,) = axes.collections[number].get_paths()
  found = {}
  for x, y in path.vertices:
    low, high = found.get(x, (y, y))
    found[x] = min(y, low), max(y, high)
  return found


def write_fig_2(folder):
  """Three seeds; the last of BN-x5 diverges at step 33."""
  for seed, (start, best) in enumerate(
    [([0.1, 0.2], 0.4), ([0.1, 0.2, 0.3], 0.5), ([0.1, 0.2], 0.3)]
  ):
    values = start + [best] * (8 - len(start))
    write_run(folder / f'p{seed}', 'inception', values, f'seed={seed}')
  for seed, values in enumerate(
    [
      [0.1, 0.4, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6],
      [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6],
    ]
  ):
    write_run(folder / f'x{seed}', 'bn_x5', values, f'seed={seed}')
  ending = {'status': 'diverged', 'step': 33}
  write_run(folder / 'x2', 'bn_x5', [0.2, 0.31, 0.35], 'seed=2', **ending)


def test_medians_ranges_and_diamonds_of_fig_2(draw, tmp_path):
  write_fig_2(tmp_path)
  (section,) = read_sections(tmp_path)
  figure = draw(figures.curves, section)
  for axes in figure.axes[:2]:
    lines = labeled(axes)
    # The last seed has three evaluations, and with it the median.
    assert list(lines['BN-x5'].get_xdata()) == [10, 20, 30]
    assert list(lines['BN-x5'].get_ydata()) == pytest.approx([0.1, 0.31, 0.35])
    assert list(band(axes, 1)) == [10, 20, 30]
    assert band(axes, 1)[20] == pytest.approx((0.2, 0.4))
    assert band(axes, 1)[30] == pytest.approx((0.3, 0.6))
    thin = [list(line.get_data()) for line in thin_lines(axes)]
    assert thin == [
      [pytest.approx([*range(30, 90, 10)]), pytest.approx(values)]
      for values in ([0.6] * 6, [0.3, 0.4, 0.5, 0.6, 0.6, 0.6])
    ]
    assert lines["Inception's best"].get_ydata() == pytest.approx([0.4, 0.4])
    # Each seed matches the best of its own: .4 at 20, .5 at 50, .3 at 20.
    diamonds = {
      line.get_color(): (line.get_xdata()[0], line.get_ydata()[0])
      for line in axes.lines
      if line.get_marker() == 'D' and len(line.get_xdata())
    }
    assert diamonds == {
      drawing.color_of('inception'): (30, pytest.approx(0.4)),
      drawing.color_of('bn_x5'): (20, pytest.approx(0.4)),
    }
    (cross,) = [line for line in axes.lines if line.get_marker() == 'x']
    assert (cross.get_xdata(), cross.get_ydata()) == ([33], [0.35])
  names = [text.get_text() for text in figure.legends[0].texts]
  assert names == [
    *('Inception', 'BN-x5', "Inception's best", 'steps to match Inception'),
    'one run, after another diverged',
    *('median of 3 and range', 'diverged'),
  ]
  # The range of y: from 3 times to 1.2 times .2, the lead of BN-x5.
  assert figure.axes[0].get_ylim() == pytest.approx((-0.2, 0.64))


def test_no_median_if_a_seed_has_no_accuracy(draw, tmp_path):
  write_run(tmp_path / 'a', 'inception', [0.5, 0.6])
  status = {'status': 'diverged', 'step': 7}
  write_run(tmp_path / 'b', 'inception', [], 'seed=1', **status)
  axes = draw(figures.curves, *read_sections(tmp_path)).axes[0]
  assert list(labeled(axes)['Inception'].get_xdata()) == []
  (line,) = thin_lines(axes)
  assert list(line.get_ydata()) == [0.5, 0.6]


def test_diamonds_of_one_step_are_above_each_other(draw, tmp_path):
  """All are of one size, and their steps are exact."""
  for variant, start in {
    'inception': [0.5],
    'bn_baseline': [0.5],
    'bn_x5': [0.1, 0.5],
  }.items():
    write_run(tmp_path / variant, variant, start + [0.5] * 5)
  figure = draw(figures.curves, *read_sections(tmp_path))
  figure.canvas.draw()
  axes = figure.axes[0]
  diamonds = [
    line
    for line in axes.lines
    if line.get_marker() == 'D' and len(line.get_xdata())
  ]
  x, y = np.transpose(
    [ln.get_transform().transform(ln.get_xydata()[0]) for ln in diamonds]
  )
  size = diamonds[0].get_markersize() * figure.dpi / 72
  assert {line.get_markersize() for line in diamonds} == {9}
  places = axes.transData.transform([(10, 0.5), (10, 0.5), (20, 0.5)])
  assert x == pytest.approx(places[:, 0])
  assert y - places[:, 1] == pytest.approx([0, size, 0])


def test_means_of_losses_are_drawn_where_there_are_losses(draw, tmp_path):
  """121 losses are 60 means of 3 neighbors at most: 40 of them."""
  write_run(tmp_path / 'a', 'inception', [0.5] * 5)
  (section,) = read_sections(tmp_path)
  assert len(draw(figures.curves, section).axes) == 2
  assert figures.curves(section, None, '') is False
  losses = [
    {'step': step, 'split': 'train', 'loss': float(step)}
    for step in range(1, 122)
  ]
  add_lines(tmp_path / 'a', losses)
  (section,) = read_sections(tmp_path)
  *_, loss = draw(figures.curves, section).axes
  assert loss.get_ylabel() == 'training loss, smoothed'
  assert list(loss.lines[0].get_ydata()) == list(range(2, 121, 3))
  assert figures.curves(section, None, '') is True


def test_a_run_without_an_accuracy_is_a_cross_on_the_axis(draw, tmp_path):
  write_run(tmp_path / 'a', 'inception', [], status='diverged', step=70)
  figure = draw(figures.curves, *read_sections(tmp_path))
  cross = next(ln for ln in figure.axes[0].lines if ln.get_marker() == 'x')
  low, high = figure.axes[0].get_xlim()
  assert low < cross.get_xdata()[0] == 70 < high
  figure.canvas.draw()
  (_, bottom), _ = figure.axes[0].get_window_extent().get_points()
  (_, height) = cross.get_transform().transform((70, 0))
  assert height == pytest.approx(bottom)
  names = [text.get_text() for text in figure.legends[0].texts]
  assert names == ['Inception', 'diverged']


def test_moving_averages_are_beside_population_statistics(draw, tmp_path):
  write_fig_2(tmp_path)
  (section,) = read_sections(tmp_path)
  _, axes = draw(figures.moving_averages, section).axes
  lines = [line for line in axes.lines if line not in thin_lines(axes)]
  solid, dotted, cross = lines
  assert (solid.get_linestyle(), dotted.get_linestyle()) == ('-', ':')
  assert solid.get_ydata()[1] == pytest.approx(0.31)
  assert list(dotted.get_ydata()) == [0.1] * 3
  assert cross.get_marker() == 'x'
  styles = [line.get_linestyle() for line in thin_lines(axes)]
  assert styles == ['-', '-', ':', ':']


def test_colors_and_shares_of_rates(draw, tmp_path):
  """Where a seed diverges before it has a best accuracy, there is no median."""
  for variant, by_rate in {
    'inception': {0.1: [0.5, 0.7, 0.6], 0.2: [0.8, 0.1, 0.8], 0.4: None},
    'bn_baseline': {0.1: [0.9] * 3, 0.2: [0.9] * 3, 0.4: [0.9, 0.8, 0.1]},
  }.items():
    for rate, best in by_rate.items():
      for seed, value in enumerate(best or [0.3, 0.1, None]):
        write_run(
          tmp_path / f'{variant}{rate}{seed}',
          variant,
          [] if value is None else [value] * 5,
          f'optim.learning_rate={rate}',
          f'seed={seed}',
          status='done' if value else 'diverged',
        )
  (section,) = read_sections(tmp_path)
  axes, shares = draw(figures.rates, section).axes
  lines = labeled(axes)
  medians = lines['Inception'].get_ydata()
  assert list(medians[:2]) == pytest.approx([0.6, 0.8])
  assert math.isnan(medians[2])
  assert list(lines['BN-Baseline'].get_ydata()) == pytest.approx(
    [0.9, 0.9, 0.8]
  )
  assert band(axes, 1)[0.4] == pytest.approx((0.1, 0.9))
  (cross,) = [line for line in axes.lines if line.get_marker() == 'x']
  assert (cross.get_xdata(), cross.get_ydata()) == ([0.4], [0])
  assert lines['best rate of Inception'].get_xdata() == [0.2, 0.2]
  written = {text.get_position(): text.get_text() for text in shares.texts}
  assert [written[rate, 0] for rate in (0.1, 0.2, 0.4)] == ['3/3', '2/3', '1/3']
  assert [written[rate, 1] for rate in (0.1, 0.2, 0.4)] == ['3/3', '3/3', '2/3']
  colors = {name: lines[name].get_color() for name in ('Inception', 'chance')}
  assert colors['Inception'] == drawing.color_of('inception')


def test_fig_1_shows_a_typical_unit(draw, tmp_path):
  start = [[-1, -1, -1], [0, 0, 0], [1, 1, 1]]
  end = [[-2, -3, -4], [9, 5, 7], [12, 13, 14]]
  for variant, accuracy in (('mnist', 0.8), ('bn_mnist', 0.9)):
    for seed in (0, 1):
      folder = tmp_path / f'{variant}{seed}'
      values = [0.75, accuracy + 0.02 * seed]
      write_run(folder, variant, values, f'seed={seed}')
      add_percentiles(folder, [start, end])
  ending = {'status': 'diverged', 'step': 15}
  write_run(tmp_path / 'c', 'mnist', [0.1], 'seed=2', **ending)
  (section,) = read_sections(tmp_path)
  first, *units = draw(figures.fig_1, section).axes
  assert labeled(first)['With BN'].get_ydata()[1] == pytest.approx(0.91)
  assert labeled(first)['(b, c) 50th percentile'].get_color() == '#999'
  assert list(band(first, 1)) == [10, 20]
  assert band(first, 1)[20] == pytest.approx((0.9, 0.92))
  # The accuracy of the run that diverged, .1, is below the axes.
  (cross,) = [line for line in first.lines if line.get_marker() == 'x']
  assert (cross.get_xdata(), cross.get_ydata()) == ([15], [0])
  # Drifts are 9/14, 5/16 and 7/18, so the last unit is in the middle.
  for axes, name in zip(units, ('inception', 'bn_baseline'), strict=True):
    shown = [list(line.get_ydata()) for line in axes.lines]
    assert shown == [[-1, -4], [0, 7], [1, 14]]
    assert {line.get_color() for line in axes.lines} == {drawing.color_of(name)}
    assert axes.get_ylabel() == 'input to a typical sigmoid'


def test_long_curves_are_thinned_and_keep_their_ends():
  _, axes = plt.subplots()
  points = [(float(step), step / 5000) for step in range(5000)]
  (style,) = drawing.styles(['bn_x5'])
  drawing.draw_curves(axes, [points], style, None)
  (line,) = axes.lines
  assert len(line.get_xdata()) == 400
  assert line.get_xdata()[[0, -1]].tolist() == [0, 4999]
  np.testing.assert_allclose(line.get_ydata(), line.get_xdata() / 5000)
  plt.close()


def test_a_variant_has_one_style_and_no_other_line_has_it():
  known = [*paper.FIG_3, *paper.ENSEMBLE]
  forth = drawing.styles(known)
  assert forth == drawing.styles(reversed(known))[::-1]
  assert len({style['color'] for style in forth}) == len(known)
  mixed = drawing.styles([None, 'own', 'bn_x5', 'bn_x5', *[None] * 20])
  assert mixed[2] == forth[known.index('bn_x5')]
  for one, other in itertools.combinations(mixed, 2):
    assert one != other
  ours = {style['color'] for style in forth[: len(paper.FIG_3)]}
  assert not ours & {style['color'] for style in (*mixed[:2], *mixed[3:])}
