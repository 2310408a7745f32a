"""A page of curves and numbers beside the paper's, from what runs have written.

python -m bn_repro.report --runs=runs/quickstart --out=runs/report

Runs of one folder, network and data set stand in one section. Those of one
config that differ in their seeds alone are taken together.
"""

import argparse
from collections.abc import Iterable, Sequence
import dataclasses
import html
import math
from pathlib import Path
import re
import sys

from bn_repro import cli
from bn_repro.errors import UserError
from bn_repro.paper import FIG_1, FIG_3, INCEPTION_STEPS, PAPER, label
from bn_repro.report import claims
from bn_repro.report import runs as runs_lib
from bn_repro.report.claims import times
from bn_repro.report.runs import WINDOW, Group, Run, Section, Spread

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Batch Normalization, reproduced</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 76rem;
  margin: 2rem auto; padding: 0 1rem; }}
img {{ width: 100%; background: #fff; border-radius: 6px; }}
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

_VERDICT_CLASSES = {claims.HOLDS: 'holds', claims.FAILS: 'fails'}


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """An HTML table of plain text; verdicts get their colours."""

  def cell(text: str) -> str:
    kind = _VERDICT_CLASSES.get(text)
    escaped = html.escape(text)
    return (
      f'<td class="{kind}">{escaped}</td>' if kind else f'<td>{escaped}</td>'
    )

  head = ''.join(f'<th>{html.escape(h)}</th>' for h in heads)
  body = ''.join(f'<tr>{"".join(map(cell, row))}</tr>' for row in rows)
  return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _number(value: float) -> str:
  return f'{value:,.0f}'


def _or_dash(value: float | None, show: str) -> str:
  return '–' if value is None else show.format(value)


def _status(run: Run) -> str:
  status = run.status.get('status', 'not started')
  if status == 'done':
    return status
  reason = run.status.get('reason', '')
  return f'{status} at step {run.step}' + (f': {reason}' if reason else '')


def _plain(section: Section) -> Group | None:
  """The net without BN that targets come from, if there is exactly one."""
  groups = section.settings_of('inception')
  return groups[0] if len(groups) == 1 else None


def _fig_3_row(section: Section, group: Group) -> list[str]:
  paper = PAPER.get(group.variant)
  plain = _plain(section)
  by_seed = {run.config['seed']: run for run in plain.runs} if plain else {}
  pairs = [(by_seed.get(run.config['seed']), run) for run in group.runs]
  reached = Spread(
    [
      run.steps_to(target)
      for without, run in pairs
      if without and (target := without.best()) is not None
    ]
  )
  faster = Spread(
    [claims.speed_up(without, run) for without, run in pairs if without],
    never=-math.inf,
  )
  paper_faster = None
  if paper and paper.steps:
    paper_faster = INCEPTION_STEPS / paper.steps
  rates = dict.fromkeys(
    run.facts.get('applied_learning_rate') for run in group.runs
  )
  varies = section.what_varies(group)
  return [
    label(group.variant) + (f', {varies}' if varies else ''),
    _or_dash(paper.learning_rate if paper else None, '{:g}'),
    ', '.join(_or_dash(rate, '{:g}') for rate in rates),
    f'{paper.steps}M' if paper and paper.steps else '–',
    reached.show(_number),
    _or_dash(paper_faster, '{:.1f}x'),
    faster.show(times),
    paper.accuracy if paper else '–',
    _shown(group.spread(Run.best)),
    _shown(group.spread(Run.test_accuracy)),
    str(len(group.runs)),
    ', '.join(dict.fromkeys(_status(run) for run in group.runs)),
  ]


def _shown(spread: Spread) -> str:
  """Percentages, or a dash where a run has none."""
  if None in spread.values:
    return '–'
  return spread.show(lambda value: f'{100 * value:.1f}')


def fig_3(section: Section) -> str:
  """The paper's Fig. 3 with our numbers beside its own, as HTML."""
  heads = (
    'variant',
    'rate, paper',
    'ours',
    'steps to 72.2 %, paper',
    "to Inception's best, ours",
    'speed-up, paper',
    'ours',
    'best %, paper',
    'ours',
    'test %, ours',
    'runs',
    'status',
  )
  rows = [_fig_3_row(section, group) for group in section.groups]
  if not section.is_sweep:
    there = {group.variant for group in section.groups}
    rows += [
      [label(name), *['–'] * (len(heads) - 2), 'not run']
      for name in FIG_3
      if name not in there
    ]
  return _table(heads, rows)


def fig_1_table(section: Section) -> str:
  """What Fig. 1 shows, in numbers, as HTML."""
  heads = (
    'net',
    'steps to 90 %',
    f'mean of the last {claims.FIG_1_LAST} evaluations, %',
    'travel of the median over width',
    'runs',
    'status',
  )
  rows = []
  for group in section.groups:
    varies = section.what_varies(group)
    # Steps of this batch size, as the figure has them.
    reached = [(run, run.steps_to(claims.FIG_1_TARGET)) for run in group.runs]
    steps = [found and found / run.equivalent for run, found in reached]
    rows.append(
      [
        label(group.variant) + (f', {varies}' if varies else ''),
        Spread(steps).show(_number),
        _shown(group.spread(lambda run: run.last(claims.FIG_1_LAST))),
        group.spread(claims.travel).show('{:.2f}'.format),
        str(len(group.runs)),
        ', '.join(dict.fromkeys(_status(run) for run in group.runs)),
      ]
    )
  return _table(heads, rows)


def settings_table(section: Section) -> str:
  """Last accuracy of both nets of Fig. 1 over initial weights and rates."""
  cells: dict[tuple[float, float], dict[str, str]] = {}
  for group in section.groups:
    config = group.runs[0].config
    rate = group.runs[0].facts.get('applied_learning_rate', math.nan)
    key = (config['model']['init_std'], round(rate, 9))
    cells.setdefault(key, {})[group.variant] = _shown(group.spread(Run.last))
  stds = sorted({std for std, _ in cells})
  rates = sorted({rate for _, rate in cells})
  rows = [
    [
      f'{std:g}',
      *(
        ' → '.join(cells.get((std, rate), {}).get(v, '–') for v in FIG_1)
        for rate in rates
      ),
    ]
    for std in stds
  ]
  return _table(['std of W', *(f'rate {rate:g}' for rate in rates)], rows)


def limits(section: Section) -> str:
  """In a sweep of rates: the highest at which each net still learns."""
  items = []
  for variant in dict.fromkeys(group.variant for group in section.groups):
    by_seed: dict[int, list[Run]] = {}
    for group in section.settings_of(variant):
      for run in group.runs:
        by_seed.setdefault(run.config['seed'], []).append(run)
    highest = Spread(
      [claims.highest_rate(runs) for runs in by_seed.values()], never=-math.inf
    )
    items.append(f'{label(variant)} {highest.show("{:g}".format)}')
  return (
    '<p>Highest rate such that the net leaves chance at it and at all lower '
    f'ones: {html.escape("; ".join(items))}.</p>'
  )


def _facts(section: Section) -> str:
  """Where the numbers come from."""
  runs = section.runs

  def all_of(values: Iterable[object]) -> str:
    return ', '.join(dict.fromkeys(str(value) for value in values)) or '?'

  count = all_of(
    f'{run.facts.get("num_examples", {}).get("train", 0):,}' for run in runs
  )
  versions = all_of(
    f'{name} {version}'
    for run in runs
    for name, version in run.facts.get('versions', {}).items()
  )
  devices = all_of(
    f'{len(names)} {all_of(names)}'
    for run in runs
    for names in [run.facts.get('devices', [])]
  )
  started = sorted(run.facts.get('started', '?') for run in runs)
  steps = all_of(f'{run.step:,}' for run in runs)
  batch_sizes = all_of(run.config['batch_size'] for run in runs)
  widths = all_of(f'{run.config["model"]["width"]:g}' for run in runs)
  revisions = all_of(run.facts.get('git_revision', '?') for run in runs)
  text = (
    f'{count} training images of {section.data_name}, {steps} steps of '
    f'{batch_sizes}, network width {widths}; devices: {devices}; started '
    f'{started[0]} to {started[-1]}; revision {revisions}; {versions}'
  )
  return f'<p><small>{html.escape(text)}</small></p>'


def _image(name: str, what: str) -> str:
  return f'<img src="{name}.svg" alt="{html.escape(what)}">'


def _section(section: Section, out: Path, name: str) -> str:
  from bn_repro.report import figures  # Matplotlib takes a second.

  parts = [f'<h2>{html.escape(section.title)}</h2>']
  not_shared = section.not_shared()
  if not_shared and not section.is_sweep:
    parts.append(
      '<p class="fails">Not the same for all of these runs: '
      f'{html.escape("; ".join(not_shared))}.</p>'
    )
  if _varies_in_fig_1_settings(section):
    parts.append(
      '<p>Accuracy without → with BN, % (the last evaluations), over the '
      'standard deviation of the initial weights and the learning rate. The '
      'paper gives neither, and Fig. 1 depends on both.</p>'
      + settings_table(section)
    )
  elif section.network == 'mlp':
    figures.fig_1(section, out, name)
    parts.append(
      _image(name, 'Test accuracy and inputs of a sigmoid over steps')
      + "<p>The paper's Fig. 1 in these data. Drawn is the unit of the last "
      'hidden layer whose median travels as far as that of the median unit; '
      'travel is its range over training, width the distance from the 15th to '
      'the 85th percentile at the end.</p>' + fig_1_table(section)
    )
  elif section.is_sweep and _rates(section) > 2:
    figures.rates(section, out, name)
    parts.append(
      _image(name, 'Best accuracy over the learning rate')
      + limits(section)
      + fig_3(section)
    )
  else:
    figures.curves(section, out, name)
    parts.append(
      _image(name, 'Accuracy and training loss over steps')
      + '<p>Thick: with population statistics (Algorithm 2). Dotted, thin: '
      "with moving averages. The paper's Fig. 2 in these data; compare "
      'shapes, not levels: the paper trains on ImageNet at full width.</p>'
      + fig_3(section)
      + f'<p>Best is the best mean of {WINDOW} evaluations in a row; steps are '
      "counted to that of Inception, each seed's own. Median, and the range "
      'over seeds.</p>'
    )
  return ''.join(parts) + _facts(section)


def _varies_in_fig_1_settings(section: Section) -> bool:
  """Whether the nets of Fig. 1 differ in their initial weights and rates."""
  fields = {'model.init_std', 'optim.learning_rate'}
  return (
    section.network == 'mlp'
    and section.is_sweep
    and all(section.varying(group) <= fields for group in section.groups)
  )


def _rates(section: Section) -> int:
  return len({run.config['optim']['learning_rate'] for run in section.runs})


def write_report(folders: Sequence[str], out: Path) -> list[str]:
  """Writes the page and its pictures; returns what could not be read.

  Raises:
    UserError: if there is no run, or `out` cannot be written.
  """
  runs, problems = runs_lib.read_runs(folders)
  sections, repeated = runs_lib.sections(runs, list(PAPER))
  problems += repeated
  rows = claims.ledger(sections)
  try:
    out.mkdir(parents=True, exist_ok=True)
    parts = [
      "<h2>The paper's claims</h2>",
      _table(claims.HEADS, map(dataclasses.astuple, rows)),
      '<p>A claim is measured for each seed by itself, and holds if it does '
      'for every seed. Median, and the range over seeds.</p>',
      *(
        _section(section, out, name)
        for name, section in _file_names(sections).items()
      ),
      *(f'<p class="fails">{html.escape(problem)}</p>' for problem in problems),
    ]
    page = _PAGE.format(body=''.join(parts))
    (out / 'index.html').write_text(page, encoding='utf-8')
    (out / 'ledger.md').write_text(claims.markdown(rows), encoding='utf-8')
  except OSError as error:
    raise UserError(f'--out={out}: {error.strerror}.') from error
  return problems


def _file_names(sections: Sequence[Section]) -> dict[str, Section]:
  """The sections by names for their pictures, of their folders."""
  names: dict[str, Section] = {}
  for section in sections:
    stem = re.sub(r'\W+', '_', section.folder.name)
    name, number = stem, 1
    while name in names:
      number += 1
      name = f'{stem}_{number}'
    names[name] = section
  return names


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = cli.Parser(
    prog='python -m bn_repro.report',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--runs',
    action='append',
    required=True,
    metavar='DIR',
    help='a workdir, or a folder of workdirs; may be given several times',
  )
  parser.add_argument('--out', required=True, metavar='DIR')
  try:
    flags = parser.parse_args(argv)
    problems = write_report(flags.runs, Path(flags.out))
  except UserError as error:
    return cli.report_errors(error.problems)
  for problem in problems:
    print(f'warning: {problem}', file=sys.stderr)
  print(f'wrote {Path(flags.out).resolve() / "index.html"}')
  return 0
