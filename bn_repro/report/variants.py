"""Whether runs differ from each other as the configs of their variants do.

Runs are named after their config file, and any field of it can be overridden.
What is overridden in all variants alike is the setting of an experiment. What
is overridden in one variant only makes it another network than the paper's.
"""

from collections.abc import Iterable, Mapping
import functools
import math
from typing import Any

from bn_repro import config as config_lib
from bn_repro import config_fields, paper
from bn_repro.report.runs import Run
from bn_repro.report.sections import Section, may_differ, show_value

# Fields that an experiment scales by one factor in all variants.
_SCALED = ('total_steps', 'optim.learning_rate', 'optim.decay_epochs')
# Relative difference up to which factors are equal: lengths are whole steps,
# and rates are rounded. Our choice.
_TOLERANCE = 0.01


@functools.cache
def _shipped(variant: str, mode: str) -> Mapping[str, Any]:
  """Fields of a shipped config by dotted name."""
  return config_fields.flatten(config_lib.read(f'{variant}:{mode}'))


def _shipped_pair(
  run: Run, base: str
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
  """The shipped configs of a run and of another variant, in the run's mode."""
  is_mini = run.facts.get('config_file', '').endswith(':mini')
  mode = 'mini' if is_mini else 'full'
  return _shipped(run.variant, mode), _shipped(base, mode)


def relative_length(run: Run) -> float:
  """Length of a variant of section 4.2 in multiples of Inception's, by config.

  Args:
    run: a run of the variant, which may have another length.
  """
  ours, theirs = _shipped_pair(run, 'inception')
  return ours['total_steps'] / theirs['total_steps']


def are_close(first: float, second: float) -> bool:
  """Whether two lengths or rates are equal but for rounding."""
  return math.isclose(first, second, rel_tol=_TOLERANCE)


def changed(sections: Iterable[Section]) -> list[str]:
  """A message for each variant of section 4.2 that is not that of its config.

  Its runs are compared with those of the first variant of their section, which
  is Inception where there is one. They have to differ in the same fields as the
  shipped configs: to the same values, or by the same factor for the length, the
  learning rate and its decay. Other differences are `Section.mismatches`.
  Sections in which a variant has several settings are left out.
  """
  messages = []
  for section in sections:
    runs = [g.runs[0] for g in section.groups if g.variant in paper.FIG_3]
    if section.is_sweep:
      continue
    for run in runs[1:]:
      differences = _differences(run, runs[0])
      if differences:
        messages.append(
          f'{section.name}: {paper.label(run.variant)} does not differ from '
          f'{paper.label(runs[0].variant)} as configs/{run.variant}.py does: '
          f'{"; ".join(differences)}.'
        )
  return messages


def _differences(run: Run, base: Run) -> list[str]:
  """Fields whose values in two runs are not related as in their configs."""
  shipped, shipped_base = _shipped_pair(run, base.variant)
  setting, base_setting = run.setting(), base.setting()
  found = []
  for name in filter(may_differ, setting):
    pair: tuple[Any, Any] = setting[name], base_setting.get(name)
    expected: tuple[Any, Any] = shipped.get(name), shipped_base.get(name)
    if name in _SCALED:
      expected = pair[1] * expected[0] / expected[1], pair[1]
      is_expected = are_close(pair[0], expected[0])
    else:
      if expected[0] == expected[1]:
        expected = pair[1], pair[1]
      is_expected = pair == expected
    if not is_expected:
      shown = (
        ' beside '.join(map(show_value, two)) for two in (pair, expected)
      )
      found.append(f'{name} {", not ".join(shown)}')
  return found
