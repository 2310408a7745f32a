"""The tables of the page: our values beside the paper's, by heading."""

from collections.abc import Callable, Iterable, Sequence
import math
import statistics

from bn_repro import paper
from bn_repro.inference.averaging import Scores
from bn_repro.report import claims, costs, fig_4
from bn_repro.report.runs import WINDOW, Run
from bn_repro.report.sections import Group, Section, Spread
from bn_repro.runtime import workdir

# Rows of text by heading.
Table = list[dict[str, str]]


def _number(value: float) -> str:
  return f'{value:,.0f}'


def _percentages(group: Group, measure: Callable[[Run], float | None]) -> str:
  """The values of runs in percent; a dash if one has none.

  A run that diverged before it has a value is named, and ranks lowest.
  """
  values = [measure(run) for run in group.runs]
  if any(
    value is None and run.status.get('status') != workdir.Status.DIVERGED
    for value, run in zip(values, group.runs, strict=True)
  ):
    return '–'
  return Spread(values, -math.inf, 'diverged').show(lambda v: f'{100 * v:.1f}')


def _or_dash(value: float | None, form: str) -> str:
  return '–' if value is None else form.format(value)


def distinct(values: Iterable[object]) -> str:
  """Values without repetitions, separated by commas."""
  return ', '.join(dict.fromkeys(str(value) for value in values))


def _states(group: Group) -> str:
  return distinct(run.state for run in group.runs)


def _pairs(section: Section, group: Group) -> list[tuple[Run, Run]]:
  """The run of Inception with the same seed, and each run of a group.

  Empty if Inception has several settings.
  """
  if len(section.settings_of('inception')) != 1:
    return []
  by_seed = section.by_seed('inception', group.variant)
  return [
    (plain, run)
    for plains, others in by_seed.values()
    for plain in plains
    for run in others
    if run in group.runs
  ]


def _fig_3_row(section: Section, group: Group) -> dict[str, str]:
  unknown = paper.PaperRow(group.variant, None, None, '–')
  theirs = paper.PAPER.get(group.variant, unknown)
  rates = (run.facts.get('applied_learning_rate') for run in group.runs)
  pairs = _pairs(section, group)
  reached = [
    run.steps_to(target)
    for plain, run in pairs
    if (target := plain.best()) is not None
  ]
  speed_ups = [
    claims.speed_up(plain, run) for plain, run in pairs if claims.learns(plain)
  ]
  trained = sum(map(claims.learns, group.runs))
  return {
    'variant': section.label(group),
    'learning rate, paper': _or_dash(theirs.learning_rate, '{:g}'),
    'learning rate, ours': distinct(_or_dash(rate, '{:g}') for rate in rates),
    'steps to 72.2 %, paper': _or_dash(theirs.steps, '{}M'),
    "steps to Inception's best, ours": (
      Spread(reached, word=group.never).show(_number)
    ),
    'speed-up, paper': _or_dash(paper.speed_up(group.variant), '{:.1f}x'),
    'speed-up, ours': (
      Spread(speed_ups, -math.inf, group.never).show(claims.times)
    ),
    'best accuracy, %, paper': theirs.accuracy,
    'best accuracy, %, ours': _percentages(group, Run.best),
    'test accuracy, %, ours': _percentages(group, Run.test_accuracy),
    'seeds that train': f'{trained} of {len(group.runs)}',
    'status': _states(group),
  }


def fig_3(section: Section) -> Table:
  """The paper's Fig. 3 with our values beside the paper's."""
  rows = [_fig_3_row(section, group) for group in section.groups]
  if not section.is_sweep:
    rows += [
      dict.fromkeys(rows[0], '–')
      | {'variant': paper.label(variant), 'status': 'not run'}
      for variant in paper.FIG_3
      if variant not in section.variants
    ]
  return rows


def networks(sections: Sequence[Section]) -> Table:
  """The networks of section 4.2: what the paper reports, and each section."""
  rows = []
  for variant in paper.FIG_3:
    factor = paper.speed_up(variant)
    row = {
      'network': paper.label(variant),
      'paper: fewer steps': f'{factor:.1f}x' if factor else '–',
      'paper: best accuracy, %': paper.PAPER[variant].accuracy,
    }
    for section in sections:
      for group in section.settings_of(variant):
        cells = _fig_3_row(section, group)
        ours = cells['speed-up, ours'], cells['test accuracy, %, ours']
        names = 'fewer steps', 'test accuracy, %'
        for name, cell in zip(names, ours, strict=True):
          row[f'{section.data_label}: {name}'] = cell
    rows.append(row)
  return rows


def costs_table(section: Section) -> Table:
  """What each variant costs up to Inception's best accuracy, and the factor.

  Empty without a run of Inception that trains.
  """
  rows = []
  for group in section.groups:
    pairs = [
      (costs.to_target(plain, target), costs.to_target(run, target))
      for plain, run in _pairs(section, group)
      if (target := claims.accuracy_to_match(plain)) is not None
    ]
    if pairs:
      factor = paper.speed_up(group.variant)
      rows.append(
        {
          'variant': section.label(group),
          'steps, paper': _less(factor) if factor else '–',
          'steps of 32 images, ours': _cost(pairs, 'steps', _number),
          'images': _cost(pairs, 'images', _number),
          'FLOPs': _cost(pairs, 'flops', '{:.2g}'.format),
          'CPU-minutes': _cost(pairs, 'cpu_minutes', '{:.2g}'.format),
        }
      )
  return rows


def _less(factor: float) -> str:
  return '1x' if factor == 1 else claims.LESS.phrase(math.log(factor))


def _cost(
  pairs: Sequence[tuple[costs.Cost | None, costs.Cost | None]],
  name: str,
  show: Callable[[float], str],
) -> str:
  """Medians of a cost, and of the factor to Inception's; a dash if unknown.

  Args:
    pairs: cost of Inception, and of a network, for each seed; None if it never
      reaches the target.
    name: attribute of the costs.
    show: formats a cost.
  """
  theirs, ours = (
    [math.inf if cost is None else getattr(cost, name) for cost in of_network]
    for of_network in zip(*pairs, strict=True)
  )
  if None in theirs or None in ours:
    return '–'
  median = statistics.median(ours)
  if median == math.inf:
    return 'never'
  factors = [a / b for a, b in zip(theirs, ours, strict=True)]
  return f'{show(median)} ({_less(statistics.median(factors))})'


def _fig_4_row(
  label: str,
  result: fig_4.Result,
  networks: int,
  scores: Sequence[Scores],
  theirs: paper.Fig4Row | None,
) -> dict[str, str]:
  """A row of `fig_4_table`.

  Args:
    label: name of the network or ensemble.
    result: what the scores are of.
    networks: number of networks whose probabilities are averaged.
    scores: of each seed.
    theirs: the paper's errors.
  """

  def errors(accuracies: Iterable[float]) -> str:
    return Spread([1 - accuracy for accuracy in accuracies]).show(
      lambda error: f'{100 * error:.2f}'
    )

  note = f' ({theirs.note})' if theirs and theirs.note else ''
  return {
    'network': label,
    'images': f'{scores[0].count:,} {result.split}',
    'crops': str(result.crops),
    'networks': str(networks),
    'top-1 error, %, paper': f'{theirs.top1:g}' if theirs else '–',
    'top-1 error, %, ours': errors(one.accuracy for one in scores),
    'top-5 error, %, paper': f'{theirs.top5:g}{note}' if theirs else '–',
    'top-5 error, %, ours': errors(one.top5_accuracy for one in scores),
    'runs': str(len(scores)),
  }


def fig_4_table(section: Section, results: Sequence[fig_4.Result]) -> Table:
  """The paper's Fig. 4 with our values beside the paper's."""
  rows = []
  for result in results:
    for group in section.groups:
      scores = result.of(group)
      theirs = None
      if group.variant == 'bn_x30':
        theirs = paper.FIG_4.get((result.crops, 1))
      if scores:
        rows.append(_fig_4_row(section.label(group), result, 1, scores, theirs))
    if result.ensemble is not None:
      count = len(result.members)
      theirs = paper.FIG_4.get((result.crops, count))
      rows.append(
        _fig_4_row('Ensemble', result, count, [result.ensemble], theirs)
      )
  return rows


def fig_1(section: Section) -> Table:
  """What Fig. 1 shows, in numbers."""
  last = claims.FIG_1_LAST

  def steps_to_target(run: Run) -> float | None:
    """In steps of the run's own batch size, as in the figure."""
    steps = run.steps_to(claims.FIG_1_TARGET)
    return steps and steps / run.equivalent

  return [
    {
      'network': section.label(group),
      f'steps to {100 * claims.FIG_1_TARGET:.0f} %': Spread(
        [steps_to_target(run) for run in group.runs], word=group.never
      ).show(_number),
      f'accuracy, %, mean of the last {last} evaluations': _percentages(
        group, lambda run: run.mean_of_last(last)
      ),
      'drift, median over units': (
        group.spread(claims.drift).show('{:.2f}'.format)
      ),
      'runs': str(len(group.runs)),
      'status': _states(group),
    }
    for group in section.groups
  ]


def fig_1_settings(section: Section) -> Table:
  """Accuracy in Fig. 1 by initial weights and learning rate."""
  cells: dict[tuple[float, float], dict[str, str]] = {}
  for group in section.groups:
    run = group.runs[0]
    rate = run.facts.get('applied_learning_rate', math.nan)
    key = run.config['model']['init_std'], round(rate, 9)
    cells.setdefault(key, {})[group.variant] = _percentages(
      group, Run.mean_of_last
    )

  def cell(std: float, rate: float) -> str:
    values = cells.get((std, rate), {})
    return ' → '.join(values.get(variant, '–') for variant in paper.FIG_1)

  stds, rates = (sorted(set(values)) for values in zip(*cells, strict=True))
  return [
    {'std of W': f'{std:g}'}
    | {f'rate {rate:g}': cell(std, rate) for rate in rates}
    for std in stds
  ]


def highest_rates(section: Section) -> str:
  """The highest learning rate at which each network of a sweep trains."""
  items = []
  for variant in section.variants:
    by_seed = [runs for (runs,) in section.by_seed(variant).values()]
    rates = [claims.highest_rate(runs) for runs in by_seed]
    highest = Spread(rates, never=-math.inf).show('{:g}'.format)
    if not all(run.is_comparable for runs in by_seed for run in runs):
      highest = f'unknown (a run has fewer than {WINDOW} evaluations)'
    items.append(f'{paper.label(variant)} {highest}')
  return (
    'A network trains if its best accuracy is at least twice chance. Highest '
    'learning rate such that it trains there and at all lower ones: '
    f'{"; ".join(items)}.'
  )
