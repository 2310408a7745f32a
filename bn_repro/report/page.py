"""The page of the report: the ledger, then figures and tables by section."""

from collections.abc import Mapping, Sequence
import html
from pathlib import Path
import re

from bn_repro.errors import UserError
from bn_repro.report import claims, fig_4, ledger, search, tables, variants
from bn_repro.report import runs as runs_lib
from bn_repro.report import sections as sections_lib
from bn_repro.report.ledger import Row
from bn_repro.report.runs import WINDOW, Run
from bn_repro.report.sections import SPREAD_NOTE, Section
from bn_repro.report.tables import distinct
from bn_repro.report.verdicts import FAILS, HOLDS, UNDECIDED, VERDICTS
from bn_repro.runtime import workdir

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Batch Normalization, reproduced</title>
<style>
:root {{ color-scheme: light dark; --holds: #0a7d3c; --fails: #c2410c;
  --undecided: #8a6100; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --holds: #4ade80; --fails: #fb923c; --undecided: #facc15; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 76rem;
  margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }}
h1 {{ line-height: 1.2; }}
img {{ width: 100%; max-width: 45rem; background: #fff; border-radius: 6px; }}
.scroll {{ overflow-x: auto; margin: 1rem 0; }}
.scroll table {{ min-width: 46rem; }}
table {{ border-collapse: collapse; font-size: .9rem; }}
th, td {{ padding: .35rem .6rem; text-align: left; vertical-align: top;
  border-bottom: 1px solid #8886; }}
.group th {{ padding-top: 1.2rem; font-size: 1rem; }}
td p {{ margin: 0 0 .4rem; }}
.holds {{ color: var(--holds); }} .fails {{ color: var(--fails); }}
.undecided {{ color: var(--undecided); }} .untested {{ opacity: .75; }}
small {{ opacity: .75; overflow-wrap: anywhere; }}
@media (max-width: 44rem) {{
  .claims thead {{ display: none; }}
  .claims, .claims tbody, .claims tr, .claims th, .claims td {{
    display: block; border: 0; padding: .15rem 0; }}
  .claims tr {{ border-bottom: 1px solid #8886; padding: .5rem 0; }}
  .claims td:first-child {{ font-weight: 600; }}
  .claims td[data-of]::before {{ content: attr(data-of) ": "; opacity: .75; }}
}}
</style></head><body>
{body}
</body></html>
"""

_COUNT_NOTE = (
  'These are the claims of "Batch Normalization" (Ioffe and Szegedy, 2015). '
  'Each counts once for each data set on which runs test it. A claim that no '
  'run tests is listed as not run, and does not count.'
)
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
  '(Algorithm 2){losses}. Each run is to match the best accuracy of Inception '
  'with the same seed, and a diamond is at the median number of steps; '
  'diamonds at one step are above each other. A median ends where a seed '
  'diverges. Compare the shapes of the curves, not their levels: the paper '
  'trains on ImageNet at full width.'
)
_LOSSES_NOTE = ', and the training loss, in means of neighboring steps'
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
_COSTS_NOTE = (
  "The cost of training up to Inception's best accuracy, as the median over "
  "seeds; in parentheses, how many times less than Inception's own cost. A "
  'step of a network with BN costs more than one without, and the networks '
  'differ in size: a factor in steps is not one in time.'
)
_FIG_4_NOTE = (
  "The paper's Fig. 4, on these data: the errors of each network with one crop "
  'of each image and with several, and those of the ensemble, which averages '
  "the probabilities of its members. The paper's errors are on the 50,000 "
  f'validation images of ImageNet. {SPREAD_NOTE}'
)

_SEARCH_NOTE = (
  "The paper's orderings (✓: as in the paper) by the length and the learning "
  "rate of Inception; the rates of the other networks are the paper's "
  'multiples of it. Accuracies are on validation images, and each setting has '
  'one seed, which no other run has: the table chooses a setting, and is not '
  'evidence for a claim.'
)

_DIFFERING_NOTE = 'A claim counts as undecided if its verdicts differ.'

_CLASSES = {HOLDS: 'holds', FAILS: 'fails', UNDECIDED: 'undecided'}


def _table(rows: Sequence[Mapping[str, str]]) -> str:
  """An HTML table of plain text by heading."""
  head = ''.join(f'<th>{html.escape(heading)}</th>' for heading in rows[0])
  body = ''.join(
    f'<tr>{"".join(map(_table_cell, row.values()))}</tr>' for row in rows
  )
  return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _table_cell(text: str) -> str:
  kind = {'✓': ' class="holds"', '✗': ' class="fails"'}.get(text[:1], '')
  return f'<td{kind}>{html.escape(text)}</td>'


def _paragraph(text: str, kind: str = '') -> str:
  opening = f'<p class="{kind}">' if kind else '<p>'
  return f'{opening}{html.escape(text, quote=False)}</p>'


def _warning(text: str) -> str:
  return _paragraph(text, 'fails')


def _claims_table(rows: Sequence[Row]) -> str:
  """The ledger as HTML: a row for each claim, a column for each data set."""
  names = list(dict.fromkeys(row.data for row in rows if row.data)) or ['ours']
  heads = ''.join(
    f'<th>{html.escape(head)}</th>' for head in ('claim', 'paper', *names)
  )
  cells = ledger.cells(rows)
  parts = [f'<table class="claims"><thead><tr>{heads}</tr></thead><tbody>']
  group = ''
  for row in {row.claim: row for row in rows}.values():
    if row.group != group:
      group = row.group
      parts.append(
        f'<tr class="group"><th colspan="{len(names) + 2}">'
        f'{html.escape(group)}</th></tr>'
      )
    parts.append(
      f'<tr><td>{html.escape(row.claim)}</td>'
      f'<td data-of="paper">{html.escape(row.paper)}</td>'
    )
    parts += (_cell(name, cells.get((row.claim, name), [])) for name in names)
    parts.append('</tr>')
  return ''.join([*parts, '</tbody></table>'])


def _cell(name: str, rows: Sequence[Row]) -> str:
  """What the runs on a data set say about a claim; folders if several do."""
  parts = []
  if len({row.verdict for row in rows}) > 1:
    parts.append(_verdict(ledger.verdict_of(rows)))
  for row in rows:
    folder = f'{row.folder}: ' if len(rows) > 1 else ''
    parts.append(
      f'<p>{html.escape(folder)}{_verdict(row.verdict)}<br>'
      f'{html.escape(row.ours)}<br><small>{html.escape(row.seeds)}</small></p>'
    )
  content = ''.join(parts) or _verdict(ledger.NOT_RUN)
  return f'<td data-of="{html.escape(name)}">{content}</td>'


def _verdict(word: str) -> str:
  return f'<b class="{_CLASSES.get(word, "untested")}">{word}</b>'


def _repeated(rows: Sequence[Row], sections: Sequence[Section]) -> list[str]:
  """Messages about folders that test the same claims, as HTML.

  It is a warning, unless their runs differ in the flags of XLA alone.
  """
  # Verdicts on each claim, by data set and folders.
  shared: dict[tuple[str, ...], list[set[str]]] = {}
  tested = [row for row in rows if row.verdict in VERDICTS]
  for of_cell in ledger.cells(tested).values():
    folders = dict.fromkeys(row.folder for row in of_cell)
    if len(folders) > 1:
      verdicts = {row.verdict for row in of_cell}
      shared.setdefault((of_cell[0].data, *folders), []).append(verdicts)
  parts = []
  for (data, *names), cells in shared.items():
    runs = [
      [
        run
        for section in sections
        if (section.data_label, section.name) == (data, name)
        for run in section.runs
      ]
      for name in names
    ]
    flags = [_xla_flags(of_folder) for of_folder in runs]
    if flags.count(flags[0]) < len(flags) and _differ_in_flags_alone(runs):
      same = sum(len(verdicts) == 1 for verdicts in cells)
      where = ' and '.join(
        f'{name} (XLA_FLAGS={" or ".join(of_folder)})' if of_folder else name
        for name, of_folder in zip(names, flags, strict=True)
      )
      text = f'{same} of {len(cells)} verdicts on {data} are the same in '
      parts.append(_paragraph(f'{text}{where}. {_DIFFERING_NOTE}'))
    else:
      text = f'{data}: runs in {", ".join(names)} test the same claims. '
      parts.append(_warning(text + _DIFFERING_NOTE))
  return parts


def _differ_in_flags_alone(folders: Sequence[Sequence[Run]]) -> bool:
  """Whether the runs of folders are the same, made by the same code."""
  contents = [
    sorted(
      f'{run.variant} {sorted(run.setting().items())} {run.repetition} '
      f'{run.numerics} {run.facts.get("versions")} {run.facts.get("devices")}'
      for run in runs
    )
    for runs in folders
  ]
  return contents.count(contents[0]) == len(contents)


def _xla_flags(runs: Sequence[Run]) -> list[str]:
  """The flags of XLA of some runs, without repetitions and empty ones."""
  flags = (run.facts.get('xla_flags') for run in runs)
  return list(dict.fromkeys(filter(None, flags)))


def _facts(section: Section) -> str:
  """How the numbers of a section were computed, as HTML."""
  runs = section.runs
  facts = [run.facts for run in runs]
  examples = distinct(
    f'{fact.get("num_examples", {}).get("train", 0):,}' for fact in facts
  )
  devices = distinct(
    f'{len(names)} {distinct(names) or "?"}'
    for fact in facts
    for names in [fact.get('devices', [])]
  )
  started = sorted(fact.get('started', '?') for fact in facts)
  versions = distinct(
    f'{name} {version}'
    for fact in facts
    for name, version in fact.get('versions', {}).items()
  )
  parts = (
    f'{examples} training images of {section.data_name}',
    f'{distinct(f"{run.step:,}" for run in runs)} steps',
    f'batch size {distinct(run.config["batch_size"] for run in runs)}',
    'network width '
    + distinct(f'{run.config["model"]["width"]:g}' for run in runs),
    f'devices: {devices}',
    f'started from {started[0]} to {started[-1]}',
    f'revision {distinct(fact.get("git_revision", "?") for fact in facts)}',
    versions or '?',
    *(f'XLA_FLAGS={flags}' for flags in _xla_flags(runs)),
  )
  return f'<p><small>{html.escape("; ".join(parts))}</small></p>'


def _image(name: str, description: str) -> str:
  return f'<img src="{name}.png" alt="{html.escape(description)}">'


def _heading(kind: str, section: Section) -> str:
  """The heading of a section, which no other section has."""
  network = '' if section.network in ('inception', 'mlp') else section.network
  place = ', '.join(filter(None, [section.name, network]))
  return f'<h2>{html.escape(f"{kind} on {section.data_label} ({place})")}</h2>'


def _section(
  section: Section, results: Sequence[fig_4.Result], out: Path, name: str
) -> str:
  """A section as HTML; draws its figure, if it has one, as `name`."""
  from bn_repro.report import figures  # Importing Matplotlib takes a second.

  if _is_fig_1_grid(section):
    kind = 'Fig. 1 at other settings'
    parts = [
      _paragraph(_FIG_1_GRID_NOTE),
      _table(tables.fig_1_settings(section)),
    ]
  elif section.network == 'mlp':
    kind = 'Fig. 1'
    figures.fig_1(section, out, name)
    parts = [
      _image(name, 'Accuracy and inputs of a sigmoid over steps'),
      _paragraph(_FIG_1_NOTE),
      _table(tables.fig_1(section)),
    ]
  elif search.is_search(section):
    kind = 'The search for a setting'
    parts = [_table(search.table(section)), _paragraph(_SEARCH_NOTE)]
  elif (
    section.is_sweep and len({run.learning_rate for run in section.runs}) > 2
  ):
    kind = 'Learning rates'
    figures.rates(section, out, name)
    parts = [
      _image(name, 'Best accuracy over the learning rate'),
      _paragraph(f'{tables.highest_rates(section)} {SPREAD_NOTE}'),
      _table(tables.fig_3(section)),
      _paragraph(_FIG_3_NOTE),
    ]
  else:
    kind = 'Fig. 2 and 3'
    has_losses = figures.curves(section, out, name)
    moving = []
    if figures.moving_averages(section, out, f'{name}_moving'):
      moving.append(_image(f'{name}_moving', _MOVING_NOTE))
      moving.append(_paragraph(_MOVING_NOTE))
    parts = [
      _image(name, f'Accuracy{" and training loss" * has_losses} over steps'),
      _paragraph(_CURVES_NOTE.format(losses=_LOSSES_NOTE * has_losses)),
      *moving,
      _table(tables.fig_3(section)),
      _paragraph(_FIG_3_NOTE),
    ]
    costs = tables.costs_table(section)
    if costs:
      parts += [_table(costs), _paragraph(_COSTS_NOTE)]
  mismatches = section.mismatches()
  if mismatches and not section.is_sweep:
    fields = '; '.join(mismatches)
    parts.insert(
      0, _warning(f'These runs are not comparable: they differ in {fields}.')
    )
  if results:
    parts += [
      _paragraph(_FIG_4_NOTE),
      _table(tables.fig_4_table(section, results)),
    ]
  return _heading(kind, section) + ''.join(parts) + _facts(section)


def _is_fig_1_grid(section: Section) -> bool:
  """Whether only initial weights and learning rates vary, in Fig. 1."""
  fields = {'model.init_std', 'optim.learning_rate'}
  return (
    section.network == 'mlp'
    and section.is_sweep
    and all(fields.issuperset(section.varying(g)) for g in section.groups)
  )


def _problems(problems: Sequence[str]) -> list[str]:
  """The list of problems with runs, as HTML."""
  if not problems:
    return []
  items = ''.join(f'<li>{html.escape(text)}</li>' for text in problems)
  return ['<h2>Problems with the runs</h2>', f'<ul class="fails">{items}</ul>']


def write_report(
  folders: Sequence[str], out: Path, introduction: str = ''
) -> list[str]:
  """Writes the page, its figures and the ledger.

  Args:
    folders: paths of workdirs, or of folders of workdirs.
    out: folder to write into.
    introduction: plain text to show below the first line, such as how the
      settings of the runs were chosen.

  Returns:
    A message for each run that is left out, and for runs of other numerics or
    of variants that are not those of their configs or not of a search.

  Raises:
    UserError: if there is no readable run, or `out` cannot be written.
  """
  runs, problems = runs_lib.read_runs(folders)
  sections, unusual = sections_lib.group(runs)
  problems += [
    *unusual,
    *sections_lib.other_numerics(sections),
    *variants.changed(sections),
  ]
  searches = [section for section in sections if search.is_search(section)]
  problems += (text for one in searches for text in search.unmatched(one))
  rows = claims.judge([s for s in sections if s not in searches])
  results = []
  for section in sections:
    found, unreadable = fig_4.read(section)
    results.append(found)
    problems += unreadable
    rows += fig_4.judge(section, found)
  try:
    out.mkdir(parents=True, exist_ok=True)
    parts = [
      f'<h1>{ledger.summary(rows)}</h1>',
      *map(_paragraph, filter(None, [_COUNT_NOTE, introduction])),
      "<h2>The paper's claims</h2>",
      _claims_table(rows),
      *_repeated(rows, sections),
      _paragraph(ledger.NOTE),
      *_problems(problems),
      *(
        _section(section, found, out, name)
        for (name, section), found in zip(
          _by_file_name(sections).items(), results, strict=True
        )
      ),
    ]
    page = _PAGE.format(body='\n'.join(parts))
    workdir.replace_file(out / 'index.html', page)
    workdir.replace_file(out / 'ledger.md', ledger.markdown(rows))
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
