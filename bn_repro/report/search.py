"""The orderings of Fig. 2 and 3 by learning rate and length.

A search for a setting trains all networks of section 4.2 at several rates and
lengths. Its table shows which claims hold where, and so which exclude another.
"""

from collections.abc import Mapping
import dataclasses
from typing import NamedTuple

from bn_repro import paper
from bn_repro.report import variants
from bn_repro.report.claims import CLAIMS, percent
from bn_repro.report.ledger import AMBIGUOUS
from bn_repro.report.runs import Run
from bn_repro.report.sections import Group, Section


class Setting(NamedTuple):
  """A setting, by what Inception has in it.

  Attributes:
    steps: total steps.
    rate: initial learning rate.
  """

  steps: int
  rate: float


def is_search(section: Section) -> bool:
  """Whether a section has several settings of all networks of section 4.2."""
  return section.is_sweep_of(paper.FIG_3)


def settings(section: Section) -> Mapping[Setting, Section]:
  """The runs of each setting of Inception as a section of their own.

  A network belongs to a setting whose learning rate it has times the paper's
  multiple, and whose length times that of the shipped configs. Those that
  belong to none are `unmatched`.
  """
  found: dict[Setting, list[Group]] = {}
  for group in section.settings_of('inception'):
    found.setdefault(_setting(group), [])
  for group in section.groups:
    if group.variant in paper.FIG_3:
      mine = _setting(group)
      for setting, groups in found.items():
        if all(map(variants.are_close, mine, setting)):
          groups.append(group)
  return {
    setting: dataclasses.replace(section, groups=found[setting])
    for setting in sorted(found)
  }


def _setting(group: Group) -> Setting:
  """The setting that a network of section 4.2 belongs to."""
  run = group.runs[0]
  return Setting(
    round(run.config['total_steps'] / variants.relative_length(run)),
    run.learning_rate / paper.rate_multiple(group.variant),
  )


def unmatched(section: Section) -> list[str]:
  """A message for each group that the `table` leaves out."""
  matched = [
    group for part in settings(section).values() for group in part.groups
  ]
  return [
    f'{section.name}: {section.label(group)} is left out of the search, which '
    'has the networks of section 4.2 at the settings of Inception.'
    for group in section.groups
    if group not in matched
  ]


def table(section: Section) -> list[dict[str, str]]:
  """A row for each claim on single settings, and a column for each setting."""
  columns = settings(section)
  best = {}
  for setting, part in columns.items():
    plain, *others = part.settings_of('inception')
    best[setting] = (
      AMBIGUOUS if others else plain.spread(Run.best).show(percent)
    )
  rows = [{'claim': "Inception's best accuracy"} | _row(columns, best)]
  held = dict.fromkeys(columns, 0)
  for claim in CLAIMS:
    if claim.min_settings > 1 or not set(claim.variants) <= set(paper.FIG_3):
      continue
    cells = {}
    for setting, part in columns.items():
      value = claim.median(part)
      if claim.is_ambiguous(part):
        cells[setting] = AMBIGUOUS
      elif value is not None:
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
