"""Evaluates the newest checkpoint of a run, every image once.

python -m bn_repro.evaluate --workdir=runs/bn_x5 --split=test

Writes nothing. Refuses a damaged checkpoint, and one that was trained with
another config or on other data.

With --crops, --save_probabilities, --overlap or --config.data.KEY=VALUE it
evaluates the network in model.safetensors, which is that of the last evaluation
of the run, with population statistics:

python -m bn_repro.evaluate --workdir=runs/bn_x5 --split=test --crops=144

Several crops take long. The class probabilities of the images that are done are
in WORKDIR/probabilities, and the same command resumes.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
import sys
from typing import Any

from bn_repro import cli, files
from bn_repro import config as config_lib
from bn_repro.data import datasets
from bn_repro.errors import UserError
from bn_repro.inference import crops
from bn_repro.runtime import backend, mirror
from bn_repro.runtime.workdir import (
  EXIT_CODES,
  Status,
  Workdir,
  read_json,
)

# Fields of `data` that belong to a trained network.
_OF_NETWORK = ('data.image_size', 'data.normalization')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit code."""
  parser = cli.Parser(
    prog='python -m bn_repro.evaluate',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  files.add_path_argument(
    parser,
    '--workdir',
    required=True,
    in_bucket=True,
    help='workdir of a run, also in a bucket',
  )
  parser.add_argument(
    '--split',
    default='',
    help='train, validation or test; the default is config.eval_split',
  )
  files.add_path_argument(
    parser,
    '--data_dir',
    help='folder of the data, in place of config.data.data_dir',
  )
  parser.add_argument(
    '--other_data',
    action='store_true',
    help='accept data that differ from those of the training',
  )
  parser.add_argument(
    '--crops',
    type=int,
    choices=crops.COUNTS,
    help='average class probabilities over 1, 10 or 144 crops of each image',
  )
  files.add_path_argument(
    parser,
    '--save_probabilities',
    metavar='FILE',
    help='write the class probabilities of each image to this npz file',
  )
  parser.add_argument(
    '--overlap',
    action='store_true',
    help='count the images that are training images of the network as well',
  )
  files.add_path_argument(
    parser,
    '--real_labels',
    metavar='FILE',
    help='also score predictions by the ReaL labels in this file, real.json',
  )
  cli.add_override_argument(parser)
  try:
    flags, _ = cli.parse_arguments(
      sys.argv[1:] if argv is None else argv, parser
    )
    flags.workdir = mirror.fetch(flags.workdir)
    evaluate = _evaluate_model if _uses_model(flags) else _evaluate
    for line in evaluate(flags):
      print(_describe(line), flush=True)
  except UserError as error:
    return cli.report_user_error(error)
  except KeyboardInterrupt:
    print('stopped; run the same command again', file=sys.stderr)
    return EXIT_CODES[Status.PREEMPTED]
  return 0


def _uses_model(flags: argparse.Namespace) -> bool:
  """Whether to evaluate the model file, and not the newest checkpoint.

  Imported weights have no checkpoint.
  """
  if flags.crops or flags.save_probabilities or flags.overrides:
    return True
  if flags.overlap or flags.real_labels:
    return True
  workdir = Workdir(flags.workdir)
  return workdir.model.exists() and not workdir.checkpoints.exists()


def _evaluate_model(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """Yields a line of metrics of the model file of a workdir."""
  for override in flags.overrides:
    key, _, _ = override.partition('=')
    if not key.startswith('data.') or key in _OF_NETWORK:
      raise UserError(
        f'--config.{key}: belongs to the trained network. Here only fields of '
        f'data can be changed, except {" and ".join(_OF_NETWORK)}.'
      )
  workdir = Workdir(flags.workdir)
  workdir.require_model()
  overrides = list(flags.overrides)
  if flags.data_dir is not None:
    overrides.append(f'data.data_dir={flags.data_dir}')
  backend.import_jax()
  from bn_repro.inference import evaluation

  yield evaluation.evaluate_model(
    workdir,
    flags.split,
    flags.crops or 1,
    overrides,
    flags.save_probabilities,
    other_data=flags.other_data,
    count_overlap=flags.overlap,
    real_labels=flags.real_labels,
  )


def _describe(line: Mapping[str, Any]) -> str:
  step, statistics = line.get('step'), line.get('statistics')
  num_crops, replaced = line.get('crops', 1), line.get('replaced_examples')
  return (
    ('' if step is None else f'step {step}  ')
    + line['split']
    + (f', {statistics} statistics' if statistics else '')
    + (f', {num_crops} crops' if num_crops > 1 else '')
    + f': accuracy {line["accuracy"]:.4f}  '
    f'top-5 {line["top5_accuracy"]:.4f}  loss {line["loss"]:.4f}  '
    f'({line["num_examples"]} images'
    + (f', {replaced} replaced)' if replaced else ')')
  )


def _evaluate(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
  """Yields a line of metrics for each kind of statistics."""
  workdir = Workdir(flags.workdir)
  config = cli.read_config(workdir.path)
  if flags.data_dir is not None:
    config = config_lib.override(config, [f'data.data_dir={flags.data_dir}'])
  dataset = datasets.check(config)
  split = datasets.choose_split(dataset, config, flags.split)
  facts = read_json(workdir.path / 'run.json') or {}
  num_classes = facts.get('num_classes', dataset.num_classes)
  datasets.check_num_classes(dataset, num_classes, workdir.path)

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
  _check_identity(
    checkpoint.meta,
    run_info.identity(experiment),
    workdir.path,
    other_data=flags.other_data,
  )
  for line, _ in evaluation.evaluate(
    experiment,
    parallel.replicate(experiment.mesh, checkpoint.state),
    dict.fromkeys(evaluation.statistics_modes(experiment), [split]),
    check=lambda: None,  # Ctrl-C ends this command, which has nothing to save.
  ):
    yield line


def _check_identity(
  trained: Mapping[str, Any],
  own: Mapping[str, Any],
  path: Path,
  *,
  other_data: bool,
) -> None:
  """Compares a checkpoint with the config and the data to evaluate.

  Args:
    trained: meta of the checkpoint.
    own: `run_info.identity` of the experiment.
    path: the workdir.
    other_data: accept data of another fingerprint.

  Raises:
    UserError: if config, data or images per BN statistic differ.
  """
  if trained['config_digest'] != own['config_digest']:
    raise UserError(
      f'{path / "config.json"}: not the config that the checkpoint of step '
      f'{trained["step"]} was trained with. Restore the file from a copy.'
    )
  fingerprints = [facts['data_fingerprint'] for facts in (trained, own)]
  if fingerprints[0] != fingerprints[1] and not other_data:
    raise UserError(
      f'--workdir={path}: trained on data with the fingerprint '
      f'{fingerprints[0]}, and these data have {fingerprints[1]}. Name the '
      'folder of the data with --data_dir, or pass --other_data to evaluate on '
      'these.'
    )
  images = [facts['images_per_statistic'] for facts in (trained, own)]
  if images[0] != images[1]:
    raise UserError(
      f'--workdir={path}: its BN statistics are over {images[0]} images, and '
      f'here they would be over {images[1]}. Evaluate on as many devices as it '
      'was trained on.'
    )


if __name__ == '__main__':
  sys.exit(cli.run(main))
