"""A page of curves and numbers beside the paper's, from what runs have written.

python -m bn_repro.report --runs=runs/quickstart --out=runs/report
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import html
from pathlib import Path
import sys

from bn_repro import main as main_lib
from bn_repro import results
from bn_repro.config import UserError
from bn_repro.results import Group, Run


@dataclasses.dataclass(frozen=True)
class PaperRow:
  """What the paper reports of a variant (Fig. 3, section 4.2.2).

  Attributes:
    label: the paper's name for it.
    learning_rate: initial rate.
    steps: millions of steps to 72.2 %; None where it is not reached.
    accuracy: the best, in percent, or what the text says instead.
  """

  label: str
  learning_rate: float
  steps: float | None
  accuracy: str


PAPER: Mapping[str, PaperRow] = {
  'inception': PaperRow('Inception', 0.0015, 31.0, '72.2'),
  'bn_baseline': PaperRow('BN-Baseline', 0.0015, 13.3, '72.7'),
  'bn_x5': PaperRow('BN-x5', 0.0075, 2.1, '73.0'),
  'bn_x30': PaperRow('BN-x30', 0.045, 2.7, '74.8'),
  'bn_x5_sigmoid': PaperRow('BN-x5-Sigmoid', 0.0075, None, '69.8'),
  'inception_x5': PaperRow('Inception at x5', 0.0075, None, 'machine infinity'),
  'inception_sigmoid': PaperRow(
    'Inception, sigmoid', 0.0015, None, 'chance, 0.1'
  ),
}

# Okabe and Ito's colours, which colour-blind people can tell apart.
COLOURS = (
  '#000000',
  '#0072b2',
  '#d55e00',
  '#009e73',
  '#cc79a7',
  '#999999',
  '#e69f00',
)
STYLES = ('-', '--', '-', '-.', '--', '-.', ':')

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Batch Normalization, reproduced</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 76rem;
  margin: 2rem auto; padding: 0 1rem; }}
img {{ width: 100%; background: #fff; border-radius: 6px; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; }}
th, td {{ padding: .35rem .6rem; text-align: right;
  border-bottom: 1px solid #8886; }}
th:first-child, td:first-child, td:last-child {{ text-align: left; }}
li b {{ font-weight: 600; }}
small {{ opacity: .75; overflow-wrap: anywhere; }}
</style></head><body>
<h1>Batch Normalization, reproduced</h1>
{body}
</body></html>
"""


def _percent(value: float | None) -> str:
  return '–' if value is None else f'{100 * value:.1f}'


def _number(value: float | None) -> str:
  return '–' if value is None else f'{value:,.0f}'


def _times(value: float | None) -> str:
  return '–' if value is None else f'{value:.1f}x'


def _ratio(above: float | None, below: float | None) -> float | None:
  return above / below if above and below else None


def label(variant: str) -> str:
  """The paper's name of a variant, or its own."""
  return PAPER[variant].label if variant in PAPER else variant


def _find(groups: Sequence[Group], variant: str) -> Group | None:
  return next((g for g in groups if g.variant == variant), None)


def target_accuracy(groups: Sequence[Group]) -> float | None:
  """The best accuracy of the run without BN, as the paper's 72.2 % is."""
  group = _find(groups, 'inception')
  return group.median_best() if group else None


def _status(run: Run) -> str:
  status = run.status.get('status', 'not started')
  if status == 'done':
    return status
  reason = run.status.get('reason', '')
  return f'{status} at step {run.step}' + (f': {reason}' if reason else '')


def table(groups: Sequence[Group]) -> str:
  """The paper's Fig. 3 with our numbers beside its own, as HTML."""
  target = target_accuracy(groups)
  plain = _find(groups, 'inception')
  plain_steps = plain.median_steps_to(target) if plain else None
  paper_steps = PAPER['inception'].steps
  rows = []
  for group in groups:
    paper = PAPER.get(group.variant)
    steps = group.median_steps_to(target)
    first = group.runs[0]
    cells = [
      label(group.variant),
      f'{paper.learning_rate:g}' if paper else '–',
      f'{first.facts.get("applied_learning_rate", float("nan")):g}',
      f'{paper.steps}M' if paper and paper.steps else '–',
      _number(steps),
      _times(_ratio(paper_steps, paper.steps if paper else None)),
      _times(_ratio(plain_steps, steps)),
      paper.accuracy if paper else '–',
      _percent(group.median_best()),
      _percent(results.median(run.test_accuracy() for run in group.runs)),
      str(len(group.runs)),
      ', '.join(dict.fromkeys(_status(run) for run in group.runs)),
    ]
    rows.append(
      '<tr>' + ''.join(f'<td>{html.escape(c)}</td>' for c in cells) + '</tr>'
    )
  heads = (
    'variant',
    'rate, paper',
    'ours',
    'steps to 72.2 %, paper',
    f'to {_percent(target)} %, ours',
    'speed-up, paper',
    'ours',
    'best %, paper',
    'ours',
    'test %, ours',
    'runs',
    'status',
  )
  head = ''.join(f'<th>{html.escape(h)}</th>' for h in heads)
  return (
    f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
  )


@dataclasses.dataclass(frozen=True)
class Claim:
  """A claim of section 4.2.2, and how it is looked for in runs.

  Attributes:
    text: the claim, with the paper's figure.
    needs: the variants that must have been run.
    check: from the groups of those variants and the target, whether it holds
      and what was found.
  """

  text: str
  needs: tuple[str, ...]
  check: Callable[[Sequence[Group], float | None], tuple[bool, str]]


def _faster(factor: float) -> Callable[..., tuple[bool, str]]:
  def check(groups: Sequence[Group], target: float | None) -> tuple[bool, str]:
    plain, other = (group.median_steps_to(target) for group in groups)
    speed_up = _ratio(plain, other)
    found = f'{_number(other)} against {_number(plain)} steps'
    return speed_up is not None and speed_up > factor, found

  return check


def _ends_above(
  groups: Sequence[Group], target: float | None
) -> tuple[bool, str]:
  del target
  first, second = (group.median_best() or 0.0 for group in groups)
  return first > second, f'best {_percent(first)} against {_percent(second)} %'


def _at_chance(
  groups: Sequence[Group], target: float | None
) -> tuple[bool, str]:
  del target
  best = groups[0].median_best()
  statuses = ', '.join({_status(run) for run in groups[0].runs})
  first = groups[0].runs[0]
  chance = 1 / (1000 if first.data_name == 'imagenet2012' else 10)
  # Twice chance is still no learning.
  return (
    best is None or best < 2 * chance,
    f'best {_percent(best)} %, {statuses}',
  )


CLAIMS = (
  Claim(
    'BN-Baseline needs less than half of the steps of Inception.',
    ('inception', 'bn_baseline'),
    _faster(2),
  ),
  Claim(
    'BN-x5 needs fewer steps than BN-Baseline (paper: 2.1M against 13.3M).',
    ('bn_baseline', 'bn_x5'),
    _faster(1),
  ),
  Claim(
    'BN-x30 ends higher than BN-x5 (paper: 74.8 against 73.0 %).',
    ('bn_x30', 'bn_x5'),
    _ends_above,
  ),
  Claim(
    'BN-x5-Sigmoid ends below BN-x5 (paper: 69.8 against 73.0 %).',
    ('bn_x5', 'bn_x5_sigmoid'),
    _ends_above,
  ),
  Claim(
    'With the sigmoid and without BN the net stays at chance.',
    ('inception_sigmoid',),
    _at_chance,
  ),
  Claim(
    'At 5 times its rate the net without BN fails to train.',
    ('inception_x5',),
    _at_chance,
  ),
)


def claims(groups: Sequence[Group]) -> str:
  """A list of the claims, each held against the runs, as HTML."""
  target = target_accuracy(groups)
  items = []
  for claim in CLAIMS:
    found = [g for name in claim.needs if (g := _find(groups, name))]
    if len(found) < len(claim.needs):
      verdict, detail = 'not run', ''
    elif not all(group.ended for group in found):
      verdict, detail = 'not finished', ''
    else:
      holds, detail = claim.check(found, target)
      verdict = 'holds here' if holds else 'does not hold here'
    tail = f' ({html.escape(detail)})' if detail else ''
    items.append(f'<li>{html.escape(claim.text)} <b>{verdict}</b>{tail}</li>')
  return f'<ul>{"".join(items)}</ul>'


def draw(groups: Sequence[Group], out: Path, stem: str) -> None:
  """Draws accuracy and training loss over steps, as SVG and PNG."""
  import matplotlib as mpl

  mpl.use('Agg')
  from matplotlib import pyplot as plt

  for kind, title in (
    ('accuracy', 'Validation accuracy'),
    ('loss', 'Training loss'),
  ):
    figure, axes = plt.subplots(figsize=(9, 5.2), layout='constrained')
    for index, group in enumerate(groups):
      style = {
        'color': COLOURS[index % len(COLOURS)],
        'linestyle': STYLES[index % len(STYLES)],
      }
      name = label(group.variant)
      for run in group.runs:
        curve = (
          run.quoted_curve()
          if kind == 'accuracy'
          else run.curve('train', 'loss', None)
        )
        if curve:
          axes.plot(*zip(*curve, strict=True), label=name, lw=1.8, **style)
          name = '_another run of the same variant'
        moving = run.curve(run.config['eval_split'], 'accuracy', 'moving')
        if kind == 'accuracy' and moving:
          faint = {**style, 'linestyle': ':'}
          axes.plot(*zip(*moving, strict=True), lw=0.8, alpha=0.6, **faint)
    axes.set_xlabel('steps of 32 images')
    axes.set_title(title, loc='left')
    axes.grid(alpha=0.3)
    if kind == 'loss':
      axes.set_yscale('log')
    if axes.get_legend_handles_labels()[0]:
      figure.legend(loc='outside lower center', ncols=3, frameon=False)
    for suffix in ('svg', 'png'):
      figure.savefig(out / f'{stem}_{kind}.{suffix}', dpi=150)
    plt.close(figure)


def _section(data_name: str, runs: Sequence[Run], out: Path) -> str:
  groups = results.group_runs(runs, list(PAPER))
  draw(groups, out, data_name)
  first = runs[0]
  count = first.facts.get('num_examples', {}).get('train', 0)
  versions = ', '.join(
    f'{k} {v}' for k, v in first.facts.get('versions', {}).items()
  )
  facts = (
    f'{count:,} training images of {data_name}, '
    f'{max(run.step for run in runs):,} steps of '
    f'{first.config["batch_size"]}, network width '
    f'{first.config["model"]["width"]:g}; started '
    f'{first.facts.get("started", "?")}, revision '
    f'{first.facts.get("git_revision", "?")}; {versions}'
  )
  name = html.escape(data_name)
  return (
    f'<h2>{name}</h2>'
    f'<img src="{name}_accuracy.svg" alt="Validation accuracy over steps">'
    '<p>Thick: with population statistics (Algorithm 2). Dotted, thin: with '
    "moving averages. The paper's Fig. 2 in these data; compare shapes, not "
    'levels: the paper trains on ImageNet at full width.</p>'
    f"{table(groups)}<h3>The paper's claims</h3>{claims(groups)}"
    f'<img src="{name}_loss.svg" alt="Training loss over steps">'
    f'<p><small>{html.escape(facts)}</small></p>'
  )


def write_report(folders: Sequence[str], out: Path) -> list[str]:
  """Writes the page and its pictures; returns what could not be read.

  Raises:
    UserError: if there is no run, or `out` cannot be written.
  """
  runs, problems = results.read_runs(folders)
  by_data: dict[str, list[Run]] = {}
  for run in runs:
    by_data.setdefault(run.data_name, []).append(run)
  try:
    out.mkdir(parents=True, exist_ok=True)
    sections = [_section(name, group, out) for name, group in by_data.items()]
    complaints = ''.join(f'<p>{html.escape(p)}</p>' for p in problems)
    page = _PAGE.format(body=''.join(sections) + complaints)
    (out / 'index.html').write_text(page, encoding='utf-8')
  except OSError as error:
    raise UserError(f'--out={out}: {error.strerror}.') from error
  return problems


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = main_lib.Parser(
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
    return main_lib.report_errors(error.problems)
  for problem in problems:
    print(f'warning: {problem}', file=sys.stderr)
  print(f'wrote {Path(flags.out).resolve() / "index.html"}')
  return 0


if __name__ == '__main__':
  sys.exit(main())
