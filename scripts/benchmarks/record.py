"""Files of figures that were measured on one machine, and their tables."""

from collections.abc import Sequence
import dataclasses
import json
from pathlib import Path
import platform
from typing import Any

from benchmarks import measure
from bn_repro import host
from bn_repro.errors import UserError
from bn_repro.runtime import workdir


def _processor() -> str:
  """Returns the name of the processor, as Linux gives it."""
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
  except OSError:
    lines = []
  names = [line.partition(':')[2] for line in lines if 'model name' in line]
  return names[0].strip() if names else platform.processor()


def machine() -> dict[str, Any]:
  """Returns what all figures of a file share. Imports JAX."""
  from bn_repro.training import run_info

  return {
    'processor': _processor(),
    'cores': host.num_cores(),
    'system': platform.system(),
    'versions': run_info.versions(),
  }


def read(path: Path) -> dict[str, Any]:
  """Returns the contents of a file, without benchmarks if it does not exist.

  Args:
    path: value of --json.

  Raises:
    UserError: if the file is not one of this module, or if its figures were
      measured on another machine or with other versions.
  """
  empty = {'machine': machine(), 'benchmarks': {}}
  if not path.exists():
    return empty
  try:
    contents = json.loads(path.read_text())
    measured_on = contents['machine']
    contents['benchmarks'].keys()
  except (ValueError, LookupError, TypeError, AttributeError) as error:
    raise UserError(f'--json={path}: not a file of benchmarks') from error
  if measured_on != empty['machine']:
    raise UserError(
      f'--json={path}: measured on another machine or with other versions; '
      'name a new file'
    )
  return contents


def add(
  path: Path,
  name: str,
  figures: Sequence[measure.Figure],
  rounds: int,
  busy: float,
) -> None:
  """Adds the figures of a benchmark to a file, or replaces them.

  Args:
    path: value of --json.
    name: the benchmark.
    figures: what it measured.
    rounds: value of --rounds.
    busy: share of the CPUs that was in use before the start.
  """
  from bn_repro.training import run_info

  contents = read(path)
  contents['benchmarks'][name] = {
    'revision': run_info.git_revision(lambda _: None),
    'rounds': rounds,
    'busy': round(busy, 3),
    'figures': [dataclasses.asdict(figure) for figure in figures],
  }
  workdir.replace_file(path, json.dumps(contents, indent=1) + '\n')


def table(contents: dict[str, Any], names: Sequence[str]) -> str:
  """Returns the figures of some benchmarks as a table in Markdown.

  Args:
    contents: what `read` returns.
    names: the benchmarks, in order; those without figures have no line.
  """
  lines = [
    '| benchmark | figure | median | range of the rounds | in use before |',
    '|---|---|---|---|---|',
  ]
  for name in names:
    entry = contents['benchmarks'].get(name)
    for stored in entry['figures'] if entry else ():
      figure = measure.Figure(**stored)
      digits = ',.0f' if figure.value >= 1000 else '.3g'
      value = f'{figure.value:{digits}} {figure.unit}'.strip()
      spread = (
        ''
        if figure.low is None
        else f'{figure.low:{digits}} to {figure.high:{digits}}'
      )
      if figure.doubt:
        value += ' (unreliable)'
      cells = (name, figure.name, value, spread, f'{entry["busy"]:.0%}')
      lines.append(f'| {" | ".join(cells)} |')
  return '\n'.join(lines)


def matrix(contents: dict[str, Any], name: str) -> str:
  """Returns the figures `ROW: COLUMN` of a benchmark as a table in Markdown."""
  rows: dict[str, dict[str, str]] = {}
  for stored in contents['benchmarks'][name]['figures']:
    figure = measure.Figure(**stored)
    row, column = figure.name.split(': ')
    text = f'{figure.value:.3f}' if figure.unit else f'{figure.value:.0f}'
    heading = f'{column}, {figure.unit}' if figure.unit else column
    rows.setdefault(row, {})[heading] = text
  columns = next(iter(rows.values())).keys()
  lines = [
    '| | ' + ' | '.join(columns) + ' |',
    '|---' * (len(columns) + 1) + '|',
  ]
  lines += [f'| {row} | {" | ".join(c.values())} |' for row, c in rows.items()]
  return '\n'.join(lines)
