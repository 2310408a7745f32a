"""Trains every combination of what a sweep varies, and compares.

Each trial is the ordinary command of `bn_repro.main` in a process and a
directory of its own. Running the same command again goes on: what is done is
left alone, what was stopped is resumed, what failed is tried again.
"""

import argparse
from collections.abc import Sequence
import json
import os
from pathlib import Path
import signal
import sys
from typing import TYPE_CHECKING, Any

from bn_repro import cli
from bn_repro import config as config_lib
from bn_repro.errors import UserError
from bn_repro.runtime import workdir as workdir_lib
from bn_repro.runtime.preemption import Preemption
from bn_repro.runtime.progress import duration
from bn_repro.sweep import grid
from bn_repro.sweep import runner as runner_lib
from bn_repro.sweep.grid import Sweep

if TYPE_CHECKING:
  from bn_repro.sweep.comparison import Comparison

_DESCRIPTION = """\
Train every combination of what a sweep varies, and compare. The same command
goes on after an preemption: done trials are left alone, stopped ones resume,
failed ones are tried again; one that diverged is a result.
"""

_EPILOG = """\
sweeps (mini, the default, is CPU scale; :full after the file is the paper's):
  lr_multipliers  rates of x1 to x60, with BN and without
  batch_size      batches of 32 to 512, the rate scaled with them
  section_421     each item of section 4.2.1 by itself
  init_scale      a twentieth to twenty times of the initial weights

examples:
  python -m bn_repro.sweep --sweep=configs/sweeps/lr_multipliers.py \\
    --workdir=runs/lr --dry_run
  python -m bn_repro.sweep --sweep=configs/sweeps/lr_multipliers.py \\
    --workdir=runs/lr
  python -m bn_repro.sweep --sweep=configs/sweeps/lr_multipliers.py \\
    --workdir=runs/short --sweep.variant=bn_x5 --sweep.multiplier=0.5,1,2 \\
    --sweep.seed=0,1,2 --config.total_steps=200

writes into the workdir:
  a directory a trial, named by what varies, and what it said in a .log;
  trials.csv, summary.md, sweep.png and .svg; sweep.json

exit code:
  0 all trials are done or diverged; 75 stopped by SIGTERM or Ctrl-C and saved,
  run it again; 1 a trial failed, or nothing was started.

On a cluster or a cloud: python scripts/launch.py --help. Every field of a sweep
stands, explained, in configs/sweeps/lr_multipliers.py.
"""


def _create_parser() -> cli.Parser:
  parser = cli.Parser(
    prog='python -m bn_repro.sweep',
    description=_DESCRIPTION,
    epilog=_EPILOG,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  cli.add_sweep_arguments(parser, required=True)
  add('--workdir', required=True, metavar='DIR', help='of all its trials')
  cli.add_config_arguments(parser, required=False)
  add(
    '--jobs',
    type=cli.positive,
    metavar='N',
    help='trials at a time: by default one a GPU, one on a TPU, or one a core',
  )
  add('--dry_run', action='store_true', help='list the trials and their cost')
  add(
    '--trial',
    metavar='NAME',
    help='be this trial alone, by name or number from 0: for clusters',
  )
  add(
    '--compare',
    action='store_true',
    help='compare what there is, and train nothing: for clusters',
  )
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  try:
    flags, axes, overrides = cli.parse_sweep_arguments(
      sys.argv[1:] if argv is None else argv, _create_parser()
    )
    sweep = grid.load(flags.sweep, axes, flags.config or '', overrides)
    folder = workdir_lib.Workdir(flags.workdir)
    _check(folder.path, sweep)
    if flags.dry_run:
      _list(folder.path, sweep, len(runner_lib.slots(flags.jobs)))
      return 0
    if flags.trial is not None:
      _become(folder.path, sweep, flags.trial)
    if flags.compare:
      return _conclude(sweep, folder.path, (), finished=True)
    # From here on a signal lets trials save.
    preemption = Preemption()
    preemption.listen()
    slots = runner_lib.slots(flags.jobs and min(flags.jobs, len(sweep.trials)))
    folder.claim()
    _freeze(folder.path, sweep)
    return _run(folder.path, sweep, slots, preemption)
  except UserError as error:
    return cli.report_errors(error.problems)
  except OSError as error:
    return cli.report_errors([str(error)])
  except KeyboardInterrupt:
    return 128 + signal.SIGINT


def _check(folder: Path, sweep: Sweep) -> None:
  """Finds out, without writing, whether a sweep can live in a directory.

  It may add trials to those that are there.

  Raises:
    UserError: if it holds something else.
  """
  if (folder / 'config.json').exists():
    raise UserError(
      f'--workdir={folder}: holds a run, not a sweep. Name another directory.'
    )
  saved = workdir_lib.read_json(folder / 'sweep.json')
  if saved is None:
    saved = {'trials': {}}
  # An earlier version could search with Optuna, and says so in `search`.
  if (
    not isinstance(saved, dict) or 'trials' not in saved or saved.get('search')
  ):
    raise UserError(f'{folder / "sweep.json"}: is not of this version.')
  names = {trial.name for trial in sweep.trials}
  missing = [name for name in saved['trials'] if name not in names]
  if missing:
    raise UserError(
      f'--workdir={folder}: holds another sweep: {len(missing)} of its trials '
      f'are not in this one, such as {missing[0]}. Name another directory.'
    )
  problems: list[str] = []
  for trial in sweep.trials:
    workdir = folder / trial.name
    if not workdir.exists() or _is_of(workdir, trial):
      continue
    config = trial.config()
    try:
      workdir_lib.Workdir(str(workdir)).check(config)
    except UserError as error:
      problems += error.problems
      continue
    saved_config = workdir_lib.read_json(workdir / 'config.json') or config
    # A run may go on longer; the trials of a sweep have to stay comparable.
    problems += [
      f'--workdir={workdir}: {name} is {saved_config[name]} there, and '
      f'{config[name]} here. Name another directory.'
      for name in ('total_steps', 'total_epochs', 'eval_every')
      if saved_config[name] != config[name]
    ]
  if problems:
    more = f' So are {len(problems) - 1} more.' if problems[1:] else ''
    raise UserError(problems[0] + more)


def _is_of(workdir: Path, trial: grid.Trial) -> bool:
  """Whether a directory holds a run of exactly this config."""
  try:
    saved = (workdir / 'config.json').read_text()
  except OSError:
    return False
  return grid.fingerprint(saved) == trial.fingerprint


def _freeze(folder: Path, sweep: Sweep) -> None:
  """Writes down what each trial is; its run sees to it that it stays so."""
  for trial in sweep.trials:
    path = folder / trial.name / 'config.json'
    if not path.exists():
      path.parent.mkdir(exist_ok=True)
      workdir_lib.replace_file(path, config_lib.to_json(trial.config()))
  content = {
    'x': sweep.x,
    'repeat': sweep.repeat,
    'trials': _written(sweep),
  }
  workdir_lib.replace_file(
    folder / 'sweep.json', json.dumps(content, indent=2) + '\n'
  )


def _written(sweep: Sweep) -> dict[str, Any]:
  """The trials of a grid, as `sweep.json` has them."""
  return {
    trial.name: {
      'values': dict(trial.values),
      'config_digest': trial.fingerprint,
    }
    for trial in sweep.trials
  }


def _become(folder: Path, sweep: Sweep, name: str) -> None:
  """Becomes the process that trains a trial.

  Raises:
    UserError: if there is none of that name or number.
  """
  by_name = {trial.name: trial for trial in sweep.trials}
  by_number = dict(enumerate(sweep.trials))
  trial = by_name.get(name) or by_number.get(
    int(name) if name.isdecimal() else -1
  )
  if trial is None:
    raise UserError(
      f'--trial={name}: no such trial. See --dry_run for their names; their '
      f'numbers are 0 to {len(by_number) - 1}.'
    )
  os.execv(sys.executable, list(trial.in_folder(folder).command))


def _list(folder: Path, sweep: Sweep, jobs: int) -> None:
  """Prints the trials, a line each, with what they cost and how they stand."""
  seconds = _seconds_an_image(folder, sweep)
  width = max(len(trial.name) for trial in sweep.trials)
  print(
    f'{"trial":<{width}}  {"steps":>10}  {"images":>14}  {"time":>9}  state'
  )
  remaining = 0.0
  unknown = False
  for trial in sweep.trials:
    path = folder / trial.name
    state = runner_lib.has_ended(path, trial.total_steps)
    rate = seconds.get(trial.config_spec)
    time_text = '?' if rate is None else duration(rate * trial.images)
    if state is None:
      left = 1 - runner_lib.last_step(path) / trial.total_steps
      unknown = unknown or rate is None
      remaining += (rate or 0.0) * trial.images * left
      state = (workdir_lib.read_json(path / 'status.json') or {}).get(
        'status', runner_lib.WAITING
      )
    print(
      f'{trial.name:<{width}}  {trial.total_steps:>10,}  {trial.images:>14,}  '
      f'{time_text:>9}  {state}'
    )
  images = sum(trial.images for trial in sweep.trials)
  cost = (
    'for times see it again when a trial of each config has ended'
    if unknown
    else f'about {duration(remaining / jobs)} to go with {jobs} at a time'
  )
  print(f'{len(sweep.trials)} trials, {images:,} images; {cost}')


def _seconds_an_image(folder: Path, sweep: Sweep) -> dict[str, float]:
  """By config file, from trials that have trained here in one go."""
  found: dict[str, float] = {}
  for trial in sweep.trials:
    if trial.config_spec in found:
      continue
    seconds = runner_lib.seconds_taken(folder / trial.name)
    if seconds is not None:
      found[trial.config_spec] = seconds / trial.images
  return found


def _run(
  folder: Path,
  sweep: Sweep,
  slots: Sequence[dict[str, str]],
  preemption: Preemption,
) -> int:
  """Runs what is left of a sweep, compares, and returns the exit code."""
  from bn_repro.sweep.progress import SweepProgress

  left = [
    trial.in_folder(folder)
    for trial in sweep.trials
    if not runner_lib.has_ended(folder / trial.name, trial.total_steps)
  ]
  print(
    f'{folder}: {len(sweep.trials)} trials, {len(left)} of them left, '
    f'{len(slots)} at a time',
    flush=True,
  )
  finished = True
  if left:
    progress = SweepProgress(left, len(slots))
    runner = runner_lib.Runner(left, slots, sweep.retries, progress)
    finished = runner.run(preemption)
  return _conclude(sweep, folder, left, finished=finished)


def _conclude(
  sweep: Sweep,
  folder: Path,
  run: Sequence[runner_lib.Trial],
  *,
  finished: bool,
) -> int:
  """Compares, says what has failed, and returns the exit code."""
  from bn_repro.sweep import comparison

  failed = [trial for trial in run if trial.state == workdir_lib.Status.FAILED]
  problems = [f'{t.name}: failed, {runner_lib.last_words(t)}' for t in failed]
  endings = {trial.name: trial.state for trial in failed}
  try:
    found = comparison.read(sweep, folder, endings)
    for line in comparison.conclusions(found):
      print(line)
    write(found)
    print(f'wrote {folder / "trials.csv"}, summary.md and sweep.png beside it')
  except UserError as error:
    problems += error.problems
  except OSError as error:
    problems.append(str(error))
  if not finished:
    print('stopped; the same command goes on')
    return workdir_lib.EXIT_CODES[workdir_lib.Status.PREEMPTED]
  return cli.report_errors(problems) if problems else 0


def write(found: 'Comparison') -> None:
  """Writes `trials.csv`, `summary.md` and the picture beside the trials."""
  from bn_repro.report import figures
  from bn_repro.sweep import comparison  # Matplotlib takes a second.

  tables = {
    'trials.csv': comparison.table(found),
    'summary.md': comparison.summary(found),
  }
  for name, text in tables.items():
    workdir_lib.replace_file(found.folder / name, text)
  figures.sweep(found, found.folder, 'sweep')


if __name__ == '__main__':
  sys.exit(main())
