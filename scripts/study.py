"""The paper at CPU scale: trains all that `results/` reports, and the page.

  python scripts/study.py            all of it, an hour or two on two cores
  python scripts/study.py fig1       one part of it

Stop it whenever you like; the same command goes on. Parts:

mnist_5k       the seven configs in `mini`, seeds 0, 1, 2. Their base rate was
               not chosen for them: it is a prototype's.
rates          Inception and BN-Baseline in `mini` at rates from 0.02 to 1.28,
               seeds 0, 1, 2: where does each stop training?
choose_rate    Inception on Fashion-MNIST at six rates, seed 100.
fashion_mnist  the seven configs on Fashion-MNIST, seeds 0, 1, 2. The base rate
               is the one at which Inception did best in `choose_rate`, by its
               best mean of five successive evaluations on validation images.
               The BN nets take the paper's multiples of that rate and nothing
               of theirs is tuned.
low_rate       four of them at a base rate of 0.003, seeds 0, 1, 2: a prototype
               saw BN-x30 end highest there.
fig1           both nets of Fig. 1, seeds 0, 1, 2.
fig1_settings  both at other initial weights and rates, seed 0: how much of
               Fig. 1 is the choice of these two?
"""

import argparse
from collections.abc import Iterator
import dataclasses
import itertools
import os
from pathlib import Path
import sys

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bn_repro import cli
from bn_repro import config as config_lib
from bn_repro.errors import UserError
from bn_repro.report import page
from bn_repro.report import runs as runs_lib
from bn_repro.runtime import workdir
from bn_repro.runtime.preemption import Preemption
from bn_repro.sweep import runner
from bn_repro.sweep.progress import SweepProgress

# Fixed before any of these runs was looked at.
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
RATES = tuple(0.02 * 2**i for i in range(7))
RATES_TO_CHOOSE_FROM = (0.0025, 0.005, 0.01, 0.02, 0.04, 0.08)
LOW_RATE = 0.003
INITIAL_STDS = (0.01, 0.05, 0.1)
MNIST_RATES = (0.1, 0.5, 1.0)

FASHION_STEPS = 3000
FASHION_HOLDOUT = 3000


@dataclasses.dataclass(frozen=True)
class Trial:
  """One run: a config in `mini`, with overrides, in a folder of its part."""

  part: str
  name: str
  variant: str
  overrides: tuple[str, ...]

  def command(self, out: Path) -> list[str]:
    """The ordinary command that trains it."""
    return [
      sys.executable,
      '-m',
      'bn_repro.main',
      f'--config=configs/{self.variant}.py:mini',
      f'--workdir={out / self.part / self.name}',
      *(f'--config.{override}' for override in self.overrides),
    ]


def _mnist_5k() -> Iterator[Trial]:
  for variant, seed in itertools.product(VARIANTS, SEEDS):
    yield Trial('mnist_5k', f'{variant}_seed{seed}', variant, (f'seed={seed}',))


def _rates() -> Iterator[Trial]:
  for variant, rate, seed in itertools.product(
    ('inception', 'bn_baseline'), RATES, SEEDS
  ):
    yield Trial(
      'rates',
      f'{variant}_rate{rate:g}_seed{seed}',
      variant,
      (f'seed={seed}', f'optim.learning_rate={rate:g}'),
    )


def _on_fashion(part: str, variant: str, seed: int, base_rate: float) -> Trial:
  """A run on Fashion-MNIST; the rate decays at the same share of the run."""
  mini = config_lib.load(f'{ROOT}/configs/{variant}.py:mini')
  base = config_lib.load(f'{ROOT}/configs/inception.py:mini')
  rate = base_rate * mini.optim.learning_rate / base.optim.learning_rate
  longer = FASHION_STEPS / mini.total_steps
  larger = (60_000 - FASHION_HOLDOUT) / 4_000
  return Trial(
    part,
    f'{variant}_rate{base_rate:g}_seed{seed}',
    variant,
    (
      f'seed={seed}',
      'data.name=fashion_mnist',
      f'data.holdout={FASHION_HOLDOUT}',
      f'total_steps={FASHION_STEPS}',
      'eval_every=100',
      'checkpoint_every=1000',
      f'optim.learning_rate={rate:g}',
      f'optim.decay_epochs={mini.optim.decay_epochs * longer / larger:g}',
    ),
  )


def _choose_rate() -> Iterator[Trial]:
  for rate in RATES_TO_CHOOSE_FROM:
    yield _on_fashion('choose_rate', 'inception', SEED_OF_CHOICE, rate)


def chosen_rate(out: Path) -> float:
  """The rate of `choose_rate` at which Inception did best on validation.

  Raises:
    UserError: if not all of its runs have ended.
  """
  runs, _ = runs_lib.read_runs([str(out / 'choose_rate')])
  if sum(run.ended for run in runs) < len(RATES_TO_CHOOSE_FROM):
    raise UserError('choose_rate has not ended. Run that part first.')
  best = max(runs, key=lambda run: run.best() or 0.0)
  return best.config['optim']['learning_rate']


def _fashion_mnist(out: Path) -> Iterator[Trial]:
  rate = chosen_rate(out)
  for variant, seed in itertools.product(VARIANTS, SEEDS):
    yield _on_fashion('fashion_mnist', variant, seed, rate)


def _low_rate() -> Iterator[Trial]:
  for variant, seed in itertools.product(VARIANTS[:4], SEEDS):
    yield _on_fashion('low_rate', variant, seed, LOW_RATE)


def _fig1() -> Iterator[Trial]:
  for variant, seed in itertools.product(('mnist', 'bn_mnist'), SEEDS):
    yield Trial('fig1', f'{variant}_seed{seed}', variant, (f'seed={seed}',))


def _fig1_settings() -> Iterator[Trial]:
  for variant, std, rate in itertools.product(
    ('mnist', 'bn_mnist'), INITIAL_STDS, MNIST_RATES
  ):
    yield Trial(
      'fig1_settings',
      f'{variant}_std{std:g}_rate{rate:g}',
      variant,
      (
        f'model.init_std={std}',
        # What is applied at the batch size of 60.
        f'optim.learning_rate={rate * 32 / 60}',
        'eval_every=2500',
      ),
    )


# Each from the folder of results to its trials, in the order of the study.
PARTS = {
  'mnist_5k': lambda out: _mnist_5k(),
  'rates': lambda out: _rates(),
  'choose_rate': lambda out: _choose_rate(),
  'fashion_mnist': _fashion_mnist,
  'low_rate': lambda out: _low_rate(),
  'fig1': lambda out: _fig1(),
  'fig1_settings': lambda out: _fig1_settings(),
}


def train(
  part: str, out: Path, jobs: int | None, preemption: Preemption
) -> list[str] | None:
  """Trains what is left of a part's runs.

  Returns:
    What went wrong; None if it was stopped.
  """
  todo = []
  for trial in PARTS[part](out):
    path = out / part / trial.name
    config = config_lib.load(
      f'configs/{trial.variant}.py:mini', trial.overrides
    )
    if not runner.has_ended(path, config.total_steps):
      todo.append(
        runner.Trial(
          name=trial.name,
          workdir=path,
          command=trial.command(out),
          images=config.total_steps * config.batch_size,
          total_steps=config.total_steps,
        )
      )
  print(f'{part}: {len(todo)} runs', flush=True)
  slots = runner.slots(jobs)
  progress = SweepProgress(todo, len(slots))
  if not runner.Runner(todo, slots, 0, progress).run(preemption):
    return None
  return [
    f'{trial.name}: failed, {runner.last_words(trial)}'
    for trial in todo
    if trial.state == workdir.Status.FAILED
  ]


KEPT = ('config.json', 'run.json', 'status.json', 'metrics.jsonl')


def publish(out: Path) -> list[str]:
  """Copies what `results/` keeps of the runs, and writes the page there."""
  published = ROOT / 'results'
  for part in PARTS:
    for config in sorted((out / part).glob('*/config.json')):
      folder = published / part / config.parent.name
      folder.mkdir(parents=True, exist_ok=True)
      for name in KEPT:
        text = (config.parent / name).read_text()
        # Where it was trained says nothing to a reader.
        (folder / name).write_text(text.replace(f'{out}/', ''))
  return page.write_report([str(published)], published / 'report')


def main() -> int:
  """Runs the study; returns its exit code."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('parts', nargs='*', metavar='PART', help='all by default')
  parser.add_argument('--out', default='runs/study', metavar='DIR')
  parser.add_argument(
    '--jobs', type=cli.positive, metavar='N', help='runs at a time'
  )
  parser.add_argument(
    '--publish', action='store_true', help='then copy the runs into results/'
  )
  flags = parser.parse_args()
  unknown = set(flags.parts) - PARTS.keys()
  if unknown:
    parser.error(f'{", ".join(unknown)}: no such part of {", ".join(PARTS)}')
  out = Path(flags.out).resolve()
  # Trials name their configs from here.
  os.chdir(ROOT)
  preemption = Preemption()
  preemption.listen()
  problems = []
  try:
    for part in flags.parts or PARTS:
      found = train(part, out, flags.jobs, preemption)
      if found is None:
        print('stopped; the same command goes on')
        return workdir.EXIT_CODES[workdir.Status.PREEMPTED]
      problems += found
    problems += page.write_report([str(out)], out / 'report')
    if flags.publish:
      problems += publish(out)
  except UserError as error:
    problems += error.problems
  return cli.report_errors(problems) if problems else 0


if __name__ == '__main__':
  sys.exit(main())
