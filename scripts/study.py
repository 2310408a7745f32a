"""Trains all runs of `results/` at CPU scale, and writes a report.

  python scripts/study.py            all parts
  python scripts/study.py fig1       one part

Each part is a sweep in `configs/sweeps/`, which says what varies in it, and is
trained in the folder of its name in `--out`. The same command
resumes an interrupted study. `--publish` also copies the parts to `results/`,
without checkpoints, and writes `results/report` from all parts that are there.

`setting` is the search for the base rates and lengths that the other parts use.
It takes longer than all of them, and trains only if it is named.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping
import contextlib
import enum
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bn_repro import cli, files
from bn_repro.errors import UserError
from bn_repro.report import fig_4, page
from bn_repro.runtime import workdir
from bn_repro.sweep import __main__ as sweep_command
from bn_repro.sweep.sweep import RESULTS

_FIVE_SEEDS = '--sweep.seed=0,1,2,3,4'


class Kept(enum.Enum):
  """What is published of the runs of a part. `results/` has to stay small."""

  # All lines of metrics.
  CURVES = enum.auto()
  # No lines of training, and none with moving averages.
  EVALUATIONS = enum.auto()
  # The same, without percentiles.
  ACCURACIES = enum.auto()
  # Only `run.json`: the report does not read the runs.
  FACTS = enum.auto()


class Part(NamedTuple):
  """A part of the study.

  Attributes:
    kept: what is published of its runs.
    sweep: name of its sweep, if that is not the name of the part.
    arguments: further arguments of the sweep.
    xla_flags: flags of XLA for its runs.
    comparison: whether the table and figure of the sweep are published.
  """

  kept: Kept = Kept.EVALUATIONS
  sweep: str = ''
  arguments: tuple[str, ...] = ()
  xla_flags: str = ''
  comparison: bool = False


SEARCH = 'setting'
# In the order in which they run, which is that of the report.
PARTS = {
  'fashion_mnist': Part(Kept.CURVES),
  'mnist_5k': Part(Kept.CURVES),
  # Which verdicts depend on how a machine rounds? XLA sums in another order
  # for older CPUs.
  'mnist_5k_avx2': Part(sweep='mnist_5k', xla_flags='--xla_cpu_max_isa=AVX2'),
  'lr_multipliers': Part(arguments=(_FIVE_SEEDS,), comparison=True),
  'fig1': Part(),
  'fig1_settings': Part(Kept.ACCURACIES),
  'ensemble': Part(Kept.CURVES, comparison=True),
  'section_421': Part(Kept.FACTS, arguments=(_FIVE_SEEDS,), comparison=True),
  'init_scale': Part(Kept.FACTS, comparison=True),
  SEARCH: Part(),
}

# What the report says first if it has the search.
INTRODUCTION = (
  "All networks of section 4.2 are an eighth as wide as the paper's. The "
  'authors of this repository chose their lengths and decays, with the '
  'orderings of the search below in view; docs/evidence.md describes what '
  "else was tried. The learning rate is Inception's best on validation "
  'images of Fashion-MNIST in the search, whose seed no other run has; the '
  "others train at the paper's multiples of it, and the digits at the same "
  'rates. Inception trains twice as long as the others. The digits are '
  'cross-validated: seed K is tested on fold K. Training digits of two '
  'folds overlap by three quarters, so the five values are not independent.'
)

# Evaluations from one whose percentiles are published to the next.
_PERCENTILES_EVERY = 8

# Networks of `results/weights`.
WEIGHTS = ('inception', 'bn_baseline', 'bn_x5', 'bn_x30', 'bn_x5_sigmoid')


def train(part: str, folder: Path, jobs: int | None) -> int:
  """Trains the runs of a part that are not complete; returns the exit code."""
  kind = PARTS[part]
  arguments = [
    f'--sweep={kind.sweep or part}',
    f'--workdir={folder}',
    *kind.arguments,
  ]
  if jobs is not None:
    arguments.append(f'--jobs={jobs}')
  print(f'{part}:', flush=True)
  with _xla_flags(kind.xla_flags):
    # In this process, so that a signal lets the runs save.
    code = sweep_command.main(arguments)
  if code == 0 and part == 'ensemble':
    return _save_probabilities(folder)
  return code


@contextlib.contextmanager
def _xla_flags(flags: str) -> Iterator[None]:
  """Adds flags of XLA to those of the processes that start in this context."""
  before = os.environ.get('XLA_FLAGS', '')
  if flags:
    os.environ['XLA_FLAGS'] = f'{before} {flags}'.strip()
  try:
    yield
  finally:
    if flags:
      os.environ['XLA_FLAGS'] = before


def _save_probabilities(folder: Path) -> int:
  """Evaluates the networks of Fig. 4 on the test images, with one crop."""
  for run in sorted(path.parent for path in folder.glob('*/config.json')):
    path = run / fig_4.FOLDER / 'test-1.npz'
    if path.exists():
      continue
    path.parent.mkdir(exist_ok=True)
    code = _command(
      'evaluate',
      f'--workdir={run}',
      '--split=test',
      f'--save_probabilities={path}',
    )
    if code:
      return code
  return 0


def _command(name: str, *arguments: str) -> int:
  """Runs a command of the package in its own process."""
  command = [sys.executable, '-m', f'bn_repro.{name}', *arguments]
  return subprocess.run(command, check=False).returncode


def publish(part: str, folder: Path) -> None:
  """Copies a part to `results/`, without checkpoints.

  The runs and figures that `results/` has of this part are replaced.
  """
  kind = PARTS[part]
  copy = ROOT / 'results' / f'.{part}'
  shutil.rmtree(copy, ignore_errors=True)
  for config in sorted(folder.glob('*/config.json')):
    _publish_run(config.parent, copy / config.parent.name, kind.kept)
  for name in RESULTS if kind.comparison else ():
    shutil.copy(folder / name, copy)
  # A failure leaves the old or the new runs.
  published = ROOT / 'results' / part
  old = ROOT / 'results' / f'.{part}.old'
  shutil.rmtree(old, ignore_errors=True)
  if published.exists():
    published.rename(old)
  copy.rename(published)
  shutil.rmtree(old, ignore_errors=True)


def _publish_run(run: Path, copy: Path, kept: Kept) -> None:
  """Copies what is published of a run."""

  def publish_json(name: str, **changes: Any) -> None:
    content = {**(workdir.read_json(run / name) or {}), **changes}
    # Readers do not need the paths of the machine that trained the run.
    text = json.dumps(content).replace(f'{run.parent}/', '')
    workdir.write_json(copy / name, json.loads(text), indent=None)

  copy.mkdir(parents=True)
  publish_json('run.json')
  if kept == Kept.FACTS:
    return
  lines = _shortened(workdir.read_metrics(run / 'metrics.jsonl'), kept)
  content = [f'{json.dumps(line)}\n'.encode() for line in lines]
  workdir.replace_file(copy / 'metrics.jsonl', b''.join(content))
  publish_json('config.json')
  digest = workdir.MetricsDigest(content).to_json()
  publish_json('status.json', metrics=digest)
  if (run / fig_4.FOLDER).is_dir():
    shutil.copytree(run / fig_4.FOLDER, copy / fig_4.FOLDER)


def _shortened(
  lines: Iterable[Mapping[str, Any]], kept: Kept
) -> Iterator[Mapping[str, Any]]:
  """The lines of metrics that are published, without what nothing reads."""
  num_probed = 0
  for line in lines:
    is_moving = line.get('statistics') == 'moving'
    if kept != Kept.CURVES and (is_moving or line['split'] == 'train'):
      continue
    short = {key: x for key, x in line.items() if key != 'timing'}
    if line['split'] == 'train':
      timing = line.get('timing', {}).items()
      short['timing'] = {key: x for key, x in timing if key != 'shares'}
    if 'percentiles' in line:
      # They are most of what a network of Fig. 1 writes.
      is_left_out = is_moving or num_probed % _PERCENTILES_EVERY
      if is_left_out or kept == Kept.ACCURACIES:
        del short['percentiles']
      num_probed += not is_moving
    yield short


def _export_weights(folder: Path) -> int:
  """Writes the networks of the first fold to `results/weights`."""
  exported = folder / 'weights'
  # `export` replaces no file.
  shutil.rmtree(exported, ignore_errors=True)
  exported.mkdir()
  for variant in WEIGHTS:
    code = _command(
      'export',
      f'--model={folder / f"{variant}_seed0"}',
      '--format=safetensors',
      f'--out={exported / variant}.safetensors',
    )
    if code:
      return code
  shutil.copytree(exported, ROOT / 'results/weights', dirs_exist_ok=True)
  return 0


def report(folder: Path, out: Path) -> list[str]:
  """Writes the report of the parts in a folder.

  Args:
    folder: folder of the parts.
    out: folder to write into.

  Returns:
    A line for each run that it leaves out.
  """
  parts = [
    # Messages on the page name no folders of this machine.
    os.path.relpath(folder / part)
    for part, kind in PARTS.items()
    if kind.kept != Kept.FACTS and (folder / part).is_dir()
  ]
  if not parts:
    return []
  introduction = INTRODUCTION if (folder / SEARCH).is_dir() else ''
  return page.write_report(parts, out, introduction)


def main() -> int:
  """Runs the study; returns its exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    'parts',
    nargs='*',
    metavar='PART',
    help=f'{", ".join(PARTS)} (default: all but {SEARCH})',
  )
  parser.add_argument(
    '--out',
    default='runs/study',
    metavar='DIR',
    help='folder of the runs and the report (default: runs/study)',
  )
  parser.add_argument(
    '--jobs',
    type=cli.positive,
    metavar='N',
    help='runs at a time (default: one per GPU, one on a TPU, or one per core)',
  )
  parser.add_argument(
    '--publish',
    action='store_true',
    help='also copy each part to results/ when it is complete, and write the '
    'report of results/',
  )
  flags = parser.parse_args()
  unknown = set(flags.parts) - PARTS.keys()
  if unknown:
    parser.error(
      f'{", ".join(unknown)}: no such part. The parts are {", ".join(PARTS)}'
    )
  try:
    return _run(flags, files.expand('--out', flags.out))
  except UserError as error:
    return cli.report_user_error(error)


def _run(flags: argparse.Namespace, out: Path) -> int:
  """Trains, publishes and reports on the named parts; returns the exit code."""
  # Paths of configs in trials are relative to the repository.
  os.chdir(ROOT)
  for part in flags.parts or [part for part in PARTS if part != SEARCH]:
    code = train(part, out / part, flags.jobs)
    if code:
      return code
    if flags.publish:
      publish(part, out / part)
      if part == 'mnist_5k' and (code := _export_weights(out / part)):
        return code
  problems = report(out, out / 'report')
  if flags.publish:
    problems += report(ROOT / 'results', ROOT / 'results/report')
  return cli.report_errors(problems) if problems else 0


if __name__ == '__main__':
  sys.exit(cli.run(main))
