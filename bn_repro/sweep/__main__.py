"""Trains all trials of a sweep, and compares the results.

Each trial is the ordinary command of `bn_repro.main`, in its own process and
directory. The same command resumes an interrupted sweep.
"""

import argparse
from collections.abc import Mapping, Sequence
import contextlib
import json
import math
import os
from pathlib import Path
import signal
import statistics
import sys

from bn_repro import cli, files
from bn_repro.errors import UserError
from bn_repro.report import runs as runs_lib
from bn_repro.runtime import mirror, streams
from bn_repro.runtime import workdir as workdir_lib
from bn_repro.runtime.preemption import Preemption
from bn_repro.runtime.progress import duration
from bn_repro.sweep import grid
from bn_repro.sweep import runner as runner_lib
from bn_repro.sweep import sweep as sweep_lib
from bn_repro.sweep.sweep import Sweep, TrialStatus

_DESCRIPTION = """\
Train all trials of a sweep, one for each combination of values, and compare the
results. The same command resumes an interrupted sweep: it leaves completed
trials alone, resumes stopped ones and retries failed ones. A trial that
diverged is complete.
"""

_EPILOG = """\
sweeps (mini, the default, is CPU scale; :full after the file is the paper's):
  lr_multipliers  learning rates of x1 to x60, with BN and without
  batch_size      batches of 32 to 512, the rate scaled with them
  section_421     each item of section 4.2.1 by itself
  init_scale      a twentieth to twenty times the initial weights
  ensemble        BN-x30 and the six members of the ensemble
  quickstart      the MNIST networks and those of section 4.2, once
and the parts of the study, scripts/study.py:
  fashion_mnist, mnist_5k  the networks of section 4.2, with five seeds
  fig1, fig1_settings      the MNIST networks; their rates and initial weights
  setting                  the search for the base rate and the length

examples:
  python -m bn_repro.sweep --sweep=configs/sweeps/lr_multipliers.py \\
    --workdir=runs/lr --dry_run
  python -m bn_repro.sweep --sweep=configs/sweeps/lr_multipliers.py \\
    --workdir=runs/lr
  python -m bn_repro.sweep --sweep=configs/sweeps/lr_multipliers.py \\
    --workdir=runs/short --sweep.variant=bn_x5 --sweep.multiplier=0.5,1,2 \\
    --sweep.seed=0,1,2 --config.total_steps=200

writes into the workdir:
  one directory per trial, named by its values, and its output in a .log file;
  trials.csv, summary.md, sweep.png; sweep.json

exit code:
  0 all trials are done or diverged; 75 stopped by SIGTERM, Ctrl-C or a closed
  terminal and saved, run it again; 1 a trial failed, or nothing was started.

In the file of a sweep, base() returns the config of --config, and base(NAME)
the config NAME in the same folder.

For clusters and clouds, see python scripts/launch.py --help. To write a sweep,
see configs/sweeps/lr_multipliers.py, which explains all parts of one.
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
  files.add_path_argument(
    parser,
    '--workdir',
    required=True,
    in_bucket=True,
    help='directory of the sweep, or gs://BUCKET/NAME',
  )
  cli.add_config_arguments(parser, required=False)
  add(
    '--jobs',
    type=cli.positive,
    metavar='N',
    help='trials at once; default: one per GPU, one on a TPU, or one per core',
  )
  add(
    '--retries',
    type=int,
    default=1,
    metavar='N',
    help='times to restart a trial that fails without progress; default: 1',
  )
  add('--dry_run', action='store_true', help='list the trials and their cost')
  add(
    '--trial',
    metavar='NAME',
    help='train only this trial, by name or number from 0, in this process',
  )
  add(
    '--compare',
    action='store_true',
    help='compare the existing results and train nothing',
  )
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  workdir = None
  try:
    flags, axes, overrides = cli.parse_sweep_arguments(
      sys.argv[1:] if argv is None else argv, _create_parser()
    )
    sweep = grid.load(flags.sweep, axes, flags.config or '', overrides)
    workdir = workdir_lib.Workdir(flags.workdir)
    copy = _check(workdir, sweep)
    if flags.dry_run:
      _list(copy, sweep, len(runner_lib.slots(flags.jobs)))
      return 0
    streams.make_output_optional()
    if flags.trial is not None:
      _exec_trial(workdir.path, sweep, flags.trial)
    if flags.compare:
      return _conclude(sweep, workdir, (), finished=True)
    # From here on, a signal lets the trials save.
    preemption = Preemption()
    preemption.listen()
    slots = runner_lib.slots(flags.jobs and min(flags.jobs, len(sweep.trials)))
    # Trials keep their workdirs themselves.
    workdir.claim(['sweep.json', '*.log', *sweep_lib.RESULTS])
    code = _run(workdir, sweep, slots, flags.retries, preemption)
    workdir.release()
    return code
  except UserError as error:
    if workdir:
      with contextlib.suppress(UserError):
        workdir.release()
    return cli.report_user_error(error)
  except OSError as error:
    return cli.report_errors([str(error)])
  except KeyboardInterrupt:
    return 128 + signal.SIGINT


def _check(workdir: workdir_lib.Workdir, sweep: Sweep) -> Path:
  """Checks that a directory is empty or holds these trials. Writes nothing.

  The sweep may have more trials than the directory.

  Returns:
    The directory to read the trials from: `workdir.path`, or a copy of what is
    in a bucket.

  Raises:
    UserError: if the directory holds anything else.
  """
  workdir.check_writable()
  copy = runs_lib.fetch(workdir.path)
  if (copy / 'config.json').exists():
    raise UserError(
      f'--workdir={workdir}: holds a run, not a sweep. Name another directory.'
    )
  found = {path.parent.name for path in copy.glob('*/config.json')}
  others = sorted(found - {trial.name for trial in sweep.trials})
  if others:
    raise UserError(
      f'--workdir={workdir}: holds {len(others)} runs that are not trials of '
      f'this sweep, such as {others[0]}. Name another directory.'
    )
  for trial in sweep.trials:
    of_trial = workdir_lib.Workdir(copy / trial.name)
    of_trial.check(trial.config)
    saved = workdir_lib.read_json(of_trial.path / 'config.json') or trial.config
    # A resumed run may change these fields; comparable trials may not.
    for name in ('total_steps', 'total_epochs', 'eval_every'):
      if saved.get(name) != trial.config[name]:
        raise UserError(
          f'--workdir={of_trial}: holds a run with {name}={saved.get(name)}, '
          f'not {trial.config[name]}. Name another directory.'
        )
  return copy


def _warn_of_few_evaluations(sweep: Sweep) -> None:
  """Prints a warning if trials cannot be compared at the end."""
  few = [
    trial.name
    for trial in sweep.trials
    if math.ceil(trial.total_steps / trial.config.eval_every) < runs_lib.WINDOW
  ]
  if few:
    print(
      f'warning: {len(few)} trials, such as {few[0]}, have fewer than '
      f'{runs_lib.WINDOW} evaluations and are not compared. Lower '
      '--config.eval_every.',
      file=sys.stderr,
    )


def _exec_trial(folder: Path, sweep: Sweep, name: str) -> None:
  """Replaces this process by the one that trains a trial.

  Raises:
    UserError: if no trial has that name or number.
  """
  by_name = {str(number): trial for number, trial in enumerate(sweep.trials)}
  by_name |= {trial.name: trial for trial in sweep.trials}
  if name not in by_name:
    raise UserError(
      f'--trial={name}: no such trial. --dry_run lists the names; the numbers '
      f'are 0 to {len(sweep.trials) - 1}.'
    )
  os.execv(sys.executable, runner_lib.command(by_name[name], folder))


def _list(folder: Path, sweep: Sweep, jobs: int) -> None:
  """Prints a line for each trial in a folder, and then the cost of all."""
  width = max(len(trial.name) for trial in sweep.trials)
  print(f'{"trial":<{width}}  {"steps":>10}  {"images":>14}  state')
  rates = []  # Seconds per image.
  images_left = 0.0
  for trial in sweep.trials:
    path = folder / trial.name
    state = runner_lib.final_status(path, trial.total_steps)
    if state is None:
      step = runner_lib.trial_process(trial, folder, folder).step
      images_left += trial.images * (1 - step / trial.total_steps)
      state = workdir_lib.Workdir(path).status().get('status')
    elif state == workdir_lib.Status.DONE:
      rates.append(runner_lib.seconds_taken(path) / trial.images)
    print(
      f'{trial.name:<{width}}  {trial.total_steps:>10,}  {trial.images:>14,}  '
      f'{state or TrialStatus.WAITING}'
    )
  _warn_of_few_evaluations(sweep)
  images = sum(trial.images for trial in sweep.trials)
  cost = 'the time is known once a trial is done'
  if rates:
    left = duration(statistics.fmean(rates) * images_left / jobs)
    cost = f'about {left} remaining with {jobs} at once'
  print(f'{len(sweep.trials)} trials, {images:,} images; {cost}')


def _run(
  workdir: workdir_lib.Workdir,
  sweep: Sweep,
  slots: Sequence[Mapping[str, str]],
  retries: int,
  preemption: Preemption,
) -> int:
  """Runs the remaining trials, compares, and returns the exit code.

  Args:
    workdir: the directory of the sweep, which this process has claimed.
    sweep: the sweep.
    slots: see `Runner`.
    retries: see `Runner`.
    preemption: signals of this process.
  """
  folder = workdir.path
  content = {
    'x': sweep.x,
    'repeat': sweep.repeat,
    'trials': {trial.name: dict(trial.values) for trial in sweep.trials},
  }
  workdir_lib.replace_file(
    folder / 'sweep.json', json.dumps(content, indent=2, default=str) + '\n'
  )
  remaining = runner_lib.remaining(sweep.trials, folder, runs_lib.fetch(folder))
  _warn_of_few_evaluations(sweep)
  print(
    f'{workdir}: {len(sweep.trials)} trials, {len(remaining)} remaining, '
    f'{len(slots)} at once',
    flush=True,
  )
  finished = True
  if remaining:
    from bn_repro.sweep.progress import SweepProgress

    progress = SweepProgress(remaining, len(slots))
    runner = runner_lib.Runner(remaining, slots, retries, progress)
    finished = runner.run(preemption, workdir.check_claim)
  return _conclude(sweep, workdir, remaining, finished=finished)


def _conclude(
  sweep: Sweep,
  workdir: workdir_lib.Workdir,
  trials: Sequence[runner_lib.TrialProcess],
  *,
  finished: bool,
) -> int:
  """Compares, reports failed trials, and returns the exit code."""
  from bn_repro.sweep import comparison

  problems = runner_lib.failures(trials)
  exit_code = 1
  failed = [
    trial.name for trial in trials if trial.state == workdir_lib.Status.FAILED
  ]
  try:
    found = comparison.read(sweep, runs_lib.fetch(workdir.path), failed)
    for line in comparison.conclusions(found):
      print(line)
    comparison.write(found, workdir.path)
    mirror.upload(workdir.path / name for name in sweep_lib.RESULTS)
    folders = dict.fromkeys((str(workdir), str(workdir.path)))
    print(f'wrote {", ".join(sweep_lib.RESULTS)} into {" and ".join(folders)}')
  except UserError as error:
    exit_code = 1 if problems else error.exit_code
    problems += error.problems
  except OSError as error:
    problems.append(str(error))
  if not finished:
    print('stopped; the same command resumes')
    return workdir_lib.EXIT_CODES[workdir_lib.Status.PREEMPTED]
  if problems:
    cli.report_errors(problems)
    return exit_code
  return 0


if __name__ == '__main__':
  sys.exit(cli.run(main))
