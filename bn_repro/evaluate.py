"""Evaluates the newest checkpoint of a run, every image once; writes nothing.

python -m bn_repro.evaluate --workdir=runs/bn_x5 --split=test
"""

import argparse
from collections.abc import Iterator, Sequence
import sys
from typing import Any

from bn_repro import cli, files
from bn_repro.data import datasets
from bn_repro.errors import UserError
from bn_repro.runtime.workdir import Workdir


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = cli.Parser(
    prog='python -m bn_repro.evaluate',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--workdir',
    required=True,
    type=files.path_type('--workdir'),
    metavar='DIR',
    help='workdir of a run',
  )
  parser.add_argument(
    '--split',
    default='',
    help='train, validation or test; the default is config.eval_split',
  )
  try:
    flags = parser.parse_args(argv)
    for line in _evaluate(Workdir(flags.workdir), flags.split):
      statistics = line.get('statistics')
      mode = f', {statistics} statistics' if statistics else ''
      replaced = line.get('replaced_examples', 0)
      print(
        f'step {line["step"]}  {line["split"]}{mode}: '
        f'accuracy {line["accuracy"]:.4f}  '
        f'top-5 {line["top5_accuracy"]:.4f}  loss {line["loss"]:.4f}  '
        f'({line["num_examples"]} images'
        + (f', {replaced} replaced)' if replaced else ')'),
        flush=True,
      )
  except UserError as error:
    return cli.report_errors(error.problems)
  return 0


def _evaluate(workdir: Workdir, split: str) -> Iterator[dict[str, Any]]:
  """Yields a line of metrics for each kind of statistics."""
  config = cli.read_config(workdir.path)
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
  from bn_repro.training.experiment import create_experiment

  experiment = create_experiment(config, dataset)
  with Checkpoints(workdir.checkpoints, keep=None) as checkpoints:
    steps = checkpoints.steps()
    if not steps:
      raise UserError(f'--workdir={workdir.path}: no checkpoint yet.')
    try:
      checkpoint = checkpoints.restore(steps[-1], experiment.initial_state())
    except DamagedCheckpoint as error:
      raise UserError(
        f'{workdir.checkpoints / str(steps[-1])}: {error}.'
      ) from error
  images = run_info.images_per_statistic(experiment)
  trained_with = checkpoint.meta['images_per_statistic']
  if images != trained_with:
    raise UserError(
      f'--workdir={workdir.path}: its BN statistics are over {trained_with} '
      f'images, and here they would be over {images}. Evaluate on as many '
      'devices as it was trained on.'
    )
  yield from evaluation.evaluate(
    experiment,
    parallel.replicate(experiment.mesh, checkpoint.state),
    dict.fromkeys(evaluation.statistics_modes(experiment), [split]),
    check=lambda: None,  # Ctrl-C ends this command, which has nothing to save.
  )


if __name__ == '__main__':
  sys.exit(cli.run(main))
