"""The page of the report: the ledger, then figures and tables by section."""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import html
import math
from pathlib import Path
import re

from bn_repro import paper
from bn_repro.errors import UserError
from bn_repro.inference.averaging import Scores
from bn_repro.report import claims, fig_4
from bn_repro.report import runs as runs_lib
from bn_repro.report.runs import (
  SPREAD_NOTE,
  WINDOW,
  Group,
  Run,
  Section,
  Spread,
)
from bn_repro.runtime import workdir

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Batch Normalization, reproduced</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 76rem;
  margin: 2rem auto; padding: 0 1rem; }}
img {{ width: 100%; max-width: 45rem; background: #fff; border-radius: 6px; }}
.scroll {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-size: .9rem; min-width: 46rem; }}
th, td {{ padding: .35rem .6rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid #8886; }}
.holds {{ color: #0a7d3c; }} .fails {{ color: #c2410c; }}
@media (prefers-color-scheme: dark) {{
  .holds {{ color: #4ade80; }} .fails {{ color: #fb923c; }} }}
small {{ opacity: .75; overflow-wrap: anywhere; }}
</style></head><body>
<h1>Batch Normalization, reproduced</h1>
{body}
</body></html>
"""

_FIG_1_NOTE = (
  "The paper's Fig. 1, on this data set. (b) and (c) show the input of one "
  'sigmoid of the last hidden layer: the unit whose drift is in the middle, or '
  'the lower of two in the middle. The drift of a unit is the range of its '
  'median input over training, divided by the distance between its 15th and '
  f'85th percentile at the end. {SPREAD_NOTE}'
)
_FIG_1_GRID_NOTE = (
  'Accuracy in %, without BN → with BN: the mean of the last '
  f'{WINDOW} evaluations, for each standard deviation of the initial weights '
  '(rows) and each learning rate (columns). The paper gives neither, and '
  f'Fig. 1 depends on both. {SPREAD_NOTE}'
)
_CURVES_NOTE = (
  "The paper's Fig. 2, on this data set: accuracies with population statistics "
  '(Algorithm 2), and the training loss, in means of neighboring steps. Each '
  'run is to match the best accuracy of Inception with the same seed, and a '
  'diamond is at the median number of steps. Compare the shapes of the curves, '
  'not their levels: the paper trains on ImageNet at full width.'
)
_MOVING_NOTE = (
  'The same networks, evaluated with population statistics (Algorithm 2) and '
  'with the moving averages of training.'
)
_FIG_3_NOTE = (
  f'The best accuracy is the highest mean of {WINDOW} consecutive evaluations; '
  'a run with fewer has none. The test accuracy is that after the last step. '
  "Steps count up to the first evaluation that reaches Inception's best "
  f'accuracy with the same seed. {SPREAD_NOTE}'
)
_FIG_4_NOTE = (
  "The paper's Fig. 4, on these data: the errors of each network with one crop "
  'of each image and with several, and those of the ensemble, which averages '
  "the probabilities of its members. The paper's errors are on the 50,000 "
  f'validation images of ImageNet. {SPREAD_NOTE}'
)

_VERDICT_CLASSES = {claims.HOLDS: 'holds', claims.FAILS: 'fails'}


def _table(rows: Sequence[Mapping[str, str]]) -> str:
  """An HTML table of plain text by heading; verdicts are colored."""

  def cell(text: str) -> str:
    kind = _VERDICT_CLASSES.get(text)
    opening = f'<td class="{kind}">' if kind else '<td>'
    return f'{opening}{html.escape(text)}</td>'

  head = ''.join(f'<th>{html.escape(heading)}</th>' for heading in rows[0])
  body = ''.join(f'<tr>{"".join(map(cell, row.values()))}</tr>' for row in rows)
  return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _paragraph(text: str) -> str:
  return f'<p>{html.escape(text, quote=False)}</p>'


def _warning(text: str) -> str:
  return f'<p class="fails">{html.escape(text, quote=False)}</p>'


def _number(value: float) -> str:
  return f'{value:,.0f}'


def _percentages(spread: Spread) -> str:
  """A spread in percent; a dash if a run has no value."""
  if None in spread.values:
    return '–'
  return spread.show(lambda value: f'{100 * value:.1f}')


def _or_dash(value: float | None, form: str) -> str:
  return '–' if value is None else form.format(value)


def _distinct(values: Iterable[object]) -> str:
  return ', '.join(dict.fromkeys(str(value) for value in values))


def _status(run: Run) -> str:
  status = run.status.get('status', 'not started')
  if status == workdir.Status.DONE:
    return status
  reason = run.status.get('reason')
  return f'{status} at step {run.step}' + (f': {reason}' if reason else '')


def _plain_run(section: Section, run: Run) -> Run | None:
  """The run of Inception, without BN, with the same seed and fold.

  None if there is no such run, or if Inception has several settings.
  """
  groups = section.settings_of('inception')
  runs = groups[0].runs if len(groups) == 1 else []
  same = (plain for plain in runs if plain.repetition == run.repetition)
  return next(same, None)


def _fig_3_row(section: Section, group: Group) -> dict[str, str]:
  unknown = paper.PaperRow(group.variant, None, None, '–')
  theirs = paper.PAPER.get(group.variant, unknown)
  paper_speed_up = theirs.steps and paper.INCEPTION_STEPS / theirs.steps
  rates = (run.facts.get('applied_learning_rate') for run in group.runs)
  pairs = [
    (plain, run) for run in group.runs if (plain := _plain_run(section, run))
  ]
  reached = [
    run.steps_to(target)
    for plain, run in pairs
    if (target := plain.best()) is not None
  ]
  speed_ups = [
    claims.speed_up(plain, run) for plain, run in pairs if claims.learns(plain)
  ]
  return {
    'variant': section.label(group),
    'learning rate, paper': _or_dash(theirs.learning_rate, '{:g}'),
    'learning rate, ours': _distinct(_or_dash(rate, '{:g}') for rate in rates),
    'steps to 72.2 %, paper': _or_dash(theirs.steps, '{}M'),
    "steps to Inception's best, ours": (
      Spread(reached, word=group.never).show(_number)
    ),
    'speed-up, paper': _or_dash(paper_speed_up, '{:.1f}x'),
    'speed-up, ours': (
      Spread(speed_ups, -math.inf, group.never).show(claims.times)
    ),
    'best accuracy, %, paper': theirs.accuracy,
    'best accuracy, %, ours': _percentages(group.spread(Run.best)),
    'test accuracy, %, ours': _percentages(group.spread(Run.test_accuracy)),
    'runs': str(len(group.runs)),
    'status': _distinct(map(_status, group.runs)),
  }


def fig_3(section: Section) -> str:
  """The paper's Fig. 3 with our values beside the paper's, as HTML."""
  rows = [_fig_3_row(section, group) for group in section.groups]
  if not section.is_sweep:
    rows += [
      dict.fromkeys(rows[0], '–')
      | {'variant': paper.label(variant), 'status': 'not run'}
      for variant in paper.FIG_3
      if variant not in section.variants
    ]
  return _table(rows)


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


def fig_4_table(section: Section, results: Sequence[fig_4.Result]) -> str:
  """The paper's Fig. 4 with our values beside the paper's, as HTML."""
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
  return _table(rows)


def fig_1_table(section: Section) -> str:
  """What Fig. 1 shows, in numbers, as HTML."""
  last = claims.FIG_1_LAST

  def steps_to_target(run: Run) -> float | None:
    """In steps of the run's own batch size, as in the figure."""
    steps = run.steps_to(claims.FIG_1_TARGET)
    return steps and steps / run.equivalent

  return _table(
    [
      {
        'network': section.label(group),
        f'steps to {100 * claims.FIG_1_TARGET:.0f} %': Spread(
          [steps_to_target(run) for run in group.runs], word=group.never
        ).show(_number),
        f'accuracy, %, mean of the last {last} evaluations': _percentages(
          group.spread(lambda run: run.mean_of_last(last))
        ),
        'drift, median over units': (
          group.spread(claims.drift).show('{:.2f}'.format)
        ),
        'runs': str(len(group.runs)),
        'status': _distinct(map(_status, group.runs)),
      }
      for group in section.groups
    ]
  )


def settings_table(section: Section) -> str:
  """Accuracy of both networks of Fig. 1 by initial weights and learning rate.

  The table is HTML.
  """
  cells: dict[tuple[float, float], dict[str, str]] = {}
  for group in section.groups:
    run = group.runs[0]
    rate = run.facts.get('applied_learning_rate', math.nan)
    key = run.config['model']['init_std'], round(rate, 9)
    cells.setdefault(key, {})[group.variant] = _percentages(
      group.spread(Run.mean_of_last)
    )

  def cell(std: float, rate: float) -> str:
    values = cells.get((std, rate), {})
    return ' → '.join(values.get(variant, '–') for variant in paper.FIG_1)

  stds, rates = (sorted(set(values)) for values in zip(*cells, strict=True))
  return _table(
    [
      {'std of W': f'{std:g}'}
      | {f'rate {rate:g}': cell(std, rate) for rate in rates}
      for std in stds
    ]
  )


def highest_rates(section: Section) -> str:
  """The highest learning rate at which each network of a sweep learns."""
  items = []
  for variant in section.variants:
    by_seed = [runs for (runs,) in section.by_seed(variant).values()]
    rates = [claims.highest_rate(runs) for runs in by_seed]
    highest = Spread(rates, never=-math.inf).show('{:g}'.format)
    if not all(run.is_comparable for runs in by_seed for run in runs):
      highest = f'unknown (a run has fewer than {WINDOW} evaluations)'
    items.append(f'{paper.label(variant)} {highest}')
  return (
    'A network learns if its best accuracy is at least twice chance. Highest '
    'learning rate such that it learns there and at all lower ones: '
    f'{"; ".join(items)}. {SPREAD_NOTE}'
  )


def _facts(section: Section) -> str:
  """How the numbers of a section were computed, as HTML."""
  runs = section.runs
  facts = [run.facts for run in runs]
  examples = _distinct(
    f'{fact.get("num_examples", {}).get("train", 0):,}' for fact in facts
  )
  devices = _distinct(
    f'{len(names)} {_distinct(names) or "?"}'
    for fact in facts
    for names in [fact.get('devices', [])]
  )
  started = sorted(fact.get('started', '?') for fact in facts)
  versions = _distinct(
    f'{name} {version}'
    for fact in facts
    for name, version in fact.get('versions', {}).items()
  )
  parts = (
    f'{examples} training images of {section.data_name}',
    f'{_distinct(f"{run.step:,}" for run in runs)} steps',
    f'batch size {_distinct(run.config["batch_size"] for run in runs)}',
    'network width '
    + _distinct(f'{run.config["model"]["width"]:g}' for run in runs),
    f'devices: {devices}',
    f'started from {started[0]} to {started[-1]}',
    f'revision {_distinct(fact.get("git_revision", "?") for fact in facts)}',
    versions or '?',
  )
  return f'<p><small>{html.escape("; ".join(parts))}</small></p>'


def _image(name: str, description: str) -> str:
  return f'<img src="{name}.png" alt="{html.escape(description)}">'


def _section(
  section: Section, results: Sequence[fig_4.Result], out: Path, name: str
) -> str:
  """A section as HTML; draws its figure, if it has one, as `name`."""
  from bn_repro.report import figures  # Importing Matplotlib takes a second.

  parts = [f'<h2>{html.escape(section.title)}</h2>']
  mismatches = section.mismatches()
  if mismatches and not section.is_sweep:
    fields = '; '.join(mismatches)
    parts.append(
      _warning(f'These runs are not comparable: they differ in {fields}.')
    )
  if _is_fig_1_grid(section):
    parts += [_paragraph(_FIG_1_GRID_NOTE), settings_table(section)]
  elif section.network == 'mlp':
    figures.fig_1(section, out, name)
    parts += [
      _image(name, 'Accuracy and inputs of a sigmoid over steps'),
      _paragraph(_FIG_1_NOTE),
      fig_1_table(section),
    ]
  elif (
    section.is_sweep and len({run.learning_rate for run in section.runs}) > 2
  ):
    figures.rates(section, out, name)
    parts += [
      _image(name, 'Best accuracy over the learning rate'),
      _paragraph(highest_rates(section)),
      fig_3(section),
      _paragraph(_FIG_3_NOTE),
    ]
  else:
    figures.curves(section, out, name)
    moving = []
    if figures.moving_averages(section, out, f'{name}_moving'):
      moving.append(_image(f'{name}_moving', _MOVING_NOTE))
      moving.append(_paragraph(_MOVING_NOTE))
    parts += [
      _image(name, 'Accuracy and training loss over steps'),
      _paragraph(_CURVES_NOTE),
      *moving,
      fig_3(section),
      _paragraph(_FIG_3_NOTE),
    ]
  if results:
    parts += [_paragraph(_FIG_4_NOTE), fig_4_table(section, results)]
  return ''.join(parts) + _facts(section)


def _is_fig_1_grid(section: Section) -> bool:
  """Whether only initial weights and learning rates vary, in Fig. 1."""
  fields = {'model.init_std', 'optim.learning_rate'}
  return (
    section.network == 'mlp'
    and section.is_sweep
    and all(fields.issuperset(section.varying(g)) for g in section.groups)
  )


def write_report(folders: Sequence[str], out: Path) -> list[str]:
  """Writes the page, its figures and the ledger.

  Args:
    folders: paths of workdirs, or of folders of workdirs.
    out: folder to write into.

  Returns:
    A message for each run that is left out, and for runs of other numerics.

  Raises:
    UserError: if there is no readable run, or `out` cannot be written.
  """
  runs, problems = runs_lib.read_runs(folders)
  sections, repeated = runs_lib.sections(runs)
  problems += [*repeated, *runs_lib.other_numerics(sections)]
  rows = claims.ledger(sections)
  results = []
  for section in sections:
    found, unreadable = fig_4.read(section)
    results.append(found)
    problems += unreadable
    rows += fig_4.judge(section, found)
  try:
    out.mkdir(parents=True, exist_ok=True)
    parts = [
      "<h2>The paper's claims</h2>",
      _table([dataclasses.asdict(row) for row in rows]),
      _paragraph(claims.NOTE),
      *(
        _section(section, found, out, name)
        for (name, section), found in zip(
          _by_file_name(sections).items(), results, strict=True
        )
      ),
      *map(_warning, problems),
    ]
    page = _PAGE.format(body=''.join(parts))
    (out / 'index.html').write_text(page, encoding='utf-8')
    (out / 'ledger.md').write_text(claims.markdown(rows), encoding='utf-8')
  except OSError as error:
    raise UserError(f'--out={out}: {error.strerror}.') from error
  return problems


def _by_file_name(sections: Sequence[Section]) -> dict[str, Section]:
  """The sections by distinct file names for their figures."""
  names: dict[str, Section] = {}
  for section in sections:
    stem = re.sub(r'\W+', '_', section.folder.name)
    name, number = stem, 1
    while name in names:
      number += 1
      name = f'{stem}_{number}'
    names[name] = section
  return names
