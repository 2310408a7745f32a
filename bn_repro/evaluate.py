"""Evaluates a run's newest checkpoint, every image once; writes nothing.

python -m bn_repro.evaluate --workdir=runs/bn_x5 --split=test
"""

import argparse
from collections.abc import Iterator, Sequence
import sys
from typing import Any

from bn_repro import cli
from bn_repro.data import datasets
from bn_repro.errors import UserError
from bn_repro.runtime import workdir as workdir_lib


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = cli.Parser(
    prog='python -m bn_repro.evaluate',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--workdir', required=True, metavar='DIR', help='directory of a run'
  )
  parser.add_argument(
    '--split',
    default='',
    help='train, validation or test; by default what the run evaluates',
  )
  try:
    flags = parser.parse_args(argv)
    for line in _evaluate(workdir_lib.Workdir(flags.workdir), flags.split):
      form = f', {line["statistics"]} statistics' if line['statistics'] else ''
      replaced = line.get('replaced_examples', 0)
      print(
        f'step {line["step"]}  {line["split"]}{form}: '
        f'accuracy {line["accuracy"]:.4f}  '
        f'top-5 {line["top5_accuracy"]:.4f}  loss {line["loss"]:.4f}  '
        f'({line["num_examples"]} images'
        + (f', {replaced} replaced)' if replaced else ')'),
        flush=True,
      )
  except UserError as error:
    return cli.report_errors(error.problems)
  return 0


def _evaluate(
  workdir: workdir_lib.Workdir, split: str
) -> Iterator[dict[str, Any]]:
  """Yields the metrics of each form of statistics."""
  config = cli.read_config(str(workdir.path))
  dataset = datasets.check(config)
  split = split or config.eval_split
  if split not in dataset.splits:
    raise UserError(
      f'--split={split}: {config.data.name} has {", ".join(dataset.splits)}.'
    )

  cli.set_up_jax(config)
  from bn_repro import parallel
  from bn_repro.training import evaluation, run_info
  from bn_repro.training.checkpoint import Checkpoints, DamagedCheckpoint
  from bn_repro.training.experiment import create_program

  program = create_program(config, dataset)
  state = program.initial_state()
  with Checkpoints(workdir.checkpoints, keep=None) as checkpoints:
    steps = checkpoints.steps()
    if not steps:
      raise UserError(f'--workdir={workdir.path}: no checkpoint there yet.')
    try:
      checkpoint = checkpoints.restore(steps[-1], state)
    except DamagedCheckpoint as error:
      raise UserError(
        f'{workdir.checkpoints / str(steps[-1])}: {error}.'
      ) from error
  images, before = (
    run_info.images_per_statistic(program),
    checkpoint.meta['images_per_statistic'],
  )
  if images != before:
    raise UserError(
      f'--workdir={workdir.path}: its BN statistics are of {before} images, '
      f'and here they would be of {images}. Evaluate on as many devices.'
    )
  state = parallel.replicate(program.mesh, checkpoint.state)

  def never_stop() -> None:
    """Ctrl-C ends this command, which has nothing to save."""

  for statistics in evaluation.forms(program):
    evaluated = evaluation.inference_state(
      program, state, statistics, never_stop
    )
    sums, _ = evaluation.evaluate(program, evaluated, split, never_stop)
    yield {
      'step': steps[-1],
      'split': split,
      'statistics': statistics,
      **sums.means(),
    }


if __name__ == '__main__':
  sys.exit(main())
