"""Runs an experiment on batch normalization, and compares it with the paper's.

Each experiment asks one question of the literature. Its module in bn_repro/lab/
defines what is measured; docs/lab.md explains it.
"""

import argparse
from collections.abc import Sequence
import importlib
import json
import math
from pathlib import Path
import sys
import time
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from bn_repro import cli, config_fields, files, numerics
from bn_repro import config as config_lib
from bn_repro.errors import UserError
from bn_repro.lab import findings
from bn_repro.runtime import streams, workdir
from bn_repro.runtime.progress import duration

FOLDER = config_lib.CONFIGS / 'lab'

_EPILOG = """\
examples:
  python -m bn_repro.lab gradients --workdir=runs/lab
  python -m bn_repro.lab gradients --workdir=runs/quick --quick
  python -m bn_repro.lab gradients --workdir=runs/deep --config.model.depth=60

writes into the workdir:
  NAME.json  what was measured, for each seed
  NAME.png   the figure
  NAME.md    the table, and each published finding with ours beside it
  index.md   the findings of all experiments in the workdir

The same command resumes after the last seed that is complete. A verdict takes
five seeds.
"""


def names() -> list[str]:
  """The experiments, which are the configs in `configs/lab`."""
  return sorted(p.stem for p in FOLDER.glob('*.py') if p.stem != '__init__')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = cli.Parser(
    prog='python -m bn_repro.lab',
    description=__doc__,
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    'name', metavar='NAME', help=f'the experiment: {", ".join(names())}'
  )
  files.add_path_argument(
    parser, '--workdir', required=True, help='folder for the results'
  )
  parser.add_argument(
    '--quick',
    action='store_true',
    help='a small version with one seed, in less than a minute',
  )
  cli.add_override_argument(parser)
  try:
    flags, overrides = cli.parse_arguments(
      sys.argv[1:] if argv is None else argv, parser
    )
    config = load(flags.name, overrides, quick=flags.quick)
    streams.make_output_optional()
    run(flags.name, config, flags.workdir)
  except UserError as error:
    return cli.report_user_error(error)
  except OSError as error:
    return cli.report_errors([str(error)])
  return 0


def load(name: str, overrides: Sequence[str], *, quick: bool) -> ConfigDict:
  """Returns the config of an experiment.

  Args:
    name: name of the experiment.
    overrides: assignments such as 'model.depth=60'.
    quick: whether to use the mode 'mini' instead of 'full'.

  Raises:
    UserError: if there is no such experiment or field, or a value has the wrong
      type.
  """
  if name not in names():
    raise UserError(
      f"'{name}': no such experiment. There are {', '.join(names())}."
    )
  mode = 'mini' if quick else 'full'
  config = config_lib.read_file(
    'NAME', f'{name}:{mode}', default_mode=mode, folder=FOLDER
  ).lock()
  errors = config_lib.apply_overrides(config, overrides)
  values = config_fields.flatten(config)
  errors = errors or [
    f'config.{key}={value}: {problem}.'
    for key, value in values.items()
    if (problem := _problem(key, value))
  ]
  if errors:
    raise UserError(*errors)
  return config


def _problem(key: str, value: Any) -> str | None:
  """What is wrong with a value whatever the experiment; None if nothing."""
  if key == 'model.dtype' or key.startswith('data.'):
    return config_fields.FIELDS[key].rule(value)
  if isinstance(value, str):
    return None
  if key.endswith('momentum'):
    return config_fields.FIELDS['optim.momentum'].rule(value)
  return None if 0 < value < math.inf else 'must be positive and finite'


def run(name: str, config: ConfigDict, folder: Path) -> None:
  """Runs the seeds of an experiment that are missing, and writes its files.

  Raises:
    UserError: if the config is one for which the experiment is undefined, or
      the folder has results of another config or another code.
  """
  cli.set_up_jax(config)
  from bn_repro.report import drawing

  experiment = importlib.import_module(f'bn_repro.lab.{name}')
  experiment.check(config)
  path = folder / f'{name}.json'
  facts = {'config': config.to_dict(), 'numerics': numerics.digest()}
  facts = json.loads(json.dumps(facts))  # JSON has no tuples.
  found = workdir.read_json(path) or {**facts, 'results': []}
  if facts != {key: found[key] for key in facts}:
    raise UserError(
      f'{path}: has results of another config, or of code that computes other '
      'results. Delete it, or use another workdir.'
    )
  results = found['results']
  start, first = time.monotonic(), len(results)
  for seed in range(first, config.num_seeds):
    results.append(experiment.run(config, seed))
    folder.mkdir(parents=True, exist_ok=True)
    # In one line: results are long lists, and are published.
    workdir.write_json(path, {**facts, 'results': results}, indent=None)
    taken = (time.monotonic() - start) / (len(results) - first)
    left = duration(taken * (config.num_seeds - len(results)))
    seeds = f'{len(results)} of {config.num_seeds} seeds'
    print(f'{name}: {seeds}, ETA {left}', flush=True)
  line, table = findings.markdown(
    (finding, results) for finding in experiment.FINDINGS
  )
  drawing.save(experiment.draw(results), folder, name)
  workdir.replace_file(
    folder / f'{name}.md',
    f'# {_title(experiment)}\n\n![{name}]({name}.png)\n\n'
    f'{experiment.table(results)}\n{table}',
  )
  write_index(folder)
  print(f'{table}\n{line}\nwrote {folder / name}.md and {folder}/index.md')


def _title(experiment: ModuleType) -> str:
  return (experiment.__doc__ or '').splitlines()[0]


def write_index(folder: Path) -> None:
  """Writes the page of all experiments in a folder.

  Raises:
    UserError: if the results of one are damaged.
  """
  found = []
  for name in names():
    results = workdir.read_json(folder / f'{name}.json')
    if results is not None:
      experiment = importlib.import_module(f'bn_repro.lab.{name}')
      found.append((name, experiment, results['results']))
  line, table = findings.markdown(
    (finding, results)
    for _, experiment, results in found
    for finding in experiment.FINDINGS
  )
  figures = ''.join(
    f'\n[{_title(experiment)}]({name}.md)\n\n![{name}]({name}.png)\n'
    for name, experiment, _ in found
  )
  workdir.replace_file(
    folder / 'index.md', f'# Experiments\n\n{line}\n\n{table}{figures}'
  )


if __name__ == '__main__':
  sys.exit(cli.run(main))
