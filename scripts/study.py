"""Trains all runs of `results/` at CPU scale, and writes a report.

  python scripts/study.py            all parts, about two hours on two cores
  python scripts/study.py fig1       one part

The same command resumes an interrupted study. The base rate of a part is the
learning rate of Inception; the other variants train at the paper's multiples of
it, for which nothing is tuned. Seeds are 0, 1 and 2 if not given. Parts:

mnist_5k       The seven configs of section 4.2 in `mini`. Their base rate comes
               from a prototype.
rates          Inception and BN-Baseline in `mini` at rates from 0.02 to 1.28.
               Question: up to which rate does each of them train?
choose_rate    Inception on Fashion-MNIST at six rates, seed 100.
fashion_mnist  The seven configs on Fashion-MNIST. Their base rate is the one of
               `choose_rate` with the highest mean accuracy of five consecutive
               evaluations on validation images.
low_rate       Four of them at a base rate of 0.003, at which BN-x30 reached the
               highest accuracy in a prototype.
fig1           Both networks of Fig. 1.
fig1_settings  Both at other initial weights and rates, seed 0. Question: how
               much does Fig. 1 depend on these two choices?
"""

import argparse
from collections.abc import Callable, Sequence
import operator
import os
from pathlib import Path
import sys
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ml_collections import ConfigDict

from bn_repro import cli, files
from bn_repro.errors import UserError
from bn_repro.report import page
from bn_repro.report import runs as runs_lib
from bn_repro.runtime import streams, workdir
from bn_repro.runtime.preemption import Preemption
from bn_repro.sweep import grid, runner
from bn_repro.sweep.progress import SweepProgress
from bn_repro.sweep.sweep import Base, Trial, Value

# Chosen before any of the runs was evaluated.
SEEDS = (0, 1, 2)
SEED_OF_CHOICE = 100

VARIANTS = (
  'inception',
  'bn_baseline',
  'bn_x5',
  'bn_x30',
  'bn_x5_sigmoid',
  'inception_x5',
  'inception_sigmoid',
)
FASHION_STEPS = 3000
FASHION_HOLDOUT = 3000


def _digits(
  base: Base, variant: str, seed: int, rate: float | None = None
) -> ConfigDict:
  """Returns a config with a seed, and with another learning rate if given."""
  config = base(variant)
  config.seed = seed
  if rate is not None:
    config.optim.learning_rate = rate
  return config


def _fashion(base: Base, variant: str, rate: float, seed: int) -> ConfigDict:
  """Returns a config that trains on Fashion-MNIST.

  The learning rate decays at the same fractions of the run as on the digits.

  Args:
    base: as for `Sweep.trial`.
    variant: name of the config.
    rate: learning rate of Inception.
    seed: seed of the run.
  """
  config = base(variant)
  longer = FASHION_STEPS / config.total_steps
  larger = (60_000 - FASHION_HOLDOUT) / 3_500
  multiple = config.optim.learning_rate / base('inception').optim.learning_rate
  config.seed = seed
  config.data.name = 'fashion_mnist'
  config.data.holdout = FASHION_HOLDOUT
  config.total_steps = FASHION_STEPS
  config.eval_every = 100
  config.checkpoint_every = 1000
  config.optim.learning_rate = _rounded(rate * multiple)
  config.optim.decay_epochs = _rounded(
    config.optim.decay_epochs * longer / larger
  )
  return config


def _rounded(value: float) -> float:
  """Returns a value rounded to six digits, as in the published configs."""
  return float(f'{value:g}')


def _fig1_setting(
  base: Base, variant: str, std: float, rate: float
) -> ConfigDict:
  """Returns a config of Fig. 1; `rate` applies to its own batch size."""
  config = base(variant)
  config.model.init_std = std
  config.optim.learning_rate = rate * 32 / config.batch_size
  config.eval_every = 2500
  return config


class Part(NamedTuple):
  """A part of the study, as arguments of `grid.expand`."""

  trial: Callable[..., ConfigDict]
  axes: dict[str, Sequence[Value]]


# The parts by their folder in `results/`, in the order in which they run.
PARTS = {
  'mnist_5k': Part(_digits, {'variant': VARIANTS, 'seed': SEEDS}),
  'rates': Part(
    _digits,
    {
      'variant': ('inception', 'bn_baseline'),
      'rate': tuple(0.02 * 2**i for i in range(7)),
      'seed': SEEDS,
    },
  ),
  'choose_rate': Part(
    _fashion,
    {
      'variant': ('inception',),
      'rate': (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08),
      'seed': (SEED_OF_CHOICE,),
    },
  ),
  # `create_trials` sets the rate.
  'fashion_mnist': Part(
    _fashion, {'variant': VARIANTS, 'rate': (), 'seed': SEEDS}
  ),
  'low_rate': Part(
    _fashion, {'variant': VARIANTS[:4], 'rate': (0.003,), 'seed': SEEDS}
  ),
  'fig1': Part(_digits, {'variant': ('mnist', 'bn_mnist'), 'seed': SEEDS}),
  'fig1_settings': Part(
    _fig1_setting,
    {
      'variant': ('mnist', 'bn_mnist'),
      'std': (0.01, 0.05, 0.1),
      'rate': (0.1, 0.5, 1.0),
    },
  ),
}


def chosen_rate(out: Path) -> float:
  """Returns the rate of `choose_rate` with the highest `Run.best`.

  Raises:
    UserError: if a run of that part is not complete, or none has a `Run.best`.
  """
  runs, _ = runs_lib.read_runs([str(out / 'choose_rate')])
  if sum(run.ended for run in runs) < len(PARTS['choose_rate'].axes['rate']):
    raise UserError('choose_rate is not complete. Run that part first.')
  best = [(accuracy, run) for run in runs if (accuracy := run.best())]
  if not best:
    raise UserError(
      f'choose_rate: no run has {runs_lib.WINDOW} evaluations to rank it by.'
    )
  return max(best, key=operator.itemgetter(0))[1].learning_rate


def create_trials(part: str, out: Path) -> tuple[Trial, ...]:
  """Returns the trials of a part of the study in the folder `out`.

  Raises:
    UserError: if it depends on a part that is not complete.
  """
  trial, axes = PARTS[part]
  if part == 'fashion_mnist':
    axes = {**axes, 'rate': (chosen_rate(out),)}
  return grid.expand(axes, trial, 'mini')


def train(
  part: str, out: Path, jobs: int | None, preemption: Preemption
) -> list[str] | None:
  """Trains the runs of a part that are not complete.

  Args:
    part: name of the part.
    out: folder of the study.
    jobs: number of runs at a time; None for one per core or GPU.
    preemption: stops the runs after a signal.

  Returns:
    A line for each run that failed; None if the study was interrupted.
  """
  trials = runner.remaining(create_trials(part, out), out / part)
  print(f'{part}: {len(trials)} runs', flush=True)
  slots = runner.slots(jobs)
  progress = SweepProgress(trials, len(slots))
  if not runner.Runner(trials, slots, 0, progress).run(preemption):
    return None
  return runner.failures(trials)


# The files of a run that are published.
KEPT = ('config.json', 'run.json', 'status.json', 'metrics.jsonl')


def publish(out: Path) -> list[str]:
  """Copies the runs to `results/`, without checkpoints, and reports on them.

  Returns:
    A line for each run that the report leaves out.
  """
  published = ROOT / 'results'
  for part in PARTS:
    for config in sorted((out / part).glob('*/config.json')):
      folder = published / part / config.parent.name
      folder.mkdir(parents=True, exist_ok=True)
      for name in KEPT:
        text = (config.parent / name).read_text()
        # Readers do not need the paths of the machine that trained the runs.
        (folder / name).write_text(text.replace(f'{out}/', ''))
  return page.write_report([str(published)], published / 'report')


def main() -> int:
  """Runs the study; returns its exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    'parts', nargs='*', metavar='PART', help='default: all parts'
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
    help='also copy the runs to results/, and write the report there',
  )
  flags = parser.parse_args()
  unknown = set(flags.parts) - PARTS.keys()
  if unknown:
    parser.error(
      f'{", ".join(unknown)}: no such part. The parts are {", ".join(PARTS)}'
    )
  try:
    out = files.expand('--out', flags.out)
  except UserError as error:
    return cli.report_errors(error.problems)
  # Paths of configs in trials are relative to the repository.
  os.chdir(ROOT)
  streams.make_output_optional()
  preemption = Preemption()
  preemption.listen()
  problems = []
  try:
    for part in flags.parts or PARTS:
      found = train(part, out, flags.jobs, preemption)
      if found is None:
        print('stopped; the same command resumes')
        return workdir.EXIT_CODES[workdir.Status.PREEMPTED]
      problems += found
    problems += page.write_report([str(out)], out / 'report')
    if flags.publish:
      problems += publish(out)
  except UserError as error:
    problems += error.problems
  return cli.report_errors(problems) if problems else 0


if __name__ == '__main__':
  sys.exit(cli.run(main))
