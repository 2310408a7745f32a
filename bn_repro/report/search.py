"""The orderings of Fig. 2 and 3 by learning rate and length.

A search for a setting trains all networks of section 4.2 at several rates and
lengths. Its table shows which claims hold where, and so which exclude another.
"""

from collections.abc import Mapping
import dataclasses
from typing import NamedTuple

from bn_repro import paper
from bn_repro.report.claims import CLAIMS, percent
from bn_repro.report.runs import Group, Run, Section


class Setting(NamedTuple):
  """A setting, by what Inception has in it.

  Attributes:
    steps: total steps.
    rate: initial learning rate.
  """

  steps: int
  rate: float


def is_search(section: Section) -> bool:
  """Whether a section has several settings of all networks."""
  return section.is_sweep and set(paper.FIG_3) <= set(section.variants)


def settings(section: Section) -> Mapping[Setting, Section]:
  """The runs of each setting as a section of their own.

  A network belongs to a rate of Inception by the paper's multiple of it, and to
  a length by its rank: the shortest runs of each network belong together.
  """
  steps = {
    variant: sorted({_steps(g) for g in section.settings_of(variant)})
    for variant in section.variants
  }
  found: dict[Setting, list[Group]] = {}
  for group in section.groups:
    rank = steps[group.variant].index(_steps(group))
    rate = group.runs[0].learning_rate / paper.rate_multiple(group.variant)
    setting = Setting(steps['inception'][rank], float(f'{rate:.4g}'))
    found.setdefault(setting, []).append(group)
  return {
    setting: dataclasses.replace(section, groups=found[setting])
    for setting in sorted(found)
  }


def _steps(group: Group) -> int:
  return group.runs[0].config['total_steps']


def table(section: Section) -> list[dict[str, str]]:
  """A row for each claim on single settings, and a column for each setting."""
  columns = settings(section)
  best = {
    setting: part.settings_of('inception')[0].spread(Run.best).show(percent)
    for setting, part in columns.items()
    if part.settings_of('inception')
  }
  rows = [{'claim': "Inception's best accuracy"} | _row(columns, best)]
  held = dict.fromkeys(columns, 0)
  for claim in CLAIMS:
    if claim.min_settings > 1 or not set(claim.variants) <= set(paper.FIG_3):
      continue
    cells = {}
    for setting, part in columns.items():
      value = claim.median(part)
      if value is not None:
        holds = value > claim.threshold
        held[setting] += holds
        cells[setting] = f'{"✓" if holds else "✗"} {claim.scale.phrase(value)}'
    rows.append({'claim': claim.text} | _row(columns, cells))
  totals = {setting: str(count) for setting, count in held.items()}
  return [*rows, {'claim': 'claims with ✓'} | _row(columns, totals)]


def _row(
  columns: Mapping[Setting, Section], cells: Mapping[Setting, str]
) -> dict[str, str]:
  """Cells by heading; a dash where there is none."""
  return {
    f'{setting.steps:,} steps, rate {setting.rate:g}': cells.get(setting, '–')
    for setting in columns
  }
